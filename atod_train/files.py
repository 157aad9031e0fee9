"""Read and write the trainer's files: JSON, JSON lines, and files replaced atomically.

All text is UTF-8, lines end in a line feed. NaN and infinity are written as null.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atod_gym.errors import AtodError

PARTIAL = ".partial"
"""Suffix of a file that is being written; a remaining one was left by a killed process."""


class FileError(AtodError):
    """A file is damaged, absent, or cannot be used."""


def without_infinities(value: Any) -> Any:
    """Return a JSON value with None for NaN and infinity, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return value


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Replace a file atomically: at every moment `path` is the complete old or new file.

    Args:
        path: the file, in a folder that exists.
        sync: flush file and folder to disk, so that a power failure loses neither.

    Yields:
        The path to write to. It is renamed when the block ends, and deleted if the block raises.
        The file is readable as the umask allows, even if a library makes it private.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        if sync:
            _sync(partial)
        os.replace(partial, path)
        if sync:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path, identity: str, *, last: str) -> Iterator[Path]:
    """Replace a folder of files: it appears when it is complete.

    Args:
        target: the folder, which may exist.
        identity: name of a file. If it is equal in the existing folder, files are replaced
            one by one, so that each exists at every moment; otherwise the
            folder is replaced as a whole, since files must not be mixed.
        last: glob of the files that are replaced last.

    Yields:
        The folder to write to, deleted if the block raises; `target` is then unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    previous = target.with_name(f".{target.name}.previous")
    # Models of a cache are saved by several processes.
    with locked(target.parent, wait=True):
        if previous.exists() and not target.exists():  # killed between the two renames below
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
        try:
            yield partial
            old, new = target / identity, partial / identity
            if not old.is_file() or old.read_bytes() != new.read_bytes():
                if target.exists():
                    target.rename(previous)
                partial.rename(target)
                shutil.rmtree(previous, ignore_errors=True)
                return
            files = sorted(partial.iterdir(), key=lambda file: file.match(last))
            for file in files:
                os.replace(file, target / file.name)
            names = {file.name for file in files}
            for file in target.iterdir():
                if file.name not in names and file.is_file():
                    file.unlink()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk; systems that cannot open folders skip those."""
    with suppress(PermissionError):  # Windows and folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path, otherwise: str = "", *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process in any case.

    Args:
        folder: an existing folder.
        otherwise: the alternative to waiting, for the error.
        wait: wait for another process instead of raising the error.

    Raises:
        FileError: another process has locked it.
    """
    lock = FileLock(folder / ".lock")
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise FileError(
            f"Another process writes to {folder}: wait for it, or {otherwise}."
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(without_infinities(value), indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty dict if the file is absent.

    Raises:
        FileError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}); remove or repair it") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} is not a JSON object; remove or repair it")
    return value


def read_json_lines(
    path: Path, *, required: bool = False, integer: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, one after the other.

    A last line without line end that is not JSON is torn: the process was killed while writing.

    Args:
        path: the file.
        required: it must exist, and a torn line is an error. Otherwise an
            absent file has no lines, and a torn line is left out.
        integer: a key that every object must have, with an integer as value.

    Raises:
        FileError: the file cannot be read, or a line is not a JSON object.
    """
    if not required and not path.exists():
        return
    try:
        # Only "\n" ends a record: text mode would also split at "\r" inside texts.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError("no JSON object")
                    if integer and not isinstance(value.get(integer), int):
                        raise ValueError(f"no {integer}")
                except ValueError as error:
                    if not required and not line.endswith(b"\n"):
                        return
                    raise FileError(
                        f"line {number} of {path} is broken ({error}); remove that line"
                    ) from error
                yield value
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def end_last_line(path: Path) -> None:
    """Prepare a JSON-lines file for appending: end its last line, or remove it if it is torn."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        last = content.rfind(b"\n") + 1
        try:
            json.loads(content[last:])
        except ValueError:
            file.truncate(last)
        else:
            file.write(b"\n")
