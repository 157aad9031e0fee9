"""Fetches one file: whole and right in its place, or not there at all.

A download that was cut off, even by a kill, goes on where it stopped. Only when length, hash and
content are right does the file get its name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from atod_gym.download_http import PATIENCE, HttpDownload, Patience, Source
from atod_gym.download_progress import Progress
from atod_gym.errors import DownloadError
from atod_gym.part_files import discard, explained, part_of, put_in_place, sha256_of

_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is in its place."""

    size: int
    sha256: str


def fetch(
    source: Source,
    target: Path,
    *,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    patience: Patience = PATIENCE,
) -> Fetched:
    """Brings a file to its place; what is there is replaced.

    Args:
        source: the file.
        target: its place; folders are made.
        progress: told what happens; None: nobody.
        check: raises DownloadError if the content of the file that it is given is wrong.
        patience: how long to wait.

    Raises:
        DownloadError: if the file cannot be had or is not the right one; `target` is untouched.
        InvalidSettingError: if the folder cannot be used or the URL has no meaning.
    """
    progress = Progress(quiet=True) if progress is None else progress
    part = part_of(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(target))
        digest = _fetch_part(source, part, progress, patience)
        if check is not None:
            try:
                check(part)
            except DownloadError:
                discard(part)
                raise
        size = part.stat().st_size
        put_in_place(part, target)
    return Fetched(size, digest)


def _fetch_part(source: Source, part: Path, progress: Progress, patience: Patience) -> str:
    """Completes the .part file and returns its hash, which is right if one is known."""
    for may_join in (True, False):
        is_joined = False
        if not may_join:
            discard(part)
        if "://" in source.url:
            is_joined = HttpDownload(source, part, progress, patience).run()
        else:
            _copy(source, part, progress)
        size = part.stat().st_size
        if source.size is not None and size != source.size:
            discard(part)
            raise DownloadError(f"{source.url} has {size} bytes instead of {source.size}.")
        digest = sha256_of(part, progress)
        if source.sha256 is None or digest == source.sha256:
            return digest
        discard(part)
        if not (is_joined and may_join):
            raise DownloadError(
                f"{source.url} is not the file that is expected: its SHA-256 is {digest} instead "
                f"of {source.sha256}. Nothing was kept."
            )
        # The pieces may be of different versions; the next round joins nothing.
        progress.note("The pieces do not fit together; beginning anew.")
    raise AssertionError("the second round returns or raises")


def _copy(source: Source, part: Path, progress: Progress) -> None:
    path = Path(source.url)
    discard(part)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DownloadError(f"Cannot read {path}: {error.strerror or error}.") from error
    with file, part.open("wb") as copy:
        total = os.fstat(file.fileno()).st_size
        progress.begin(path.name, 0, total)
        while chunk := file.read(_CHUNK):
            copy.write(chunk)
            progress.advance(copy.tell())
        progress.end(copy.tell())
