"""Episodes inside TRL whose tokens vLLM samples, colocated and from a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'atod-gym[trl]'")

if TYPE_CHECKING:
    from served_vllm import ServedVllm

HERE = Path(__file__).parent


def steps(folder: Path, launcher: list[str], *arguments: object) -> list[dict[str, Any]]:
    """The steps of `trl_steps.py` in a process, or processes, of their own."""
    root = str(HERE.parent.parent)
    environment = {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, *launcher, str(HERE / "trl_steps.py"), *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=folder, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return [
        step
        for file in sorted(folder.glob("steps-*.json"))
        for step in json.loads(file.read_text())
    ]


def test_a_colocated_engine_samples_from_the_weights_of_each_step(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    longest = 200
    first, second = steps(tmp_path, [], smollm2_folder, "colocate", "chat", 2, longest)
    for step in (first, second):
        assert step["drift"] < 1e-4
        assert step["ratio"] < 1e-2
        # Episodes end where the next turn would not fit the engine, which would refuse it.
        assert step["longest"] <= longest
    assert min(first["turns"] + second["turns"]) < 3
    # The teacher is the start: the weights that the second step is sampled from are others.
    assert first["log_ratio"] < 1e-5
    assert second["log_ratio"] > 1e-3


def test_processes_share_a_server_though_their_episodes_differ_in_length(
    smollm2_folder: Path, vllm_server: ServedVllm, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = (smollm2_folder, vllm_server.url, "window", 1, 0)
    one, other = steps(tmp_path, launcher, *arguments)
    assert (one["turns"], other["turns"]) == ([3.0, 3.0], [4.0, 4.0])
    assert (one["rows"], other["rows"]) == (8, 8)
    for step in (one, other):
        # Each process has the completions of its own prompts, or the log-probs would differ.
        assert step["drift"] < 1e-4
        assert step["ratio"] < 1e-2
