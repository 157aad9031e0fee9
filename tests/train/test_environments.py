"""All environments train through the same command and the same code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atod_gym import ENV_IDS
from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)
from atod_train.reports.metrics import read_evaluations, read_metrics
from atod_train.studies.study import train_one

# Env id -> settings of a small generated world, a split to evaluate on, and a verb of its actions.
WORLDS = {
    "atod/ALFWorld-v0": ({"house_size": "tiny"}, "valid_unseen"),
    "atod/WebShop-v0": ({"products": 30}, "test"),
    "atod/SearchQA-v0": ({"entities": 60}, "test"),
}


def test_no_environment_is_forgotten() -> None:
    assert set(WORLDS) == set(ENV_IDS)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_demonstrations_steps_evaluation_and_report(
    env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    options, split = WORLDS[env_id]
    config = RunConfig(
        env=EnvConfig(
            id=env_id,
            data="generated",
            options=options,  # type: ignore[arg-type]
            max_turns=10,
            eval_splits=(split,),
            eval_tasks=4,
        ),
        model=ModelConfig(
            student="micro",
            teacher="micro",
            max_context=4096,
        ),
        # The actions of a shop take longer to learn.
        start=StartConfig(demonstrations=64, epochs=(2, 60 if "WebShop" in env_id else 20)),
        algorithm=AlgorithmConfig(schedule="linear:2"),
        train=TrainConfig(
            steps=2,
            tasks_per_step=2,
            group_size=2,
            minibatches="1",
            max_completion_tokens=16,
            eval_every=2,
        ),
    )
    report = train_one(config, tmp_path / "study")
    assert "tasks solved" in report.read_text(encoding="utf-8")
    [run_folder] = [path.parent for path in (tmp_path / "study").glob("*/metrics.jsonl")]
    steps = read_metrics(run_folder)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["turns"] <= 10 and 0 <= step["train_score"] <= 1 for step in steps)
    evaluations = read_evaluations(run_folder)
    assert {evaluation.result.split for evaluation in evaluations} == {split}
    assert {evaluation.result.data for evaluation in evaluations} == {"generated"}
    # Some dozens of demonstrations teach at least how to begin.
    assert any(evaluation.result.invalid_share < 1 for evaluation in evaluations)


@pytest.mark.slow
def test_a_script_that_closes_nothing_ends_silently() -> None:
    # With torch, Python clears modules before the environments of the script go.
    made = "\n".join(
        f"envs.append(gymnasium.make({env_id!r}, data='generated', **{options!r}))\n"
        "envs[-1].reset(seed=0)"
        for env_id, (options, _) in WORLDS.items()
    )
    script = f"import torch, gymnasium, atod_gym\nenvs = []\n{made}\n"
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
