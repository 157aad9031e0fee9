"""Runs of a few steps: resuming bit for bit, stopping, refusing, and learning."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from atod_gym.errors import AtodError
from atod_gym.parsing import CompletionFormat
from atod_train.cli import main
from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)
from atod_train.files import read_json
from atod_train.models.from_scratch import build_policy
from atod_train.models.generation import Generator
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.reports.metrics import read_metrics
from atod_train.reports.run_folder import RunFolderError
from atod_train.reports.run_summary import read_run
from atod_train.studies.file import Run, Study, StudyPart
from atod_train.studies.study import train_one
from atod_train.training.checkpoint import CheckpointError, load_latest

CONFIG = RunConfig(
    env=EnvConfig(
        data="generated",
        options={"house_size": "tiny"},
        max_turns=6,
        eval_splits=("valid_seen",),
        eval_tasks=4,
    ),
    model=ModelConfig(student="micro", teacher="micro"),
    start=StartConfig(demonstrations=16, epochs=(2, 4)),
    algorithm=AlgorithmConfig(schedule="linear:4"),
    train=TrainConfig(
        steps=6,
        tasks_per_step=2,
        group_size=2,
        minibatches="2",
        eval_every=3,
        save_every=1,
        max_completion_tokens=8,
    ),
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ATOD_CACHE"] = str(folder)
    return folder


def _with(config: RunConfig, **train: object) -> RunConfig:
    return replace(config, train=replace(config.train, **train))  # type: ignore[arg-type]


def study_of_methods(config: RunConfig, methods: Sequence[str], out: Path) -> Study:
    """Runs of several methods at the same time."""
    settings = {
        method: replace(config, algorithm=replace(config.algorithm, method=method))  # type: ignore[arg-type]
        for method in methods
    }
    runs = tuple(Run(name, found, out / f"{name}-seed0") for name, found in settings.items())
    return Study((StudyPart("houses", out, runs, settings),), jobs=len(methods))


def _numbers(run_dir: Path) -> list[dict[str, object]]:
    rows = read_metrics(run_dir)
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train_one(CONFIG, out)
    return out / "atod-seed0"


@pytest.mark.slow
def test_a_run_writes_what_it_promises(whole_run: Path) -> None:
    for name in (
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "trajectories.jsonl",
        "summary.json",
        "models/last/model.safetensors",
        "models/best/model.safetensors",
    ):
        assert (whole_run / name).is_file(), name
    assert (whole_run.parent / "report.html").is_file()
    assert list((whole_run / "tensorboard").iterdir())
    rows = read_metrics(whole_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["kappa"] == pytest.approx(1.0 - 0.9 / 4)
    assert rows[-1]["rho"] == 2.0
    assert max(float(row["rollout/logprob_drift"]) for row in rows) < 1e-3
    for phase in ("environment", "generation", "teacher", "update"):
        assert all(row[f"seconds/{phase}"] > 0 for row in rows)
    assert all(row["tokens_per_second"] > 0 <= row["approx_kl"] for row in rows)
    run = read_run(whole_run, "atod", 0)
    assert [e.step for e in run.course("valid_seen", "greedy")] == [0, 3, 6]
    assert [e.step for e in run.course("valid_seen", "greedy", "teacher")] == [0]
    manifest = read_json(whole_run / "manifest.json")
    assert manifest["data"]["name"] == "generated"
    assert len(manifest["data"]["hash"]) == 64


def test_the_reasons_of_invalid_turns_add_up(whole_run: Path) -> None:
    for row in read_metrics(whole_run):
        invalid = sum(share for key, share in row.items() if key.startswith("invalid/"))
        assert invalid == pytest.approx(row["invalid_share"])


@pytest.mark.slow
def test_three_steps_and_three_more_are_six(whole_run: Path, tmp_path: Path) -> None:
    train_one(_with(CONFIG, steps=3), tmp_path)
    train_one(CONFIG, tmp_path, resume=True)
    resumed = tmp_path / "atod-seed0"
    assert _numbers(resumed) == _numbers(whole_run)
    (ours, _), (theirs, _) = load_latest(resumed), load_latest(whole_run)
    assert ours is not None
    assert theirs is not None
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert torch.equal(tensor, theirs.tensors[name]), name


_SCRIPT = """
import sys, dataclasses
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_trainer as t
from atod_train.studies.file import Run, Study, StudyPart
from atod_train.studies.study import train_one
from atod_train.training.stopping import StoppedByUser
try:
    train_one(t.CONFIG, Path(sys.argv[1]), resume=True)
