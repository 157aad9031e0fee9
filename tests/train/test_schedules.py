"""Schedules: closed forms, teachers that are withdrawn, and runs that are resumed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from echo_env import ECHO

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.algorithm import schedules
from atod_train.algorithm.methods import coefficients, scores_teacher
from atod_train.algorithm.schedules import (
    ADAPTIVE_RATE,
    ScheduleState,
    advanced,
    has_state,
    parse_schedule,
    schedule_of,
)
from atod_train.config import AlgorithmConfig, RunConfig
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.records import Batch, Trajectory
from atod_train.reports.metrics import read_metrics
from atod_train.reports.step_records import solved_groups
from atod_train.rollout.env_pool import EnvPool
from atod_train.teachers.local import LocalTeacher
from atod_train.training.checks import check_settings
from atod_train.training.trainer import Trainer


def with_schedule(schedule: str, **settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig(schedule=schedule, **settings)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "number"),
    [
        ("linear:80", "linear", 80), ("cosine:7", "cosine", 7), ("constant", "constant", None),
        ("adaptive", "adaptive", None), ("gap", "gap", None), ("gap:0.62", "gap", 0.62),
        ("gap:1", "gap", 1.0), ("handoff", "handoff", None), ("handoff:40", "handoff", 40),
    ],
)  # fmt: skip
def test_schedules_are_read(text: str, name: str, number: float | None) -> None:
    assert parse_schedule(text) == (name, number)
    follows_run = text in ("adaptive", "gap", "gap:0.62", "gap:1", "handoff")
    assert has_state(with_schedule(text)) == follows_run
    assert not has_state(with_schedule(text, method="opd"))


@pytest.mark.parametrize(
    "text",
    ["", "cubic", "linear", "linear:", "linear:0", "linear:-3", "linear:1.5", "cosine:x",
     "constant:3", "adaptive:2", "gap:", "gap:0", "gap:1.2", "gap:nan", "gap:x", "handoff:",
     "handoff:0"],
)  # fmt: skip
def test_other_schedules_are_refused(text: str) -> None:
    wanted = re.escape(f"schedule is {text!r}; choose linear:80")
    with pytest.raises(InvalidSettingError, match=wanted):
        check_settings(RunConfig(algorithm=with_schedule(text)))


def test_gap_asks_for_the_success_of_a_teacher_that_cannot_play() -> None:
    config = RunConfig(algorithm=with_schedule("gap"))
    config = replace(config, model=replace(config.model, teacher="http://10.0.0.2:8000"))
    with pytest.raises(InvalidSettingError, match=r"only scores tokens.*gap:0\.62"):
        check_settings(config)
    for algorithm in (with_schedule("gap:0.5"), with_schedule("gap", method="opd")):
        check_settings(replace(config, algorithm=algorithm))


# -- closed forms ----------------------------------------------------------------------------------


def walked(algorithm: AlgorithmConfig, key: str, values: list[float], **state: Any) -> list[Any]:
    """Kappa and rho of the steps that see these values, and of the next one."""
    now, found = ScheduleState(**state), []
    for step, value in enumerate([*values, 0.0], start=1):
        found.append(coefficients(algorithm, step, now.progress))
        now = advanced(now, algorithm, {key: value})
    return found


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


def test_adaptive_waits_where_every_group_fails_and_takes_25_steps_where_none_does() -> None:
    found = walked(with_schedule("adaptive"), "solved_groups", [0.0] * 3 + [0.5] * 2 + [1.0] * 30)
    for step, progress in ((3, 0.0), (4, ADAPTIVE_RATE / 2), (17, 0.52), (29, 1.0), (35, 1.0)):
        assert found[step] == pytest.approx((1.0 - 0.9 * progress, 1.0 + progress))
    assert found[28] != found[29] == (0.1, 2.0)


def test_gap_follows_the_teachers_lead_and_ends_for_good() -> None:
    algorithm = with_schedule("gap:0.5", kappa=(2.0, 0.1), rho=(1.5, 2.0))
    success = [0.1, 0.2, 0.0, 0.1, 0.1, 0.6, 0.8, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]
    # Means of up to five steps, each seen by the step after it: 0.5 is reached by 2.5 / 5.
    means = [0.0, 0.1, 0.15, 0.1, 0.1, 0.1, 0.2, 0.32, 0.5]
    wanted = [(2.0 * (1.0 - mean / 0.5), 1.5) for mean in means] + [(0.0, 1.5)] * 5
    found = walked(algorithm, "train_success", success)
    assert found == [pytest.approx(pair) for pair in wanted]
    assert [kappa for kappa, _ in found[8:]] == [0.0] * 6
    measured = walked(
        replace(algorithm, schedule="gap"), "train_success", success, teacher_success=0.5
    )
    assert measured == found


def test_handoff_goes_from_the_teacher_alone_to_the_reward_alone() -> None:
    algorithm = with_schedule("handoff:40", kappa=(0.8, 0.1), rho=(1.5, 2.0))
    assert [coefficients(algorithm, step) for step in (1, 40, 41, 900)] == [
        (0.8, 0.0), (0.8, 0.0), (0.0, 1.5), (0.0, 1.5)
    ]  # fmt: skip


def test_handoff_waits_until_disagreement_stops_falling() -> None:
    algorithm = with_schedule("handoff")
    # One step of 1.0 is left in the ten before after step 29: 9.1 to 9.0 is 1.1 % less. After step
    # 28 it was 9.2 to 9.0, 2.2 %.
    found = walked(algorithm, "disagreement", [1.0] * 10 + [0.9] * 30)
    assert found == [(1.0, 0.0)] * 29 + [(0.0, 1.0)] * 12
    # A rise afterwards does not bring the teacher back.
    assert walked(algorithm, "disagreement", [1.0] * 20 + [9.0, 5.0])[19:] == [
        (1.0, 0.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)
    ]  # fmt: skip


def test_the_teacher_is_scored_where_it_counts() -> None:
    to_zero = with_schedule("linear:4", kappa=(1.0, 0.0))
    assert [scores_teacher(to_zero, step) for step in (1, 3, 4, 9)] == [True, True, False, False]
    assert scores_teacher(with_schedule("linear:4"), 9)
    assert [scores_teacher(with_schedule("gap:0.5"), 9, at) for at in (0.9, 1.0)] == [True, False]
    for method, wanted in {"grpo": False, "opd": True, "mix": True, "sdar": True}.items():
        assert scores_teacher(replace(to_zero, method=method), 9) is wanted  # type: ignore[arg-type]
    assert schedule_of(with_schedule("cosine:80")).coefficients(40) == pytest.approx((0.55, 1.5))


# -- runs ------------------------------------------------------------------------------------------


class CountingTeacher(LocalTeacher):
    """Counts the batches that it scores."""

    calls = 0

    def score(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        return super().score(batch)


def run(
    algorithm: AlgorithmConfig,
    pool: EnvPool,
    policies: tuple[Policy, Policy],
    folder: Path,
    steps: int,
) -> tuple[CountingTeacher, list[dict[str, Any]]]:
    """Make a run of the echo task; return its teacher and its metrics."""
    start, teacher = policies
    start.save(folder.parent / "start")
    student = load_policy(folder.parent / "start")
    train = replace(ECHO.train, steps=steps, tasks_per_step=6, group_size=4)
    counting = CountingTeacher(teacher, student)
    config = replace(ECHO, algorithm=algorithm, train=train)
    Trainer(config, folder, student, counting, pool, []).run()
    return counting, read_metrics(folder)


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["sampled", "exact"])
def test_a_withdrawn_teacher_is_not_scored(
    signal: str, echo_pool: EnvPool, echo_policies: tuple[Policy, Policy], tmp_path: Path
) -> None:
    algorithm = with_schedule("handoff:2", opd_signal=signal)
    teacher, rows = run(algorithm, echo_pool, echo_policies, tmp_path / "run", 4)
    assert teacher.calls == (2 if signal == "sampled" else 0)
    assert ["seconds/teacher" in row for row in rows] == [True, True, False, False]
    for row in rows[2:]:
        assert not {"disagreement", "opd_signal", "turn_weight"} & row.keys()
        assert row["rho"] == 1.0
    plain, theirs = run(
        with_schedule("linear:2", method="grpo"), echo_pool, echo_policies, tmp_path / "grpo", 1
    )
    assert plain.calls == 0
    # How many actions of a kind there are is left out where there are none.
    names, others = ({key for key in row if "/" not in key} for row in (rows[-1], theirs[0]))
    assert names == others


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear:3", "adaptive", "gap", "gap:0.7", "handoff"])
def test_a_resumed_run_continues_the_schedule(
    schedule: str,
    echo_pool: EnvPool,
    echo_policies: tuple[Policy, Policy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(schedules, "HANDOFF_STEPS", 2)
    monkeypatch.setattr(schedules, "HANDOFF_REDUCTION", 0.5)
    algorithm = with_schedule(schedule, kappa=(1.0, 0.0))
    how = (algorithm, echo_pool, echo_policies)
    _, whole = run(*how, tmp_path / "whole", 7)
    run(*how, tmp_path / "parts", 3)
    _, parts = run(*how, tmp_path / "parts", 7)
    assert without_seconds(whole) == without_seconds(parts)
    assert len({row["kappa"] for row in whole}) > 1
    if schedule == "gap":
        shown = re.findall(r"the teacher solves ([\d.]+)% of 24 episodes", capsys.readouterr().err)
        assert len(shown) == 2  # not again where it is resumed
        measured = {row["teacher_success"] for row in whole}
        assert [f"{100 * success:.1f}" for success in measured] == shown[:1]


def test_a_teacher_that_solves_nothing_has_no_gap(
    echo_pool: EnvPool, echo_policies: tuple[Policy, Policy], tmp_path: Path
) -> None:
    start = echo_policies[0]
    start.save(tmp_path / "teacher")
    teacher = load_policy(tmp_path / "teacher")
    for weight in teacher.model.parameters():
        weight.detach().zero_()
    with pytest.raises(AtodError, match=r"solved 0\.0% of 24 episodes.*gap:0\.62"):
        run(with_schedule("gap"), echo_pool, (start, teacher), tmp_path / "run", 1)
