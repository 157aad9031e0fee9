"""Adapters that put the environments into outside systems, one file each.

The outside package is imported when an adapter is used, not when it is imported.
"""
