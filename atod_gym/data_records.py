"""What was downloaded into a folder, and the lock that keeps two downloads from one folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from atod_gym.errors import DownloadError
from atod_gym.part_files import part_of, put_in_place

RECORD_FILE = "atod-data.json"
LOCK_FILE = ".atod-data.lock"


@dataclass(slots=True)
class Record:
    """The files of one data set as they came: what `verify` compares with."""

    downloads: list[dict[str, Any]] = field(default_factory=list)
    """Of each download its name, URL, SHA-256, size and time."""
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Path in the folder -> SHA-256 in hexadecimal, bytes; unpacked files are here as well."""

    def add_download(self, name: str, url: str, sha256: str, size: int) -> None:
        """Takes down a download that was just completed."""
        self.downloads = [one for one in self.downloads if one.get("name") != name]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"name": name, "url": url, "sha256": sha256, "size": size, "time": now}
        self.downloads.append(entry)


def read_record(folder: Path, name: str) -> Record:
    """The record of a data set; empty if there is none that can be read."""
    try:
        entry = _read(folder)[name]
        files = {path: (str(one[0]), int(one[1])) for path, one in entry["files"].items()}
        return Record([dict(one) for one in entry["downloads"]], files)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return Record()


def write_record(folder: Path, name: str, record: Record) -> None:
    """Keeps a record beside the data; those of other data sets stay as they are."""
    sets = _read(folder)
    sets[name] = {"downloads": record.downloads, "files": record.files}
    part = part_of(folder / RECORD_FILE)
    part.write_text(json.dumps({"data_sets": sets}, indent=0), encoding="utf-8")
    put_in_place(part, folder / RECORD_FILE)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one process; the lock ends with it, however it ends.

    Raises:
        DownloadError: if another process holds it.
    """
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        # Where nothing can be written nothing can collide; data that is whole can still be found.
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(
                f"Another process is downloading into {folder}. Wait until it is done, or choose "
                "another folder with --to."
            ) from error
        yield
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, Any]:
    try:
        sets = json.loads((folder / RECORD_FILE).read_bytes())["data_sets"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return sets if isinstance(sets, dict) else {}
