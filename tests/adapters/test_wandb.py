"""Weights & Biases and trackio, with the real packages and without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from atod_gym.errors import AtodError
from atod_train.training.loggers import check_loggers

PROGRAM = """
    import sys
    from pathlib import Path
    from atod_train.reports.evaluations import Evaluation, EvaluationResult, TaskResult
    from atod_train.reports.metrics import MetricsWriter
    from atod_train.training.loggers import Loggers, LogTo

    study, logger = Path(sys.argv[1]), sys.argv[2]
    run = study / "houses" / "atod-seed0"
    tasks = (TaskResult("t1", "pick", True, 1.0, 4, 1), TaskResult("t2", "pick", False, 0.5, 8, 2))
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(run, resume_step=resume_step)
        settings = {"label": "atod", "train": {"lr": 0.5}}
        with Loggers(LogTo((logger,), study), run, "ab12", settings, resume_step) as loggers:
            writer.log = loggers.log
            for step in steps:
                writer.write({"step": step, "loss": step / 2, "invalid/empty": float("nan")})
        result = EvaluationResult("valid_seen", "generated", "greedy", tasks)
        with Loggers(LogTo((logger,), study), run, "ab12", settings, 4) as loggers:
            writer.log = loggers.log
            writer.write_evaluation(Evaluation(steps[-1], "student", result))
"""
EVALUATION = {
    "evaluation/student/valid_seen/greedy/success": 0.5,
    "evaluation/student/valid_seen/greedy/score": 0.75,
    "evaluation/student/valid_seen/greedy/turns": 6.0,
    "evaluation/student/valid_seen/greedy/invalid_share": 0.25,
}
LOSSES = [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.5), (4, 2.0)]


def run_logged(study: Path, logger: str, **variables: str) -> str:
    """Log a run that is resumed at step 2; return what the process shows."""
    (study / "houses" / "atod-seed0").mkdir(parents=True)
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), str(study), logger]
    result = subprocess.run(
        command,
        cwd=study,
        env={**os.environ, "HOME": str(study), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    return result.stderr


def wandb_records(file: Path) -> list[Any]:
    """Return the records of an offline run, which are those of a LevelDB log of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    left, records = file.read_bytes()[7:], []
    while left:
        length, _ = struct.unpack("<4xHB", left[:7])
        records.append(Record.FromString(left[7 : 7 + length]))
        left = left[7 + length :]
    return records


def test_a_resumed_run_is_one_run_of_wandb_without_an_account(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    study = tmp_path / "my study"
    shown = run_logged(study, "wandb", WANDB_MODE="offline")
    files = sorted((study / "houses" / "atod-seed0").glob("wandb/offline-run-*/*.wandb"))
    lines = [f"wandb: houses/atod-seed0: wandb sync {file.parent}" for file in files]
    assert sorted(shown.splitlines()) == lines
    rows, exits = [], []
    for file in files:
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                names = (run.project, run.run_id, run.display_name)
                assert names == ("my-study", "houses-atod-seed0-ab12", "houses/atod-seed0")
                config = {item.key: json.loads(item.value_json) for item in run.config.update}
                assert config["train"] == {"lr": 0.5}
            elif kind == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
            elif kind == "exit":
                exits.append(record.exit.exit_code)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    found = [row for row in rows if "loss" not in row]
    assert found == [{"step": step, **EVALUATION} for step in (3, 4)]
    assert exits == [0] * 4


def test_wandb_without_an_account_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AtodError, match=r"No API key.*WANDB_MODE=offline"):
        check_loggers(("wandb",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(("wandb",))


def test_a_resumed_run_is_one_run_of_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    study = tmp_path / "my study"
    shown = run_logged(study, "trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    line = "trackio: houses/atod-seed0: trackio show --project my-study"
    assert shown.splitlines() == [line] * 4
    code = """
        import json
        from trackio.sqlite_storage import SQLiteStorage as Storage
        name = "houses-atod-seed0-ab12"
        assert Storage.get_runs("my-study") == [name]
        rows, config = Storage.get_logs("my-study", name), Storage.get_run_config("my-study", name)
        print(json.dumps([rows, config["train"]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    rows, train = json.loads(result.stdout)
    assert train == {"lr": 0.5}
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == LOSSES
    found = [{k: row[k] for k in EVALUATION} for row in rows if "loss" not in row]
    assert found == [EVALUATION] * 2
