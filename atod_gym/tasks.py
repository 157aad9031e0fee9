"""Task manifests, and the rules for `data=` and `task_types=` that all environments share."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atod_gym.errors import DataNotFoundError, InvalidSettingError, TaskNotFoundError

DATA_VARIABLE = "ATOD_DATA"
"""Environment variable of a folder with data of all environments."""

# Comparing takes about 20 microseconds each; some splits have millions of tasks.
_MOST_COMPARED = 10_000
_announced: set[str] = set()


@dataclass(frozen=True, slots=True)
class TaskManifest:
    """The tasks of one split of one data set, the same on every machine.

    Manifests with equal `content_hash` contain the same tasks under the same ids, byte for byte.
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
    """Return the hash of a set of tasks; their order in `digests` has no influence.

    Args:
        digests: for every task id the SHA-256 of the task's content, in hexadecimal.

    Returns:
        SHA-256, in hexadecimal, over one line `<task id> <digest>` per task, sorted by id.
    """
    total = hashlib.sha256()
    for task_id in sorted(digests):
        total.update(f"{task_id} {digests[task_id]}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def spread(task_ids: Sequence[str], count: int) -> tuple[str, ...]:
    """Return `count` tasks spread evenly over a split, in its order; 0: all.

    The first tasks of a split are often of one type.
    """
    known = len(task_ids)
    count = min(count, known) or known
    return tuple(task_ids[i * known // count] for i in range(count))


def task_not_found(task_id: object, task_ids: tuple[str, ...], split: str) -> TaskNotFoundError:
    """Return the error for an unknown task id; proposes the closest known ones."""
    candidates = task_ids[:_MOST_COMPARED]
    close = difflib.get_close_matches(str(task_id)[:200], candidates, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" An example: {task_ids[0]}."
    return TaskNotFoundError(
        f"No task {str(task_id)[:200]!r} among the {len(task_ids)} of split {split!r}.{hint} "
        "env.unwrapped.task_ids lists them."
    )


def choose_task_types(types: Mapping[str, str], task_types: object) -> Mapping[str, str]:
    """Keep the tasks of the chosen types.

    Args:
        types: task id -> task type, of all tasks of a split.
        task_types: None (all), a name, several names separated by commas, or a list of names.

    Returns:
        `types` itself for None; else the chosen part of it, in the same order.

    Raises:
        InvalidSettingError: if a name is not a type of the split, or no name is given.
    """
    if task_types is None:
        return types
    if isinstance(task_types, str):
        names = [name.strip() for name in task_types.split(",")]
    elif isinstance(task_types, list | tuple | set | frozenset):
        names = list(task_types)
    else:
        raise InvalidSettingError(
            f"task_types must be None, a name or a list of names, not {task_types!r}."
        )
    known = sorted(set(types.values()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"Unknown task type {unknown[0]!r}" if unknown else "task_types is empty"
        raise InvalidSettingError(f"{what}; this split has: {', '.join(known)}.")
    return {task_id: kind for task_id, kind in types.items() if kind in names}


@dataclass(frozen=True, slots=True)
class DataSource:
    """The places in which an environment's data is searched, and its names in messages."""

    name: str
    """Folder name in caches, such as `alfworld`."""
    title: str
    """Such as `ALFWorld`."""
    find: Callable[[Path], Path | None]
    """Return the data in or at a folder (or file); None: there is none."""
    expected: str
    """The required content of a path, for messages."""
    how_to_get: str
    """Instruction to get the official data, for messages; begins with a verb."""
    generated: str
    """The tasks that are played without data, such as `generated games`."""
    variables: tuple[str, ...] = ()
    """Environment variables that name a folder, as upstream packages use them."""

    def folders(self) -> tuple[Path, ...]:
        """Return the folders that are searched, in order; see `data_folders`."""
        return data_folders(self.name, self.variables)

    def found(self, is_official: Callable[[Path], bool] | None = None) -> Path | None:
        """Return the first data in `folders()`, official data before other; None: there is none."""
        every = filter(None, map(self.find, self.folders()))
        first = next(every, None)
        if first is None or is_official is None or is_official(first):
            return first
        return next(filter(is_official, every), first)


def check_data(data: object) -> None:
    """Raise InvalidSettingError if the setting `data` is neither a word nor a possible path."""
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else ""
    if not name or "\0" in name:
        raise InvalidSettingError(
            f"data must be auto, official, generated or a path, not {data!r}."
        )


def locate(
    data: str | os.PathLike[str],
    source: DataSource,
    is_official: Callable[[Path], bool] | None = None,
) -> Path | None:
    """Resolve the setting `data`, by the same rule in every environment.

    Args:
        data: `official`, `generated`, `auto` (the data in the usual folders, else generated)
            or a path; a `Path` is never one of the three words.
        source: the environment's data.
        is_official: returns whether found data is the official one; for `official`, which
            skips other data in the usual folders.

    Returns:
        The path of the data; None: the generated data is played. `official` may also return other
        data than the official one, if no official data is found: see `data_label`.

    Raises:
        InvalidSettingError: if `data` is neither a text nor a path, or empty.
        DataNotFoundError: if the data is missing; the message names the command that gets it.
    """
    check_data(data)
    if data == "generated":
        return None
    if data not in ("auto", "official"):
        found = source.find(expanded(data))
        if found is None:
            raise DataNotFoundError(
                f"No {source.title} data in {os.fspath(data)!r}: expected auto, official, "
                f"generated, or {source.expected}."
            )
        return found
    found = source.found(is_official if data == "official" else None)
    if found is None and data == "official":
        raise DataNotFoundError(
            f"No official {source.title} data found (looked in "
            f"{', '.join(map(str, source.folders()))}). To get it: {source.how_to_get}. "
            'data="generated" needs no download.'
        )
    if found is None:
        announce_once(
            f'{source.title}: no official data found, so data="auto" plays {source.generated}. '
            "`atod-data list` shows how to get the official data."
        )
    return found


def data_label(
    data: str | os.PathLike[str], folder: Path | None, *, is_official: bool, how_to_get: str = ""
) -> str:
    """Return the value of `info["data"]`.

    Args:
        data: the setting.
        folder: from `locate`.
        is_official: whether the content hash of what is played is the published one.
        how_to_get: how to get the official data, as in `DataSource`.

    Returns:
        `generated`, `official`, the given path, or the path of the found folder.

    Raises:
        DataNotFoundError: if `official` was requested and the folder contains other data.
    """
    if folder is None:
        return "generated"
    if is_official:
        return "official"
    if data == "official":
        raise DataNotFoundError(
            f"The data in {folder} is not the official data: its content differs. To play it, give "
            f"that folder as data.{f' For the official data: {how_to_get}.' if how_to_get else ''}"
        )
    return str(folder) if data == "auto" else os.fspath(data)


def cache_folder() -> Path:
    """Return the user's cache folder, which contains downloads of this and other packages."""
    configured = os.environ.get("XDG_CACHE_HOME")
    return Path(configured) if configured else Path.home() / ".cache"


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` and `~name` replaced; `~` with an unknown user name stays."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for unknown names


def data_folders(name: str, variables: Iterable[str] = ()) -> tuple[Path, ...]:
    """Return the folders in which data is searched, in order of preference.

    Args:
        name: folder name of the environment, such as `alfworld`.
        variables: further environment variables that name a folder, as upstream packages use them.

    Returns:
        `$ATOD_DATA`, the folders of `variables`, then the caches `~/.cache/<name>` (where upstream
        packages download to, whatever `$XDG_CACHE_HOME` is) and `atod/<name>` in the cache
        folder. Unset variables are left out; folders that do not exist are not.
    """
    configured = [os.environ.get(variable) for variable in (DATA_VARIABLE, *variables)]
    folders = [expanded(folder) for folder in configured if folder]
    folders += [Path.home() / ".cache" / name, cache_folder() / "atod" / name]
    return tuple(dict.fromkeys(folders))


def announce_once(message: str) -> None:
    """Log a warning once per process, through the logger `atod_gym`.

    With no logging set up, Python writes it to standard error as one line.
    """
    if message not in _announced:
        _announced.add(message)
        logging.getLogger("atod_gym").warning(message)
