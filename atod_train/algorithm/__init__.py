"""The algorithm: schedules, turn weights, advantages and losses, on tensors only."""
