"""What all environments accept and refuse alike: turn limits, render modes and reset options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from numpy.random import Generator

from atod_gym.data import task_not_found
from atod_gym.errors import InvalidSettingError

RENDER_MODES = ("ansi",)


def check_max_turns(max_turns: object) -> None:
    """Raises `InvalidSettingError` unless it is an integer of 1 or more."""
    if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
        raise InvalidSettingError(f"max_turns must be an integer >= 1, not {max_turns!r}.")


def check_render_mode(render_mode: object) -> None:
    """Raises `InvalidSettingError` unless it is None or one of `RENDER_MODES`."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise InvalidSettingError(
            f"Unknown render_mode {render_mode!r}; known: None, {', '.join(RENDER_MODES)}."
        )


def choose_task(
    options: Mapping[str, Any] | None,
    task_ids: tuple[str, ...],
    known: Collection[str],
    split: str,
    np_random: Generator,
) -> str:
    """The task of a reset: the one that the options name, else one at random.

    Args:
        options: of `reset`; `task_id` is the only one.
        task_ids: in manifest order.
        known: the same, in a form that is fast to ask.
        split: for the message.
        np_random: of the environment; a draw is made only if no task is named.

    Raises:
        InvalidSettingError: if there are other options.
        TaskNotFoundError: if the task is none of `task_ids`.
    """
    options = options or {}
    unknown = [key for key in options if key != "task_id"]
    if unknown:
        raise InvalidSettingError(
            f"Unknown reset option {unknown[0]!r}; the only one is 'task_id'."
        )
    if "task_id" not in options:
        return task_ids[int(np_random.integers(len(task_ids)))]
    return check_task(options["task_id"], task_ids, known, split)


def check_task(
    task_id: object, task_ids: tuple[str, ...], known: Collection[str], split: str
) -> str:
    """The task id, if it is one of the split; else `TaskNotFoundError`, which proposes others."""
    if not isinstance(task_id, str) or task_id not in known:
        raise task_not_found(task_id, task_ids, split)
    return task_id
