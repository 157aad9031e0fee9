"""Parts of a study are read from files, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import results_files as files

from atod_gym.errors import AtodError
from atod_train.reports.results import ResultsError, read_results


def sound(seed: int = 0, **more: Any) -> dict[str, Any]:
    return files.environment(
        [files.run("a", seed, {"s": "01"})], start={"s": "00"}, teacher={"s": "11"}, **more
    )


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in sound().items() if name != key}


def run_with(**more: Any) -> dict[str, Any]:
    record = sound()
    record["runs"][0].update(more)
    return record


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{}", id="no-environment"),
        pytest.param("[1]", id="list"),
        pytest.param('{"houses": 3}', id="number"),
        pytest.param('{"houses": {"runs": []}}', id="no-tasks"),
    ],
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(AtodError, match=re.escape(str(path))):
        read_results([path])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(without("start"), "start", id="no-start"),
        pytest.param({**sound(), "runs": []}, "has no runs", id="no-runs"),
        pytest.param(
            run_with(last=files.evaluations({"s": "011"})), "of 2 tasks", id="too-many-bits"
        ),
        pytest.param(
            run_with(last=files.evaluations({"s": "02"})), "0 to 1, for", id="digit-too-big"
        ),
        pytest.param(
            run_with(last={"s/greedy": {"success": "02", "plays": 10}}), "0 to 10", id="plays"
        ),
        pytest.param(
            run_with(last={"s/greedy": {"success": "0.", "plays": 1.0}}), "'float'", id="half-plays"
        ),
        pytest.param(run_with(best=files.evaluations({"t": "01"})), "'t'", id="unknown-split"),
        pytest.param(
            run_with(last={"s/greedy": {"success": "01"}}), "s/greedy has no score", id="no-score"
        ),
        pytest.param(run_with(seed="0"), "label and seed", id="seed-as-text"),
        pytest.param(
            {**sound(), "runs": [*sound()["runs"], files.run("a", 0, {"s": "11"})]},
            "give each run once",
            id="a-seed-twice",
        ),
        pytest.param(
            {**sound(), "runs": [{"label": "a", "seed": 0}]}, "has no 'minutes'", id="older-version"
        ),
    ],
)
def test_incomplete_records_are_refused(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ResultsError, match=re.escape(message)):
        read_results([files.write(tmp_path / "r.json", houses=record)])


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="not the name of an environment"):
        read_results([files.write(tmp_path / "r.json", **{"../houses": sound()})])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        pytest.param(sound(), "is also in", id="the-same-run"),
        pytest.param(sound(1, tasks={"s": ["s-0", "s-2"]}), "the list of tasks", id="tasks"),
        pytest.param(sound(1, data={"hash": "decaf"}), "training data", id="data"),
        pytest.param(sound(1, model={"student": "mini"}), "model.student", id="student"),
        pytest.param(
            {**sound(1), "runs": [files.run("a", 1, {"s": "01"}, train={"steps": 4, "seed": 1})]},
            "train.steps (4 and 3)",
            id="budget",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    paths = [
        files.write(tmp_path / "1.json", houses=sound()),
        files.write(tmp_path / "2.json", houses=second),
    ]
    with pytest.raises(ResultsError, match=re.escape(message)):
        read_results(paths)


def change_device(record: dict[str, Any]) -> None:
    record["model"] = {"student": "tiny", "device": "cuda"}


def change_path(record: dict[str, Any]) -> None:
    record["env"] = {"max_turns": 30, "data": "/elsewhere"}


def change_folder(record: dict[str, Any]) -> None:
    record["model"] = {"student": "/models/tiny/"}


def change_evaluations(record: dict[str, Any]) -> None:
    record["runs"][0]["train"] = {"steps": 3, "seed": 1, "eval_every": 3}
    record["env"] = {"eval_samples": 4}


def change_option(record: dict[str, Any]) -> None:
    record["model"] = {"student": "tiny", "new_setting": 1}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_device, id="device"),
        pytest.param(change_path, id="path"),
        pytest.param(change_folder, id="folder-of-a-model"),
        pytest.param(change_evaluations, id="evaluations"),
        pytest.param(change_option, id="setting-of-one-alone"),
    ],
)
def test_parts_may_be_made_in_different_places(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    second = sound(1)
    change(second)
    paths = [
        files.write(tmp_path / "1.json", houses=sound()),
        files.write(tmp_path / "2.json", houses=second, shop=sound()),
    ]
    houses, shop = read_results(paths)
    assert [(run.part, run.seed) for run in houses.runs] == [(0, 0), (1, 1)]
    assert [(run.part, run.seed) for run in shop.runs] == [(0, 0)]
