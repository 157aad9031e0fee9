from __future__ import annotations

import pytest
import torch

from atod_gym.errors import AtodError
from atod_train.batch import make_batch
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn
from atod_train.teachers.local import LocalTeacher

STUDENT = ModelShape(layers=1, width=16, heads=2, mlp_width=24)
TEACHER = ModelShape(layers=2, width=32, heads=2, mlp_width=48)


def make(shape: ModelShape, words: str = "take mug from desk") -> Policy:
    return build_policy(shape, build_word_tokenizer([words]), seed=1)


def make_a_batch() -> Batch:
    turns = tuple(
        Turn(
            index,
            (),
            "",
            "",
            0.0,
            True,
            TokenizedTurn((8 + index, 9), (10, 11, 4), (0.0,) * 3, "stop", index > 0),
        )
        for index in range(3)
    )
    return make_batch([Trajectory(0, "t", "k", turns, True, False, "terminated", True, 1.0)], 0)


def test_scores_are_the_teachers_logprobs_without_gradient() -> None:
    student, teacher = make(STUDENT), make(TEACHER)
    batch = make_a_batch()
    expected = score_completions(teacher, batch).logprobs
    scores = LocalTeacher(teacher, student).score(batch)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad
    assert scores.shape == batch.completion_ids.shape
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(AtodError, match=r"do not share a vocabulary.*'mug'"):
        LocalTeacher(make(TEACHER, "take from desk"), make(STUDENT))


def test_padded_embedding_is_accepted() -> None:
    student, teacher = make(STUDENT), make(TEACHER)
    teacher.model.resize_token_embeddings(128, mean_resizing=False)
    scores = LocalTeacher(teacher, student).score(make_a_batch())
    assert torch.isfinite(scores).all()


def test_too_few_embeddings_are_refused() -> None:
    student, teacher = make(STUDENT), make(TEACHER)
    teacher.model.resize_token_embeddings(50, mean_resizing=False)
    with pytest.raises(AtodError, match="too few"):
        LocalTeacher(teacher, student)
