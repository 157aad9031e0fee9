"""The report: one valid page that loads nothing, escapes everything and holds the numbers."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
from html_page import Page

from atod_train.config import AlgorithmConfig, RunConfig, TrainConfig
from atod_train.files import FileError
from atod_train.reports.metrics import Evaluation, MetricsWriter, TrajectoryRecord, TurnDisplay
from atod_train.reports.report import ReportError, read_run, write_report
from atod_train.reports.report_data import RunSummary, mean_curve, smooth
from atod_train.reports.report_page import LONGEST_TEXT, percent, percent_range, trajectory
from atod_train.reports.run_folder import (
    write_config,
    write_manifest,
    write_summary,
)
from atod_train.reports.statistics import (
    EvaluationResult,
    TaskResult,
    tango_interval,
    wilson_interval,
)

NASTY = (
    "<script>alert('x')</script> & \"quoted\" <img src=https://example.org/x.png> \x00 \ud800 $x_1$"
)


def evaluation(step: int, solved: int, model="student", tasks: int = 20) -> Evaluation:
    results = tuple(
        TaskResult(
            f"t{i}",
            "pick" if i % 2 else "cool",
            i < solved,
            float(i < solved),
            10,
            2,
            (("answer", 1), ("search", 3)) if model == "student" else (("answer", 1),),
        )
        for i in range(tasks)
    )
    return Evaluation(step, model, EvaluationResult("valid_seen", "generated", "greedy", results))


def make_run(run_dir, *, method="atod", seed=0, solved=15, teacher=True, text="a room"):
    config = RunConfig(algorithm=AlgorithmConfig(method=method), train=TrainConfig(seed=seed))
    write_config(run_dir, config)
    write_manifest(
        run_dir,
        method=method,
        env_id="atod/ALFWorld-v0",
        data="generated",
        data_hash="c0ffee",
        seeds={"train": seed},
        student_parameters=871_424,
        teacher_parameters=3_412_992 if teacher else None,
        command=["atod-train", "--out", "a b"],
    )
    measured = (0.101, 0.037, 0.75) if teacher else (None, None, None)
    turns = (
        TurnDisplay(text, f"<action>{text}</action>", text, False, -0.1, *measured),
        TurnDisplay("done", "look", "look", True, 10.0, *measured),
    )
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        writer.write_evaluation(evaluation(0, 5))
        if teacher:
            writer.write_evaluation(evaluation(0, 18, "teacher"))
        for step in (1, 2):
            metrics = {
                "step": step,
                "rho": 1.0 + step,
                "train_success": 0.5,
                "actions/search": 2.5,
                "entropy": 0.4,
            }
            metrics |= {"seconds/update": 2.0, "seconds/generation": 1.0, "grad_norm": 1.5}
            if teacher:
                metrics |= {"kappa": 1.0, "opd_signal": 0.3, "turn_weight": 0.6}
            writer.write(metrics)
            writer.write_evaluation(evaluation(step, solved + (step == 1)))
        writer.write_trajectory(TrajectoryRecord(2, "pick/task 7", True, turns))
    write_summary(run_dir, steps=2, minutes=3.25)


def page_of(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    """The report of a complete run."""
    run_dir = tmp_path_factory.mktemp("run")
    make_run(run_dir)
    before = dict(matplotlib.rcParams)
    path = write_report(run_dir)
    assert dict(matplotlib.rcParams) == before
    assert path == run_dir / "report.html"
    return path


def test_the_page_parses_and_loads_nothing(usual):
    page = page_of(usual)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    assert all(href.startswith("#") for href in page.attributes("href"))
    assert page.attributes("src") == []
    text = usual.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.attributes("href")} <= set(ids)
    assert "default-src 'none'" in page.attributes("content")[0]


def test_figures_and_tables_are_described(usual):
    page = page_of(usual)
    images = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(images) == sum(tag == "svg" for tag, _ in page.tags) > 5
    assert all(len(attrs["aria-label"]) > 20 for attrs in images)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert any("kappa from 1 to 1" in attrs["aria-label"] for attrs in images)
    assert any("search from 2.5 to 2.5" in attrs["aria-label"] for attrs in images)


def test_tables_hold_the_numbers(usual):
    page = page_of(usual)
    rows = {row[0]: row for row in reversed(page.rows)}
    start, teacher, student = rows["start"], rows["teacher"], rows["atod, seed 0"]
    interval = percent_range(wilson_interval(15, 20))
    assert student[1:3] == ["20", f"75.0\u00a0% {interval}"]
    best = percent_range(wilson_interval(16, 20))
    assert student[3] == f"80.0\u00a0% {best}, step 1"
    assert student[4] == f"+50.0 {percent_range(tango_interval(10, 0, 20))}"
    assert student[5:] == ["75.0\u00a0%", "10.0", "20.0\u00a0%"]
    assert start[2].startswith("25.0")
    assert teacher[2].startswith("90.0")
    pick = next(row for row in page.rows if row[0] == "pick")
    assert pick[1].startswith("20.0\u00a0% 2/10")  # t1 and t3 of t1, t3, .., t19
    assert pick[3].startswith("70.0\u00a0% 7/10")
    assert ["atod, seed 0", "1.00", "3.00"] in page.rows
    assert ["teacher", "1.00", "\u2013"] in page.rows
    for fact in ("871,424 weights", "3,412,992 weights", "c0ffee", "3.2 min", "--out 'a b'"):
        assert fact in page.text
    assert "Not recorded" not in page.text


def test_turns_are_shown_with_a_shaded_and_described_heat_map(usual):
    page = page_of(usual)
    tips = page.attributes("title")
    assert any("turn 1" in tip and "disagreement" in tip and "0.1010" in tip for tip in tips)
    assert ["w", "0.75", "0.75"] in page.rows
    assert "not valid" in page.text
    assert "return 9.90" in page.text
    shades = [value for value in page.attributes("style") if "--heat" in value]
    assert len(shades) == 12  # three measures of two turns, in the map and beside the turns


def test_everything_from_outside_is_escaped(tmp_path):
    make_run(tmp_path, text=NASTY)
    run = read_run(tmp_path)
    named = RunSummary(
        NASTY, 0, run.metrics, run.evaluations, run.trajectories, {"env_id": NASTY}, run.config
    )
    path = write_report(tmp_path, [named, run], title=NASTY)
    page = page_of(path)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script>alert('x')</script>" in page.text
    assert "\x00" not in path.read_text(encoding="utf-8")


def test_a_run_without_teacher_says_so(tmp_path):
    make_run(tmp_path, method="grpo", teacher=False)
    page = page_of(write_report(tmp_path))
    assert "Not recorded: an evaluation of the teacher." in page.text
    assert "No teacher scored this trajectory" in page.text
    assert "Mean turn weight" not in page.text
    assert "teacher" not in [row[0] for row in page.rows]


def test_an_empty_folder_gives_a_report_that_names_what_is_missing(tmp_path):
    page = page_of(write_report(tmp_path))
    for words in ("metrics of the steps", "No evaluation has", "No step has", "No trajectory has"):
        assert words in page.text


def test_a_study_has_means_over_seeds_and_differences(tmp_path):
    runs = []
    for method, seed, solved in (("atod", 0, 16), ("atod", 1, 18), ("opd", 0, 12), ("opd", 1, 12)):
        make_run(tmp_path / f"{method}{seed}", method=method, seed=seed, solved=solved)
        runs.append(read_run(tmp_path / f"{method}{seed}"))
    page = page_of(write_report(tmp_path, runs, max_trajectories=3))
    rows = {row[0]: row for row in page.rows}
    # mean 0.85, standard deviation 0.0707, t = 12.7062: half width 0.6353
    assert rows["atod, mean of 2 seeds"][2] == "85.0\u00a0% 21.5 to 148.5"
    assert rows["atod minus opd"][1:] == ["2", "+25.0", "\u221238.5 to 88.5"]
    assert sum(tag == "details" for tag, _ in page.tags) == 3
    one_each = page_of(write_report(tmp_path, [runs[0], runs[2]]))
    row = next(row for row in one_each.rows if row[0] == "atod minus opd")
    assert row[1:] == ["1", "+20.0", percent_range(tango_interval(4, 0, 20))]


def test_long_texts_are_cut():
    turn = TurnDisplay("x" * (LONGEST_TEXT + 5), "look", "look", True, 0.0)
    shown = Page(trajectory(TrajectoryRecord(1, "t", True, (turn,)), "atod"))
    assert "(5 more characters)" in shown.text
    assert shown.text.count("x") == LONGEST_TEXT


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ReportError, match="at least one run"):
        write_report(tmp_path, [])
    with pytest.raises(ReportError, match="choose another folder"):
        write_report(tmp_path / "absent", [RunSummary("atod", 0)])
    (tmp_path / "summary.json").write_text("{torn")
    with pytest.raises(FileError, match=r"summary\.json"):
        write_report(tmp_path)


def test_reports_of_the_same_run_are_the_same(usual):
    first = usual.read_bytes()
    assert write_report(usual.parent).read_bytes() == first


def test_run_summary_picks_last_and_best():
    run = RunSummary("atod", 0, evaluations=(evaluation(0, 19), evaluation(1, 8), evaluation(2, 8)))
    (board,) = run.boards
    assert run.start(board) == evaluation(0, 19).result
    assert run.last(board).step == 2
    assert run.best(board).step == 1
    assert run.teacher(board) is None
    only_start = RunSummary("atod", 0, evaluations=(evaluation(0, 19),))
    assert only_start.last(board) is None
    assert only_start.best(board) is None


def test_curves_are_averaged_where_present():
    runs = [
        RunSummary("a", 0, metrics=({"step": 1, "x": 1.0}, {"step": 2, "x": None})),
        RunSummary("a", 1, metrics=({"step": 1, "x": 3.0}, {"step": 2, "x": 5.0})),
    ]
    assert mean_curve(runs, "x") == ([1, 2], [2.0, 5.0])
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert percent(0.7214) == "72.1\u00a0%"
    assert percent_range((-0.05, 0.1)) == "\u22125.0 to 10.0"
