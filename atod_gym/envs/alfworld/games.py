"""Find ALFWorld games, their splits and task types, and whether they are official."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import monotonic

from atod_gym.datasets import data_set
from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.houses import (
    GENERATOR_VERSION,
    HOUSE_SIZES,
    SPLIT_SIZES,
    TASK_TYPES,
    generated_task_ids,
    read_task_id,
)
from atod_gym.errors import DataNotFoundError, InvalidGameError, InvalidSettingError
from atod_gym.tasks import DataSource, TaskManifest, announce_once, content_hash, data_label, locate

SPLITS = tuple(SPLIT_SIZES)
"""The splits of official and of generated data; other folders of games may have others."""

GAME_FILE = "game.tw-pddl"
OFFICIAL_FOLDER = "json_2.1.1"
_OFFICIAL = "alfworld/official"
"""Name of manifests whose content hash is the published one."""

_CONFIG_NAMES = {
    "eval_in_distribution": "valid_seen",
    "eval_out_of_distribution": "valid_unseen",
}
"""Split names of ALFWorld's own configuration files."""

_PAUSE = 10.0
"""Pause between two looks at the files of a split, relative to the time of a look."""
_known_states: dict[tuple[Path, str], tuple[float, int]] = {}
"""Folder and part of a split -> time of the next look, and the state."""
_SOLVABLE = re.compile(rb'"solvable"\s*:\s*true')
# Task kinds that the official package leaves out, too.
_UNSUPPORTED = ("movable", "Sliced")
_NOT_IN_TEXT = (
    "with a movable receptacle or a sliced object, which ALFWorld leaves out, too, because they "
    "cannot be won in text"
)
_OTHER_TYPE = f"of a task type other than {', '.join(TASK_TYPES)}"
_UNSOLVABLE = 'whose file does not say "solvable": true'


@dataclass(frozen=True, slots=True)
class Games:
    """The playable games of one split."""

    manifest: TaskManifest
    types: Mapping[str, str]
    """Task id -> one of `TASK_TYPES`, in manifest order."""
    label: str = "generated"
    """`info["data"]`: `official`, `generated` or the path of the games."""
    folder: Path | None = None
    """The folder `<task>/<trial>/game.tw-pddl` of the split; None: generated on demand."""

    @property
    def is_official(self) -> bool:
        """Whether the content hash is the published one."""
        return self.manifest.name == _OFFICIAL

    def game(self, task_id: str) -> Path | dict[str, object]:
        """Return the game file of a task, or the content of a generated one."""
        return self._file(task_id) or generate_game(task_id)

    def describe(self, task_id: str) -> str:
        """Return a name for error messages: the path of the file where there is one."""
        return str(self._file(task_id) or f"generated game {task_id}")

    def _file(self, task_id: str) -> Path | None:
        return self.folder and self.folder.joinpath(*task_id.split("/"), GAME_FILE)


def open_games(data: str | os.PathLike[str], split: str, house_size: str) -> Games:
    """Resolve the settings `data` and `split`.

    Args:
        data: `official`, `generated`, `auto` (the games found in the usual folders, else generated
            ones) or a path: a folder of splits, of one split or of one task, or a single game.
        split: name of the split.
        house_size: size of generated houses; unused for files.

    Raises:
        InvalidSettingError: if `data` is empty or the house size is unknown.
        DataNotFoundError: if the data or the split is missing; names the known splits, or how
            to get the data.
    """
    found = locate(data, SOURCE, lambda place: _is_official(place, split))
    if found is None:
        if split not in SPLITS:
            raise _no_split(split, "the generated games", SPLITS)
        if house_size not in HOUSE_SIZES:
            raise InvalidSettingError(
                f"Unknown house_size {house_size!r}; known: {', '.join(HOUSE_SIZES)}."
            )
        return _generated(split, house_size)
    folders, part = _splits(found)
    if split not in folders:
        raise _no_split(split, str(found), folders)
    games, left_out = _read_recent(folders[split], part)
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not games.types:
        raise DataNotFoundError(f"No game in {folders[split]} can be played. Left out: {reasons}.")
    label = data_label(data, found, is_official=games.is_official, how_to_get=SOURCE.how_to_get)
    if left_out and not games.is_official:
        announce_once(f"ALFWorld: games in {folders[split]} are left out: {reasons}.")
    return replace(games, label=label)


def _is_official(place: Path, split: str) -> bool:
    folders, part = _splits(place)
    return split in folders and _read_recent(folders[split], part)[0].is_official


def _no_split(split: str, where: str, known: Iterable[str]) -> DataNotFoundError:
    meant = _CONFIG_NAMES.get(split)
    hint = f" {split} in ALFWorld's own settings corresponds to the split {meant}." if meant else ""
    return DataNotFoundError(f"No split {split!r} in {where}; known: {', '.join(known)}.{hint}")


@lru_cache(maxsize=64)
def _generated(split: str, house_size: str) -> Games:
    task_ids = generated_task_ids(split, house_size)
    # The games follow from their ids and the version of the generator.
    lines = "\n".join([f"generator {GENERATOR_VERSION}", *task_ids])
    digest = hashlib.sha256(lines.encode()).hexdigest()
    manifest = TaskManifest(f"alfworld/generated-{house_size}", split, task_ids, digest)
    return Games(manifest, {task_id: read_task_id(task_id)[2] for task_id in task_ids})


# -- finding -------------------------------------------------------------------------------------


