"""Examples: the method in one file, an environment of your own, other trainers."""
