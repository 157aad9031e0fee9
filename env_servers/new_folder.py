"""Create folders that are complete or absent, once, by the first of several processes."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REPORT_SECONDS = 10.0

_LOG = logging.getLogger("env_servers")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends without an error.

    Yields None if `folder` has files already, perhaps after waiting for another process that
    is filling it. What a killed process has left is deleted.

    Raises:
        OSError: if files cannot be written.
    """
    if _has_files(folder):
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if _has_files(folder):
            yield None
            return
        partial = folder.parent / f".{folder.name}-partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            _write_through(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Wait until no other process makes a file or folder.

    The lock is a hidden file next to it. It is deleted only when there is `target`: a process that
    waited for it and one that locks a new file must not both make `target`.
    """
    # Imported here: it takes 5 MB, and shops in memory make no folder.
    from filelock import FileLock, Timeout

    path = target.parent / f".{target.name}.lock"
    lock = FileLock(path)
    # Some file systems have no locks; then two concurrent processes do the same work twice.
    with suppress(NotImplementedError):
        while not lock.is_locked:
            try:
                lock.acquire(_REPORT_SECONDS)
            except Timeout:
                _LOG.warning("Waiting for another process that is making %s.", target)
    try:
        yield
    finally:
        if target.exists():
            with suppress(OSError):
                path.unlink()
        lock.release()


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _write_through(folder: Path) -> None:
    """Flush the files to disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            # Opened for writing, as Windows requires.
            with path.open("r+b") as file:
                os.fsync(file.fileno())