except StoppedByUser as stop:
    print(stop)
    sys.exit(130)
"""


def _start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(out), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while len(read_metrics(run_dir) if run_dir.exists() else ()) < step:
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_and_ctrl_c_lose_nothing(whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "atod-seed0"
    for step in (1, 2):
        process = _start(tmp_path)
        _wait_for_step(run_dir, step, process)
        process.kill()
        process.communicate()
    process = _start(tmp_path)
    _wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    if process.returncode != 0:  # it may have been in its last step
        assert process.returncode == 130
        assert "stopped after step" in output
        process = _start(tmp_path)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert _numbers(run_dir) == _numbers(whole_run)


_SCRIPT_OF_TWO = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_trainer as t
from atod_train.studies.study import run_study
if __name__ == "__main__":
    out = Path(sys.argv[1])
    run_study(t.study_of_methods(t._with(t.CONFIG, steps=10_000), ("atod", "opd"), out), out)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_the_study_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_SCRIPT_OF_TWO)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for method in ("atod", "opd"):
        _wait_for_step(tmp_path / f"{method}-seed0", 1, process)
    workers = _children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker trains on without its study"
        time.sleep(0.05)


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It ended while we looked.
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def test_a_folder_is_not_overwritten(whole_run: Path) -> None:
    with pytest.raises(RunFolderError, match="--resume"):
        train_one(CONFIG, whole_run.parent)
    other = replace(CONFIG, algorithm=replace(CONFIG.algorithm, kappa=(1.0, 0.2)))
    with pytest.raises(RunFolderError, match=r"kappa"):
        train_one(other, whole_run.parent, resume=True)
    with pytest.raises(
        RunFolderError, match=r"has 6 steps, more than train\.steps=4; use --train.steps 6"
    ):
        train_one(_with(CONFIG, steps=4), whole_run.parent, resume=True)


@pytest.mark.slow
def test_a_folder_has_one_process_at_a_time(whole_run: Path) -> None:
    """Two studies in one folder would write into each other's runs."""
    out = whole_run.parent
    script = (
        "import filelock, sys; held = filelock.FileLock(sys.argv[1] + '/.lock'); held.acquire()"
    )
    script += "; print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(out)], **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(AtodError, match="Another process writes to"):
            train_one(CONFIG, out, resume=True)
        other.kill()
    train_one(CONFIG, out, resume=True)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(whole_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "atod-seed0"
    target.mkdir()
    (whole_run / "checkpoints").rename(tmp_path / "moved")
    try:
        (tmp_path / "moved").rename(target / "checkpoints")
        other = replace(CONFIG, model=replace(CONFIG.model, student="tiny"))
        (target / "config.json").write_text(json.dumps({}))
        (target / "config.json").unlink()
        with pytest.raises(CheckpointError, match="another model"):
            train_one(other, tmp_path)
    finally:
        (target / "checkpoints").rename(whole_run / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opd", "grpo", "mix", "sod", "tcod", "sdar"])
def test_every_method_runs(method: str, tmp_path: Path) -> None:
    config = _with(CONFIG, steps=2)
    algorithm = replace(config.algorithm, method=method)  # type: ignore[arg-type]
    train_one(replace(config, algorithm=algorithm), tmp_path)
    rows = read_metrics(tmp_path / f"{method}-seed0")
    assert len(rows) == 2
    assert ("seconds/teacher" in rows[0]) == (method != "grpo")
    if method == "tcod":
        assert rows[0]["turns"] == 1.0


@pytest.mark.slow
def test_where_the_teacher_is_changes_nothing(whole_run: Path, tmp_path: Path) -> None:
    model = replace(CONFIG.model, device=("auto", "cpu"))
    train_one(_with(replace(CONFIG, model=model), steps=2), tmp_path)
    assert _numbers(tmp_path / "atod-seed0") == _numbers(whole_run)[:2]


@pytest.mark.slow
def test_exact_signal_and_adapters_resume_too(whole_run: Path, tmp_path: Path) -> None:
    algorithm = replace(CONFIG.algorithm, opd_signal="top-k:4")
    start = str(whole_run / "models" / "best")
    model = replace(CONFIG.model, student=start, teacher=start, lora_rank=2)
    config = replace(CONFIG, algorithm=algorithm, model=model, start=StartConfig())
    config = _with(config, eval_every=0)
    train_one(_with(config, steps=3), tmp_path / "whole")
    train_one(_with(config, steps=2), tmp_path / "parts")
    parts = tmp_path / "parts" / "atod-seed0"
    (parts / "summary.json").unlink()
    train_one(_with(config, steps=3), tmp_path / "parts", resume=True)
    assert _numbers(parts) == _numbers(tmp_path / "whole" / "atod-seed0")
    ours, theirs = (load_latest(tmp_path / name / "atod-seed0")[0] for name in ("whole", "parts"))
    assert ours is not None
    assert theirs is not None
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        # Weights that are not trained are those of the start, and not in it.
        assert "lora_" in name
        assert torch.equal(tensor, theirs.tensors[name]), name


@pytest.mark.slow
def test_window_style_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = set()

    class Noting(Generator):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            formats.add(settings["completion_format"])
            super().__init__(*arguments, **settings)

    monkeypatch.setattr("atod_train.rollout.rollout.Generator", Noting)
    env = replace(CONFIG.env, prompt_style="window", show_admissible=True, parse_profile="tags")
    config = _with(replace(CONFIG, env=env), steps=1, max_completion_tokens=24)
    train_one(config, tmp_path)
    assert len(read_metrics(tmp_path / "atod-seed0")) == 1
    # Completions end with their action in training and in evaluation.
    assert formats == {CompletionFormat("tags")}


@pytest.mark.slow
def test_a_folder_is_resumed_without_its_settings(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    train_one(_with(CONFIG, steps=2), out)
    assert main(["resume", str(out)]) == 0  # nothing is left to do
    study = out / "study.json"
    settings = json.loads(study.read_text())
    settings["runs"][0]["config"]["train"]["steps"] = CONFIG.train.steps
    study.write_text(json.dumps(settings))
    assert main(["resume", str(out / "atod-seed0")]) == 0
    assert _numbers(out / "atod-seed0") == _numbers(whole_run)
    assert main(["resume", str(tmp_path)]) == 2
    assert "is not the folder of a study" in capsys.readouterr().err


def test_models_that_do_not_fit_are_named(tmp_path: Path) -> None:
    build_policy("micro", build_word_tokenizer(["other words"]), seed=0).save(tmp_path / "other")
    foreign = replace(CONFIG, model=replace(CONFIG.model, teacher=str(tmp_path / "other")))
    with pytest.raises(AtodError, match="share a vocabulary"):
        train_one(foreign, tmp_path / "foreign")
    assert not list((tmp_path / "foreign").glob("*/evaluations.jsonl"))
    missing = replace(CONFIG, model=replace(CONFIG.model, student=str(tmp_path / "none")))
    with pytest.raises(AtodError, match="none"):
        train_one(missing, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({"student": "/absent/model"}, "'/absent/model': there is no such folder"),
        ({"teacher": "/absent/model"}, "'/absent/model': there is no such folder"),
        ({"teacher": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ({"device": ("cpu", "cuda:99")}, "'cuda:99' cannot be used here"),
        ({"device": ("offload",)}, "'offload' cannot be used here"),
        ({"student": "bytes"}, "micro is made with the words of demonstrations as tokens, bytes"),
    ],
)
def test_unsuitable_models_are_refused_before_any_is_made(
    models: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    build_policy("micro", build_word_tokenizer(["a few words"]), seed=0).save(Path("bytes"))
    letters = Tokenizer(BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained("bytes")
    with pytest.raises(AtodError, match=re.escape(told)):
        train_one(replace(CONFIG, model=replace(CONFIG.model, **models)), tmp_path / "out")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.R_OK), reason="needs /proc")
def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "atod_train.cli",
            "houses-tiny",
            "--out",
            str(blocked / "x"),
            "--start.demonstrations",
            "16",
            "--model.student",
            "micro",
            "--model.teacher",
            "micro",
            "--env.eval-tasks",
            "2",
            "--train.steps",
            "1",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error" in done.stderr
