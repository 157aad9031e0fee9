"""List the tasks of a split for external trainers."""

from __future__ import annotations

from typing import Any

from atod_gym.adapters.made_env import made_env
from atod_gym.errors import MissingExtraError


def task_ids(env_id: str, **settings: Any) -> tuple[str, ...]:
    """Return the task ids of a split, in manifest order.

    Raises:
        AtodError: as `made_env`.
    """
    with made_env(env_id, settings) as env:
        ids = tuple(env.get_wrapper_attr("task_ids"))
    return ids


def dataset(rows: list[dict[str, Any]], extra: str) -> Any:
    """Make a `datasets.Dataset` from rows.

    Args:
        rows: dicts with the same keys.
        extra: the extra to install, for the message.

    Raises:
        MissingExtraError: if the package datasets is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError(
            f"Data sets need packages that are not installed: pip install 'atod-gym[{extra}]'"
        ) from error
    return Dataset.from_list(rows)
