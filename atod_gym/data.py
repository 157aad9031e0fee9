"""Where data lies and which tasks it holds: the part that all environments share."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from atod_gym.errors import TaskNotFoundError

DATA_VARIABLE = "ATOD_DATA"
"""Environment variable that names a folder with data of all environments."""

# Comparing takes about 20 microseconds each; some splits have millions of tasks.
_MOST_COMPARED = 10_000
_announced: set[str] = set()


@dataclass(frozen=True, slots=True)
class TaskManifest:
    """The tasks of one split of one data set, the same on every machine.

    Two manifests with equal `content_hash` hold the same tasks under the same ids, byte for byte.
    """

    name: str
    """The data: environment and kind, such as `alfworld/official`."""
    split: str
    task_ids: tuple[str, ...]
    """Sorted, without duplicates."""
    content_hash: str
    """64 hexadecimal digits, see `content_hash`."""

    def __post_init__(self) -> None:
        if list(self.task_ids) != sorted(set(self.task_ids)):
            raise ValueError("task_ids must be sorted and without duplicates")


def content_hash(digests: Mapping[str, str]) -> str:
    """The hash of a set of tasks; their order in `digests` has no influence.

    Args:
        digests: for every task id the SHA-256 of the task's content, in hexadecimal.

    Returns:
        SHA-256, in hexadecimal, over one line `<task id> <digest>` per task, sorted by id.
    """
    total = hashlib.sha256()
    for task_id in sorted(digests):
        total.update(f"{task_id} {digests[task_id]}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def task_not_found(task_id: object, task_ids: tuple[str, ...], split: str) -> TaskNotFoundError:
    """The error for an unknown task id; proposes the closest known ones."""
    candidates = task_ids[:_MOST_COMPARED]
    close = difflib.get_close_matches(str(task_id)[:200], candidates, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" An example: {task_ids[0]}."
    return TaskNotFoundError(
        f"No task {str(task_id)[:200]!r} among the {len(task_ids)} of split {split!r}.{hint} "
        "env.unwrapped.task_ids lists them."
    )


def cache_folder() -> Path:
    """The user's cache folder, where downloads of this and other packages lie."""
    configured = os.environ.get("XDG_CACHE_HOME")
    return Path(configured) if configured else Path.home() / ".cache"


def data_folders(name: str, variables: Iterable[str] = ()) -> tuple[Path, ...]:
    """The folders in which an environment's data is looked for, in order of preference.

    Args:
        name: folder name of the environment, such as `alfworld`.
        variables: further environment variables that name a folder, as upstream packages use them.

    Returns:
        `$ATOD_DATA`, the folders of `variables`, then the caches `~/.cache/<name>` (where upstream
        packages download to, whatever `$XDG_CACHE_HOME` says) and `atod/<name>` in the cache
        folder; those that are not set are left out, those that do not exist are not.
    """
    configured = [os.environ.get(variable) for variable in (DATA_VARIABLE, *variables)]
    folders = [Path(folder).expanduser() for folder in configured if folder]
    folders += [Path.home() / ".cache" / name, cache_folder() / "atod" / name]
    return tuple(dict.fromkeys(folders))


def announce_once(message: str) -> None:
    """Tells the user something once per process, through the logger `atod_gym`.

    With no logging set up, Python writes it to standard error as one line.
    """
    if message not in _announced:
        _announced.add(message)
        logging.getLogger("atod_gym").warning(message)
