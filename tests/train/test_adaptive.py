from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atod_train import adaptive
from atod_train.adaptive import NEAR, RATE, STILL, WINDOW, AdaptiveProgress
from atod_train.baselines import Signals, compute_advantages
from atod_train.config import AlgorithmConfig, EnvConfig, ModelConfig, RunConfig, TrainConfig
from atod_train.metrics import read_metrics
from atod_train.study import run_study

ADAPTIVE = AlgorithmConfig(shape="adaptive")


def test_it_stands_while_the_disagreement_falls() -> None:
    annealing = AdaptiveProgress()
    for step in range(100):
        annealing.update(0.98**step, 0.0)
    # A tenth of ln(0.98) a step is far more than STILL over WINDOW steps.
    assert 1 - 0.98**WINDOW > STILL
    assert annealing.progress == 0.0


def test_it_moves_on_once_the_disagreement_has_stopped_falling() -> None:
    annealing = AdaptiveProgress()
    found = []
    for step in range(40):
        annealing.update(1.0 if step < 5 else 0.5, 0.0)
        found.append(annealing.progress)
    first = next(i for i, progress in enumerate(found) if progress > 0)
    # k steps after the fall the mean is (1 + 0.8^k) / 2; over 10 steps it falls by less than 2 % of
    # itself from 0.8926 * 0.8^(k - 10) <= 0.02 * (1 + 0.8^(k - 10)) on, which is k = 27.
    assert first == 4 + 27
    steps = torch.tensor(found[first:]).diff()
    assert steps.tolist() == pytest.approx([RATE] * len(steps))
    for _ in range(100):
        annealing.update(0.5, 0.0)
    assert annealing.progress == 1.0


def test_it_moves_on_when_the_student_is_nearly_as_good() -> None:
    for success, moves in ((NEAR * 0.8, True), (NEAR * 0.8 - 0.01, False)):
        annealing = AdaptiveProgress()
        for step in range(5):
            annealing.update(0.9**step, success, 0.8)
        assert (annealing.progress > 0) is moves
    unknown = AdaptiveProgress()
    for teacher in (None, 0.0):
        unknown.update(1.0, 1.0, teacher)
    assert unknown.progress == 0.0


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1)), max_size=60), st.floats(0, 1))
def test_it_never_moves_back_and_can_be_saved(
    steps: list[tuple[float, float]], teacher: float
) -> None:
    annealing, before = AdaptiveProgress(), 0.0
    for disagreement, success in steps:
        annealing.update(disagreement, success, teacher)
        assert before <= annealing.progress <= min(1.0, before + RATE + 1e-12)
        before = annealing.progress
        again = AdaptiveProgress(**json.loads(json.dumps(asdict(annealing))))
        assert again == annealing
        assert len(annealing.disagreements) <= WINDOW + 1


@pytest.mark.parametrize("numbers", [(float("nan"), 0.0), (-1.0, 0.0), (1.0, float("inf"))])
def test_numbers_that_make_no_sense(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        AdaptiveProgress().update(*numbers)


def test_progress_gives_the_coefficients() -> None:
    signals = Signals(
        old_logprobs=torch.zeros(2, 1),
        teacher_logprobs=torch.ones(2, 1),
        completion_mask=torch.ones(2, 1, dtype=torch.bool),
        trajectory_index=torch.tensor([0, 1]),
        turn_index=torch.tensor([0, 0]),
        turn_rewards=torch.zeros(2),
        returns=torch.zeros(2),
        group_index=torch.tensor([0, 0]),
    )
    for progress, kappa, rho in ((0.0, 1.0, 1.0), (0.5, 0.55, 1.5), (1.0, 0.1, 2.0)):
        found = compute_advantages(signals, ADAPTIVE, step=70, progress=progress)
        assert (found.kappa, found.rho) == pytest.approx((kappa, rho))
    linear = compute_advantages(signals, replace(ADAPTIVE, shape="linear"), 40, progress=1.0)
    assert linear.kappa == pytest.approx(0.55)


def test_a_resumed_run_goes_on_where_annealing_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive, "WINDOW", 1)
    monkeypatch.setattr(adaptive, "STILL", 1.0)

    def config(steps: int, resume: bool = False) -> RunConfig:
        made = RunConfig(
            env=EnvConfig(
                data="generated", options={"house_size": "tiny"}, max_turns=12, eval_splits=(),
            ),
            model=ModelConfig(
                student="mini", teacher="mini", demonstrations=8, student_epochs=0.5,
                teacher_epochs=0.5,
            ),
            algorithm=ADAPTIVE,
            train=TrainConfig(
                steps=steps, tasks_per_step=2, group_size=2, minibatches=1, eval_every=0,
                save_every=2,
            ),
        )  # fmt: skip
        return replace(made, study=replace(made.study, resume=resume))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_study(config(5), whole)
    run_study(config(3), parts)
    run_study(config(5, resume=True), parts)
    runs = [read_metrics(folder / "atod-seed0") for folder in (whole, parts)]
    for name in ("anneal_progress", "kappa", "rho", "disagreement"):
        first, second = ([step[name] for step in run] for run in runs)
        assert first == second, name
    progress = [step["anneal_progress"] for step in runs[0]]
    assert progress == pytest.approx([0.0, 0.0, RATE, 2 * RATE, 3 * RATE])
