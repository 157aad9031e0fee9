"""Check the content of `results.json` made from run folders, and when it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atod_gym.errors import AtodError
from atod_train.cli import main
from atod_train.config import AlgorithmConfig, RunConfig, TrainConfig
from atod_train.distributed import Processes
from atod_train.files import write_json
from atod_train.reports.answer import answer
from atod_train.reports.evaluations import EvaluatedModel, Evaluation, EvaluationResult, TaskResult
from atod_train.reports.metrics import MetricsWriter
from atod_train.reports.report import write_report
from atod_train.reports.results import RESULTS_FILE, results_of, write_results
from atod_train.reports.run_folder import write_config, write_manifest
from atod_train.reports.run_summary import finished_runs, record_of
from atod_train.reports.tables import BUDGET, NOTHING, main_table
from atod_train.studies import study
from atod_train.studies.file import Run, StudyPart
from atod_train.studies.study import CallAll
from atod_train.training.stopping import StoppedByUser

STUDY = """
[environments.houses]
preset = "houses-tiny"
"train.steps" = 4
[environments.more]
preset = "houses-tiny"
"train.steps" = 4
[runs.atod]
[runs.grpo]
"algorithm.method" = "grpo"
"""


def evaluation(step: int, bits: str, model: EvaluatedModel = "student") -> Evaluation:
    tasks = tuple(
        TaskResult(f"t{number}", "pick", bit == "1", float(bit), 4, 1)
        for number, bit in enumerate(bits)
    )
    return Evaluation(step, model, EvaluationResult("seen", "generated", "greedy", tasks))


def settings_of(method: str, *, seed: int = 0, steps: int = 4) -> RunConfig:
    return RunConfig(
        algorithm=AlgorithmConfig(method=method), train=TrainConfig(seed=seed, steps=steps)
    )


def make_run(folder: Path, *, method: str = "atod", seed: int = 0, finished: bool = True) -> None:
    """A run of four steps; step 3 has left no metrics."""
    config = settings_of(method, seed=seed)
    write_config(folder, config)
    beginning = {
        "env_id": "some/Env-v0",
        "data": {"name": "generated", "hash": "c0ffee"},
        "parameters": {"student": 1000, "teacher": None if method == "grpo" else 5000},
    }
    write_manifest(folder, beginning)
    writer = MetricsWriter(folder)
    writer.write_evaluation(evaluation(0, "001"))
    writer.write_evaluation(evaluation(0, "111", "teacher"))
    for step in (1, 2, 4):
        distance = 0.123456 / step if step != 2 else float("nan")
        writer.write({"step": step, "rho": 1.0, "disagreement": distance, "grad_norm": 2.0,
                      "kappa": float("nan"), "seconds/update": 1.26})  # fmt: skip
    writer.write_evaluation(evaluation(2, "011"))
    writer.write_evaluation(evaluation(4, "010"))
    totals = {"steps": 4, "minutes": 1.5, "tokens": 90, "trajectories": 16, "finished": finished}
    write_json(folder / "summary.json", totals)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_is_kept_in_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "houses" / "atod-seed0")
    path = tmp_path / RESULTS_FILE
    runs, _ = finished_runs(tmp_path / "houses", {"atod": settings_of("atod")})
    write_results(path, [results_of("houses", runs)])
    assert list(read(path)) == ["houses"]
    record = read(path)["houses"]
    [run] = record["runs"]
    assert [line for line in lines_of(path) if '"label"' in line] == ["    " + json.dumps(run)]
    assert run["course"] == {"seen/greedy": [[2, 0.6667], [4, 0.3333]]}
    # kappa was never a number; what is not of interest later is not kept.
    assert run["metrics"] == {
        "rho": [1.0, 1.0, None, 1.0], "disagreement": [0.1235, None, None, 0.03086]
    }  # fmt: skip
    assert run["best"]["seen/greedy"]["success"] == "011"
    assert run["seconds"] == {"update": 3.8}
    assert record["env"]["max_turns"] == 30
    assert record["model"]["student"] == "tiny"
    assert record["tasks"] == {"seen": ["t0", "t1", "t2"]}
    assert record["task_types"] == {"seen": ["pick"] * 3}
    assert (record["start"]["seen/greedy"]["success"], record["data"]["hash"]) == ("001", "c0ffee")


def test_the_teacher_is_described_by_a_run_that_has_one(tmp_path: Path) -> None:
    for method in ("grpo", "atod"):
        make_run(tmp_path / f"{method}-seed0", method=method)
    runs, _ = finished_runs(tmp_path, {label: settings_of(label) for label in ("grpo", "atod")})
    assert record_of(runs)["parameters"] == {"student": 1000, "teacher": 5000}
    assert record_of(runs[:1])["parameters"] == {"student": 1000, "teacher": None}


def test_finished_runs_are_found_whatever_their_seed(tmp_path: Path) -> None:
    for label, seed in (("a", 10), ("a", 2), ("a-seed1", 2), ("b", 2), ("c", 0)):
        make_run(tmp_path / f"{label}-seed{seed}", seed=seed, finished=label != "c")
    settings = {label: settings_of("atod") for label in ("b", "a", "c")}
    found, left_out = finished_runs(tmp_path, settings)
    assert [(run.label, run.seed) for run in found] == [("b", 2), ("a", 2), ("a", 10)]
    assert left_out == [f"{tmp_path / 'c-seed0'} is not finished: step 4 of 4"]
    assert finished_runs(tmp_path / "none", settings) == ([], [])


def test_runs_of_other_settings_are_left_out(tmp_path: Path) -> None:
    for method in ("atod", "grpo", "opd", "mix"):
        make_run(tmp_path / f"{method}-seed0", method=method)
    settings = {
        "atod": settings_of("atod"),
        "grpo": settings_of("sod"),
        "opd": settings_of("opd", steps=3),
        "mix": settings_of("mix", steps=5),
    }
    found, [grpo, opd, mix] = finished_runs(tmp_path, settings)
    assert "mix-seed0 is not finished: step 4 of 5" in mix
    assert [run.label for run in found] == ["atod"]
    assert "grpo-seed0 was run with algorithm.method='grpo', not 'sod'" in grpo
    assert "opd-seed0 has 4 steps, more than train.steps=3" in opd


def test_unequal_budgets_are_shown(tmp_path: Path) -> None:
    for method, steps in (("atod", 4), ("opd", 3)):
        make_run(tmp_path / f"{method}-seed0", method=method)
        write_config(tmp_path / f"{method}-seed0", settings_of(method, steps=steps))
        write_json(tmp_path / f"{method}-seed0/summary.json", {"steps": steps, "finished": True})
    settings = {"atod": settings_of("atod"), "opd": settings_of("opd", steps=3)}
    results = results_of("houses", finished_runs(tmp_path, settings)[0])
    table, found = main_table(results), answer(results)
    assert [dict(zip(table.head, row, strict=True)).get(BUDGET) for row in table.rows] == [
        NOTHING, NOTHING, "4 x 16 x 8", "3 x 16 x 8"
    ]  # fmt: skip
    assert found
    assert f"different budgets ({BUDGET}): atod 4 x 16 x 8, opd 3 x 16 x 8." in found.text
    assert "3 or 4 steps" in write_report(tmp_path, [results]).read_text(encoding="utf-8")
    equal = replace(results, runs=results.runs[:1])
    assert BUDGET not in (*main_table(equal).head, answer(equal))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "made", "told"),
    [
        ({"grpo-seed2"}, 5, "error: Failed runs: grpo, seed 2. To try them again: "),
        ({"atod-seed1", "opd-seed2"}, 4, "error: Failed runs: atod, seed 1; opd, seed 2. To "),
        ({"atod-seed1", "grpo-seed1"}, 0, "error: grpo, seed 1 failed like the run before it, so "),
    ],
)
def test_a_run_that_fails_does_not_stop_the_others(
    fails: set[str], made: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, out = tmp_path / "small.toml", tmp_path / "my runs"
    one = STUDY.partition("[environments.more]")[0] + STUDY[STUDY.index("[runs.atod]") :]
    path.write_text(one + '[runs.opd]\n"algorithm.method" = "opd"\n', encoding="utf-8")

    def train(run: Run, *_: Any) -> None:
        if run.folder.name in fails:
            raise AtodError(f"{run.folder}/models cannot be written")
        make_run(run.folder, method=run.label, seed=run.config.train.seed)
        write_config(run.folder, run.config)

    monkeypatch.setattr(study, "_make_models", lambda *_: None)
    monkeypatch.setattr(study, "evaluate_start", lambda *_: [])
    monkeypatch.setattr(study, "_train", train)
    monkeypatch.setattr(study, "_last_error", "")
    assert main(["study", str(path), "--out", str(out), "--seeds", "1", "2"]) == 2
    shown = capsys.readouterr()
    for name in fails if made else ("atod-seed1",):
        label, _, seed = name.partition("-seed")
        assert f"atod-train: {label}, seed {seed}: {out / name}/models cannot be" in shown.err
    assert shown.err.splitlines()[-1].startswith(f"atod-train: {told}")
    assert (f"atod-train resume '{out}'\n" in shown.err) == (made > 0)
    assert (out / "report.html").is_file() == (made > 0)
    assert len(read(out / RESULTS_FILE)["houses"]["runs"] if made else ()) == made
    # A second attempt makes the others; a run that fails alone reports its own error.
    failed, _ = fails.pop(), fails.clear()
    if made == 5:
        fails.add(failed)
        assert main(["resume", str(out)]) == 2
        assert capsys.readouterr().err.endswith(f"error: {out / failed}/models cannot be written\n")
        fails.clear()
    assert main(["resume", str(out)]) == 0
    assert len(read(out / RESULTS_FILE)["houses"]["runs"]) == 6


def test_a_study_that_is_stopped_has_the_results_of_what_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "small.toml", tmp_path / "my out"
    path.write_text(STUDY, encoding="utf-8")
    asked = []

    def make_runs(
        part: StudyPart, left: list[Run], processes: Processes, call_all: CallAll, *_: Any
    ) -> None:
        asked.append([run.folder.relative_to(out).as_posix() for run in left])
        make_run(left[0].folder, method=left[0].label, seed=7)
        write_config(left[0].folder, left[0].config)
        raise StoppedByUser("stopped")

    monkeypatch.setattr(study, "_make_models", lambda *_: None)
    monkeypatch.setattr(study, "_make_runs", make_runs)
    command = ["study", str(path), "--out", str(out), "--seeds", "7"]
    assert main([*command, "--environments", "more"]) == 130
    assert asked == [["more/atod-seed7", "more/grpo-seed7"]]
    assert [run["seed"] for run in read(out / RESULTS_FILE)["more"]["runs"]] == [7]
    assert not (out / "report.html").exists()
    # What other calls have made in the same folder stays in the results.
    assert main([*command, "--environments", "houses", "--runs", "grpo"]) == 130
    assert asked[1:] == [["houses/grpo-seed7"]]
    results = read(out / RESULTS_FILE)
    assert {name: [run["label"] for run in results[name]["runs"]] for name in results} == {
        "houses": ["grpo"], "more": ["atod"]
    }  # fmt: skip
    told = f"atod-train: stopped. Continue with: atod-train resume '{out}'\n"
    assert capsys.readouterr().err.count(told) == 2


def test_models_of_all_environments_are_checked_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(STUDY, encoding="utf-8")
    asked = []

    def make_models(part: StudyPart, *_: Any) -> None:
        asked.append(part.name)
        if part.name == "more":
            raise AtodError("the vocabulary is another")

    monkeypatch.setattr(study, "_make_models", make_models)
    monkeypatch.setattr(study, "_make_runs", lambda part, *_: asked.append(part))
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    assert asked == ["houses", "more"]
    assert "the vocabulary is another" in capsys.readouterr().err
