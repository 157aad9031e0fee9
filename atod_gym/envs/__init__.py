"""The environments, one module or package each; `import atod_gym` registers them."""
