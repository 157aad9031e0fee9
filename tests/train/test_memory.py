"""Check that memory freed below blocks in use is returned to the system."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from atod_train.memory import give_back

PIECES = """
import ctypes
from pathlib import Path
from atod_train.memory import give_back

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) // 1024

# Below the size from which a piece is a mapping of its own.
pieces = [ctypes.create_string_buffer(b"x" * 100_000) for _ in range(2000)]
last = pieces.pop()
full = resident()
del pieces
held = resident()
give_back()
print(full, held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PIECES], check=True, capture_output=True, text=True
    )
    full, held, after = map(int, done.stdout.split())
    assert after < full - 150, (full, held, after)
    assert after <= held


def test_other_c_libraries_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()
