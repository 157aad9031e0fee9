"""Short programs that show the adapters: run them with `python -m`."""
