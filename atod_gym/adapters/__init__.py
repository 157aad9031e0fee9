"""Our environments inside other people's trainers: one file for each of them.

The outside packages are imported where they are used; each has an extra of its name.
"""
