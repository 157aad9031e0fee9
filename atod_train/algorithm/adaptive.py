"""Annealing without a length: the mix moves on as fast as rewards have something to say.

Reinforcement learning has no signal where all trajectories of a group fail alike, and that is where
the teacher is needed (for this reason distillation leads at first, arXiv:2606.27814). So progress
p, which `Schedule.coefficients_at` turns into kappa and rho, moves on after each step by `RATE`
times the share of groups in which at least one trajectory reached the goal. From a weak start it
waits for the teacher's help to show; from a strong one it takes little more than 1 / RATE = 25
steps.

Ours. Related hand-offs wait until the disagreement with the teacher stops falling: TIDE's, and
RetireOPD's (arXiv:2609.20784).
"""

from __future__ import annotations

from collections.abc import Sequence

from atod_train.records import Trajectory

RATE = 0.04


def solved_groups(trajectories: Sequence[Trajectory]) -> float:
    """The share of groups in which at least one trajectory reached the goal, 0 to 1.

    Args:
        trajectories: of a step, at least one.
    """
    groups = {trajectory.group_id for trajectory in trajectories}
    solved = {trajectory.group_id for trajectory in trajectories if trajectory.success}
    return len(solved) / len(groups)


def moved_on(progress: float, solved: float) -> float:
    """Where annealing stands after a step; it never moves back.

    Args:
        progress: before, 0 to 1.
        solved: share of the step's groups with a success, 0 to 1.

    Raises:
        ValueError: a number that is not between 0 and 1.
    """
    if not (0 <= progress <= 1 and 0 <= solved <= 1):
        raise ValueError(f"progress {progress} and share {solved} must be between 0 and 1")
    return min(1.0, progress + RATE * solved)
