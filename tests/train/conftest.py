"""Fixtures of the trainer's tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from echo_env import ECHO
from served_chat import FakeChat

if TYPE_CHECKING:
    from atod_train.models.policy import Policy
    from atod_train.rollout.env_pool import EnvPool


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    """A server of chat completions; tests with it need the client library."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if importlib.util.find_spec("openai") is None:
        if os.environ.get("CI"):
            pytest.fail("no package openai; under CI these tests must run")
        pytest.skip("no package openai: pip install 'atod-gym[eval]'")
    with FakeChat() as served:
        yield served


@pytest.fixture(scope="session")
def echo_pool() -> EnvPool:
    """The tasks of `echo_env`."""
    from atod_train.rollout.env_pool import EnvPool

    return EnvPool(ECHO.env, "train")


@pytest.fixture(scope="session")
def echo_policies(echo_pool: EnvPool) -> tuple[Policy, Policy]:
    """A student that rarely says both words, and a teacher that mostly does."""
    import torch

    from atod_train.models.dialogue import DialogueEncoder
    from atod_train.models.from_scratch import ModelShape, build_policy
    from atod_train.models.word_tokenizer import build_word_tokenizer
    from atod_train.training import supervised
    from atod_train.training.supervised import (
        demonstrate,
        demonstration_texts,
        tokenize,
        train_on_demonstrations,
    )

    torch.set_num_threads(1)
    shape = ModelShape(layers=2, width=48, heads=4, mlp_width=96, max_positions=2048)
    episodes = demonstrate(echo_pool, 120, 0.0, seed=0)
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    trajectories = [tokenize(episode, DialogueEncoder(tokenizer)) for episode in episodes]
    student, teacher = (build_policy(shape, tokenizer, seed=1) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "_episodes_per_update", lambda trajectories: 4)
        for policy, epochs in ((student, 9.0), (teacher, 11.0)):
            train_on_demonstrations(policy, trajectories, epochs=epochs, lr=(3e-3, 1.8e-2), seed=1)
    return student, teacher
