"""A folder that is there whole or not at all, also when what fills it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# So young a folder may be one that its maker has not locked yet.
_YOUNG_SECONDS = 60


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it becomes `folder` when the block ends without an error.

    Where `folder` has appeared meanwhile, made by another process, that one stays. What a killed
    process left behind on its way to the same folder is deleted.

    Raises:
        OSError: if files cannot be written there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-partial-"
    for path in folder.parent.glob(f"{glob.escape(prefix)}*"):
        with _locked(path) as was_free:
            if was_free and time.time() - path.stat().st_mtime > _YOUNG_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        with _locked(partial):
            yield partial
            _write_through(partial)
            partial.chmod(0o755)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process got the folder's lock, which goes with the process that holds it."""
    with contextlib.ExitStack() as closing:
        try:
            handle = os.open(folder, os.O_RDONLY)
            closing.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Held by another process, gone, or a file system without locks.
            is_locked = False
        else:
            is_locked = True
        yield is_locked


def _write_through(folder: Path) -> None:
    """Makes sure that the content of the files reaches the disk before the folder's name does."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
