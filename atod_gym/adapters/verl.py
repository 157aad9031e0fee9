"""Tasks for verl: its data sets are parquet files, and a row names the task to play.

The agent loop that plays them, and ATOD's objective, are in `atod_train.adapters.verl`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from atod_gym.adapters import tasks
from atod_gym.errors import AtodError

AGENT_NAME = "atod"
"""Name in each row of the agent loop that plays it."""


def task_dataset(env_id: str, *, split: str = "train", **settings: Any) -> Any:
    """Return the tasks of a split as a data set in verl's format.

    Args:
        env_id: such as `atod/WebShop-v0`.
        split: of the tasks.
        **settings: of the environment, such as `data`; the same as for the agent loop.

    Returns:
        A `datasets.Dataset` with the columns `data_source` (the environment), `prompt` (one message
        with the task id, for people; the agent loop writes the prompts), `agent_name`,
        `reward_model` (the environment gives the reward) and `extra_info`.

    Raises:
        MissingExtraError: if the package datasets is not installed.
        AtodError: as the environment raises it.
    """
    rows = [
        {
            "data_source": env_id,
            "prompt": [{"role": "user", "content": task_id}],
            "agent_name": AGENT_NAME,
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index, "split": split, "task_id": task_id},
        }
        for index, task_id in enumerate(tasks.task_ids(env_id, split=split, **settings))
    ]
    return tasks.dataset(rows, "verl")


def write_tasks(path: str | os.PathLike[str], env_id: str, **settings: Any) -> int:
    """Write `task_dataset` to a parquet file, for `data.train_files` and `data.val_files`.

    Returns:
        The number of tasks.

    Raises:
        AtodError: the file cannot be written; and as `task_dataset`.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    rows = task_dataset(env_id, **settings)
    try:
        rows.to_parquet(str(part))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AtodError(f"Cannot write {path}: {error}") from error
    return len(rows)
