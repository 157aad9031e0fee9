"""Goals, prices and price limits, against what the original drew."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

import pytest
from webshop_golden import golden_lines, official_shop

from env_servers.webshop.goals import NO_LIMIT, Goal
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop


def test_prices(webshop_data: Path) -> None:
    path = webshop_data / "golden" / "product_prices_seed233.json.xz"
    with lzma.open(path) as file:
        recorded = json.load(file)
    shop = official_shop(webshop_data)
    assert len(recorded["prices"]) == len(shop.catalogue) == 1000
    for row, product in enumerate(shop.catalogue):
        assert shop.price(row) == recorded["prices"][product.asin]
        assert product.price_text == recorded["Price_text"][product.asin]
        assert list(product.pricing) == recorded["pricing"][product.asin]


def test_the_ordered_goals(webshop_data: Path) -> None:
    recorded = golden_lines(webshop_data, "goals_6910")
    goals = official_shop(webshop_data).goals
    assert len(goals) == len(recorded) == 6910
    for goal, record in zip(goals, recorded, strict=True):
        assert goal.index == record["i"]
        assert goal.asin == record["asin"]
        assert goal.instruction == record["instruction_text"]
        assert list(goal.attributes) == record["attributes"]
        assert goal.price_upper == record["price_upper"]
        assert dict(goal.options) == record["goal_options"]


@pytest.mark.slow
def test_the_goals_of_every_recorded_seed(webshop_data: Path) -> None:
    recorded = json.loads((webshop_data / "golden" / "seed_goal_digests.json").read_text())
    assert len(recorded["seeds"]) >= 3
    for seed, expected in recorded["seeds"].items():
        goals = official_shop(webshop_data, goal_seed=int(seed)).goals
        # No limit is an integer in the original.
        limits = [1_000_000 if g.price_upper == NO_LIMIT else g.price_upper for g in goals]
        lines = [
            f"{goal.asin}\t{goal.instruction}\t{limit}"
            for goal, limit in zip(goals, limits, strict=True)
        ]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected["sha256"]
        ends = [[goal.asin, dict(goal.options), goal.price_upper] for goal in goals]
        assert (ends[:5], ends[-1]) == (expected["first5"], expected["last"])


def test_goals_are_the_same_however_they_are_read() -> None:
    goals = Shop.open(ShopSettings()).goals
    every = list(goals)
    assert [goal.index for goal in every] == list(range(len(goals)))
    assert [goals[index] for index in range(0, len(goals), 97)] == every[::97]
    assert len({(goal.asin, goal.options) for goal in every}) == len(goals)
    for outside in (-1, len(goals)):
        with pytest.raises(IndexError):
            goals[outside]


def test_human_goals_keep_their_words(webshop_data: Path) -> None:
    goals = official_shop(webshop_data, human_goals=True).goals
    assert len(goals) == 13
    goal: Goal = goals[2]
    assert goal.options == ("black1901", "10.5")
    assert goal.instruction.endswith("rubber soles, and price lower than 60.00 dollars")
