"""Check that after any failure the last finished step is saved and no damaged file written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_policy import make_policy
from test_trainer import CONFIG as WHOLE
from test_trainer import _numbers, _wait_for_step, _with

from atod_gym.errors import AtodError
from atod_train.config import RunConfig
from atod_train.files import read_json
from atod_train.models.policy import Policy
from atod_train.reports.metrics import MetricsWriter, read_evaluations, read_metrics
from atod_train.reports.run_folder import RunFolderError
from atod_train.studies.study import train_one
from atod_train.training import run_record, stopping, trainer, update
from atod_train.training.checkpoint import checkpoint_path, saved_checkpoints
from atod_train.training.checks import DivergedError
from atod_train.training.update import Learner

CONFIG = _with(WHOLE, save_every=100, steps=4)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ATOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train_one(CONFIG, out)
    return out / "atod-seed0"


def _assert_same(run: Path, whole: Path) -> None:
    assert _numbers(run) == _numbers(whole)
    assert read_evaluations(run) == read_evaluations(whole)
    assert (
        read_json(run / "summary.json")["best_step"]
        == (read_json(whole / "summary.json")["best_step"])
    )
    for model in ("last", "best"):
        ours, theirs = (load_file(f / "models" / model / "model.safetensors") for f in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make one element of one gradient NaN in some of the updates, counted from 1."""
    step, count = Learner.step, [0]

    def poisoned(self: Learner) -> float:
        count[0] += 1
        if count[0] in calls:
            weights = self.policy.model.parameters()
            grad = next(weight.grad for weight in weights if weight.grad is not None)
            grad.view(-1)[0] = float("nan")
        return step(self)

    monkeypatch.setattr(Learner, "step", poisoned)


@pytest.mark.slow
def test_an_update_without_a_finite_gradient_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {3, 7, 8})  # two updates a step
    train_one(_with(CONFIG, save_every=1), tmp_path)
    run = tmp_path / "atod-seed0"
    rows = read_metrics(run)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 2]
    assert rows[1]["grad_norm"] > 0
    assert rows[3]["grad_norm"] is None
    for path in (*saved_checkpoints(run), *run.glob("models/*/model.safetensors")):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.slow
