"""Define the schedules of method atod: kappa and rho of every step, and the end of the teacher.

    schedule    kappa; rho                                         state     source
    linear:80   kappa[0] to kappa[1]; rho[0] to rho[1] (80 steps)  -         ATOD, Eq. 10-12
    cosine:80   the same ends, along half a cosine wave            -         ours
    constant    kappa[0]; rho[0]                                   -         ATOD's ablation
    adaptive    as linear, by the share of solved groups           progress  ours
    gap         kappa[0] * max(1 - M_S / M_T, 0); rho[0]           M_S, M_T  GATS (2026)
    gap:0.62    the same with M_T = 0.62                           M_S       GATS
    handoff:40  kappa[0]; 0. After step 40: 0; rho[0]              -         arXiv:2609.04108
    handoff     the same, once |delta| stops shrinking             |delta|   TIDE, arXiv:2609.35058

M_S is the student's training success over the last steps, M_T the teacher's ("Guide, then let go").
A schedule is a course from the first to the last coefficients (`atod.Schedule`) and a progress on
it, from 0 to 1. The progress depends on the step number or on the run; in the second case it is
part of a `ScheduleState`, which checkpoints contain. A step with kappa = 0 uses no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, get_args

from atod_train.algorithm.atod import Schedule
from atod_train.config import AlgorithmConfig

ADAPTIVE_RATE = 0.04
"""Progress of `adaptive` in a step in which every group has a success."""
GAP_STEPS = 5
"""K of `gap`: steps over which the student's training success is averaged."""
HANDOFF_STEPS = 10
"""W of `handoff`: steps over which |delta| is averaged."""
HANDOFF_REDUCTION = 0.02
"""Relative reduction of |delta| from W steps to the next W that counts as none."""

ScheduleName = Literal["linear", "cosine", "constant", "adaptive", "gap", "handoff"]


def parse_schedule(text: str) -> tuple[ScheduleName, float | None]:
    """Return the name and the number of the setting `schedule`; None: it has no number.

    Raises:
        ValueError: an unknown name, or a number that is missing, not taken or out of range.
    """
    name, separator, number = text.partition(":")
    if name in ("linear", "cosine") or (name == "handoff" and separator):
        is_known = number.isdecimal() and int(number) > 0
    elif name == "gap" and separator:
        is_known = _is_share(number)
    else:
        is_known = text in get_args(ScheduleName)
    if not is_known:
        raise ValueError(
            f"schedule is {text!r}; choose linear:80, cosine:80, constant, adaptive, gap, "
            "gap:0.62, handoff or handoff:40; numbers of steps are whole and at least 1, that of "
            "gap is a success above 0, up to 1"
        )
    return name, float(number) if separator else None  # type: ignore[return-value]


def _is_share(number: str) -> bool:
    try:
        return 0.0 < float(number) <= 1.0
    except ValueError:
        return False


def schedule_of(settings: AlgorithmConfig) -> Schedule:
    """Return the course of the coefficients; the run gives the progress if there is a state.

    Raises:
        ValueError: as `parse_schedule` and `Schedule`.
    """
    name, number = parse_schedule(settings.schedule)
    if name == "gap":
        return Schedule(settings.kappa[0], 0.0, settings.rho[0], settings.rho[0])
    shape: Literal["linear", "cosine", "constant", "handoff"]
    shape = "linear" if name == "adaptive" else name
    return Schedule(*settings.kappa, *settings.rho, anneal_steps=int(number or 0), shape=shape)


# -- schedules with a state ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """The state of a schedule that follows the run, after a step."""

    progress: float = 0.0
    """Of the next step, from 0 to 1; at 1 `gap` and `handoff` have withdrawn the teacher."""
    seen: tuple[float, ...] = ()
    """gap: training success of the last K steps; handoff: mean |delta| of the last 2 W steps."""
    teacher_success: float | None = None
    """M_T of `gap`, if it is measured."""


def has_state(settings: AlgorithmConfig) -> bool:
    """Return whether progress is computed from the run, see `advanced`."""
    name, number = parse_schedule(settings.schedule)
    follows_run = name in ("adaptive", "gap") or (name == "handoff" and number is None)
    return settings.method == "atod" and follows_run


def measures_teacher(settings: AlgorithmConfig) -> bool:
    """Return whether the teacher's success on training tasks must be measured before the run."""
    return settings.method == "atod" and settings.schedule == "gap"


def advanced(
    state: ScheduleState, settings: AlgorithmConfig, metrics: Mapping[str, float]
) -> ScheduleState:
    """Return the state after a step; progress never falls, except that of `gap` before its end.

    adaptive: without a success all trajectories of a group have the same return, and only the
    teacher gives a signal. Progress therefore rises by `ADAPTIVE_RATE` times the share of groups
    with a success: in 25 steps if all have one, and not at all if none has.

    gap: M_S / M_T, where M_S is the mean training success of the student over the last K = 5 steps
    (fewer at the start), so that a step does not set its own kappa. Once M_S reaches M_T the
    teacher is withdrawn permanently.

    handoff: 1 as soon as the mean |delta| of the last W = 10 steps is at most 2 % below that of the
    W steps before, where |delta| is the metric `disagreement`. W and the limit are those of TIDE;
    RetireOPD (arXiv:2609.20784) retires its teacher by the same signal.

    Args:
        state: before the step.
        settings: of method atod, with a schedule that has a state.
        metrics: of the step: `solved_groups`, `train_success` and `disagreement`.
    """
    if state.progress >= 1.0:
        return state
    name, number = parse_schedule(settings.schedule)
    if name == "adaptive":
        moved = state.progress + ADAPTIVE_RATE * metrics["solved_groups"]
        return replace(state, progress=min(1.0, moved))
    if name == "gap":
        seen = (*state.seen, metrics["train_success"])[-GAP_STEPS:]
        teacher = state.teacher_success if number is None else number
        assert teacher is not None
        return replace(state, seen=seen, progress=min(1.0, fmean(seen) / teacher))
    seen = (*state.seen, metrics.get("disagreement", 0.0))[-2 * HANDOFF_STEPS :]
    before, last = sum(seen[:HANDOFF_STEPS]), sum(seen[HANDOFF_STEPS:])
    is_full = len(seen) == 2 * HANDOFF_STEPS
    has_stopped = is_full and before - last <= HANDOFF_REDUCTION * before
    return replace(state, seen=seen, progress=float(has_stopped))
