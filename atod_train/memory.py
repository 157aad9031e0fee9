"""Memory of the CPU and of devices: return what was freed, explain what ran out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from atod_gym.errors import AtodError


def give_back() -> None:
    """Return freed memory to the system where the C library is glibc.

    glibc keeps freed blocks below the last one in use. Rollouts, updates and evaluations allocate
    different sizes, so a process grows from step to step: with SmolLM2-135M, which holds 2 GB
    between steps, to 12 GB in an hour. A call takes less than 0.1 s.
    """
    with suppress(OSError, AttributeError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


class OutOfMemory(AtodError):
    """Memory of a device or of the CPU ran out; the message says what needs less."""


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """Raise errors of allocators as one line with advice.

    Args:
        doing: what needs the memory, such as `updating the weights`.
        advice: settings to change.

    Raises:
        OutOfMemory: an allocation failed within.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        parts = ("allocate memory", "out of memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(part in text for part in parts):
            raise
        cause = text.partition("\n")[0].partition(". ")[0]
        raise OutOfMemory(f"Memory ran out while {doing} ({cause}). {advice}") from error
