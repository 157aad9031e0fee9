"""Our rollouts and objective inside other people's trainers: one file for each of them."""
