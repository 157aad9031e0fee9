"""The teacher: a frozen model that scores the student's own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.models.policy import Policy
from atod_train.records import Batch


class Teacher(Protocol):
    """What scores tokens, wherever it runs."""

    def score(self, batch: Batch) -> Tensor:
        """Log-probs [R, T] of the completion tokens at temperature 1, 0 on padding."""


class LocalTeacher:
    """A teacher in this process; its parameters are frozen.

    Token-level distillation compares the two models on the same ids, so both must give every id
    the same meaning. Embeddings padded beyond the vocabulary do not matter.

    Args:
        policy: The teacher.
        student: The student whose tokens are to be scored.
        tokens_per_microbatch: Padded tokens that go through the model at once.

    Raises:
        AtodError: The tokenizers disagree.
    """

    def __init__(
        self, policy: Policy, student: Policy, *, tokens_per_microbatch: int = 16384
    ) -> None:
        _check_same_vocabulary(policy, student)
        self.policy = policy
        self.tokens_per_microbatch = tokens_per_microbatch
        policy.model.requires_grad_(False)
        policy.model.eval()

    def score(self, batch: Batch) -> Tensor:
        """Log-probs of the completion tokens under the teacher at temperature 1.

        Args:
            batch: The student's batch, packed or not.

        Returns:
            [R, T] float32 without gradient, 0 on padding, on the batch's device.
        """
        scores = self.policy.completion_logprobs(batch, self.tokens_per_microbatch)
        return scores.to(batch.completion_ids.device)


def require_same_vocabulary(
    ours: Mapping[str, int], theirs: Mapping[str, int], student: str, teacher: str
) -> None:
    """Checks that two tokenizers give every id the same meaning.

    Args:
        ours: token -> id of the student.
        theirs: token -> id of the teacher.
        student: its name, for the message.
        teacher: its name, for the message.

    Raises:
        AtodError: They differ; names a token.
    """
    if ours == theirs:
        return
    different = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    )
    example = different[0]
    raise AtodError(
        f"Teacher {teacher} and student {student} do not share a vocabulary: {len(theirs)} and "
        f"{len(ours)} tokens, {len(different)} of them differ (for example {example!r} is "
        f"{theirs.get(example)} for the teacher and {ours.get(example)} for the student). Use a "
        "teacher of the same model family, or train both on one tokenizer."
    )


def _check_same_vocabulary(teacher: Policy, student: Policy) -> None:
    ours = student.tokenizer.get_vocab()
    require_same_vocabulary(ours, teacher.tokenizer.get_vocab(), student.name, teacher.name)
    rows = teacher.embedding_rows
    if rows <= max(ours.values()):
        raise AtodError(
            f"Teacher {teacher.name} has {rows} embeddings, too few for a vocabulary of "
            f"{max(ours.values()) + 1} tokens: its tokenizer does not belong to it."
        )