def test_many_in_a_row_end_the_run_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, set(range(5, 100)))
    with pytest.raises(DivergedError, match=r"6 updates up to step 5 were not finite\. Lower"):
        train_one(_with(CONFIG, steps=20), tmp_path)
    # Skipped updates move nothing: the last finished step is saved.
    assert saved_checkpoints(tmp_path / "atod-seed0")[-1].stem == "step-000004"


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_never_saved(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = Learner.step, [0]

    def breaking(self: Learner) -> float:
        norm = step(self)
        count[0] += 1
        if count[0] == 6:
            with torch.no_grad():
                next(self.student.model.parameters()).view(-1)[0] = value
        return norm

    monkeypatch.setattr(Learner, "step", breaking)
    with pytest.raises(DivergedError, match=r"Step 3 .*Lower .*checkpoint of step 2 is kept"):
        train_one(_with(CONFIG, save_every=1), tmp_path)
    paths = saved_checkpoints(tmp_path / "atod-seed0")
    assert [path.stem for path in paths] == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_log_probs_that_are_not_finite_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = trainer.score_batch

    def broken(*arguments: Any) -> Any:
        scores = scored(*arguments)
        getattr(scores, name).fill_(float("nan"))
        return scores

    monkeypatch.setattr(trainer, "score_batch", broken)
    for name, message in (("logprobs", "student .* Lower"), ("reference_logprobs", "teacher")):
        with pytest.raises(DivergedError, match=f"Step 1: {name} of the {message}"):
            train_one(CONFIG, tmp_path / name)


class Failing:
    """Fails at one of its calls, as what it stands for."""

    def __init__(self, function: Any, call: int, error: Exception | None = None) -> None:
        self.function, self.left = function, call
        self.error = error or AtodError("it is gone")

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*arguments, **settings)

    def __get__(self, owner: Any, kind: type) -> Any:
        """A method, where it stands for one."""
        return partial(self, owner)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ("rollout", 3, 2),  # an environment's server
        ("teacher", 3, 2),
        ("update", 3, 2),  # out of memory before weights are moved
        ("evaluation", 1, 3),
        ("best", 1, 3),
        ("metrics", 3, 3),
    ],
)
def test_finished_steps_are_saved_and_resumed_exactly(
    place: str, call: int, step: int, whole_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    owner, name = {
        "rollout": (trainer, "collect"),
        "teacher": (trainer, "score_batch"),
        "update": (update, "split_minibatches"),
        "evaluation": (trainer, "evaluate"),
        "best": (Policy, "save"),
        "metrics": (MetricsWriter, "write"),
    }[place]
    kept = getattr(owner, name)
    monkeypatch.setattr(owner, name, Failing(kept, call))
    with pytest.raises(AtodError, match="it is gone"):
        train_one(CONFIG, tmp_path)
    run = tmp_path / "atod-seed0"
    assert [path.stem for path in saved_checkpoints(run)] == [f"step-{step:06d}"]
    monkeypatch.setattr(owner, name, kept)
    train_one(CONFIG, tmp_path, resume=True)
    _assert_same(run, whole_run)


class Signalling:
    """Sends this process Ctrl-C at one of its calls: once, or twice."""

    def __init__(self, function: Any, call: int, times: int) -> None:
        self.function, self.left, self.times = function, call, times

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return self.function(*arguments, **settings)

    __get__ = Failing.__get__


@pytest.mark.slow
@pytest.mark.usefixtures("usual_sigint")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ("rollout", 3, 2),
        ("scores", 3, 2),
        ("update", 3, 3),
        ("moments", 6, 3),
        ("evaluation", 1, 3),
        ("last evaluation", 2, 4),
        ("save", 1, 3),
    ],
)
def test_ctrl_c_loses_no_finished_step(
    place: str, call: int, step: int, times: int, whole_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twice within an update loses its step, and those before if weights have moved."""
    monkeypatch.setattr(stopping, "_ECHO_SECONDS", -1.0)
    owner, name = {
        "rollout": (trainer, "collect"),
        "scores": (trainer, "score_batch"),
        "update": (update, "split_minibatches"),
        "moments": (Learner, "step"),
        "evaluation": (trainer, "evaluate"),
        "last evaluation": (trainer, "evaluate"),
        "save": (run_record, "save_checkpoint"),
    }[place]
    kept = getattr(owner, name)
    signalling = Signalling(kept, call, times)
    monkeypatch.setattr(owner, name, signalling)
    with pytest.raises(KeyboardInterrupt):
        train_one(CONFIG, tmp_path)
    assert signalling.left <= 0
    run = tmp_path / "atod-seed0"
    if times == 2:
        step -= {"update": 1, "moments": 3}.get(place, 0)
    newest = [path.stem for path in saved_checkpoints(run)][-1:]
    assert newest == [f"step-{step:06d}"] * bool(step)
    monkeypatch.setattr(owner, name, kept)
    train_one(CONFIG, tmp_path, resume=True)
    _assert_same(run, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("call", [5, 6])
def test_weights_of_half_a_step_are_not_saved(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates a step; one of the third step's fails when the weights have moved."""
    step, count = Learner.step, [0]

    def breaking(self: Learner) -> float:
        count[0] += 1
        if count[0] == call:
            move = self._optimizer.step

            def moved_and() -> None:
                move()
                raise AtodError("it is gone")

            monkeypatch.setattr(self._optimizer, "step", moved_and)
        return step(self)

    monkeypatch.setattr(Learner, "step", breaking)
    with pytest.raises(AtodError, match="it is gone"):
        train_one(CONFIG, tmp_path)
    assert not saved_checkpoints(tmp_path / "atod-seed0")


@pytest.mark.slow
def test_fewer_steps_than_were_made_are_refused(tmp_path: Path) -> None:
    train_one(_with(CONFIG, save_every=1, steps=2), tmp_path)
    (tmp_path / "atod-seed0" / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=r"has 2 steps, more than train\.steps=1"):
        train_one(_with(CONFIG, steps=1), tmp_path, resume=True)


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_passed_over(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", Failing(trainer.evaluate, 1))
        with pytest.raises(AtodError, match="it is gone"):
            train_one(_with(CONFIG, save_every=1), tmp_path)
    run = tmp_path / "atod-seed0"
    newest = checkpoint_path(run, 3)
    os.truncate(newest, newest.stat().st_size - 1)
    train_one(CONFIG, tmp_path, resume=True)
    told = capsys.readouterr().err
    assert "step-000003.safetensors cannot be read" in told
    assert "continuing from step 2" in told
    assert _numbers(run) == _numbers(whole_run)


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_failures as t
from test_trainer import study_of_methods
from atod_train.studies.study import run_study
from atod_train.training.stopping import StoppedByUser
if __name__ == "__main__":
    methods = ("atod", "opd")[: int(sys.argv[3])]
    out = Path(sys.argv[1])
    # Nothing is saved before the signal: no evaluation, and save_every is never reached.
    config = t._with(t.CONFIG, steps=10_000, eval_every=0)
    try:
        run_study(study_of_methods(config, methods, out), out)
    except StoppedByUser as stop:
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_every_run(number: int, jobs: int, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent), str(jobs)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    runs = [tmp_path / f"{method}-seed0" for method in ("atod", "opd")[:jobs]]
    for run in runs:
        _wait_for_step(run, 2, process)
    # Ctrl-C reaches all processes of a terminal; SIGTERM the one that it is sent to.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    for run in runs:
        steps = len(read_metrics(run))
        assert [p.stem for p in saved_checkpoints(run)] == [f"step-{steps:06d}"]


@pytest.mark.slow
def test_resuming_needs_no_settings_that_change_nothing(tmp_path: Path) -> None:
    train_one(_with(CONFIG, steps=1), tmp_path)

    def other(config: RunConfig) -> RunConfig:
        model = replace(config.model, gradient_checkpointing=True, device=("cpu",))
        return _with(replace(config, model=model), tokens_per_microbatch=512)

    train_one(other(_with(CONFIG, steps=2)), tmp_path, resume=True)
    assert len(read_metrics(tmp_path / "atod-seed0")) == 2


_FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_policy import make_policy
policy = make_policy()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
policy.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_model_is_saved_is_one_line(tmp_path: Path) -> None:
    make_policy(1).save(tmp_path / "best")
    kept = (tmp_path / "best" / "model.safetensors").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "best"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AtodError: The model" in done.stderr.splitlines()[-1]
    assert "Free disk space" in done.stderr.splitlines()[-1]
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == kept
    assert {path.name for path in tmp_path.iterdir()} == {"best", ".lock"}
