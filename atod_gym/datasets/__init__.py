"""The official data sets: their files, sources and published hashes.

`catalogue()` imports no download code, so environments use it to check whether data is the official
one. `atod-data` downloads (get.py) and checks (verify.py) the data.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from atod_gym.errors import InvalidSettingError

RECORD_FILE = "atod-data.json"
"""Next to the data: {data set: {file: {sha256, url}}} of each download."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to download; None: not known.

    `name` is its path in the folder of the data set and of a mirror, `size` is in bytes, `entries`
    are the lines of JSON lines, or the entries of a JSON list or object.
    """

    name: str
    url: str = ""
    size: int | None = None
    sha256: str | None = None
    entries: int | None = None


@dataclass(frozen=True, slots=True)
class DataSet:
    """Files that belong together; sizes in bytes, approximate."""

    name: str
    title: str
    source: str
    licence: str
    cache: str
    """Name of the folder in the user's cache."""
    variable: str
    """Environment variable that names a folder with this data."""
    files: tuple[DataFile, ...]
    download_size: int
    unpacks_to: str = ""
    """Folder or file inside the downloaded archive; empty: the files are not archives."""
    unpacked_size: int = 0
    manifest_hashes: Mapping[str, str] = field(default_factory=dict)
    """Split -> content hash of its task manifest (ALFWorld)."""

    @property
    def entries(self) -> dict[str, int]:
        """Return the published number of entries by file name, for the files that have one."""
        return {file.name: file.entries for file in self.files if file.entries is not None}

    @property
    def places(self) -> tuple[str, ...]:
        """Return the paths in the folder that exist when the data set is complete."""
        return (self.unpacks_to,) if self.unpacks_to else tuple(file.name for file in self.files)


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, DataSet]:
    """Return the official data sets by name, as catalogue.toml lists them."""
    rows = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    sets = {}
    for name, row in rows.items():
        base, files = row.pop("base", ""), row.pop("files")
        files = tuple(DataFile(**{"url": base + file["name"], **file}) for file in files)
        sets[name] = DataSet(name, files=files, **row)
    return sets


def data_set(name: str) -> DataSet:
    """Return a data set by its name; raise InvalidSettingError with the known names if unknown."""
    if name not in catalogue():
        raise InvalidSettingError(f"Unknown data set {name!r}; known: {', '.join(catalogue())}.")
    return catalogue()[name]
