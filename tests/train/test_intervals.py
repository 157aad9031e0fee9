"""Intervals against published numbers and against what defines them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_gym.errors import AtodError
from atod_train.reports.statistics import (
    EvaluationResult,
    InvalidCountsError,
    TaskResult,
    bootstrap_interval,
    difference_interval,
    mean_interval,
    paired_by_task,
    paired_difference_interval,
    student_quantile,
    tango_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_the_published_numbers(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_exact_at_the_ends_and_mirrors():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("s1", "n1", "s2", "n2", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 20, 0.6791, 1.0000),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
    ],
)
def test_difference_interval_equals_the_published_numbers(s1, n1, s2, n2, low, high):
    assert difference_interval(s1, n1, s2, n2) == pytest.approx((low, high), abs=5e-5)


def test_tango_interval_equals_the_paper_and_an_independent_program():
    # Tango (1998), section 6.1: 43 pairs agree, one goes the other way; 90 % lower limit.
    assert tango_interval(0, 1, 44, confidence=0.90)[0] == pytest.approx(-0.096, abs=5e-4)
    # R, PropCIs::scoreci.mp(20, 60, 1000), and (41, 48, 549) at 90 %, printed to four decimals.
    assert tango_interval(60, 20, 1000) == pytest.approx((0.0231, 0.0584), abs=5e-5)
    assert tango_interval(48, 41, 549, confidence=0.90) == pytest.approx(
        (-0.0157, 0.0414), abs=5e-5
    )


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_tango_interval_mirrors_contains_the_estimate_and_agrees_with_mcnemar(b, c, same):
    n = b + c + same
    low, high = tango_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert tango_interval(c, b, n) == pytest.approx((-high, -low), abs=1e-9)
    mcnemar = abs(b - c) / math.sqrt(b + c) if b + c else 0.0
    if abs(mcnemar - 1.959964) > 1e-3:
        assert (low <= 0 <= high) == (mcnemar < 1.959964)


def test_tango_interval_at_the_corners():
    assert tango_interval(5, 0, 5)[1] == 1.0
    assert tango_interval(0, 5, 5)[0] == -1.0
    low, high = tango_interval(0, 0, 10)
    # With no differing pair the statistic is -n*d / sqrt(n*d*(1-d)) = -z at the upper bound.
    z2 = 1.959963984540054**2
    assert high == pytest.approx(z2 / (10 + z2))
    assert low == pytest.approx(-high)


def test_paired_difference_interval_counts_the_differing_pairs():
    a = [True] * 60 + [False] * 20 + [True] * 460 + [False] * 460
    b = [False] * 60 + [True] * 20 + [True] * 460 + [False] * 460
    assert paired_difference_interval(a, b) == tango_interval(60, 20, 1000)
    unpaired = difference_interval(sum(a), 1000, sum(b), 1000)
    paired = paired_difference_interval(a, b)
    assert paired[1] - paired[0] < unpaired[1] - unpaired[0]


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_student_quantile_equals_the_tables(degrees, value):
    assert student_quantile(0.95, degrees) == pytest.approx(value, abs=1e-4)
    assert student_quantile(0.99, 5) == pytest.approx(4.03214, abs=1e-4)


def test_mean_interval_of_three_seeds():
    # mean 0.8, standard deviation 0.05, t = 4.30265: half width 0.12421
    low, high = mean_interval([0.75, 0.8, 0.85])
    assert (low, high) == pytest.approx((0.8 - 0.124207, 0.8 + 0.124207), abs=1e-5)
    assert mean_interval([0.5]) == (-math.inf, math.inf)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(1, 0),
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(1, 2, confidence=95),
        lambda: difference_interval(1, 2, -1, 2),
        lambda: tango_interval(2, 2, 3),
        lambda: paired_difference_interval([True], [True, False]),
        lambda: paired_difference_interval([], []),
        lambda: mean_interval([]),
        lambda: student_quantile(0.95, 0),
        lambda: EvaluationResult("valid", "generated", "greedy", ()),
        lambda: EvaluationResult.from_json({"split": "valid"}),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(InvalidCountsError) as caught:
        call()
    assert isinstance(caught.value, AtodError)


def make_result(successes: int = 3) -> EvaluationResult:
    tasks = tuple(
        TaskResult(
            f"t{i}",
            "pick" if i < 3 else "cool",
            i < successes,
            float(i < successes),
            4,
            i,
            (("go", 4 - i),) if i % 2 else (("go", 2), ("take", 1)),
        )
        for i in range(4)
    )
    return EvaluationResult("valid_seen", "generated", "greedy", tasks)


def test_evaluation_result_figures():
    result = make_result()
    assert result.success_rate == 0.75
    assert result.interval == wilson_interval(3, 4)
    assert result.mean_turns == 4.0
    assert result.invalid_share == 6 / 16
    assert result.mean_score == 0.75
    cool, pick = result.by_task_type()
    assert (cool.task_type, cool.tasks, cool.successes) == ("cool", 1, 0)
    assert (pick.task_type, pick.tasks, pick.success_rate) == ("pick", 3, 1.0)
    assert pick.interval == wilson_interval(3, 3)
    assert result.actions_per_episode() == {"go": (2 + 3 + 2 + 1) / 4, "take": 0.5}


def test_evaluation_result_survives_json():
    result = make_result()
    record = json.loads(json.dumps(result.to_json()))
    assert EvaluationResult.from_json(record) == result
    assert record["success_rate"] == 0.75
    for task in record["tasks"]:
        del task["actions"]
    assert EvaluationResult.from_json(record).actions_per_episode() == {}


def test_pairing_by_task_needs_the_same_tasks():
    better, worse = make_result(4), make_result(1)
    assert paired_by_task(better, worse) == tango_interval(3, 0, 4)
    fewer = EvaluationResult("valid_seen", "generated", "greedy", better.tasks[:2])
    assert paired_by_task(better, fewer) is None


def test_pairing_of_several_plays_is_by_their_shares():
    def shares(*values: float) -> EvaluationResult:
        tasks = tuple(TaskResult(f"t{i}", "pick", v, v, 2.5, 0.5) for i, v in enumerate(values))
        return EvaluationResult("valid_seen", "generated", "sampled", tasks, plays=4)

    a, b = shares(1.0, 0.75, 0.25), shares(0.5, 0.25, 0.25)
    assert (a.successes, a.success_rate) == (2.0, 2 / 3)
    assert a.interval == wilson_interval(2, 3)
    assert paired_by_task(a, b) == bootstrap_interval([0.5, 0.5, 0.0])
    record = json.loads(json.dumps(a.to_json()))
    assert record["plays"] == 4
    assert EvaluationResult.from_json(record) == a


def test_bootstrap_interval_is_that_of_a_mean_and_repeats():
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    # The mean of 400 draws with standard deviation 1/2.
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.006)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    with pytest.raises(InvalidCountsError):
        bootstrap_interval([])
