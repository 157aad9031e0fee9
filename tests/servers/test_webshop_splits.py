"""Splits and manifests."""

from __future__ import annotations

from pathlib import Path

import pytest
from webshop_golden import official_shop

from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop
from env_servers.webshop.splits import split_ranges

SIZES = {
    "original": {"test": 500, "dev": 1000, "train": 5410},
    "verl-agent": {"val": 500, "train": 6410},
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", SIZES)
def test_the_official_splits(webshop_data: Path, rule: str) -> None:
    shop = official_shop(webshop_data, splits=rule)
    sizes = {split: len(shop.task_ids(split)) for split in shop.splits}
    assert sizes == SIZES[rule]
    assert sizes == {split: len(shop.splits[split]) for split in shop.splits}
    every = [task_id for split in shop.splits for task_id in shop.task_ids(split)]
    assert len(set(every)) == 6910
    first = next(iter(shop.splits))
    assert set(shop.task_ids(first)) == {f"webshop/official-1000/{i}" for i in range(500)}
    assert all(list(shop.task_ids(split)) == sorted(shop.task_ids(split)) for split in shop.splits)


def test_the_generated_splits_are_tenths() -> None:
    shop = Shop.open(ShopSettings())
    count = len(shop.goals)
    sizes = [len(shop.task_ids(split)) for split in ("test", "dev", "train")]
    assert sizes == [count // 10, count // 10, count - 2 * (count // 10)]
    assert shop.goal("webshop/generated/17") == shop.goals[17]


@pytest.mark.parametrize("goals", [0, 1, 9, 13, 499, 700, 20_000])
@pytest.mark.parametrize("rule", SIZES)
@pytest.mark.parametrize("official", [True, False])
def test_splits_cover_every_goal_once(goals: int, rule: str, official: bool) -> None:
    ranges = split_ranges(rule, goals, official)
    assert [index for part in ranges.values() for index in part] == list(range(goals))


@pytest.mark.slow
def test_manifests_pin_the_content_down(webshop_data: Path) -> None:
    shop = official_shop(webshop_data)
    manifests = [shop.manifest(split) for split in shop.splits]
    assert shop.manifest("test") == manifests[0]
    assert [manifest.task_ids for manifest in manifests] == [*map(shop.task_ids, shop.splits)]
    assert {manifest.name for manifest in manifests} == {"webshop/official-1000"}
    again = Shop.open(ShopSettings(data=str(webshop_data), noun_tagger="words"))
    assert again.manifest("dev") == shop.manifest("dev")
    assert manifests[0].content_hash == (
        "a9d4b32d45fd751789f896038f91569bb46ae8e8077489d49349ef216d732e41"
    )


def test_other_goals_have_other_names(webshop_data: Path) -> None:
    other = official_shop(webshop_data, goal_seed=0)
    assert other.name == "webshop/official-1000-seed0"
    human = official_shop(webshop_data, human_goals=True)
    assert human.name == "webshop/official-1000-human"
    assert human.label == "official"
    # All 13 human goals come before the 500th.
    assert [len(human.task_ids(split)) for split in human.splits] == [13, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "task_id",
    ["", "webshop/generated/", "webshop/generated/-1", "webshop/generated/017",
     "webshop/generated/99999", "webshop/generated/1x", "other/generated/1",
     "webshop/generated/\u0661", "webshop/generated/" + "1" * 5000],
)  # fmt: skip
def test_unknown_tasks(task_id: str) -> None:
    with pytest.raises(KeyError):
        Shop.open(ShopSettings()).goal(task_id)


def test_unknown_split() -> None:
    shop = Shop.open(ShopSettings())
    for ask in (shop.task_ids, shop.manifest):
        with pytest.raises(KeyError):
            ask("validation")


@pytest.mark.parametrize(
    ("name", "value"),
    [("splits", "mine"), ("text_style", "html"), ("noun_tagger", "nltk"), ("goal_seed", True),
     ("goal_seed", 1.5), ("data", "")],
)  # fmt: skip
def test_settings_without_meaning(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        ShopSettings(**{name: value})  # type: ignore[arg-type]
