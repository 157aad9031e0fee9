"""The generated shop: reproducible, in the official format, and every goal of it can be met."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from env_servers.webshop.episode import Episode
from env_servers.webshop.generator import GeneratedShop, generate_shop
from env_servers.webshop.goals import Goal
from env_servers.webshop.products import Product, parse_record
from env_servers.webshop.reward import reward_details
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop
from env_servers.webshop.shop_words import CATEGORIES, WORDS, Kind

KINDS = {kind.query: kind for kinds in CATEGORIES.values() for kind in kinds}
BUTTONS = {"search", "back to search", "< prev", "next >", "description", "features", "reviews",
           "attributes", "buy now"}  # fmt: skip
DIGESTS = {
    (0, 1_000): "0618da50129bbe15bc09c2f06dc3f6e20ea2132a72461f8b089fb3484b79ffcd",
    (7, 100): "ac2bc3528b635a643ffd6b08d3383a6ab741ac0f378eda44ba15d1b9eb554605",
}


def digest(shop: GeneratedShop) -> str:
    text = json.dumps([shop.items, shop.instructions], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def generated() -> GeneratedShop:
    return generate_shop()


@lru_cache(maxsize=1)
def opened() -> Shop:
    return Shop.open(ShopSettings(data="generated", noun_tagger="words"))


@pytest.fixture(scope="module")
def products(generated: GeneratedShop) -> list[Product]:
    return [
        parse_record(item, generated.instructions[item["asin"]]).product for item in generated.items
    ]


def first_found(shop: Shop, goal: Goal, *, choosing: bool) -> float:
    """The score of buying the first result of the instruction, with the right options or none."""
    episode = Episode(shop, goal, "test")
    query = re.sub(r"[\[\]]", "", goal.instruction.split(", and price lower")[0])
    found = [a for a in episode.step(f"search[{query}]").page.clickables if a.startswith("b0")]
    page = episode.step(f"click[{found[0]}]").page
    for _, value in goal.options if choosing else ():
        if isinstance(value, str) and value in page.clickables:
            episode.step(f"click[{value}]")
    return episode.step("click[buy now]").score


@pytest.mark.parametrize(("seed", "count"), DIGESTS)
def test_a_seed_gives_the_same_bytes_everywhere(seed: int, count: int) -> None:
    assert digest(generate_shop(seed, count)) == DIGESTS[seed, count]


def test_neither_the_hash_seed_nor_other_draws_matter() -> None:
    code = (
        "import random; random.seed(5); random.random()\n"
        "import json; from env_servers.webshop.generator import generate_shop\n"
        "shop = generate_shop(3, 60); print(json.dumps([shop.items, shop.instructions]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    shop = generate_shop(3, 60)
    assert outputs == {json.dumps([shop.items, shop.instructions]) + "\n"}


def test_another_seed_gives_another_shop() -> None:
    shops = [generate_shop(seed, 50) for seed in range(5)]
    assert len({digest(shop) for shop in shops}) == 5
    ids = [item["asin"] for shop in shops for item in shop.items]
    assert len(set(ids)) == 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10), "seed must be an integer of 0 or more, not -1"),
        ((0, 0), "products must be an integer of 1 or more, not 0"),
        ((0, 1.5), "products must be an integer of 1 or more, not 1.5"),
        ((True, 10), "seed must be an integer of 0 or more, not True"),
    ],
)
def test_settings_without_meaning_are_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_shop(*arguments)


def test_entries_have_the_form_of_the_official_files(
    generated: GeneratedShop, data_folder: Path
) -> None:
    folder = data_folder / "webshop"
    official = json.loads((folder / "items_ins_v2_1000.json").read_text(encoding="utf-8"))
    keys = {key for entry in official.values() for key in entry}
    assert {key for entry in generated.instructions.values() for key in entry} == keys
    assert {item["asin"] for item in generated.items} == set(generated.instructions)
    for item in generated.items:
        assert re.fullmatch(r"B0[A-Z0-9]{8}", item["asin"])
        assert re.fullmatch(r"\$\d+\.\d\d(\$\d+\.\d\d)?", item["pricing"])
        assert item["product_category"].count("\u203a") >= 2
        assert 3 <= len(item["small_description"]) <= 6
        assert 1 <= len(re.findall(r"[.?](?: |$)", item["full_description"])) <= 4
        assert len(item["reviews"]) <= 6
        for values in (item["customization_options"] or {}).values():
            assert 2 <= len(values) <= 8
    for name in ("name", "query", "category", "page"):
        kinds = {type(item[name]) for item in generated.items}
        assert len(kinds) == 1
    assert len(generated.instructions) == len(generated.items) == 1_000


def test_the_shop_is_varied(generated: GeneratedShop, products: list[Product]) -> None:
    assert len({product.category for product in products}) >= 6
    assert {product.query for product in products} == set(KINDS)
    assert len({product.title for product in products}) > 900
    lengths = {len(product.title.split()) for product in products}
    assert min(lengths) <= 4
    assert max(lengths) >= 10
    assert {len(product.options) for product in products} == {0, 1, 2, 3}
    assert {len(product.reviews) for product in products} == set(range(7))
    assert 0.05 < sum(len(product.pricing) == 2 for product in products) / 1_000 < 0.15
    sentences = [e["instruction"] for e in generated.instructions.values() if "instruction" in e]
    assert len(set(sentences)) > 0.9 * len(sentences) > 500
    wanted = Counter(
        len(e.get("instruction_attributes", ())) for e in generated.instructions.values()
    )
    assert set(wanted) == {0, 1, 2, 3}


def test_an_instruction_names_the_kind_and_the_attributes(generated: GeneratedShop) -> None:
    for item in generated.items:
        entry = generated.instructions[item["asin"]]
        if "instruction" in entry:
            kind = KINDS[item["query"]]
            for phrase in (kind.name, *entry["instruction_attributes"]):
                assert phrase in entry["instruction"]
            assert set(entry["instruction_attributes"]) <= set(entry["attributes"])
            assert entry["instruction"][-1].isalpha()


def test_texts_state_exactly_the_attributes(products: list[Product]) -> None:
    """A reader can find out what a product is, and nothing else passes for it."""
    tagger = opened().tagger
    for product in products:
        kind = KINDS[product.query]
        texts = " | ".join((product.title, *product.bullets, product.description)).lower()
        assert all(attribute in texts for attribute in product.attributes)
        assert kind.name in texts
        for phrase in {a.phrase for a in (*kind.features, *kind.materials)}:
            goal = Goal(0, "", "", "", 1e6, (), (phrase,), "", "", "")
            has = reward_details(goal, product, 1.0, (), tagger).r_att == 1.0
            assert has == (phrase in product.attributes), (product.asin, phrase)


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_each_kind_is_distinguishable(kind: Kind) -> None:
    assert len(kind.features) >= 7
    assert len({axis.name for axis in kind.axes}) == len(kind.axes) >= 2
    values = [value.lower() for axis in kind.axes for value in axis.values]
    assert len(set(values)) == len(values)
    assert not BUTTONS & set(values)
    assert 3 <= kind.dollars[0] < kind.dollars[1] < 800
    assert len(WORDS.brands[kind.category]) >= 5


@pytest.mark.parametrize("axis", WORDS.axes.values(), ids=WORDS.axes)
def test_only_the_wanted_value_counts(axis: Any) -> None:
    tagger = opened().tagger
    product = opened().catalogue[0]
    name = axis.name.lower()
    for wanted, chosen in (
        pair for two in combinations(axis.values, 2) for pair in (two, two[::-1])
    ):
        goal = Goal(0, "", "", "", 1e6, ((name, wanted.lower()),), ("x",), "", "", "")
        assert reward_details(goal, product, 1.0, [wanted.lower()], tagger).r_option == 1.0
        assert reward_details(goal, product, 1.0, [chosen.lower()], tagger).r_option == 0.0


def test_the_number_of_goals() -> None:
    assert 3_000 <= len(opened().goals) <= 8_000
    most = Counter(goal.asin for goal in opened().goals).most_common(1)[0][1]
    assert most <= 16


@pytest.mark.slow
def test_an_oracle_meets_every_goal() -> None:
    """Buying the goal's product with the goal's options scores 1."""
    shop = opened()
    for goal in shop.goals:
        episode = Episode(shop, goal, "oracle")
        episode.step(f"search[{goal.name}]")
        found = episode.page.clickables
        while goal.asin.lower() not in found:
            found = episode.step("click[next >]").page.clickables
            assert episode.page.page_number <= 5, goal
        assert episode.step(f"click[{goal.asin.lower()}]").executed
        for pair in goal.options:
            assert episode.step(f"click[{pair[1]}]").executed
        outcome = episode.step("click[buy now]")
        assert outcome.over
        assert outcome.score == 1.0, goal


@pytest.mark.slow
def test_the_instruction_finds_the_product() -> None:
    shop = opened()
    places = []
    for goal in shop.goals:
        rows = shop.search_rows(goal.instruction.split(", and price lower")[0], "")
        found = [shop.catalogue[row].asin for row in rows]
        places.append(found.index(goal.asin) if goal.asin in found else 99)
    shares = {top: sum(place < top for place in places) / len(places) for top in (1, 10, 50)}
    assert shares[50] > 0.995
    assert shares[10] > 0.95
    assert shares[1] < 0.7


def test_the_first_result_is_seldom_enough() -> None:
    shop = opened()
    goals = [shop.goals[index] for index in range(0, len(shop.goals), 5)]
    bare = [first_found(shop, goal, choosing=False) for goal in goals]
    chosen = [first_found(shop, goal, choosing=True) for goal in goals]
    assert sum(score == 1.0 for score in bare) / len(bare) < 0.1
    assert 0.4 < sum(score == 1.0 for score in chosen) / len(chosen) < 0.85


def test_products_have_near_misses(products: list[Product]) -> None:
    """Many products differ from a rival of the same brand in one attribute, price or option."""
    close = 0
    for product in products:
        rivals = [p for p in products if p.query == product.query and p is not product]
        common = [len(set(p.attributes) & set(product.attributes)) for p in rivals]
        close += max(common, default=0) >= len(product.attributes) - 1
    assert close / len(products) > 0.4


@pytest.mark.parametrize("count", [1, 12, 100])
def test_small_shops(count: int) -> None:
    shop = generate_shop(1, count)
    assert len(shop.items) == count
    rivals = Counter(item["query"] for item in shop.items)
    assert len(rivals) == max(1, count // 12)
    assert max(rivals.values()) - min(rivals.values()) <= 1
    words = re.findall(r"[a-z]+", json.dumps([item["name"] for item in shop.items]).lower())
    assert len(set(words)) < 400
    if count == 100:
        assert len({item["category"] for item in shop.items}) == 8
