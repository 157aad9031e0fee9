"""A tiny agent gets better: from a weak start towards its teacher, on a few generated tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atod_train.config import AlgorithmConfig, EnvConfig, Method, RunConfig, TrainConfig
from atod_train.demonstrations import (
    demonstrate,
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)
from atod_train.dialogue import DialogueEncoder
from atod_train.evaluate import evaluate
from atod_train.metrics import read_metrics
from atod_train.policy import ModelShape, Policy, build_policy
from atod_train.rollout import EnvPool
from atod_train.tokenizer import build_word_tokenizer
from atod_train.trainer import Trainer

SHAPE = ModelShape(layers=2, width=64, heads=2, mlp_width=128, max_positions=1024)
ENV = EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=14, eval_splits=())
CONFIG = RunConfig(
    env=ENV,
    algorithm=AlgorithmConfig(anneal_steps=10),
    train=TrainConfig(
        steps=12,
        tasks_per_step=4,
        group_size=8,
        minibatches=4,
        lr=5e-4,
        eval_every=0,
        save_every=100,
        max_completion_tokens=8,
        tokens_per_microbatch=4096,
    ),
)


@pytest.fixture(scope="module")
def pool() -> EnvPool:
    """Four tasks of the training split."""
    pool = EnvPool(ENV, "train")
    pool.task_ids = pool.task_ids[:4]
    return pool


@pytest.fixture(scope="module")
def policies(pool: EnvPool) -> tuple[Policy, Policy]:
    """A weak student and a teacher, both from the same demonstrations."""
    torch.set_num_threads(1)
    episodes = demonstrate(pool, 48, 0.2, seed=0)
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    trajectories = [tokenize(episode, DialogueEncoder(tokenizer)) for episode in episodes]
    made = []
    for seed, epochs in ((1, 10.0), (0, 16.0)):
        policy = build_policy(SHAPE, tokenizer, seed)
        train_on_demonstrations(policy, trajectories, epochs=epochs, lr=3e-3, seed=seed)
        made.append(policy)
    return made[0], made[1]


def _copy(policy: Policy, folder: Path) -> Policy:
    from atod_train.policy import load_policy

    policy.save(folder)
    return load_policy(folder)


@pytest.mark.parametrize("method", ["atod", "opd"])
def test_the_student_gets_better(
    pool: EnvPool, policies: tuple[Policy, Policy], method: Method, tmp_path: Path
) -> None:
    start, teacher = policies
    config = replace(CONFIG, algorithm=replace(CONFIG.algorithm, method=method))
    student = _copy(start, tmp_path / "start")
    Trainer(config, tmp_path / "run", student, teacher, pool, []).run()
    success = [float(row["train_success"]) for row in read_metrics(tmp_path / "run")]
    first, last = sum(success[:3]) / 3, sum(success[-3:]) / 3
    before, after, best = (
        evaluate(policy, pool, config, "sampled").success_rate
        for policy in (start, student, teacher)
    )
    print(f"{method}: {first:.2f} -> {last:.2f}; {before:.2f} -> {after:.2f}, teacher {best:.2f}")
    assert best >= 0.75
    assert last > first + 0.2
