"""An environment of one's own, and how to train on it: find a number by guessing.

    atod-train houses-tiny --env.id atod_train.examples.own_environment:my/Guess-v0 \
        --env.max-turns 6 --model.student micro --model.teacher mini

In a file of yours, say guess.py, the id is `guess:my/Guess-v0`. Seeds are the tasks. The expert is
needed for models from scratch only; language models start without one.
"""

from __future__ import annotations

from string import printable
from typing import Any

import gymnasium
from gymnasium import spaces


class GuessEnv(gymnasium.Env[str, str]):
    """Find a number from 1 to 15: the answer to a guess is `more`, `less` or `right`."""

    def __init__(self) -> None:
        self.action_space = spaces.Text(20, charset=printable)
        self.observation_space = spaces.Text(100, charset=printable)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Draw the number."""
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1, 16))
        return "guess a number from 1 to 15", {}

    def step(self, action: str) -> Any:
        """Compare a guess, such as `guess 8`, with the number; any text gets an answer."""
        word, _, digits = action.partition(" ")
        if word != "guess" or not digits.isdecimal():
            text = "what"
        elif int(digits) == self.number:
            text = "right"
        else:
            text = "more" if int(digits) < self.number else "less"
        found = text == "right"
        return text, float(found), found, False, {"success": found}

    def expert(self) -> Bisection:
        """Return an expert for one episode, see `atod_train.training.supervised.Expert`."""
        return Bisection()


class Bisection:
    """Guesses the middle of what is left."""

    def reset(self, instruction: str, text: str) -> None:
        """Begin an episode."""
        self.low, self.high = 1, 15

    def act(self, text: str, admissible_actions: tuple[str, ...], last_action: str | None) -> str:
        """Return the next guess."""
        if last_action:
            guess = int(last_action.split()[1])
            self.low = guess + 1 if text == "more" else self.low
            self.high = guess - 1 if text == "less" else self.high
        return f"guess {(self.low + self.high) // 2}"


gymnasium.register(id="my/Guess-v0", entry_point=f"{__name__}:GuessEnv", max_episode_steps=6)
