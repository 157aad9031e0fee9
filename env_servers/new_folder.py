"""Create folders that are complete or absent, even if the process is killed while filling them."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends without an error.

    If another process has created `folder` meanwhile, that one is kept. Folders left
    over from a killed process are deleted: each folder that is being filled has a locked file next
    to it, and the lock ends with the process that holds it.

    Raises:
        OSError: if files cannot be written.
    """
    # Imported here: it takes 5 MB, and shops in memory make no folder.
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-partial-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*.lock"):
        with contextlib.suppress(Timeout, OSError), FileLock(left, timeout=0):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    partial = folder.parent / f"{prefix}{secrets.token_hex(4)}"
    lock = partial.with_suffix(".lock")
    with FileLock(lock):
        try:
            partial.mkdir()
            yield partial
            _write_through(partial)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)


def _write_through(folder: Path) -> None:
    """Flush the files to disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            # Opened for writing, as Windows requires.
            with path.open("r+b") as file:
                os.fsync(file.fileno())
