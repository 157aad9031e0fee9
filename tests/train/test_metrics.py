"""Check the files of a run: lines after kills and resumes, phase times, manifest, progress."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from atod_train.config import AlgorithmConfig, EnvConfig, RunConfig
from atod_train.files import FileError, read_json, write_json
from atod_train.progress import PhaseTimes, progress
from atod_train.reports.evaluations import Evaluation, EvaluationResult, TaskResult
from atod_train.reports.metrics import (
    MetricsWriter,
    read_evaluations,
    read_metrics,
    read_trajectories,
)
from atod_train.reports.rows import FORMAT
from atod_train.reports.run_folder import (
    RunFolderError,
    is_finished,
    package_versions,
    read_config,
    write_config,
    write_manifest,
)


def make_evaluation(step: int) -> Evaluation:
    task = TaskResult("t1", "pick", True, 1.0, 5, 1)
    return Evaluation(step, "student", EvaluationResult("valid", "generated", "greedy", (task,)))


ODD_TEXT = 'line\u2028separator\n"quote" \ud800 lone surrogate'
ROW = {"format": FORMAT, "task_id": "t1", "turns": [{"completion": ODD_TEXT}]}


def write_steps(run_dir, steps, **options) -> None:
    writer = MetricsWriter(run_dir, **options)
    for step in steps:
        writer.write({"step": step, "loss": step / 2})
        writer.write_evaluation(make_evaluation(step))
        writer.write_trajectory(step, ROW)


def test_lines_come_back_and_infinities_become_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": math.nan, "return": math.inf, "kappa": 0.1})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "return": None, "kappa": 0.1}]
    assert read_evaluations(tmp_path) == []


def test_resume_removes_later_steps_and_the_torn_line_from_every_file(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert read_evaluations(tmp_path) == [make_evaluation(step) for step in (1, 2, 3, 4, 5)]
    assert read_trajectories(tmp_path) == [{"step": step, **ROW} for step in (1, 2, 3, 4, 5)]


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write_evaluation(make_evaluation(0))
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1], resume_step=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert [evaluation.step for evaluation in read_evaluations(tmp_path)] == [0, 1]


def test_a_new_run_refuses_the_folder_of_an_old_one(tmp_path):
    write_steps(tmp_path, [1])
    with pytest.raises(RunFolderError, match="resume it, or choose a new folder"):
        MetricsWriter(tmp_path)


@pytest.mark.parametrize("metrics", [{"step": 2}, {"step": 1}, {"loss": 1.0}, {"step": "3"}])
def test_steps_must_rise(tmp_path, metrics):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 2})
    with pytest.raises(RunFolderError, match="cannot follow step 2"):
        writer.write(metrics)


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(FileError, match="line 2 of"):
        read_metrics(tmp_path)


def test_trajectories_of_another_format_are_left_out(tmp_path):
    (tmp_path / "trajectories.jsonl").write_text('{"step": 1, "turns": []}\n')
    assert read_trajectories(tmp_path) == []


def test_a_full_disk_is_one_error_that_names_the_run(tmp_path):
    # A limit on the size of files fails as a full disk does.
    program = """
        import resource, sys
        from pathlib import Path
        from atod_train.reports.metrics import MetricsWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        step = 0
        writer = MetricsWriter(Path(sys.argv[1]))
        try:
            while step < 10_000:
                step += 1
                writer.write({"step": step, "loss": 0.5})
        except OSError as error:
            print(step, error.strerror, error.filename, sep="; ")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    step, reason, name = result.stdout.strip().split("; ")
    assert (reason, name) == ("File too large", str(tmp_path))
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 20_000
    # What was written before is there: the last line may be torn.
    assert len(read_metrics(tmp_path)) in (int(step) - 1, int(step))


def test_phases_add_up_and_inner_phases_are_not_counted_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    times = PhaseTimes()
    with times.phase("generation"):
        now[0] += 2.0
        with times.phase("environment"):
            now[0] += 0.5
        now[0] += 1.0
    now[0] += 0.25
    with times.phase("environment"):
        now[0] += 4.0
    assert times.take() == {
        "seconds/generation": 3.0,
        "seconds/environment": 4.5,
        "seconds/other": 0.25,
    }
    now[0] += 1.0
    assert times.take() == {"seconds/other": 1.0}


