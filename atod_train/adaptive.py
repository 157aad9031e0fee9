"""Annealing without a length: the mix moves on only while the teacher has little left to give.

Ours; nobody ships it. Related are TIDE's hand-off, which moves on while the relative reduction of
the mean |delta| over 10 steps is in (0, 0.02], by 0.02 each time, and RetireOPD (arXiv:2609.20784).
Here progress p, which `Schedule.coefficients_at` turns into kappa and rho, moves on by `RATE` after
a step in which

- the running mean of the disagreement has fallen by no more than `STILL` of itself over the last
  `WINDOW` steps, or has risen: the student follows the teacher as far as it will; or
- the running mean of the training success has reached `NEAR` of the teacher's success.

It never moves back, so kappa never rises. A full way takes at least 1 / RATE = 50 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WINDOW = 10
STILL = 0.02
NEAR = 0.9
RATE = 0.02
MEMORY = 0.8
"""Share of a running mean that stays at each step."""


@dataclass
class AdaptiveProgress:
    """Where annealing stands; of JSON values, to be saved with a checkpoint.

    Attributes:
        progress: p in [0, 1].
        disagreements: running means of the last steps, oldest first, at most WINDOW + 1.
        success: running mean of the training success; None before the first step.
    """

    progress: float = 0.0
    disagreements: list[float] = field(default_factory=list)
    success: float | None = None

    def update(
        self, disagreement: float, success: float, teacher_success: float | None = None
    ) -> None:
        """Takes in a step; what it changes counts from the next one on.

        Args:
            disagreement: mean |delta| of the step's batch, nats per token.
            success: success rate of the step's episodes, 0 to 1.
            teacher_success: the teacher's success rate; None or 0: not known, and not used.

        Raises:
            ValueError: a number that is not finite, or a negative disagreement.
        """
        if not (math.isfinite(disagreement) and math.isfinite(success)) or disagreement < 0:
            raise ValueError(
                f"disagreement {disagreement} and success {success} must be finite, the first >= 0"
            )
        before = self.disagreements[-1] if self.disagreements else disagreement
        self.disagreements.append(_moved(before, disagreement))
        del self.disagreements[: -(WINDOW + 1)]
        self.success = success if self.success is None else _moved(self.success, success)
        is_near = bool(teacher_success) and self.success >= NEAR * (teacher_success or 0.0)
        if self._is_still() or is_near:
            self.progress = min(1.0, self.progress + RATE)

    def _is_still(self) -> bool:
        if len(self.disagreements) <= WINDOW:
            return False
        first, last = self.disagreements[0], self.disagreements[-1]
        return first - last <= STILL * first


def _moved(mean: float, value: float) -> float:
    return MEMORY * mean + (1.0 - MEMORY) * value
