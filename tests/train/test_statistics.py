"""The interval of all results against closed forms, and the records of evaluations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_gym.errors import AtodError
from atod_train.reports.evaluations import EvaluationResult, TaskResult, difference_by_task
from atod_train.reports.statistics import (
    InvalidCountsError,
    crossed_means,
    estimate,
    paired_difference,
    unpaired_difference,
)

Z2 = 1.959964**2


def successes(solved: int, tasks: int) -> np.ndarray:
    return np.array([[1.0] * solved + [0.0] * (tasks - solved)])


def test_one_replicate_has_the_interval_of_a_binomial() -> None:
    found = estimate(successes(30, 100))
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert (found.value, found.replicates, found.tasks) == (0.3, 1, 100)
    # A percentile of 5,000 draws of a mean that moves in steps of 0.01.
    assert found.low == pytest.approx(0.3 - half, abs=0.0101)
    assert found.high == pytest.approx(0.3 + half, abs=0.0101)


def test_many_tasks_give_the_same_interval_in_little_memory() -> None:
    found = estimate(successes(12_000, 40_000))
    half = 1.96 * (0.3 * 0.7 / 40_000) ** 0.5
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.0005)


def test_an_effect_of_replicates_varies_as_if_only_they_were_drawn() -> None:
    effects = np.array([0.1, 0.4, 0.5, 0.9])
    means = crossed_means(np.repeat(effects[:, None], 50, axis=1))
    # The variance of a mean of n values drawn with replacement.
    assert means.var() == pytest.approx(effects.var() / 4, rel=0.08)


@pytest.mark.parametrize("tasks", [6, 1200])
def test_replicates_and_tasks_are_drawn_independently(tasks: int) -> None:
    # As many replicates as tasks: the same draws for both would double the variance.
    effects = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    of_tasks = np.resize(effects, tasks)
    means = crossed_means(effects[:, None] + of_tasks[None, :])
    expected = effects.var() / 6 + of_tasks.var() / tasks
    assert means.var() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("tasks", [1, 7, 140])
def test_equal_values_leave_open_what_n_tasks_cannot_rule_out(tasks: int) -> None:
    """The score bound of 0 of n (Wilson 1927), and of n pairs without a difference (Tango 1998)."""
    margin = Z2 / (tasks + Z2)
    none, all_of_them = (estimate(successes(solved, tasks)) for solved in (0, tasks))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(margin)
    assert (all_of_them.value, all_of_them.high) == (1.0, 1.0)
    assert all_of_them.low == pytest.approx(1 - margin)
    same = paired_difference(successes(tasks, tasks), successes(tasks, tasks))
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -margin, margin))


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=5, max_size=5), min_size=1, max_size=4
    )
)
def test_an_interval_contains_the_mean_mirrors_and_does_not_depend_on_order(
    rows: list[list[float]],
) -> None:
    matrix = np.array(rows)
    found = estimate(matrix)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert estimate(matrix) == found
    mirrored = estimate(1 - matrix)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


@pytest.mark.slow
def test_pairs_are_narrower_than_different_tasks() -> None:
    first, second = successes(60, 100), successes(50, 100)
    paired, unpaired = (f(first, second) for f in (paired_difference, unpaired_difference))
    assert paired.value == pytest.approx(unpaired.value) == pytest.approx(0.1)
    assert paired.high - paired.low < unpaired.high - unpaired.low
    half = 1.96 * ((0.6 * 0.4 + 0.5 * 0.5) / 100) ** 0.5
    assert (unpaired.low, unpaired.high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.012)
    sure = unpaired_difference(successes(10, 10), successes(0, 1000))
    assert sure.low == pytest.approx(1 - Z2 / (10 + Z2))
    assert sure.high == 1.0


def test_nothing_has_no_interval() -> None:
    with pytest.raises(InvalidCountsError) as caught:
        estimate(np.zeros((1, 0)))
    assert isinstance(caught.value, AtodError)
    with pytest.raises(InvalidCountsError, match="valid_seen needs at least one task"):
        EvaluationResult("valid_seen", "generated", "greedy", ())


def make_result(solved: int = 3) -> EvaluationResult:
    tasks = tuple(
        TaskResult(f"t{i}", "pick" if i < 3 else "cool", i < solved, float(i < solved), 4, i)
        for i in range(4)
    )
    return EvaluationResult("valid_seen", "generated", "greedy", tasks)


def test_evaluation_result_figures() -> None:
    result = make_result()
    assert (result.successes, result.success_rate) == (3, 0.75)
    assert result.success == estimate(successes(3, 4))
    assert result.mean_turns == 4.0
    assert result.invalid_share == 6 / 16
    assert result.mean_score == 0.75
    types = result.by_task_type()
    assert list(types) == ["cool", "pick"]
    assert (types["cool"].successes, len(types["pick"].tasks)) == (0, 3)
    assert types["pick"].success.low == pytest.approx(1 - Z2 / (3 + Z2))


def test_evaluation_result_survives_json() -> None:
    result = make_result()
    record = json.loads(json.dumps(result.to_json()))
    assert EvaluationResult.from_json(record) == result
    assert record["success_rate"] == 0.75
    assert record["interval"] == [result.success.low, result.success.high]
    # Records of earlier versions have more.
    record["plays"] = 1
    for task in record["tasks"]:
        task["actions"] = [["go", 2.0]]
    assert EvaluationResult.from_json(record) == result
    del record["tasks"][0]["score"]
    with pytest.raises(InvalidCountsError, match="not the record of an evaluation"):
        EvaluationResult.from_json(record)


def test_pairing_by_task_needs_the_same_tasks() -> None:
    better, worse = make_result(4), make_result(1)
    found = difference_by_task(better, worse)
    assert found is not None
    assert (found.value, found.tasks) == (0.75, 4)
    turned = EvaluationResult("valid_seen", "generated", "greedy", worse.tasks[::-1])
    assert difference_by_task(better, turned) == found
    fewer = EvaluationResult("valid_seen", "generated", "greedy", better.tasks[:2])
    assert difference_by_task(better, fewer) is None
    twice = EvaluationResult("valid_seen", "generated", "greedy", better.tasks + better.tasks[:1])
    assert difference_by_task(twice, twice) is None
