"""Evaluation: policies and agents played on a split, with intervals."""
