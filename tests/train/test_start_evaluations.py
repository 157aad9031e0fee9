"""Evaluations of start and teacher are made once for a folder, and survive a kill one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atod_train.config import (
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.reports.evaluations import Evaluation
from atod_train.reports.run_folder import FileError
from atod_train.rollout.env_pool import EnvPool
from atod_train.training import starts
from atod_train.training.starts import evaluate_start

CONFIG = RunConfig(
    env=EnvConfig(
        data="generated",
        options={"house_size": "tiny"},
        max_turns=12,
        eval_splits=("valid_seen",),
        eval_tasks=3,
    ),
    model=ModelConfig(student="mini", teacher="mini"),
    start=StartConfig(demonstrations=8, epochs=(0.5, 0.5)),
    train=TrainConfig(max_completion_tokens=8),
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The modes that were evaluated, in order; models are cached in a folder of the test."""
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    modes: list[str] = []

    def counted(policy: Any, pool: Any, config: Any, mode: Any, *others: Any) -> Any:
        modes.append(mode)
        return evaluate(policy, pool, config, mode, *others)

    monkeypatch.setattr(starts, "evaluate", counted)
    return modes


def _evaluated(folder: Path, config: RunConfig = CONFIG) -> list[Evaluation]:
    return evaluate_start(config, "student", "valid_seen", folder, Processes())


def test_what_is_kept_is_not_made_again(made: list[str], tmp_path: Path) -> None:
    first = _evaluated(tmp_path)
    assert made == ["greedy", "sampled"]
    assert [(e.step, e.model, e.result.mode) for e in first] == [
        (0, "student", "greedy"), (0, "student", "sampled")
    ]  # fmt: skip
    assert len(first[0].result.tasks) == 3
    # Another method has the same start, and a teacher's server may move.
    other = replace(
        CONFIG,
        algorithm=replace(CONFIG.algorithm, method="grpo"),
        model=replace(CONFIG.model, teacher="http://10.0.0.2:8000", device=("cpu",)),
    )
    assert _evaluated(tmp_path, other) == first
    assert made == ["greedy", "sampled"]


@pytest.mark.slow
def test_a_kill_between_two_evaluations_loses_one(made: list[str], tmp_path: Path) -> None:
    first = _evaluated(tmp_path)
    (tmp_path / "evaluations" / "student-valid_seen-sampled.json").unlink()
    made.clear()
    assert _evaluated(tmp_path) == first
    assert made == ["sampled"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"train": replace(CONFIG.train, max_completion_tokens=6)}, id="tokens"),
        pytest.param({"start": replace(CONFIG.start, epochs=(0.6, 0.5))}, id="start"),
    ],
)
def test_other_settings_are_evaluated_again(
    change: dict[str, Any], made: list[str], tmp_path: Path
) -> None:
    _evaluated(tmp_path)
    made.clear()
    _evaluated(tmp_path, replace(CONFIG, **change))
    assert made == ["greedy", "sampled"]


@pytest.mark.slow
def test_other_tasks_are_evaluated_again(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _evaluated(tmp_path)
    made.clear()

    class Changed(EnvPool):
        """A split whose files were changed."""

        def __init__(self, config: EnvConfig, split: str) -> None:
            super().__init__(config, split)
            if split != "train":
                self.content_hash = "0" * 64

    monkeypatch.setattr(starts, "EnvPool", Changed)
    _evaluated(tmp_path)
    assert made == ["greedy", "sampled"]


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"settings"', '{"settings": SAME, "result": {"split": 1}}'])
def test_a_broken_file_is_named(content: str, made: list[str], tmp_path: Path) -> None:
    _evaluated(tmp_path)
    path = tmp_path / "evaluations" / "student-valid_seen-greedy.json"
    text = path.read_text(encoding="utf-8")
    same = text[text.index("{", 1) : text.index(',\n  "result"')]
    path.write_text(content.replace("SAME", same), encoding="utf-8")
    with pytest.raises(FileError, match=r"student-valid_seen-greedy\.json .*remove"):
        _evaluated(tmp_path)
