"""Adapters that run our environments inside other trainers, one file per trainer.

External packages are imported on use; each has an extra of the same name.
"""
