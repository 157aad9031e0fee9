"""The method in one file computes what the package computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atod_train.algorithm.methods import compute_advantages
from atod_train.batch import make_batch
from atod_train.config import AlgorithmConfig, EnvConfig, RunConfig, TrainConfig
from atod_train.distributed import Processes
from atod_train.examples import atod_one_file as one_file
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.progress import PhaseTimes
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect
from atod_train.teachers.local import LocalTeacher
from atod_train.training.update import Learner, score_batch, update_policy

TURNS, TASKS, GROUP, TOKENS, LR, STEP = 6, 3, 4, 6, 1e-3, 30
SHAPE = ModelShape(layers=2, width=32, heads=2, mlp_width=64, max_positions=2048)
ENV = EnvConfig(data="generated", max_turns=TURNS, prompt_style="window")
ARGS = one_file.Args(
    student="", teacher="", max_turns=TURNS, show_admissible=False, parse_profile="plain",
    group_size=GROUP, minibatches=1, rows_per_pass=7, max_completion_tokens=TOKENS, lr=LR,
    max_context=2048, entropy_bonus=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> EnvPool:
    return EnvPool(ENV, "train")


@pytest.fixture(scope="module")
def policy(pool: EnvPool) -> Policy:
    texts = [episode.observation["text"] for episode in pool.start(pool.task_ids[:20])]
    actions = [action for episode in pool.start(pool.task_ids[:20]) for action in episode.actions]
    return build_policy(SHAPE, build_word_tokenizer([*texts, *actions]), seed=0)


def played(pool: EnvPool, policy: Policy, temperature: float) -> list[Trajectory]:
    generator = Generator(
        policy, DialogueEncoder(policy.tokenizer, "window"), temperature=temperature,
        max_completion_tokens=TOKENS, completion_format=pool.completion_format, max_context=2048,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return collect(pool, generator, pool.task_ids[:TASKS], group_size=GROUP, turn_limit=TURNS)


def as_rows(trajectories: Sequence[Trajectory]) -> list[one_file.Row]:
    return [
        one_file.Row(
            number, turn.index, [*turn.tokens.prompt_ids], [*turn.tokens.completion_ids],
            turn.reward,
        )
        for number, trajectory in enumerate(trajectories)
        for turn in trajectory.turns
    ]  # fmt: skip


def test_greedy_rollouts_are_the_same(pool: EnvPool, policy: Policy) -> None:
    tasks = [task for task in pool.task_ids[:TASKS] for _ in range(GROUP)]
    envs = [one_file.make_env(ARGS, "train") for _ in tasks]
    rows, solved = one_file.rollout(policy.model, policy.tokenizer, envs, tasks, ARGS, greedy=True)
    trajectories = played(pool, policy, temperature=0.0)
    assert rows == as_rows(trajectories)
    assert len({len(row.prompt_ids) for row in rows}) > 3
    assert solved == [trajectory.success for trajectory in trajectories]


@pytest.mark.slow
def test_a_step_moves_the_weights_alike(pool: EnvPool, policy: Policy) -> None:
    trajectories = played(pool, policy, temperature=1.0)
    # Untrained models succeed nowhere: returns are drawn, so that both signals act.
    drawn = torch.Generator().manual_seed(2)
    rewards = torch.randint(0, 2, (len(trajectories),), generator=drawn).tolist()
    trajectories = [
        replace(t, turns=(*t.turns[:-1], replace(t.turns[-1], reward=float(reward))))
        for t, reward in zip(trajectories, rewards, strict=True)
    ]
    teacher = build_policy(SHAPE, policy.tokenizer, seed=9)
    config = RunConfig(
        env=ENV,
        algorithm=AlgorithmConfig(entropy_bonus=ARGS.entropy_bonus),
        train=TrainConfig(minibatches="1", lr=LR, group_size=GROUP),
    )

    mine = copy.deepcopy(policy.model)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=LR, weight_decay=0.01)
    metrics = one_file.train_step(mine, teacher.model, optimizer, as_rows(trajectories), STEP, ARGS)

    before = [weight.detach().clone() for weight in policy.model.parameters()]
    learner = Learner(policy, LR, Processes())
    batch = make_batch(trajectories, policy.pad_id)
    taught = LocalTeacher(teacher, policy)
    scores = score_batch(learner, taught, batch, config, PhaseTimes())
    advantages = compute_advantages(batch, scores, config.algorithm, STEP)
    update = update_policy(
        learner, taught, batch, scores, advantages, config, torch.Generator().manual_seed(0)
    )

    assert 0 < metrics["turn_weight"] < 1
    assert metrics["kappa"] < 1 < metrics["rho"]
    assert metrics["loss"] == pytest.approx(update["loss"], rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(update["grad_norm"], rel=1e-4)
    moved = apart = 0.0
    for start, theirs, ours in zip(
        before, policy.model.parameters(), mine.parameters(), strict=True
    ):
        moved += float((theirs.detach() - start).square().sum())
        apart += float((theirs - ours).detach().square().sum())
    # AdamW's first step is a sign: gradients that are rounding noise alone may differ in it.
    assert moved > 0
    assert apart < 1e-3 * moved

    # A further update on this batch finds how far the one before moved the policy.
    assert update["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    now = score_batch(learner, taught, batch, config, PhaseTimes()).logprobs
    change = (now - scores.logprobs)[batch.completion_mask].double()
    again = update_policy(
        learner, taught, batch, scores, advantages, config, torch.Generator().manual_seed(0)
    )
    assert again["approx_kl"] == pytest.approx(float((change.expm1() - change).mean()), rel=1e-3)


def test_the_command_trains_and_saves(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.save(tmp_path / "student")
    build_policy(SHAPE, policy.tokenizer, seed=9).save(tmp_path / "teacher")
    args = replace(
        ARGS, student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"),
        out=str(tmp_path / "out"), steps=2, tasks_per_step=2, group_size=2, max_turns=3,
        eval_tasks=2, eval_every=1,
    )  # fmt: skip
    one_file.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all("valid_seen_success" in line for line in lines)
    assert (tmp_path / "out/model.safetensors").is_file()
