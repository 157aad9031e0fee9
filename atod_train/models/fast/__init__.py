"""Faster paths for small models on processors, each equal to the plain one."""
