"""Sampling among given completions, such as the admissible actions of a turn.

Each token is drawn from the model's distribution over those that continue one of the completions.
The log-probs of a completion are those of these smaller distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.models.scores import LOWEST_LOGIT


class Choices:
    """What the completions of a turn may be, row by row, while they grow.

    Args:
        choices: for each row token ids, end-of-turn token included.
        longest: tokens that a completion may have.

    Attributes:
        allowed: for each row and token so far, the ids among which it was chosen, ascending.

    Raises:
        AtodError: a row has no choice, or one that is too long.
    """

    def __init__(self, choices: Sequence[Sequence[tuple[int, ...]]], longest: int) -> None:
        if not all(choices):
            raise AtodError(
                "There is a turn with no admissible action that the tokenizer can write. Use "
                "another model, or do without env.constrain_actions."
            )
        needed = max((len(ids) for row in choices for ids in row), default=0)
        if needed > longest:
            raise AtodError(
                f"An admissible action has {needed} tokens. Raise train.max_completion_tokens "
                f"(now {longest})."
            )
        self._left = [list(row) for row in choices]
        self.allowed: list[list[tuple[int, ...]]] = [[] for _ in choices]

    def constrain(self, logits: Tensor, step: int, alive: Sequence[int]) -> Tensor:
        """The logits of the next tokens; those that continue no choice cannot be sampled.

        Args:
            logits: [n, vocabulary] of the rows that have not ended.
            step: tokens that each of them has so far.
            alive: their n numbers, in the order of the logits.
        """
        mask = torch.zeros(logits.shape, dtype=torch.bool)
        for place, row in enumerate(alive):
            ids = tuple(sorted({choice[step] for choice in self._left[row]}))
            self.allowed[row].append(ids)
            mask[place, list(ids)] = True
        return logits.masked_fill(~mask.to(logits.device), LOWEST_LOGIT)

    def take(self, row: int, step: int, token_id: int) -> None:
        """Takes note of the token that a row got at a step."""
        self._left[row] = [choice for choice in self._left[row] if choice[step] == token_id]
