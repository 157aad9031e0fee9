"""The hash of a file's bytes, remembered, so that large files are not read at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from env_servers.retrieval.corpus import CorpusError

_BLOCK = 1 << 20


def file_hash(path: Path, notes: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits.

    Args:
        path: the file.
        notes: folder with one note per file: its size, its time of change, and its hash. The hash
            is taken from there if neither size nor time are other ones.

    Raises:
        CorpusError: the file cannot be read.
    """
    place = path.resolve()
    try:
        stat = place.stat()
        state = {"path": str(place), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        note = notes / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.json"
        known = _noted(note, state)
        if known is not None:
            return known
        digest = hashlib.sha256()
        with place.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        raise CorpusError(f"There is no corpus file {path}.") from None
    except IsADirectoryError:
        raise CorpusError(f"{path} is a folder; give the corpus file in it.") from None
    except OSError as error:
        raise CorpusError(f"Cannot read {path}: {error.strerror or error}.") from error
    # Without the note the file is read again next time, no more.
    with contextlib.suppress(OSError):
        notes.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**state, "sha256": digest.hexdigest()}), encoding="utf-8")
        fresh.replace(note)
    return digest.hexdigest()


def _noted(note: Path, state: dict[str, object]) -> str | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = content.pop("sha256", None) if isinstance(content, dict) else None
    return known if isinstance(known, str) and content == state else None
