"""The report: one valid page that loads nothing, escapes everything and holds the numbers."""

from __future__ import annotations

import ast
import base64
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from html_page import Page

from atod_gym.types import Message
from atod_train.cli import _parsed
from atod_train.config import AlgorithmConfig, RunConfig, TrainConfig
from atod_train.evaluation.eval_options import EvalOptions, read_options
from atod_train.files import FileError, read_json, write_json
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.reports.answer import answer
from atod_train.reports.evaluations import (
    EvaluatedModel,
    Evaluation,
    EvaluationResult,
    TaskResult,
)
from atod_train.reports.figures import smooth
from atod_train.reports.metrics import MetricsWriter
from atod_train.reports.report import LONGEST_TEXT, ReportError, _next_steps, write_report
from atod_train.reports.results import results_of
from atod_train.reports.rows import TurnStatistics, to_row
from atod_train.reports.run_folder import write_config, write_manifest
from atod_train.reports.run_summary import RunSummary, read_run, record_of
from atod_train.reports.statistics import estimate, paired_difference
from atod_train.reports.tables import difference_text, rate_text

NASTY = (
    "<script>alert('x')</script> & \"quoted\" <img src=https://example.org/x.png> \x00 \ud800 $x_1$"
)


def evaluation(
    step: int, solved: int, model: EvaluatedModel = "student", tasks: int = 20
) -> Evaluation:
    results = tuple(
        TaskResult(f"t{i}", "pick" if i % 2 else "cool", i < solved, float(i < solved), 10, 2)
        for i in range(tasks)
    )
    return Evaluation(step, model, EvaluationResult("valid_seen", "generated", "greedy", results))


def make_run(
    run_dir: Path,
    *,
    method: str = "atod",
    seed: int = 0,
    solved: int = 15,
    teacher: bool = True,
    text: str = "a room",
    task: str = "pick/task 7",
) -> Path:
    config = RunConfig(algorithm=AlgorithmConfig(method=method), train=TrainConfig(seed=seed))
    write_config(run_dir, config)
    beginning = {
        "method": method,
        "env_id": "atod/ALFWorld-v0",
        "data": {"name": "generated", "hash": "c0ffee"},
        "seeds": {"train": seed},
        "parameters": {"student": 871_424, "teacher": 3_412_992 if teacher else None},
    }
    write_manifest(run_dir, beginning)
    tokens = TokenizedTurn((1,), (2,), (0.0,), "stop", False)
    prompts = [(Message("user", content),) for content in (text, "done")]
    turns = (
        Turn(0, prompts[0], f"<action>{text}</action>", text, -0.1, False, tokens),
        Turn(1, prompts[1], "look", "look", 10.0, True, tokens),
    )
    trajectory = Trajectory(0, task, "pick", turns, True, False, "terminated", True, 1.0)
    measured = [TurnStatistics(0.101, 0.037, 0.75)] * 2 if teacher else None
    writer = MetricsWriter(run_dir)
    writer.write_evaluation(evaluation(0, 5))
    if teacher:
        writer.write_evaluation(evaluation(0, 18, "teacher"))
    for step in (1, 2):
        metrics = {"step": step, "rho": 1.0 + step, "train_success": 0.5, "entropy": 0.4,
                   "seconds/update": 2.0, "seconds/generation": 1.0}  # fmt: skip
        if teacher:
            metrics |= {"kappa": 1.0, "opd_signal": 0.3, "turn_weight": 0.6}
        writer.write(metrics)
        writer.write_evaluation(evaluation(step, solved + (step == 1)))
    writer.write_trajectory(2, to_row(trajectory, measured))
    write_json(run_dir / "summary.json", {"steps": 2, "minutes": 3.25})
    return run_dir


def report_of(folder: Path, *run_dirs: Path, name: str = "houses") -> Path:
    manifests = [read_json(run_dir / "manifest.json") for run_dir in run_dirs]
    runs = [
        read_run(run_dir, found.get("method", "run"), found.get("seeds", {}).get("train", 0))
        for run_dir, found in zip(run_dirs, manifests, strict=True)
    ]
    return write_report(folder, [results_of(name, runs)])


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a complete run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["atod-train", "--out", "a b"])
        run_dir = make_run(tmp_path_factory.mktemp("run"))
    before = dict(matplotlib.rcParams)
    path = report_of(run_dir, run_dir)
    assert dict(matplotlib.rcParams) == before
    assert path == run_dir / "report.html"
    return path