def find_games(path: Path) -> Path | None:
    """Return the folder of the games in or at a path; None: there are none.

    That is a folder of splits, of one split or of one task, or the trial folder of a single game.
    A folder counts only if it contains game files, whatever its name.
    """
    if path.name == GAME_FILE and path.is_file():
        path = path.parent
    candidates = (path / OFFICIAL_FOLDER, path / "alfworld" / OFFICIAL_FOLDER, path)
    return next((folder for folder in candidates if _depth(folder) is not None), None)


SOURCE = DataSource(
    name="alfworld",
    title="ALFWorld",
    find=find_games,
    expected=(
        f"a folder with {OFFICIAL_FOLDER}/<split>/<task>/<trial>/{GAME_FILE} (the folder "
        f"{OFFICIAL_FOLDER}, that of a split, or one game will do)"
    ),
    how_to_get=(
        "run atod-data get alfworld (or alfworld-download of the package alfworld); data that lies "
        "elsewhere is found through the environment variable ALFWORLD_DATA or ATOD_DATA (the "
        f"folder that holds {OFFICIAL_FOLDER})"
    ),
    generated="generated games",
    variables=("ALFWORLD_DATA",),
)
"""The places in which official games are searched."""


def _depth(folder: Path) -> int | None:
    """Return how many folders lie between `folder` and game files: 3 for a folder of splits."""
    return next((depth for depth in (3, 2, 1, 0) if _holds_games(folder, depth)), None)


def _holds_games(folder: Path, depth: int) -> bool:
    """Return whether a game file lies `depth` folders below; of other trees little is read."""
    if depth == 0:
        return (folder / GAME_FILE).is_file()
    try:
        return any(
            _holds_games(child, depth - 1)
            for child in _folders(folder)
            if depth != 2 or child.name.startswith(("pick_", "look_at_obj"))
        )
    except OSError:
        return False


def _splits(found: Path) -> tuple[dict[str, Path], str]:
    """Return the split folders by name, and the selected part of a split; empty: all."""
    depth = _depth(found)
    if depth == 3:
        every = sorted(_folders(found))
        return {folder.name: folder for folder in every if _holds_games(folder, 2)}, ""
    place = Path(os.path.abspath(found))
    if depth == 2:
        return {place.name: place}, ""
    folder = place.parent if depth == 1 else place.parent.parent
    return {folder.name: folder}, place.relative_to(folder).as_posix()


def _folders(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if entry.is_dir())


# -- reading -------------------------------------------------------------------------------------


def scan_games(root: Path, split: str) -> TaskManifest:
    """Return the manifest of a split from its current files.

    Raises:
        InvalidGameError: if a game file cannot be read.
    """
    return _read_split(root / split, "", _state(root / split))[0].manifest


@lru_cache(maxsize=64)
def _read_split(folder: Path, part: str, state: int) -> tuple[Games, Mapping[str, int]]:
    """Read every game file of a split, as bytes: parsing them all would take a minute.

    Args:
        folder: the folder of the split.
        part: read only `<task>` or `<task>/<trial>`; empty: all.
        state: from `_state`; while it is the same, the files are read once.

    Returns:
        The games, and how many are left out by reason.

    Raises:
        InvalidGameError: if a file or folder cannot be read.
    """
    del state
    digests: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    try:
        for path, *_ in _game_files(folder, part):
            task, trial = path.split(os.sep)[-3:-1]
            if any(word in task for word in _UNSUPPORTED):
                left_out[_NOT_IN_TEXT] += 1
            elif task.partition("-")[0] not in TASK_TYPES:
                left_out[_OTHER_TYPE] += 1
            elif _SOLVABLE.search(content := Path(path).read_bytes()) or _is_damaged(content):
                digests[f"{task}/{trial}"] = hashlib.sha256(content).hexdigest()
            else:
                left_out[_UNSOLVABLE] += 1
    except OSError as error:
        raise InvalidGameError(f"Cannot read {error.filename}: {error.strerror}.") from error
    task_ids, digest = tuple(sorted(digests)), content_hash(digests)
    is_official = digest == data_set("alfworld").manifest_hashes.get(folder.name)
    manifest = TaskManifest(
        _OFFICIAL if is_official else "alfworld/files", folder.name, task_ids, digest
    )
    # Task types are few: one text each, not one per task.
    types = {task_id: sys.intern(task_id.partition("-")[0]) for task_id in task_ids}
    return Games(manifest, types, folder=folder), left_out


def _game_files(folder: Path, part: str) -> Iterator[tuple[str, int, int]]:
    """Yield the path, modification time and size of each game file of a split or its part."""
    only_task, _, only_trial = part.partition("/")
    for task in [folder / only_task] if only_task else _folders(folder):
        for trial in [task / only_trial] if only_trial else _folders(task):
            path = os.path.join(trial, GAME_FILE)
            with suppress(FileNotFoundError):  # Official data has trials without a game.
                status = os.stat(path)
                yield path, status.st_mtime_ns, status.st_size


def _state(folder: Path, part: str = "") -> int:
    """Return a hash of the state of the game files; a large split takes a tenth of a second."""
    with suppress(OSError):  # `_read_split` reports it.
        return hash(frozenset(_game_files(folder, part)))
    return 0


def _read_recent(folder: Path, part: str) -> tuple[Games, Mapping[str, int]]:
    """Return the games of a split; many environments that are made at once share a state."""
    begun = monotonic()
    until, state = _known_states.get((folder, part), (begun, 0))
    if begun >= until:
        state = _state(folder, part)
        ended = monotonic()
        _known_states[folder, part] = ended + _PAUSE * (ended - begun), state
    return _read_split(folder, part, state)


def _is_damaged(content: bytes) -> bool:
    """Return whether a file is not JSON: such a game stays a task, whose reset names the file.

    Leaving it out would make a split smaller without a message.
    """
    if b'"solvable"' in content:
        return False
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False
