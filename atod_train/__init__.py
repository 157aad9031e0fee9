"""The trainer: annealed on-policy distillation and its baselines for multi-turn agents.

The functions of `atod_train.algorithm.atod` can be imported from here, which then imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atod_train.algorithm.atod import (
        LossStats,
        Schedule,
        atod_advantages,
        clipped_policy_loss,
        group_advantages,
        sampled_log_ratio,
        turn_statistics,
        turn_weights,
    )

__all__ = [
    "LossStats",
    "Schedule",
    "atod_advantages",
    "clipped_policy_loss",
    "group_advantages",
    "sampled_log_ratio",
    "turn_statistics",
    "turn_weights",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from atod_train.algorithm import atod

    return getattr(atod, name)
