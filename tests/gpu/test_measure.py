"""The script for GPUs runs on a processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_part_runs_on_a_processor(tmp_path: Path) -> None:
    script, file = Path(__file__).with_name("measure.py"), tmp_path / "measure.json"
    done = subprocess.run(
        [sys.executable, str(script), "--small", "--json", str(file)],
        check=False, capture_output=True, text=True, timeout=280, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["part"] for row in rows} == {"families", "methods", "resume", "speed", "trl"}
    assert all(row["is_right"] for row in rows)
    assert done.stdout.count("| ok |") == len(rows)
