"""What is said of a study: numbers that can be worked out by hand, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import results_files as files

from atod_train.reports.statistics import bootstrap_interval, mean_interval, wilson_interval
from atod_train.studies.study_analysis import (
    Estimate,
    cost,
    course_band,
    crossed_estimate,
    crossed_means,
    difference,
    mean_metric,
    rate,
    seed_courses,
    verdict,
)
from atod_train.studies.study_markdown import (
    describe,
    difference_table,
    difference_text,
    first_pairs,
    main_table,
    phase_table,
    rate_text,
)
from atod_train.studies.study_pieces import StudyEnvironment, read_results


def one(*paths: Path) -> StudyEnvironment:
    [environment] = read_results(paths)
    return environment


@pytest.fixture
def merged(tmp_path: Path) -> StudyEnvironment:
    """Two pieces with starts as far apart as can be; `b` lacks seed 2, `c` is in the second."""
    first = files.environment(
        [files.run("a", 0, {"s": "1111"}), files.run("b", 0, {"s": "1011"})],
        start={"s": "1111"},
        teacher={"s": "1111"},
    )
    second = files.environment(
        [
            files.run("a", 0, {"s": "0000"}, minutes=4.0),
            files.run("a", 2, {"s": "0000"}, minutes=6.0),
            files.run("b", 0, {"s": "1111"}),
            files.run("c", 3, {"s": "1111"}),
        ],
        start={"s": "0000"},
        teacher={"s": "0011"},
    )
    return one(
        files.write(tmp_path / "1.json", houses=first),
        files.write(tmp_path / "2.json", houses=second),
    )


def test_several_plays_of_a_task_count_by_their_share(tmp_path: Path) -> None:
    run = files.run("a", 0, {"s": "0134"}, best={"s": "0011"})
    for board in run["last"].values():
        board["plays"] = 4
    record = files.environment([run], start={"s": "0011"}, teacher={"s": "0222"})
    for board in record["teacher"].values():
        board["plays"] = 2
    environment = one(files.write(tmp_path / "1.json", houses=record))
    assert rate(environment, "a", "greedy") == crossed_estimate(np.array([[0, 0.25, 0.75, 1]]))
    gap = difference(environment, "a", "teacher", "greedy")
    assert gap == crossed_estimate(np.array([[0, -0.75, -0.25, 0]]))


# -- the bootstrap --------------------------------------------------------------------------------


def test_a_matrix_without_spread_has_an_interval_without_width() -> None:
    assert crossed_estimate(np.ones((3, 7))) == Estimate(1.0, 1.0, 1.0, 3, 7)


def test_one_replicate_has_the_interval_of_a_bootstrap_over_tasks() -> None:
    solved = [1.0] * 30 + [0.0] * 70
    found = crossed_estimate(np.array([solved]))
    low, high = bootstrap_interval(solved)
    assert found.value == 0.3
    # A percentile moves by about a hundredth of the task's weight; one task is 0.01.
    assert found.low == pytest.approx(low, abs=0.0101)
    assert found.high == pytest.approx(high, abs=0.0101)
    assert found.high - found.low > 0.15


def test_an_effect_of_replicates_varies_as_if_only_they_were_drawn() -> None:
    effects = np.array([0.1, 0.4, 0.5, 0.9])
    means = crossed_means(np.repeat(effects[:, None], 50, axis=1))
    # The variance of a mean of n values drawn with replacement.
    assert means.var() == pytest.approx(effects.var() / 4, rel=0.08)


def test_replicates_and_tasks_are_drawn_independently() -> None:
    # As many replicates as tasks: the same draws for both would double the variance.
    effects = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    means = crossed_means(effects[:, None] + effects[None, :])
    assert means.var() == pytest.approx(2 * effects.var() / 6, rel=0.08)


# -- estimates ------------------------------------------------------------------------------------


def test_all_against_none_is_a_hundred_points(tmp_path: Path) -> None:
    record = files.environment(
        [files.run("a", 0, {"s": "111", "t": "11"}), files.run("b", 0, {"s": "000", "t": "00"})],
        start={"s": "000", "t": "00"},
        teacher={"s": "111", "t": "11"},
    )
    environment = one(files.write(tmp_path / "r.json", houses=record))
    found = difference(environment, "a", "b", "greedy")
    assert found == Estimate(1.0, 1.0, 1.0, 1, 5)
    assert difference_text(found) == "+100.0 [+100.0, +100.0]"
    assert difference(environment, "b", "teacher", "sampled", "t") == Estimate(
        -1.0, -1.0, -1.0, 1, 2
    )
    assert difference(environment, "start", "teacher", "sampled") == Estimate(
        -1.0, -1.0, -1.0, 1, 5
    )


def test_replicates_are_seeds_of_pieces(merged: StudyEnvironment) -> None:
    found = rate(merged, "a", "greedy")
    assert found is not None
    assert (found.value, found.replicates, found.tasks) == (pytest.approx(1 / 3), 3, 4)
    start = rate(merged, "start", "greedy")
    assert start is not None
    assert (start.value, start.replicates) == (0.5, 2)
    assert (start.low, start.high) == (0.0, 1.0)


def test_a_label_is_compared_with_the_start_of_its_piece(merged: StudyEnvironment) -> None:
    assert difference(merged, "a", "start", "sampled") == Estimate(0.0, 0.0, 0.0, 3, 4)
    found = difference(merged, "start", "b", "sampled")
    assert found is not None
    assert (found.value, found.replicates) == ((1 / 4 - 1) / 2, 2)


def test_labels_are_compared_where_both_are(merged: StudyEnvironment) -> None:
    found = difference(merged, "b", "a", "greedy")
    assert found is not None
    assert (found.value, found.replicates) == ((-1 / 4 + 1) / 2, 2)
    assert difference(merged, "a", "c", "greedy") is None


def test_the_best_is_that_of_each_split(tmp_path: Path) -> None:
    run = files.run("a", 0, last={"s": "00", "t": "00"}, best={"s": "11", "t": "01"})
    record = files.environment([run], start={"s": "00", "t": "00"}, teacher={"s": "11", "t": "11"})
    environment = one(files.write(tmp_path / "r.json", houses=record))
    best, last = (rate(environment, "a", "greedy", which=which) for which in ("best", "last"))
    assert best is not None
    assert last is not None
    assert (best.value, last.value) == (0.75, 0.0)


def test_what_was_not_evaluated_has_no_numbers(tmp_path: Path) -> None:
    record = files.environment(
        [files.run("a", 0, {"s": "01"})], start={"s": "01"}, teacher={"s": "11"}
    )
    record["teacher"] = {"s/greedy": None, "s/sampled": None}
    environment = one(files.write(tmp_path / "r.json", houses=record))
    assert rate(environment, "teacher", "greedy") is None
    assert difference(environment, "a", "teacher", "greedy") is None
    assert [row[0] for row in main_table(environment).rows] == ["start", "a"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "holds"),
        (-0.2, -0.01, "does not hold"),
        (-0.01, 0.2, "undecided"),
        (0.0, 0.2, "undecided"),
        (-0.2, 0.0, "undecided"),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 2, 10)) == expected


# -- courses, metrics, cost -----------------------------------------------------------------------


def with_courses(tmp_path: Path, rates: list[float]) -> StudyEnvironment:
    """Runs that solve these shares of s (10 tasks) at step 3, and half of t (2 tasks)."""
    runs = [
        files.run(
            "a",
            seed,
            {"s": "1" * 10, "t": "11"},
            course={"s/greedy": [[2, 0.9], [3, share]], "t/greedy": [[3, 0.5]]},
        )
        for seed, share in enumerate(rates)
    ]
    splits = {"s": "1" * 5 + "0" * 5, "t": "00"}
    record = files.environment(runs, start=splits, teacher=splits)
    return one(files.write(tmp_path / "r.json", houses=record))


def test_the_course_of_one_seed_has_intervals_over_tasks(tmp_path: Path) -> None:
    band = course_band(with_courses(tmp_path, [0.8]), "a", "greedy")
    assert band is not None
    # Step 2 was not evaluated on t. Tasks count alike, in whatever split they are.
    assert band.steps == (0, 3)
    assert band.means == pytest.approx((5 / 12, 9 / 12))
    assert (band.lows[1], band.highs[1]) == pytest.approx(wilson_interval(9, 12))


def test_a_course_begins_at_the_start_of_its_piece(merged: StudyEnvironment) -> None:
    courses = seed_courses(merged, "b", "greedy")
    assert courses == [{0: 1.0, 3: 0.75}, {0: 0.0, 3: 1.0}]


def test_the_course_of_three_seeds_has_intervals_over_seeds(tmp_path: Path) -> None:
    band = course_band(with_courses(tmp_path, [0.4, 0.5, 0.6]), "a", "greedy", "s")
    assert band is not None
    assert band.steps == (0, 2, 3)
    assert band.means == pytest.approx((0.5, 0.9, 0.5))
    assert (band.lows[2], band.highs[2]) == pytest.approx(mean_interval([0.4, 0.5, 0.6]))
    assert (band.lows[1], band.highs[1]) == pytest.approx((0.9, 0.9))


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    environment = with_courses(tmp_path, [0.4, 0.6])
    band = course_band(environment, "a", "greedy", "s")
    assert band is not None
    assert band.lows == band.highs == band.means == pytest.approx((0.5, 0.9, 0.5))
    assert [course[3] for course in seed_courses(environment, "a", "greedy", "s")] == [0.4, 0.6]


def test_metrics_are_averaged_where_they_were_measured(tmp_path: Path) -> None:
    runs = [
        files.run("a", 0, {"s": "01"}, metrics={"rho": [1.0, None, None, 4.0]}),
        files.run("a", 1, {"s": "01"}, metrics={"rho": [3.0, 5.0]}),
        files.run("b", 1, {"s": "01"}, metrics={}),
    ]
    record = files.environment(runs, start={"s": "01"}, teacher={"s": "01"})
    environment = one(files.write(tmp_path / "r.json", houses=record))
    assert mean_metric(environment, "a", "rho") == ([1, 2, 4], [2.0, 5.0, 4.0])
    assert mean_metric(environment, "b", "rho") == ([], [])


def test_cost_is_that_of_a_run(merged: StudyEnvironment) -> None:
    found = cost(merged, "a")
    assert (found.minutes, found.episodes, found.tokens) == (4.0, 48.0, 4000.0)
    assert found.phases == {"environment": 10.0, "generation": 60.0, "update": 20.0, "other": 10.0}


# -- tables ---------------------------------------------------------------------------------------


def test_tables_as_markdown(merged: StudyEnvironment) -> None:
    assert describe(merged) == "4 tasks (s 4); 6 runs from 2 starts and teachers."
    table = main_table(merged)
    assert [row[0] for row in table.rows] == ["start", "teacher", "a", "b", "c"]
    assert table.markdown.splitlines()[:2] == [
        "| model | seeds | greedy, last | greedy, best | sampled, last "
        "| gain over start (sampled, last) | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    assert table.markdown.splitlines()[-1] == (
        "| c | 1 | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] "
        "| +100.0 [+100.0, +100.0] | 2.0 |"
    )
    assert first_pairs(merged) == [("a", "b"), ("a", "c"), ("a", "teacher")]
    claims = difference_table(merged, [("c", "start"), ("start", "c"), ("a", "start"), ("a", "c")])
    assert [row[:4] for row in claims.rows] == [
        ("c > start", "1", "+100.0 [+100.0, +100.0]", "one seed"),
        ("start > c", "1", "-100.0 [-100.0, -100.0]", "one seed"),
        ("a > start", "3", "+0.0 [+0.0, +0.0]", "undecided"),
        ("a > c", "0", "–", "–"),  # noqa: RUF001
    ]
    assert phase_table(merged).markdown.splitlines()[2] == (
        "| a | 4.0 | 48 | 4 | 10 % | 60 % | 0 % | 20 % | 10 % |"
    )


def test_numbers_as_text() -> None:
    assert rate_text(Estimate(0.7214, 0.6421, 0.789, 3, 10)) == "72.1 [64.2, 78.9]"
    assert difference_text(Estimate(-0.0001, -0.05, 0.0449, 3, 10)) == "+0.0 [-5.0, +4.5]"


def test_scores_are_shown_where_they_say_more_than_success(tmp_path: Path) -> None:
    bits = {"s": "011", "t": "1"}
    run = files.run("a", 0, bits)
    record = files.environment([run, files.run("a", 1, bits)], start=bits, teacher=bits)
    plain = main_table(one(files.write(tmp_path / "plain.json", houses=record)))
    assert not any("score" in name for name in plain.head)
    run["last"]["s/sampled"]["score"] = 0.8
    table = main_table(one(files.write(tmp_path / "r.json", houses=record)))
    place = table.head.index("score (sampled, last)")
    # The mean of (3 * 0.8 + 1) / 4 and 3 / 4 of two seeds.
    assert [row[place] for row in table.rows] == ["75.0", "75.0", "80.0"]
    assert all(len(row) == len(table.head) for row in table.rows)
