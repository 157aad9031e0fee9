"""Task manifests, and the rules for `data=` and `task_types=` that all environments share."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import gymnasium
import pytest
from written_games import write_games

from atod_gym import tasks as tasks_module
from atod_gym.envs.search_qa.settings import SearchQASettings
from atod_gym.errors import DataNotFoundError, InvalidSettingError
from atod_gym.tasks import (
    DataSource,
    TaskManifest,
    announce_once,
    choose_task_types,
    content_hash,
    data_folders,
    data_label,
    locate,
)
from env_servers.webshop.generator import generate_shop

# SHA-256 of "a 1\nb 2\n".
TWO_TASKS = "2951835de33689a441bfa61bc7af99b1f0305ca8ec0ab4dd508f14f57b27ca23"


def find(folder: Path) -> Path | None:
    return folder / "it" if (folder / "it").exists() else None


SOURCE = DataSource("toy", "Toy", find, "a folder with `it`", "run get toy", "generated toys")


def test_the_hash_does_not_depend_on_order() -> None:
    digests = {f"task-{number}": f"{number:064x}" for number in range(30)}
    items = list(digests.items())
    random.Random(0).shuffle(items)
    assert content_hash(dict(items)) == content_hash(digests)
    assert content_hash({"b": "2", "a": "1"}) == TWO_TASKS
    assert content_hash({**digests, "task-0": "1"}) != content_hash(digests)
    assert content_hash({}) == ("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


def test_manifests_are_sorted() -> None:
    with pytest.raises(ValueError, match="sorted"):
        TaskManifest("x", "train", ("b", "a"), "")
    with pytest.raises(ValueError, match="duplicates"):
        TaskManifest("x", "train", ("a", "a"), "")


@pytest.mark.usefixtures("no_user_data")
def test_the_caches_are_searched_after_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_DATA", "~no_such_user")
    monkeypatch.setenv("ALFWORLD_DATA", "b")
    monkeypatch.setenv("XDG_CACHE_HOME", "c")
    home_cache = tmp_path / "home/.cache"
    assert data_folders("alfworld", ("ALFWORLD_DATA",)) == (
        Path("~no_such_user"), Path("b"), home_cache / "alfworld", Path("c/atod/alfworld"),
    )  # fmt: skip


@pytest.mark.usefixtures("no_user_data")
def test_auto_plays_found_data_else_generated_data_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks_module, "_announced", set())
    with caplog.at_level(logging.WARNING, "atod_gym"):
        assert [locate("auto", SOURCE) for _ in range(3)] == [None] * 3
    assert [record.name for record in caplog.records] == ["atod_gym"]
    assert "Toy: no official data found" in caplog.text
    announce_once("something else")
    assert len(caplog.records) == 2
    with pytest.raises(DataNotFoundError, match=r"\.cache.*run get toy.*generated"):
        locate("official", SOURCE)
    (tmp_path / "it").touch()
    monkeypatch.setenv("ATOD_DATA", str(tmp_path))
    for data in ("auto", "official", str(tmp_path), tmp_path):
        assert locate(data, SOURCE) == tmp_path / "it"
    assert locate("generated", SOURCE) is None


@pytest.mark.slow
@pytest.mark.usefixtures("no_user_data")
def test_other_data_does_not_hide_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alfworld_data: Path, webshop_data: Path
) -> None:
    write_games(tmp_path / "json_2.1.1", {"valid_seen": 1}, "tiny")
    shop = generate_shop(seed=0, products=20)
    for name, rows in (("shuffle", shop.items), ("ins_v2", shop.instructions)):
        (tmp_path / f"items_{name}_1000.json").write_text(json.dumps(rows), encoding="utf-8")
    questions = tmp_path / "questions"
    for folder in (tmp_path, questions):
        (folder / "nq").mkdir(parents=True)
        row = {"question": "Where?", "golden_answers": ["Here."]}
        (folder / "nq" / "test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for name, folder in (("ATOD", tmp_path), ("ALFWORLD", alfworld_data.parent),
                         ("WEBSHOP", webshop_data), ("SEARCHQA", questions)):  # fmt: skip
        monkeypatch.setenv(f"{name}_DATA", str(folder))
    for name, split in (("ALFWorld", "valid_seen"), ("WebShop", "test")):
        for data in ("official", "auto"):
            env = gymnasium.make(f"atod/{name}-v0", data=data, split=split)
            named = env.unwrapped.data  # type: ignore[attr-defined]
            assert named == "official" if data == "official" else named.startswith(str(tmp_path))
    monkeypatch.setattr(
        "atod_gym.envs.search_qa.settings.missing_official",
        lambda folder: "" if folder == questions else "something",
    )
    assert SearchQASettings(data="official").locate() == questions
    assert SearchQASettings(data="auto").locate() == tmp_path


@pytest.mark.parametrize("data", ["", None, 3])
def test_data_that_is_no_text_is_refused(data: object) -> None:
    with pytest.raises(InvalidSettingError, match="data must be"):
        locate(data, SOURCE)


def test_a_wrong_path_is_reported_with_the_expected_content(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"oficial.*a folder with `it`"):
        locate("oficial", SOURCE)
    for data in (tmp_path, "~no_such_user/data"):
        with pytest.raises(DataNotFoundError, match="a folder with `it`"):
            locate(data, SOURCE)


def test_only_the_published_content_is_called_official() -> None:
    folder = Path("some/folder")
    assert data_label("auto", None, is_official=False) == "generated"
    for data in ("auto", "official", "some"):
        assert data_label(data, folder, is_official=True) == "official"
    assert data_label("auto", folder, is_official=False) == str(folder)
    assert data_label("some", folder, is_official=False) == "some"
    with pytest.raises(DataNotFoundError, match=r"some/folder.*To play it.*run get toy"):
        data_label("official", folder, is_official=False, how_to_get=SOURCE.how_to_get)


def test_task_types_are_a_name_or_several() -> None:
    types = {"1": "a", "2": "b", "3": "c", "4": "a"}
    assert choose_task_types(types, None) is types
    assert choose_task_types(types, "a") == {"1": "a", "4": "a"}
    for chosen in ("c, a", ["c", "a"], ("a", "c"), {"a", "c"}):
        assert choose_task_types(types, chosen) == {"1": "a", "3": "c", "4": "a"}
    for wrong in ("d", "", "a,", [], ["a", "d"], [None]):
        with pytest.raises(InvalidSettingError, match="this split has: a, b, c"):
            choose_task_types(types, wrong)
    with pytest.raises(InvalidSettingError, match="list of names"):
        choose_task_types(types, 3)
