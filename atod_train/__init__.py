"""The trainer: annealed on-policy distillation and its baselines for multi-turn agents."""
