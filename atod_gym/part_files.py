"""The beginnings of files: where they lie, which file they belong to, and how they get their name.

What has come of a download so far lies in `<name>.part`, and `<name>.part.json` says which file it
is the beginning of.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from atod_gym.download_progress import Progress
from atod_gym.errors import DownloadError, InvalidSettingError

_SHOWN_FROM = 20 << 20
_UNUSABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
     errno.ENAMETOOLONG}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Begun:
    """What a .part file is the beginning of."""

    url: str
    etag: str | None
    last_modified: str | None
    total: int | None

    @property
    def validator(self) -> str | None:
        """What tells versions of the file apart; weak entity tags do not."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


def part_of(target: Path) -> Path:
    """Where the beginning of a file lies until all of it is there."""
    return target.with_name(f"{target.name}.part")


def read_begun(part: Path) -> Begun | None:
    """What a .part file is the beginning of; None: nothing that is known."""
    try:
        return Begun(**json.loads(_state_of(part).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write_begun(part: Path, begun: Begun) -> None:
    """Remembers it; what is in the .part file must be of that file or nothing."""
    state = _state_of(part)
    fresh = state.with_name(f"{state.name}.new")
    fresh.write_text(json.dumps(asdict(begun), indent=1), encoding="utf-8")
    os.replace(fresh, state)


def size_of(part: Path) -> int:
    """Bytes; none if there is no such file."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


def discard(part: Path) -> None:
    """Forgets a beginning."""
    part.unlink(missing_ok=True)
    _state_of(part).unlink(missing_ok=True)


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """The hash of a file, in hexadecimal; `progress` is told of large files only."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        shown = progress if size > _SHOWN_FROM else None
        if shown is not None:
            shown.begin(f"checking {path.name.removesuffix('.part')}", 0, size)
        while chunk := file.read(1 << 20):
            total.update(chunk)
            if shown is not None:
                shown.advance(file.tell())
        if shown is not None:
            shown.end(file.tell())
    return total.hexdigest()


def put_in_place(part: Path, target: Path) -> None:
    """Gives a complete file its name, so that even a power cut leaves all of it or nothing."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    _state_of(part).unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Says what to do about errors of the file system.

    Raises:
        DownloadError: if the disk is full, or an error may be gone the next time.
        InvalidSettingError: if the place cannot be used.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or target
        reason = error.strerror or str(error)
        if error.errno in _UNUSABLE:
            raise InvalidSettingError(
                f"Cannot write {path}: {reason}. Choose another folder with --to."
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"No room left for {path}: {reason}. Make room and give the same command again; it "
                "goes on where it stopped."
            ) from error
        raise DownloadError(f"Cannot write {path}: {reason}.") from error


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")
