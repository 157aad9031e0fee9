"""Make results files of invented studies: all of their content comes from the test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODES = ("greedy", "sampled")
SETTINGS = {
    "env": {"max_turns": 30, "data": "generated"},
    "model": {"student": "tiny"},
}


def evaluation(bits: str, step: int | None = None) -> dict[str, Any]:
    rate = bits.count("1") / len(bits)
    record: dict[str, Any] = {"success": bits, "success_rate": rate, "score": rate}
    return record if step is None else {"step": step, **record}


def evaluations(by_split: Mapping[str, str], step: int | None = None) -> dict[str, Any]:
    """Both modes of every split with the same successes."""
    return {
        f"{split}/{mode}": evaluation(bits, step)
        for split, bits in by_split.items()
        for mode in MODES
    }


def run(
    label: str,
    seed: int,
    last: Mapping[str, str],
    best: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A run of three steps whose last evaluations were `last`: split -> its bits."""
    return {
        "label": label,
        "seed": seed,
        "algorithm": {"method": label},
        "train": {"steps": 3, "seed": seed, "eval_every": 1},
        "minutes": 2.0,
        "tokens": 4000,
        "episodes": 48,
        "seconds": {"environment": 10.0, "generation": 60.0, "update": 20.0, "other": 10.0},
        "last": evaluations(last, 3),
        "best": evaluations(best or last, 2),
        "course": {key: [[3, found["success_rate"]]] for key, found in evaluations(last).items()},
        "metrics": {"kappa": [1.0, 0.5, 0.1], "rho": [1.0, None, 2.0]},
        **more,
    }


def environment(
    runs: Sequence[Mapping[str, Any]],
    start: Mapping[str, str],
    teacher: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    return {
        "env_id": "some/Env-v0",
        "data": {"name": "generated", "hash": "c0ffee"},
        "packages": {"atod": "0.1.0"},
        **SETTINGS,
        "tasks": {
            split: [f"{split}-{number}" for number in range(len(bits))]
            for split, bits in start.items()
        },
        "start": evaluations(start),
        "teacher": evaluations(teacher),
        "runs": list(runs),
        **more,
    }


def write(path: Path, **environments: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(environments), encoding="utf-8")
    return path
