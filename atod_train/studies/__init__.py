"""Studies: methods and seeds compared from one start, teacher and budget."""
