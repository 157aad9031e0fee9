from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from atod_gym.errors import InvalidSettingError
from atod_train.cli import Train, _parsed, main
from atod_train.files import FileError, read_json
from atod_train.reports.metrics import read_evaluations, read_metrics
from atod_train.reports.results import read_results
from atod_train.reports.run_folder import OtherSettingsError, write_config
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.file import StudySelection, keep_study, read_kept_study, read_study

STUDY = """
seeds = [0, 1]

[environments.houses]
preset = "houses-tiny"
"env.eval_tasks" = 3
"env.max_turns" = 12
"env.eval_splits" = ["valid_seen"]
"start.demonstrations" = 8
"start.epochs" = [0.5, 0.5]
"train.steps" = 2
"train.tasks_per_step" = 2
"train.group_size" = 2

[runs.atod]
[runs.adaptive]
"algorithm.schedule" = "adaptive"
"algorithm.kappa" = [0.8, 0.2]
"""
OTHER = """
[environments.more]
preset = "houses-tiny"
"env.max_turns" = 5
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY, encoding="utf-8")
    return path


def test_a_study_is_read(study: Path, tmp_path: Path) -> None:
    [part] = read_study(study, tmp_path / "out").parts
    assert [run.folder.name for run in part.runs] == [
        "atod-seed0", "adaptive-seed0", "atod-seed1", "adaptive-seed1"
    ]  # fmt: skip
    first, second = part.runs[:2]
    assert first.config.algorithm.schedule.startswith("linear:")
    assert second.config.algorithm.kappa == (0.8, 0.2)
    assert second.label == "adaptive"
    assert {run.config.train.save_every for run in part.runs} == {20}
    assert first.config.env.eval_splits == ("valid_seen",)


def test_options_of_an_environment_are_added_to_those_of_the_preset(
    study: Path, tmp_path: Path
) -> None:
    options = '"env.options" = { entities = 60, server_url = "http://127.0.0.1:1" }'
    file = STUDY.replace('"houses-tiny"', f'"searchqa-tiny"\n{options}')
    study.write_text(file, encoding="utf-8")
    [part] = read_study(study, tmp_path / "out").parts
    assert part.config.env.options == {
        "entities": 60, "topk": 1, "task_types": "one_hop", "server_url": "http://127.0.0.1:1"
    }  # fmt: skip
    words = ["webshop-tiny", "--env.options", "topk", "3", "split", "x"]
    command = _parsed(words)
    assert isinstance(command, Train)
    assert command.config(words).env.options == {
        "products": 300, "topk": 3, "split": "x"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "toml", "value"),
    [
        ("True", "true", True),
        ("false", "false", False),
        ("FALSE", None, False),
        ("3", "3", 3),
        ("0.5", "0.5", 0.5),
        ("1e-3", "1e-3", 1e-3),
        ("one_hop", '"one_hop"', "one_hop"),
        (None, '"false"', "false"),
        (None, '"0.5"', "0.5"),
    ],
)
@pytest.mark.parametrize("table", ["options", "template_options"])
def test_tables_reach_the_environment_with_their_types(
    table: str, words: str | None, toml: str | None, value: Any, study: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = []
    if words is not None:
        command = _parsed(words := ["webshop-tiny", f"--env.{table}", "given", words])
        assert isinstance(command, Train)
        found.append(command.config(words))
    if toml is not None:
        given = f'"webshop-tiny"\n"env.{table}" = {{ given = {toml} }}'
        study.write_text(STUDY.replace('"houses-tiny"', given), encoding="utf-8")
        [part] = read_study(study, tmp_path / "out").parts
        found.append(part.config)
    received: list[Any] = []
    monkeypatch.setattr(gymnasium, "make_vec", lambda *_, **settings: received.append(settings))
    for config in found:
        chosen = getattr(config.env, table)["given"]
        assert (type(chosen), chosen) == (type(value), value)
        with pytest.raises(AssertionError):  # no environment was made
            EnvPool(config.env, "train")
    if table == "options":
        assert [settings["given"] for settings in received] == [value] * len(found)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('"env.options" = { topk = [1] }', "topk of 'env.options' must be a text"),
        ('"env.template-options" = { day = 2024-07-26 }', "day of 'env.template-options' must"),
        ('"env.eval_modes" = { a = 1 }', "is not a table"),
        ('"model.device" = { a = 1 }', "is not a table"),
    ],
)
def test_a_table_that_no_setting_takes_is_refused(
    line: str, told: str, study: Path, tmp_path: Path
) -> None:
    study.write_text(STUDY.replace('"houses-tiny"', f'"houses-tiny"\n{line}'), encoding="utf-8")
    with pytest.raises(InvalidSettingError, match=re.escape(told)):
        read_study(study, tmp_path / "out")


def test_a_value_of_a_wrong_type_is_found(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.write_text(STUDY.replace("= 12", "= 1.5"), encoding="utf-8")
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--env.max-turns" in told
    assert f"{study}: environments.houses: invalid" in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "twice"),
        ("seeds = [0, 1]", "seeds = 3", "seeds must be a list"),
        ("seeds = [0, 1]", "seed = [0]", "unknown key 'seed'"),
        ("seeds = [0, 1]", "jobs = 0", "jobs must be"),
        ("seeds = [0, 1]", "seeds = [", "Cannot read the study"),
        ("[runs.adaptive]", "[runs.'a/b']", "cannot be the name of a folder"),
        ('preset = "houses-tiny"', 'preset = "slowstart"', "preset must be one of"),
        ('"algorithm.schedule" = "adaptive"', '"model.student" = "tiny"', "cannot be set here"),
        ('"algorithm.schedule" = "adaptive"', '"env.max_turns" = 3', "cannot be set here"),
        ('"algorithm.schedule" = "adaptive"', 'algorithm.schedule = "adaptive"', "with quotes"),
        ('"env.max_turns" = 12', '"study.jobs" = 12', "invalid setting"),
        ("[runs.atod]\n[runs.adaptive]", "[run.adaptive]", "unknown key 'run'"),
        ("[runs.adaptive]", "[runs.teacher]", "'teacher' cannot be the name of a run"),
        ('"train.steps" = 2', '"train.seed" = 2', "write seeds = [2] at the top"),
        ('"algorithm.schedule" = "adaptive"', '"train.seed" = 5', "write seeds = [5] at the top"),
    ],
)
def test_invalid_study_files_are_refused(
    old: str, new: str, message: str, study: Path, tmp_path: Path
) -> None:
    study.write_text(STUDY.replace(old, new), encoding="utf-8")
    with pytest.raises(InvalidSettingError, match=re.escape(message)):
        read_study(study, tmp_path / "out")


def test_a_part_of_a_study_is_chosen(study: Path, tmp_path: Path) -> None:
    study.write_text(STUDY + OTHER, encoding="utf-8")
    selection = StudySelection((3, 2), ("more",), ("adaptive",), jobs=7, log=("wandb",))
    chosen = read_study(study, tmp_path, selection)
    houses, more = chosen.parts
    assert [run.folder.name for run in more.runs] == ["adaptive-seed3", "adaptive-seed2"]
    assert houses.runs == ()
    assert list(houses.settings) == list(more.settings) == ["atod", "adaptive"]
    # What all runs share does not depend on which are chosen.
    whole = read_study(study, tmp_path, StudySelection((3, 2))).parts
    assert more.config == whole[1].config
    assert (chosen.jobs, chosen.log) == (7, ("wandb",))
    keep_study(chosen, tmp_path)
    assert read_kept_study(tmp_path)[0].log == ("wandb",)
    assert more.config.env.max_turns == 5


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        pytest.param(
            StudySelection(environments=("house",)),
            "unknown environment 'house'; known: houses, more",
            id="environment",
        ),
        pytest.param(
            StudySelection(runs=("x",)), "unknown run 'x'; known: atod, adaptive", id="run"
        ),
        pytest.param(StudySelection(seeds=(1, 1)), "a number twice", id="seeds"),
        pytest.param(StudySelection(jobs=0), "jobs must be", id="jobs"),
    ],
)
def test_a_selection_of_missing_runs_is_refused(
    selection: StudySelection, message: str, study: Path, tmp_path: Path
) -> None:
    study.write_text(STUDY + OTHER, encoding="utf-8")
    with pytest.raises(InvalidSettingError, match=message):
        read_study(study, tmp_path, selection)


def test_mistakes_are_one_line(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.write_text(STUDY.replace("houses-tiny", "none"), encoding="utf-8")
    assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 2
    assert main(["study", str(tmp_path / "none.toml")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("atod-train: error: ") for line in lines)


@pytest.mark.slow
def test_a_killed_study_resumes_and_writes_its_results(
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    variables = {**os.environ, "ATOD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "atod_train.cli", "study", str(study), "--out", str(out)]
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(out / "atod-seed0")) < 1:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    looks = ["study", str(study), "--out", str(out), "--results-only"]
    assert main(looks) == 2
    assert "there are no results" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    # Runs that have not begun continue too.
    resume = [*command[:3], "resume", str(out / "atod-seed0")]
    finished = subprocess.run(
        resume, env=variables, capture_output=True, text=True, check=False, timeout=200
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert re.search(r"^adaptive +2 ", finished.stdout, re.MULTILINE)
    # The killed run had written down how start and teacher do.
    assert "adaptive" in finished.stderr
    assert "evaluating the" not in finished.stderr
    assert "adaptive" in (out / "report.html").read_text(encoding="utf-8")

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    houses: dict[str, Any] = results["houses"]
    assert [(run["label"], run["seed"]) for run in houses["runs"]] == [
        ("atod", 0), ("adaptive", 0), ("atod", 1), ("adaptive", 1)
    ]  # fmt: skip
    assert len(houses["tasks"]["valid_seen"]) == 3
    assert houses["start"].keys() == houses["teacher"].keys() == {
        "valid_seen/greedy", "valid_seen/sampled"
    }  # fmt: skip
    for run in houses["runs"]:
        folder = out / f"{run['label']}-seed{run['seed']}"
        assert [step["step"] for step in read_metrics(folder)] == [1, 2]
        assert run["minutes"] == read_json(folder / "summary.json")["minutes"]
        found = [(e.step, e.model, e.result.mode) for e in read_evaluations(folder)]
        assert len(found) == len(set(found))
        last = [e for e in read_evaluations(folder) if e.step == 2 and e.result.mode == "greedy"]
        bits = "".join("1" if task.success else "0" for task in last[0].result.tasks)
        assert run["last"]["valid_seen/greedy"]["success"] == bits
        assert run["seconds"]["generation"] >= 0
        key = "valid_seen/greedy"
        assert run["course"][key][-1] == [2, round(run["last"][key]["success_rate"], 4)]
        steps = [f"{step['rho']:.4g}" for step in read_metrics(folder)]
        assert [f"{value:.4g}" for value in run["metrics"]["rho"]] == steps
    assert houses["env"]["max_turns"] == 12
    assert min(houses["parameters"].values()) > 0
    [environment] = read_results([out / "results.json"])
    assert environment.labels == ("atod", "adaptive")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "step 2" in page  # of a trajectory
    assert {path.name for path in out.glob("*.png")} == {
        "houses-success.png", "houses-signals.png"
    }  # fmt: skip
    # Nothing is left to do, and nothing changes.
    monkeypatch.setenv("ATOD_CACHE", variables["ATOD_CACHE"])
    assert main([*looks[:-1], "--resume"]) == 0
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert main(looks[:-1]) == 2
    assert "atod-seed0 already contains a run; continue it (--resume)" in capsys.readouterr().err
    # A run that has not finished, or lacks steps, is left out, and named.
    (out / "atod-seed1" / "summary.json").unlink()
    capsys.readouterr()
    assert main(looks) == 0
    assert f"not in the results: {out / 'atod-seed1'} is not finished" in capsys.readouterr().err
    houses["runs"].pop(2)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results


def test_several_environments_have_folders_of_their_own(study: Path, tmp_path: Path) -> None:
    assert read_study(study, tmp_path).runs[0].folder == tmp_path / "atod-seed0"
    study.write_text(STUDY + OTHER, encoding="utf-8")
    folders = {run.folder.parent for run in read_study(study, tmp_path).runs}
    assert folders == {tmp_path / "houses", tmp_path / "more"}


def test_the_settings_of_all_runs_are_kept(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = STUDY.replace("[0.8, 0.2]", '[0.8, 0.2]\n"algorithm.clip" = [0.2, 0.3, "inf"]') + OTHER
    study.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    first = read_study(study, out, StudySelection(seeds=(0,), environments=("houses",)))
    keep_study(first, out)
    second = read_study(study, out, StudySelection(seeds=(1,), jobs=3))
    keep_study(second, out)
    monkeypatch.chdir(out)
    (out / "houses" / "atod-seed1").mkdir(parents=True)
    for folder in (out, out / "houses" / "atod-seed1", Path()):
        kept, found = read_kept_study(folder)
        assert (found.absolute(), kept.jobs) == (out, 3)
    monkeypatch.chdir(out / "houses" / "atod-seed1")
    for folder in (out, out / "houses" / "atod-seed1", Path()):
        kept, found = read_kept_study(folder)
        assert (found, kept.jobs) == (out, 3)
        assert sorted(kept.runs, key=str) == sorted([*first.runs, *second.runs], key=str)
    with pytest.raises(FileError, match=r"has no study\.json"):
        read_kept_study(tmp_path)


def test_runs_of_a_folder_share_start_teacher_and_tasks(study: Path, tmp_path: Path) -> None:
    first = read_study(study, tmp_path)
    keep_study(first, tmp_path)
    study.write_text(STUDY.replace("= 12", "= 13"), encoding="utf-8")
    other = read_study(study, tmp_path, StudySelection(seeds=(2,)))
    # Runs that have not begun are no reason to refuse others.
    assert keep_study(other, tmp_path).runs == other.runs
    write_config(other.runs[0].folder, other.runs[0].config)
    with pytest.raises(OtherSettingsError, match=r"env\.max_turns=13, not 12"):
        keep_study(first, tmp_path)


def test_the_quickstart_makes_the_runs_of_some_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("atod_train.studies.study.run_study", lambda *given: asked.append(given))
    words = ["quickstart", "--out", str(tmp_path), "--model.student", "smollm2"]
    assert main(words) == main([*words, "--runs", "grpo", "--seeds", "2", "1", "--jobs", "1"]) == 0
    (study, *_), (other, *_) = asked
    assert [run.folder.name for run in study.runs] == ["atod-seed0", "opd-seed0"]
    assert [run.config.algorithm.method for run in study.runs] == ["atod", "opd"]
    assert {run.config.model.student for run in study.runs} == {"smollm2"}
    # Models of the package, like others that are loaded, have no supervised start.
    assert {run.config.model.teacher for run in study.runs} == {"quickstart-teacher"}
    assert {run.config.start.epochs for run in study.runs} == {(0.0, 0.0)}
    assert study.jobs == 2
    assert [run.folder for run in other.runs] == [tmp_path / "grpo-seed2", tmp_path / "grpo-seed1"]
    for option in (("--jobs", "0"), ("--seeds", "1", "1")):
        assert main([*words, *option]) == 2


def test_what_the_quickstarts_runs_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for setting, told in (
        (("--algorithm.method", "grpo"), "--runs grpo --seeds 0"),
        (("--train.seed", "3"), "--runs atod --seeds 3"),
    ):
        assert main(["quickstart", *setting]) == 2
        assert f": atod-train quickstart {told}\n" in capsys.readouterr().err
