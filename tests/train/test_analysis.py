"""Check the analysis of a study: numbers computed by hand, and files that do not match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import results_files as files

from atod_train.reports.analysis import (
    Selection,
    cost,
    courses,
    difference,
    mean_course,
    mean_metric,
    rate,
    verdict,
)
from atod_train.reports.results import Results, read_results
from atod_train.reports.statistics import Estimate, estimate, paired_difference
from atod_train.reports.tables import (
    describe,
    difference_table,
    difference_text,
    first_pairs,
    main_table,
    phase_table,
    rate_text,
    type_table,
)

GREEDY, SAMPLED = Selection("greedy"), Selection("sampled")


def one(*paths: Path) -> Results:
    [environment] = read_results(paths)
    return environment


@pytest.fixture
def merged(tmp_path: Path) -> Results:
    """Two parts with starts as far apart as can be; `b` lacks seed 2, `c` is in the second."""
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
    for evaluation in run["last"].values():
        evaluation["plays"] = 4
    record = files.environment([run], start={"s": "0011"}, teacher={"s": "0222"})
    for evaluation in record["teacher"].values():
        evaluation["plays"] = 2
    environment = one(files.write(tmp_path / "1.json", houses=record))
    assert rate(environment, "a", GREEDY) == estimate(np.array([[0, 0.25, 0.75, 1]]))
    gap = difference(environment, "a", "teacher", GREEDY)
    assert gap == paired_difference(
        np.array([[0, 0.25, 0.75, 1]]), np.array([[0.0, 1.0, 1.0, 1.0]])
    )


# -- estimates ------------------------------------------------------------------------------------


def test_all_against_none_is_a_hundred_points(tmp_path: Path) -> None:
    record = files.environment(
        [files.run("a", 0, {"s": "111", "t": "11"}), files.run("b", 0, {"s": "000", "t": "00"})],
        start={"s": "000", "t": "00"},
        teacher={"s": "111", "t": "11"},
    )
    environment = one(files.write(tmp_path / "r.json", houses=record))
    found = difference(environment, "a", "b", GREEDY)
    # Five tasks that all differ leave this open: 1 - z^2 / (5 + z^2).
    assert found == Estimate(1.0, pytest.approx(0.5655, abs=1e-4), 1.0, 1, 5)
    assert difference_text(found) == "+100.0 [+56.6, +100.0]"
    [of_t, of_all] = (
        difference(environment, "b", "teacher", Selection("sampled", "t")),
        difference(environment, "start", "teacher", SAMPLED),
    )
    assert of_t == Estimate(-1.0, -1.0, pytest.approx(-0.3424, abs=1e-4), 1, 2)
    assert of_all == Estimate(-1.0, -1.0, pytest.approx(-0.5655, abs=1e-4), 1, 5)


def test_replicates_are_seeds_of_parts(merged: Results) -> None:
    found = rate(merged, "a", GREEDY)
    assert found is not None
    assert (found.value, found.replicates, found.tasks) == (pytest.approx(1 / 3), 3, 4)
    start = rate(merged, "start", GREEDY)
    assert start is not None
    assert (start.value, start.replicates) == (0.5, 2)
    assert (start.low, start.high) == (0.0, 1.0)


def test_a_label_is_compared_with_the_start_of_its_part(merged: Results) -> None:
    found = difference(merged, "a", "start", SAMPLED)
    assert found is not None
    assert (found.value, found.replicates, found.tasks) == (0.0, 3, 4)
    found = difference(merged, "start", "b", SAMPLED)
    assert found is not None
    assert (found.value, found.replicates) == ((1 / 4 - 1) / 2, 2)


def test_labels_are_compared_where_both_are(merged: Results) -> None:
    found = difference(merged, "b", "a", GREEDY)
    assert found is not None
    assert (found.value, found.replicates) == ((-1 / 4 + 1) / 2, 2)
    assert difference(merged, "a", "c", GREEDY) is None


def test_the_best_is_that_of_each_split(tmp_path: Path) -> None:
    run = files.run("a", 0, last={"s": "00", "t": "00"}, best={"s": "11", "t": "01"})
    record = files.environment([run], start={"s": "00", "t": "00"}, teacher={"s": "11", "t": "11"})
    environment = one(files.write(tmp_path / "r.json", houses=record))
    best, last = (
        rate(environment, "a", Selection("greedy", which=which)) for which in ("best", "last")
    )
    assert best is not None
    assert last is not None
    assert (best.value, last.value) == (0.75, 0.0)


def test_runs_without_evaluation_have_no_numbers(tmp_path: Path) -> None:
    record = files.environment(
        [files.run("a", 0, {"s": "01"})], start={"s": "01"}, teacher={"s": "11"}
    )
    record["teacher"] = {"s/greedy": None, "s/sampled": None}
    environment = one(files.write(tmp_path / "r.json", houses=record))
    assert rate(environment, "teacher", GREEDY) is None
    assert difference(environment, "a", "teacher", GREEDY) is None
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


def with_courses(tmp_path: Path, rates: list[float]) -> Results:
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


def test_a_course_over_several_splits_has_the_steps_of_all(tmp_path: Path) -> None:
    [course] = courses(with_courses(tmp_path, [0.8]), "a", GREEDY)
    # Step 2 was not evaluated on t. Tasks count alike, in whatever split they are.
    assert course == pytest.approx({0: 5 / 12, 3: 9 / 12})


def test_a_course_begins_at_the_start_of_its_part(merged: Results) -> None:
    assert courses(merged, "b", GREEDY) == [{0: 1.0, 3: 0.75}, {0: 0.0, 3: 1.0}]


def test_the_mean_course_has_the_steps_of_all_seeds() -> None:
    assert mean_course([{0: 0.5, 2: 0.9, 3: 0.4}, {0: 0.5, 3: 0.6}]) == {0: 0.5, 3: 0.5}
    assert mean_course([]) == {}


def test_metrics_are_averaged_where_they_were_measured(tmp_path: Path) -> None:
    runs = [
        files.run("a", 0, {"s": "01"}, metrics={"rho": [1.0, None, None, 4.0]}),
        files.run("a", 1, {"s": "01"}, metrics={"rho": [3.0, 5.0]}),
        files.run("b", 1, {"s": "01"}, metrics={}),
    ]
    record = files.environment(runs, start={"s": "01"}, teacher={"s": "01"})
    environment = one(files.write(tmp_path / "r.json", houses=record))
    assert mean_metric(environment, "a", "rho") == {1: 2.0, 2: 5.0, 4: 4.0}
    assert mean_metric(environment, "b", "rho") == {}


def test_cost_is_that_of_a_run(merged: Results) -> None:
    found = cost(merged, "a")
    assert (found.minutes, found.episodes, found.tokens) == (4.0, 48.0, 4000.0)
    assert found.phases == {"environment": 10.0, "generation": 60.0, "update": 20.0, "other": 10.0}


# -- tables ---------------------------------------------------------------------------------------


def test_tables_as_markdown(merged: Results) -> None:
    assert describe(merged) == "4 tasks (s 4); 6 runs from 2 starts and teachers."
    table = main_table(merged)
    assert [row[0] for row in table.rows] == ["start", "teacher", "a", "b", "c"]
    assert table.markdown.splitlines()[:2] == [
        "| model | seeds | greedy, last | greedy, best | sampled, last "
        "| gain over start (sampled, last) | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    assert table.markdown.splitlines()[-1] == (
        "| c | 1 | 100.0 [51.0, 100.0] | 100.0 [51.0, 100.0] | 100.0 [51.0, 100.0] "
        "| +100.0 [+51.0, +100.0] | 2.0 |"
    )
    assert first_pairs(merged) == [("a", "b"), ("a", "c"), ("a", "teacher")]
    claims = difference_table(merged, [("c", "start"), ("start", "c"), ("a", "start"), ("a", "c")])
    assert [row[:4] for row in claims.rows] == [
        ("c > start", "1", "+100.0 [+51.0, +100.0]", "one seed"),
        ("start > c", "1", "-100.0 [-100.0, -51.0]", "one seed"),
        ("a > start", "3", "+0.0 [-49.0, +49.0]", "undecided"),
        ("a > c", "0", "–", "–"),  # noqa: RUF001
    ]
    assert phase_table(merged).markdown.splitlines()[2] == (
        "| a | 4.0 | 48 | 4 | 10 % | 60 % | 0 % | 20 % | 10 % |"
    )


def test_the_teacher_passes_that_a_schedule_saved_have_a_column(tmp_path: Path) -> None:
    """A teacher that is the student itself is scored, and agrees exactly."""
    runs = [files.run(label, 0, {"s": "01"}) for label in ("atod", "gap", "self", "grpo")]
    for run, course in zip(runs, ([0.5, 0.3], [0.5, 0.4, None, None], [0.0, 0.0]), strict=False):
        run["metrics"] |= {"disagreement": course, "kappa": [1.0] * len(course)}
    found = one(
        files.write(
            tmp_path / "1.json", houses=files.environment(runs, start={"s": "01"}, teacher={})
        )
    )
    table = phase_table(found)
    assert table.head[-1] == "teacher passes saved"
    assert [row[-1] for row in table.rows] == ["0 %", "50 %", "0 %", "100 %"]


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


def test_task_types_have_a_table_where_there_are_several(tmp_path: Path) -> None:
    runs = [files.run("a", seed, {"s": bits}) for seed, bits in enumerate(("0111", "0101"))]
    record = files.environment(runs, start={"s": "0000"}, teacher={"s": "1111"})
    assert type_table(one(files.write(tmp_path / "old.json", houses=record)), "greedy") is None
    record["task_types"] = {"s": ["pick", "pick", "cool", "pick"]}
    environment = one(files.write(tmp_path / "r.json", houses=record))
    table = type_table(environment, "greedy")
    assert table is not None
    assert table.head == ("task type", "start", "teacher", "a")
    assert [row[0] for row in table.rows] == ["cool", "pick"]
    # Two of three tasks in both seeds; one task in one of two.
    assert [row[3].partition(" ")[0] for row in table.rows] == ["50.0", "66.7"]
    assert table.text.splitlines()[0].startswith("task type  ")
