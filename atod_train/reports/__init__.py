"""Records and reports of runs."""