@pytest.mark.slow
def test_the_page_parses_and_loads_nothing(usual: Path) -> None:
    page = page_of(usual)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert page.attributes("href") == []
    assert all(source.startswith("data:") for source in page.attributes("src"))
    text = usual.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(", text)
    assert '"Segoe UI"' in text
    assert "default-src 'none'" in page.attributes("content")[0]


def test_figures_and_tables_are_described(usual: Path) -> None:
    page = page_of(usual)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2  # success; metrics over steps
    for title in ("kappa", "rho", "|kappa w delta|", "turn weight", "training success", "entropy"):
        assert title in images[1]["alt"]
    assert "rho A" not in images[1]["alt"]  # not measured
    assert all(len(attrs["alt"]) > 20 for attrs in images)
    assert "atod, greedy: 75.0 %" in images[0]["alt"]
    pictures = [base64.b64decode(attrs["src"].partition(",")[2]) for attrs in images]
    assert all(picture[:4] == b"\x89PNG" for picture in pictures)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def test_tables_hold_the_numbers(usual: Path) -> None:
    page = page_of(usual)

    def cell(solved: int, tasks: int = 20) -> str:
        return rate_text(evaluation(1, solved, tasks=tasks).result.success)

    rows = {row[0]: row for row in reversed(page.rows) if len(row) > 3}
    assert rows["atod"][1:4] == ["1", cell(15), cell(16)]
    assert rows["start"][2] == cell(5)
    assert rows["teacher"][2] == cell(18)
    assert rows["atod > teacher"][1:4] == ["1", "-15.0 [-30.0, +0.0]", "one seed"]
    # t1 and t3 of t1, t3, .., t19; nine of ten for the teacher.
    [pick] = [row for row in page.rows if row[0] == "pick"]
    assert [row.partition(" ")[0] for row in pick[1:]] == ["20.0", "90.0", "70.0"]
    for fact in ("871,424", "3,412,992", "c0ffee", "3.2", "--out 'a b'", "train.lr"):
        assert fact in page.text
    assert "Not recorded" not in page.text


def test_turns_are_shown_with_a_shaded_and_described_heat_map(usual: Path) -> None:
    page = page_of(usual)
    tips = page.attributes("title")
    assert any("turn 1" in tip and "disagreement" in tip and "0.1010" in tip for tip in tips)
    assert ["w", "0.75", "0.75"] in page.rows
    assert "not valid" in page.text
    assert "return 9.90" in page.text
    shades = [value for value in page.attributes("style") if "--heat" in value]
    assert len(shades) == 6  # three measures of two turns


@pytest.mark.slow
def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, text=NASTY, task=NASTY, method=NASTY)
    path = report_of(tmp_path, run_dir, name=NASTY)
    page = page_of(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(source.startswith("data:") for source in page.attributes("src"))
    assert page.text.count("<script>alert('x')</script>") > 5
    assert "\x00" not in path.read_text(encoding="utf-8")


def test_a_run_without_teacher_reports_it(tmp_path: Path) -> None:
    page = page_of(report_of(tmp_path, make_run(tmp_path, method="grpo", teacher=False)))
    assert "Not recorded: an evaluation of the teacher." in page.text
    assert "No teacher scored this trajectory" in page.text
    assert "teacher" not in [row[0] for row in page.rows]


def test_an_empty_folder_gives_a_report_that_names_what_is_missing(tmp_path: Path) -> None:
    page = page_of(report_of(tmp_path, tmp_path))
    for words in ("metrics of the steps", "evaluations", "trajectories", "the manifest"):
        assert words in page.text


@pytest.mark.slow
def test_runs_of_several_seeds_have_the_crossed_interval(tmp_path: Path) -> None:
    made = (("atod", 0, 16), ("atod", 1, 18), ("opd", 0, 12), ("opd", 1, 12))
    folders = [
        make_run(tmp_path / f"{method}{seed}", method=method, seed=seed, solved=solved)
        for method, seed, solved in made
    ]
    page = page_of(report_of(tmp_path, *folders))
    rows = {row[0]: row for row in reversed(page.rows) if len(row) > 3}
    both = np.concatenate([evaluation(2, solved).result.solved for solved in (16, 18)])
    assert rows["atod"][1:3] == ["2", rate_text(estimate(both))]
    other = np.concatenate([evaluation(2, 12).result.solved] * 2)
    assert rows["atod > opd"][1:3] == ["2", difference_text(paired_difference(both, other))]
    # Four trajectories and the fold around them; numbers, types, metrics, cost, settings, help.
    assert sum(tag == "details" for tag, _ in page.tags) == 11


@pytest.mark.slow
def test_the_page_begins_with_the_answer_and_what_to_do_next(tmp_path: Path) -> None:
    made = (("atod", 0, 16), ("atod", 1, 18), ("opd", 0, 12), ("opd", 1, 12))
    folders = [
        make_run(tmp_path / f"{method}{seed}", method=method, seed=seed, solved=solved)
        for method, seed, solved in made
    ]
    for name in ("last", "best"):
        (folders[0] / "models" / name).mkdir(parents=True)
    text = page_of(report_of(tmp_path, *folders)).text.replace("\u00a0", " ")
    first = text[: text.index("All numbers")]
    for words in (
        "20 tasks (valid_seen 20). 4 runs: atod, opd; seeds 0, 1;",
        "atod ends highest and solves 85.0 % [",
        "of 20 tasks after step 2 (greedy decoding).",
        "+60.0",  # over the start
        "+25.0",  # over OPD
        "significant",
        f'folder = "{folders[0] / "models" / "last"}"',
        f"atod-eval --agent model:{folders[0] / 'models' / 'last'} --split valid_seen",
    ):
        assert words in first


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["a/atod-train", "quickstart", "--train.steps", "2", "--out", "my runs"], 200),
        (["a/atod_train/cli.py", "houses-tiny", "--train.steps=2", "--resume"], 200),
        (["atod-train", "study", "my file.toml"], 0),
        (["my_script.py", "houses-tiny"], 0),
    ],
)
def test_commands_to_copy_can_be_parsed(
    words: list[str], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    run_dir = make_run(tmp_path / "my runs" / "atod-seed0")
    model = run_dir / "models" / "last"
    model.mkdir(parents=True)
    results = results_of("houses", [read_run(run_dir, "atod", 0)])
    (_, load, evaluate, train, curves) = [text for _, text in _next_steps(results, answer(results))]
    assert ast.literal_eval(load.splitlines()[0].removeprefix("folder = ")) == str(model)
    program, *given = shlex.split(evaluate)
    options = read_options(given)
    assert isinstance(options, EvalOptions)
    assert (program, options.agent) == ("atod-eval", f"model:{model}")
    assert shlex.split(curves)[-1] == str(tmp_path / "my runs")
    if steps:
        program, *given = shlex.split(train)
        command: Any = _parsed(given)
        assert (program, command.resume) == ("atod-train", True)
        assert command.config(given).train.steps == steps
        assert str(command.out) in ("my runs", "runs/houses-tiny")
    else:
        assert "--resume and a larger train.steps" in train


@pytest.mark.parametrize(
    ("solved", "seeds", "words"),
    [
        ((15, 5), (0,), ["atod ends highest", "significant over tasks"]),
        ((15, 15), (0, 1), ["atod, opd end highest, equal,", "not significant"]),
        ((5, 15), (0, 1), ["opd ends highest", "+50.0"]),
        ((0, 0), (0,), ["No run solves any of 20 tasks"]),
    ],
)
def test_the_answer_names_the_highest_run_and_what_is_significant(
    solved: tuple[int, int], seeds: tuple[int, ...], words: list[str]
) -> None:
    runs = [
        RunSummary(label, seed, evaluations=(evaluation(0, 5), evaluation(1, count)))
        for seed in seeds
        for label, count in zip(("atod", "opd"), solved, strict=True)
    ]
    found = answer(results_of("houses", runs))
    assert found is not None
    assert all(part in found.text for part in words)
    has_one = "Intervals of one seed are over tasks" in found.text
    assert has_one == (len(seeds) == 1)


def test_a_page_of_several_environments_begins_with_their_answers(tmp_path: Path) -> None:
    runs = [RunSummary("atod", 0, evaluations=(evaluation(0, 5), evaluation(1, 15)))]
    environments = [results_of(name, runs) for name in ("houses", "shop")]
    page = page_of(write_report(tmp_path, environments))
    assert page.attributes("href") == ["#environment-1", "#environment-2"]
    assert set(page.attributes("id")) == {"environment-1", "environment-2"}
    lead = page.text[: page.text.index("differences, points")]
    assert lead.count("atod solves 75.0\u00a0% [") == 2


def test_without_evaluations_there_is_no_answer() -> None:
    assert answer(results_of("houses", [RunSummary("atod", 0)])) is None


@pytest.mark.slow
def test_long_texts_are_cut(tmp_path: Path) -> None:
    page = page_of(report_of(tmp_path, make_run(tmp_path, text="q" * (LONGEST_TEXT + 5))))
    assert "(5 more characters)" in page.text
    assert "q" * LONGEST_TEXT in page.text
    assert "q" * (LONGEST_TEXT + 1) not in page.text


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="at least one run"):
        write_report(tmp_path, [])
    results = results_of("houses", [RunSummary("atod", 0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="choose another folder"):
        write_report(tmp_path / "file", [results])
    (tmp_path / "summary.json").write_text("{torn")
    with pytest.raises(FileError, match=r"summary\.json"):
        read_run(tmp_path, "atod", 0)


@pytest.mark.slow
def test_reports_of_the_same_run_are_the_same(usual: Path) -> None:
    first = usual.read_bytes()
    assert report_of(usual.parent, usual.parent).read_bytes() == first


def test_the_record_of_a_run_has_its_start_its_last_and_its_best() -> None:
    made = (evaluation(0, 19), evaluation(1, 8), evaluation(2, 8))
    record = record_of([RunSummary("atod", 0, evaluations=made)])
    [key] = record["start"]
    [run] = record["runs"]
    assert (record["start"][key]["step"], record["start"][key]["success_rate"]) == (0, 0.95)
    assert (run["last"][key]["step"], run["best"][key]["step"]) == (2, 1)
    assert record["teacher"][key] is None
    [run] = record_of([RunSummary("atod", 0, evaluations=made[:1])])["runs"]
    assert (run["last"][key], run["best"][key]) == (None, None)


def test_values_are_smoothed_over_those_before() -> None:
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
