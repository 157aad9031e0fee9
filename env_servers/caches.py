"""Locate the cache of indexes, vectors and catalogues that servers make from data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$ATOD_CACHE`, else `$XDG_CACHE_HOME/atod`, else `~/.cache/atod`.

    An empty variable counts as not set. The folder need not exist.

    Raises:
        ValueError: the folder is below a home folder that does not exist.
    """
    if configured := os.environ.get("ATOD_CACHE"):
        return expanded(configured)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "atod"


def expanded(text: str) -> Path:
    """Return a path; a `~` or `~user` at its beginning becomes the home folder.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder for {text}: give the full path") from None
