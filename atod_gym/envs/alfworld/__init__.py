"""ALFWorld: household tasks in text, played in this process."""
