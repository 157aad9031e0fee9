"""The reward and its parts, against the original's."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from webshop_golden import golden_lines, official_shop

from env_servers.webshop.goals import Goal
from env_servers.webshop.nouns import WordTagger, open_tagger
from env_servers.webshop.products import Product, ShopDataError
from env_servers.webshop.reward import RewardDetails, reward_details

PRODUCT = Product(
    asin="B000000001", title="Cotton Crew Socks", description="Warm in winter.",
    bullets=("Machine wash",), pricing=(10.0,), price_text="$10.0",
    options=(("color", ("navy blue", "white")), ("size", ("small", "large"))),
    category="fashion", query="men's socks", product_category="Clothing \u203a Men \u203a Socks",
    attributes=("crew neck", "long lasting"), reviews=(), rating="N.A.",
)  # fmt: skip
GOAL = Goal(
    index=0, asin="B000000002", name="Wool Socks", instruction="find socks", price_upper=20.0,
    options=(("color", "navy blue"), ("size", "large")), attributes=("machine wash", "crew neck"),
    category="fashion", query="men's socks", product_category="Shoes \u203a Socks",
)  # fmt: skip


def judge(goal: Goal = GOAL, product: Product = PRODUCT, *chosen: str) -> RewardDetails:
    return reward_details(goal, product, 10.0, chosen, WordTagger())


def test_all_recorded_rewards(webshop_data: Path) -> None:
    shop = official_shop(webshop_data)
    records = golden_lines(webshop_data, "rewards")
    for record in records:
        goal = shop.goals[record["goal_idx"]]
        row = shop.catalogue.columns.find(record["asin"])
        assert row is not None
        assert goal.asin == record["goal_asin"]
        assert goal.price_upper == record["price_upper"]
        assert shop.price(row) == record["price"]
        details = reward_details(
            goal, shop.catalogue[row], shop.price(row), record["options"].values(), shop.tagger
        )
        parts = {name: value for name, value in asdict(details).items() if value is not None}
        assert parts.pop("reward") == record["reward"], record["n"]
        assert parts.pop("noun_tagger") == "words"
        assert parts == record["info"], record["n"]
    assert len(records) == 2000


def test_the_parts_add_up() -> None:
    details = judge(GOAL, PRODUCT, "navy blue")
    assert (details.r_att, details.r_option, details.r_price) == (1.0, 0.5, True)
    assert details.r_option is not None
    assert details.w_option is not None
    total = (
        details.r_att * details.w_att
        + details.r_option * details.w_option
        + details.r_price * details.w_price
    )
    assert details.reward == pytest.approx(total * details.r_type)
    assert judge(replace(GOAL, options=())).r_option is None


def test_colours_count_as_their_first_colour_word() -> None:
    # The pair counts with its name, so only an exact colour is reduced on the goal's side.
    goal = replace(GOAL, options=(("color", "navy"),))
    assert judge(goal, PRODUCT, "dark navy").r_option == 0.0
    assert judge(goal, PRODUCT, "sky navy").r_option == 1.0
    human = replace(GOAL, options=("navy1901", "large"))
    assert judge(human, PRODUCT, "sky navy", "large").r_option == 1.0


def test_no_noun_in_common_earns_nothing() -> None:
    details = judge(replace(GOAL, name="Ceramic Vase"))
    assert details.query_match
    assert (details.title_score, details.r_type, details.reward) == (0.0, 0.0, 0.0)


def test_spacy_finds_nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model(title: str) -> list[SimpleNamespace]:
        asked.append(title)
        tags = {"Cotton": "NOUN", "Acme": "PROPN"}
        return [SimpleNamespace(text=w, pos_=tags.get(w, "ADJ")) for w in title.split()]

    spacy = SimpleNamespace(load={"en_core_web_sm": model}.__getitem__)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    tagger = open_tagger("auto")
    assert tagger.name == "spacy"
    for _ in range(2):
        assert tagger.nouns("Acme Soft Cotton") == ("acme", "cotton")
    assert asked == ["Acme Soft Cotton"]
    assert open_tagger("words").name == "words"


def test_a_missing_tagger_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_tagger("auto").name == "words"
    with pytest.raises(ShopDataError, match="pip install"):
        open_tagger("spacy")
