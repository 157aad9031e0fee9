"""Teachers, and the one in this process: a frozen model that scores the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.records import Batch


class Teacher(Protocol):
    """A model that scores tokens, in this process or elsewhere."""

    def score(self, batch: Batch) -> Tensor:
        """Return the log-probs [R, T] of the completion tokens at temperature 1, 0 on padding."""


class LocalTeacher:
    """A teacher in this process; its parameters are frozen.

    Distillation compares the two models on the same ids, so every token of the student must have
    the same id at the teacher. Further tokens of the teacher and padded embeddings do not matter.

    Args:
        policy: The teacher.
        student: The student whose tokens are to be scored.
        tokens_per_microbatch: Padded tokens that go through the model at once.

    Raises:
        AtodError: A token of the student has another id or none.
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
        """Return the log-probs of the completion tokens under the teacher at temperature 1.

        Args:
            batch: The student's batch, packed or not.

        Returns:
            [R, T] float32 without gradient, 0 on padding, on the batch's device.
        """
        scores = score_completions(self.policy, batch, self.tokens_per_microbatch).logprobs
        return scores.to(batch.completion_ids.device)


def require_same_vocabulary(
    ours: Mapping[str, int], theirs: Mapping[str, int], student: str, teacher: str
) -> None:
    """Check that every token of the student has the same id at the teacher.

    The teacher may have more tokens, since the student samples none of them.

    Args:
        ours: token -> id of the student.
        theirs: token -> id of the teacher.
        student: its name, for the message.
        teacher: its name, for the message.

    Raises:
        AtodError: a token has another id or none.
    """
    token_of = {token_id: token for token, token_id in theirs.items()}
    different = [
        (token_id, token, token_of.get(token_id))
        for token, token_id in ours.items()
        if theirs.get(token) != token_id
    ]
    if different:
        raise vocabulary_error(different, len(ours), student, teacher)


def vocabulary_error(
    different: Sequence[tuple[int, str, str | None]], compared: int, student: str, teacher: str
) -> AtodError:
    """Return the error for two vocabularies that are not the same.

    Args:
        different: id, the student's token and the teacher's (None: it has none), at least one.
        compared: number of tokens that were compared.
        student: its name.
        teacher: its name.
    """
    token_id, ours, theirs = min(different, key=lambda entry: entry[0])
    other = "none" if theirs is None else repr(theirs)
    return AtodError(
        f"Teacher {teacher} and student {student} do not share a vocabulary: {len(different)} of "
        f"{compared} tokens of the student that were compared are others at the teacher (for "
        f"example id {token_id} is {ours!r} for the student and {other} for the teacher). Use a "
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