def test_a_phase_ends_when_the_device_has_finished(monkeypatch):
    now, left = [0.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait():
        now[0], left[0] = now[0] + left[0], 0.0

    times = PhaseTimes(wait)
    with times.phase("update"):
        left[0] = 3.0
    with times.phase("environment"):
        now[0] += 1.0
    seconds = times.take()
    assert (seconds["seconds/update"], seconds["seconds/environment"]) == (3.0, 1.0)


def test_a_phase_ends_when_it_raises():
    times = PhaseTimes()
    with pytest.raises(KeyError), times.phase("update"):
        raise KeyError
    assert times.take()["seconds/update"] < 1.0


def test_config_survives_and_foreign_settings_are_refused(tmp_path):
    config = RunConfig(
        env=EnvConfig(eval_splits=("valid_seen",), options={"house_size": "small"}),
        algorithm=AlgorithmConfig(method="opd"),
    )
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config
    record = read_json(tmp_path / "config.json")
    record["train"]["momentum"] = 1
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="momentum"):
        read_config(tmp_path)
    with pytest.raises(RunFolderError, match="not a config"):
        read_config(tmp_path / "absent")


def test_manifest_keeps_its_beginning_when_a_run_is_resumed(tmp_path):
    beginning = {"method": "atod", "seeds": {"train": 3}}
    write_manifest(tmp_path, beginning, "cpu", 2)
    write_manifest(tmp_path, {**beginning, "method": "other"}, "cuda")
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest.items() >= {**beginning, "device": "cpu", "processes": 2}.items()
    assert manifest["packages"]["torch"] == package_versions(["torch"])["torch"] != "absent"
    assert [part["device"] for part in manifest["resumed"]] == ["cuda"]


def test_totals_that_are_infinite_and_broken_json(tmp_path):
    write_json(tmp_path / "summary.json", {"minutes": math.inf})
    assert read_json(tmp_path / "summary.json")["minutes"] is None
    assert read_json(tmp_path / "absent.json") == {}
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(FileError, match="not a JSON object"):
        read_json(tmp_path / "summary.json")


def test_progress_away_from_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress(110, "training", initial=10) as advance:
        for step in range(11, 111):
            now[0] += 1.0
            with progress(9, "rollout", is_part=True) as inner:
                now[0] += 30.0 * (step == 110)
                inner(3)
            advance(note=f"loss {step}", tokens=20)
    assert stream.getvalue().splitlines() == [
        "training: 15/110, 00:05 gone, 01:35 left, 20 tokens/s, loss 15",
        "training: 45/110, 00:35 gone, 01:05 left, 20 tokens/s, loss 45",
        "training: 75/110, 01:05 gone, 00:35 left, 20 tokens/s, loss 75",
        "training: 105/110, 01:35 gone, 00:05 left, 20 tokens/s, loss 105",
        "training: rollout: 3/9, 00:30 gone, 01:00 left",
        "training: 110/110, 02:10 gone, 15 tokens/s, loss 110",
    ]


@pytest.mark.slow
def test_a_first_unit_that_takes_long_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atod_train.progress._FIRST_LINE", 0.05)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress(4, "evaluating") as advance:
        time.sleep(0.5)
        assert stream.getvalue() == "evaluating: 0/4\n"
        advance(4)
    assert stream.getvalue().count("\n") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress(2, "[not markup]") as advance:
        advance(2, note="done")
    assert "[not markup]" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "00:00 gone, 00:00 left, done" in stream.getvalue()


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_a_terminal_without_a_size_has_a_bar(monkeypatch):
    ours, theirs = os.openpty()  # its size is 0 x 0
    with open(ours, "rb", buffering=0) as read, open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress(2, "training") as advance:
            advance(2)
        assert b"training: 2/2" in read.read(4096)


def test_a_bar_inside_of_another_is_a_line_below_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress(2, "outer") as outer:
        for _ in range(2):
            with progress(3, "inner") as inner:
                time.sleep(0.2)  # the terminal is drawn ten times a second
                inner(3, note="done")
            outer()
    assert "3/3" in stream.getvalue()
    last = stream.getvalue().rpartition("outer")[2]
    assert "2/2" in last
    assert "inner" not in last


@pytest.mark.parametrize("totals", ['{"finished": true}', '{"finished": true, "steps": "2"}'])
def test_a_finished_run_must_say_how_many_steps_it_made(tmp_path: Path, totals: str) -> None:
    config = RunConfig()
    write_config(tmp_path, config)
    (tmp_path / "summary.json").write_text(totals)
    with pytest.raises(RunFolderError, match=r"summary\.json does not contain the number of steps"):
        is_finished(tmp_path, config)
