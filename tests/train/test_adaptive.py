from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_baselines import turn_rows

from atod_train.algorithm.methods import (
    ADAPTIVE_RATE,
    compute_advantages,
    moved_on,
    solved_groups,
)
from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)
from atod_train.records import TokenScores, Trajectory
from atod_train.reports import step_records
from atod_train.reports.metrics import read_metrics
from atod_train.studies.study import train_one

ADAPTIVE = AlgorithmConfig(shape="adaptive")


def trajectory(group: int, success: bool) -> Trajectory:
    return Trajectory(
        group_id=group, task_id="t", task_type="pick", turns=(), terminated=success,
        truncated=not success, stop_reason="terminated" if success else "turn_limit",
        success=success, score=float(success),
    )  # fmt: skip


def test_a_group_is_solved_by_one_success() -> None:
    outcomes = {3: (False, False), 5: (True, False), 8: (False, False), 9: (True, True)}
    made = [trajectory(group, success) for group, all_ in outcomes.items() for success in all_]
    assert solved_groups(made) == 0.5
    assert solved_groups(made[:2]) == 0.0


def test_it_waits_where_every_group_fails_and_is_as_fast_as_groups_are_solved() -> None:
    assert moved_on(0.3, 0.0) == 0.3
    assert moved_on(0.3, 0.5) == pytest.approx(0.3 + ADAPTIVE_RATE / 2)
    assert moved_on(1.0 - ADAPTIVE_RATE / 4, 1.0) == 1.0
    progress, steps = 0.0, 0
    while progress < 1.0:
        progress, steps = moved_on(progress, 1.0), steps + 1
    assert steps == 25


@given(st.lists(st.floats(0, 1), max_size=60))
def test_it_never_moves_back(shares: list[float]) -> None:
    progress = 0.0
    for share in shares:
        before, progress = progress, moved_on(progress, share)
        assert before <= progress <= min(1.0, before + ADAPTIVE_RATE)


@pytest.mark.parametrize("numbers", [(float("nan"), 0.0), (-0.1, 0.0), (0.5, 1.1)])
def test_numbers_that_make_no_sense(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        moved_on(*numbers)


def test_progress_gives_the_coefficients() -> None:
    scores = TokenScores(logprobs=torch.zeros(2, 1), reference_logprobs=torch.ones(2, 1))
    batch = turn_rows(
        torch.ones(2, 1, dtype=torch.bool),
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.zeros(2),
        torch.tensor([0, 0]),
    )
    for progress, kappa, rho in ((0.0, 1.0, 1.0), (0.5, 0.55, 1.5), (1.0, 0.1, 2.0)):
        found = compute_advantages(batch, scores, ADAPTIVE, step=70, progress=progress)
        assert (found.kappa, found.rho) == pytest.approx((kappa, rho))
    linear = compute_advantages(batch, scores, replace(ADAPTIVE, shape="linear"), 40, progress=1.0)
    assert linear.kappa == pytest.approx(0.55)


def test_a_resumed_run_goes_on_where_annealing_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What hardly taught students solve is too little to see anything move.
    monkeypatch.setattr(step_records, "solved_groups", lambda trajectories: len(trajectories) / 8)

    def config(steps: int) -> RunConfig:
        return RunConfig(
            env=EnvConfig(
                data="generated", options={"house_size": "tiny"}, max_turns=12, eval_splits=(),
            ),
            model=ModelConfig(student="mini", teacher="mini"),
            start=StartConfig(demonstrations=8, epochs=(0.5, 0.5)),
            algorithm=ADAPTIVE,
            train=TrainConfig(
                steps=steps, tasks_per_step=2, group_size=2, minibatches=1, eval_every=0,
                save_every=2,
            ),
        )  # fmt: skip

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_one(config(5), whole)
    train_one(config(3), parts)
    train_one(config(5), parts, resume=True)
    runs = [read_metrics(folder / "atod-seed0") for folder in (whole, parts)]
    for name in ("anneal_progress", "kappa", "rho", "disagreement"):
        first, second = ([step[name] for step in run] for run in runs)
        assert first == second, name
    progress = [step["anneal_progress"] for step in runs[0]]
    assert progress == pytest.approx([step * ADAPTIVE_RATE / 2 for step in range(5)])
