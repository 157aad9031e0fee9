"""Memory that runs out, and memory of the processor that is free again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from atod_gym.errors import AtodError


def give_back() -> None:
    """Gives back what the C library keeps of freed memory; where it cannot, nothing happens.

    glibc holds on to freed pieces below the last one in use. Rollouts, updates and evaluations ask
    for pieces of different sizes, and so a process grows from step to step: of SmolLM2-135M, which
    holds 2 GB between steps, to 12 GB in an hour. Giving back takes less than 0.1 s.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Any:
    """The function of glibc; None in other C libraries."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


class OutOfMemory(AtodError):
    """Memory of the device or the processor ran out; the message says what needs less."""


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """Turn an error of an allocator into one line.

    Args:
        doing: what was being done, such as `making the update`.
        advice: which settings to change.

    Raises:
        OutOfMemory: an allocation failed within.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            part in text for part in ("allocate memory", "out of memory", "ALLOC_FAILED")
        )
        if not is_memory:
            raise
        cause = text.partition("\n")[0].partition(". ")[0]
        raise OutOfMemory(f"Memory ran out while {doing} ({cause}). {advice}") from error
