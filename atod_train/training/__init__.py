"""Training: the loop, its update, its supervised start, and its checkpoints."""
