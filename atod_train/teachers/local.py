"""Teachers, and the one in this process: a frozen model that scores the student's tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.records import Batch
from atod_train.teachers.vocabulary import require_same_vocabulary


class Teacher(Protocol):
    """A model that scores tokens, in this process or elsewhere.

    Attributes:
        is_float32: whether it scores in float32; otherwise rounding looks like disagreement.
    """

    is_float32: bool

    def score(self, batch: Batch) -> Tensor:
        """Return the log-probs [R, T] of the completion tokens at temperature 1, 0 on padding."""


class LocalTeacher:
    """A teacher in this process; its parameters are frozen.

    Distillation compares the two models on the same ids, so every token of the student must have
    the same id at the teacher. Further tokens of the teacher and padded embeddings do not matter.

    Args:
        policy: The teacher.
        student: The student whose tokens are to be scored.
        tokens_per_microbatch: Padded tokens that go through the model at once; 0: `tokens_at_once`.

    Raises:
        AtodError: A token of the student has another id or none, or no embedding.
    """

    def __init__(
        self, policy: Policy, student: Policy, *, tokens_per_microbatch: int = 16384
    ) -> None:
        ours = student.tokenizer.get_vocab()
        require_same_vocabulary(ours, policy.tokenizer.get_vocab(), student.name, policy.name)
        if policy.embedding_rows <= max(ours.values()):
            raise AtodError(
                f"Teacher {policy.name} has {policy.embedding_rows} embeddings, too few for a "
                f"vocabulary of {max(ours.values()) + 1} tokens: its tokenizer does not belong to "
                "it."
            )
        self.policy = policy
        self.is_float32 = policy.layer_dtype == torch.float32
        self.tokens_per_microbatch = tokens_per_microbatch
        policy.model.requires_grad_(False)
        policy.model.eval()

    def score(self, batch: Batch) -> Tensor:
        """Return the log-probs as `Teacher.score`, without gradient, on the batch's device."""
        scores = score_completions(self.policy, batch, self.tokens_per_microbatch).logprobs
        return scores.to(batch.completion_ids.device)
