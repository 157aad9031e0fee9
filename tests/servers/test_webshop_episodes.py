"""Replays what the original environment did, action by action; and rules of episodes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webshop_golden import golden_lines, official_shop

from env_servers.webshop.episode import Episode, Outcome
from env_servers.webshop.goals import Goal
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

GOLDEN_KINDS = {
    "expert": 27,
    "random_valid": 27,
    "edge": 28,
    "near_miss": 17,
    "text_rich": 7,
    "human_goals": 5,
    "show_attrs": 4,
    "num_prev": 3,
    "html": 1,
    "url": 1,
    "session_prefix": 1,
}


@pytest.fixture(scope="module")
def recorded(webshop_data: Path) -> list[dict[str, Any]]:
    return golden_lines(webshop_data, "episodes")


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop.open(ShopSettings(noun_tagger="words"))


def open_recorded(folder: Path, config: dict[str, Any]) -> Shop:
    return official_shop(
        folder,
        human_goals=bool(config["human_goals"]),
        show_attributes=config["show_attrs"],
        text_style="text_rich" if config["observation_mode"] == "text_rich" else "text",
    )


class Transcript:
    """Puts earlier texts and actions before the current text, as the original can be told to."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.most_texts = config.get("num_prev_obs", 0)
        self.most_actions = config.get("num_prev_actions", 0)
        self.texts: list[str] = []
        self.actions: list[str] = []

    def observation(self, text: str) -> str:
        parts = [text]
        for back in range(1, 1 + max(self.most_texts, self.most_actions)):
            if len(self.actions) >= back and self.most_actions >= back:
                parts.append(self.actions[-back])
            if len(self.texts) >= back and self.most_texts >= back:
                parts.append(self.texts[-back])
        self.texts.append(text)
        return " [SEP] ".join(reversed(parts))


def assert_same_goal(goal: Goal, recorded: dict[str, Any]) -> None:
    options = recorded["goal_options"]
    assert goal.asin == recorded["asin"]
    assert goal.instruction == recorded["instruction_text"]
    assert list(goal.attributes) == recorded["attributes"]
    assert goal.price_upper == recorded["price_upper"]
    assert goal.options == tuple(options.items() if isinstance(options, dict) else options)
    for name in ("name", "query", "product_category", "category"):
        assert getattr(goal, name) == recorded[name]


def assert_same_step(episode: Episode, outcome: Outcome, step: dict[str, Any]) -> None:
    """All that is recorded of a step, but its observation."""
    assert list(outcome.page.clickables) == step["clickables"]
    assert outcome.page.has_search_bar == step["has_search_bar"]
    assert step["done"] == (outcome.details is not None)
    assert step["reward"] == outcome.score
    # The original gives an integer when it did nothing.
    assert outcome.executed == isinstance(step["reward"], float)
    if "reward_info" in step:
        purchase = outcome.page.purchase
        assert purchase is not None
        parts = {k: v for k, v in asdict(purchase.details).items() if v is not None}
        assert parts.pop("reward") == step["reward"]
        assert parts.pop("noun_tagger") == "words"
        assert parts == step["reward_info"]
        bought = step["purchased"]
        assert purchase.product.asin == bought["asin"]
        assert list(purchase.options) == list(bought["options"].items())
        assert purchase.price == bought["price"]
        assert purchase.product.title == bought["name"]
        assert purchase.product.query == bought["query"]
        assert purchase.product.product_category == bought["product_category"]


def replay(folder: Path, record: dict[str, Any]) -> int:
    """Plays a recorded episode up to where the original's session broke; counts the steps."""
    config = record["config"]
    shop = open_recorded(folder, config)
    goal = shop.goals[record["session"]]
    assert goal.index == record["goal"]["goal_idx"]
    assert_same_goal(goal, record["goal"])
    episode = Episode(shop, goal, record["session_name"])
    transcript = Transcript(config)

    def compare(observation: Any) -> None:
        # The mode `url`, whose observation is the page's address, is not offered.
        if config["observation_mode"] != "url":
            expected = observation["text"] if isinstance(observation, dict) else observation
            assert transcript.observation(episode.page.text) == expected

    compare(record["reset"]["obs"])
    assert list(episode.page.clickables) == record["reset"]["clickables"]
    assert episode.page.has_search_bar == record["reset"]["has_search_bar"]
    for number, step in enumerate(record["steps"]):
        before = episode.page
        if step.get("error") == "KeyError":
            return number
        outcome = episode.step(step["action"])
        if "error" in step:
            # The original raises; ours says why and stays where it is.
            assert not outcome.executed
            assert outcome.message
            assert outcome.page is episode.page is before
            continue
        transcript.actions.append(step["action"])
        compare(step["obs"])
        assert_same_step(episode, outcome, step)
    return len(record["steps"])


@pytest.mark.slow
def test_all_recorded_episodes(webshop_data: Path, recorded: list[dict[str, Any]]) -> None:
    played: dict[str, int] = {}
    steps = 0
    for record in recorded:
        kind = record["kind"]
        if kind == "edge_random_search":
            continue
        try:
            steps += replay(webshop_data, record)
        except AssertionError as error:
            raise AssertionError(f"episode {record['id']} ({kind}): {error}") from error
        played[kind] = played.get(kind, 0) + 1
    assert played == GOLDEN_KINDS
    assert steps > 1150


@pytest.mark.slow
def test_a_broken_search_leaves_the_product_open(webshop_data: Path) -> None:
    shop = official_shop(webshop_data)
    episode = Episode(shop, shop.goals[3849], "3849")
    episode.step("search[pillow]")
    episode.step("click[b09hkzs7lv]")
    for action, part in (
        ("search[<a> x]", "<a>"),
        ("search[<c>]", "<c> category"),
        ("search[pan [2 pieces]]", "no brackets"),
        ("search[pan", "write search[keywords]"),
    ):
        outcome = episode.step(action)
        assert (outcome.executed, outcome.page.kind) == (False, "item")
        assert part in outcome.message
    outcome = episode.step("click[buy now]")
    assert outcome.over
    assert outcome.page.purchase is not None
    assert outcome.page.purchase.product.asin == "B09HKZS7LV"


def test_pages_behind_the_last_result_say_so(shop: Shop) -> None:
    episode = Episode(shop, shop.goals[0], "0")
    assert episode.step("search[zzzzqqqq]").message == ""
    outcome = episode.step("click[next >]")
    assert outcome.executed
    assert outcome.page.page_number == 2
    assert "empty" in outcome.message


def test_a_random_search_keeps_its_products_from_page_to_page(shop: Shop) -> None:
    episode = Episode(shop, shop.goals[0], "first")
    first = episode.step("search[<r>]").page
    assert (len(first.products), first.total_results) == (10, 50)
    second = episode.step("click[next >]").page
    assert not set(first.products) & set(second.products)
    assert episode.step("click[< prev]").page == first
    other = Episode(shop, shop.goals[0], "second").step("search[<r>]").page
    assert other.products != first.products


def test_search_works_from_every_page_and_after_the_purchase(shop: Shop) -> None:
    episode = Episode(shop, shop.goals[0], "0")
    product = episode.step(f"search[{shop.goals[0].query}]").page.products[0]
    for action in (f"click[{product.asin}]", "click[Description]", "search[x]", "search[tea]"):
        assert episode.step(action).executed
    episode.step(f"click[{episode.page.clickables[-1]}]")
    assert not episode.over
    bought = episode.step("click[Buy Now]")
    assert bought.over
    assert bought.details is not None
    assert bought.score == bought.details.reward
    assert not episode.step("click[back to search]").executed
    again = episode.step("search[tea]")
    assert (again.executed, again.over, again.score, again.details) == (True, True, 0.0, None)


def test_options_are_chosen_replaced_and_forgotten(shop: Shop) -> None:
    goal = next(g for g in shop.goals if len(g.options) == 2)
    row = shop.catalogue.columns.find(goal.asin)
    assert row is not None
    product = shop.catalogue[row]
    (name, values), *_ = (option for option in product.options if len(option[1]) > 1)
    episode = Episode(shop, goal, "0")
    episode.step(f"search[{product.title}]")
    episode.step(f"click[{product.asin}]")
    for value in values:
        page = episode.step(f"click[{value.upper()}]").page
        assert dict(page.chosen_options) == {name: value}
    episode.step("click[features]")
    assert episode.page.chosen_options == ((name, values[-1]),)
    episode.step("click[< prev]")
    assert episode.page.chosen_options == ((name, values[-1]),)
    assert episode.step("click[< prev]").page.kind == "results"
    assert episode.page.chosen_options == ()


def test_reviews_and_rating_of_the_data_are_shown(shop: Shop) -> None:
    product = next(p for p in shop.catalogue if len(p.reviews) > 1)
    episode = Episode(shop, shop.goals[0], "0")
    episode.step(f"search[{product.title}]")
    page = episode.step(f"click[{product.asin}]").page
    mean = sum(review.stars for review in product.reviews) / len(product.reviews)
    assert f"Rating: {mean:.1f}" in page.text
    text = episode.step("click[reviews]").page.text
    for review in product.reviews:
        assert f'"{review.title}" [SEP] {review.stars:g} [SEP] {review.body}' in text


def test_the_engine_imports_nothing_of_http() -> None:
    code = (
        "import sys; from env_servers.webshop import episode, shop\n"
        "print({'starlette', 'prometheus_client', 'filelock', 'sqlite3'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def odd_shop(folder: Path) -> Shop:
    """A shop whose names have all that a grammar of actions could stumble over."""
    values = [
        "wipes [ 20 pieces ] + bag", "a]", "[b", "[", "]", "click[x]", "search[y]", "Large/Small",
        "\u0130stanbul \u1e9e", "two\nlines", "search", "< prev", "buy now", "description",
        "<x>", "\ud800 lone", "  ", "", "x" * 12_000, '"quoted"', "B0ODD00001",
    ]  # fmt: skip
    options = {
        name: [{"value": f"{value}{end}"} for value in values]
        for name, end in (("Style [1]", ""), ("Size", "2"))
    }
    items = [
        {"asin": asin, "name": f"Odd wipes {asin}", "category": "beauty", "query": "wipes",
         "customization_options": options}
        for asin in ("B0ODD00001", "b0odd00001", "[x]", "next >", "B0 \u0130")
    ]  # fmt: skip
    entry = {"attributes": ["odd"], "instruction": "Find wipes", "instruction_attributes": ["odd"]}
    entries = {item["asin"]: entry for item in items[:1]}
    (folder / "items_shuffle_1000.json").write_text(json.dumps(items))
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(entries))
    return Shop.open(ShopSettings(data=str(folder), noun_tagger="words", show_attributes=True))


def click_everything(shop: Shop, searches: list[str]) -> int:
    """Clicks every name that is listed on the pages reached from searches; counts the clicks."""
    clicks = 0

    def click(path: list[str]) -> Episode:
        episode = Episode(shop, shop.goals[0], "0")
        outcomes = [episode.step(action) for action in path]
        assert outcomes[-1].executed, (path, outcomes[-1].message)
        return episode

    for search in searches:
        results = click([search])
        for name in results.page.clickables:
            path = [search, f"click[{name}]"]
            page = click(path).page
            clicks += 1
            if page.kind != "item":
                continue
            for listed in page.clickables:
                after = click([*path, f"click[{listed}]"]).page
                clicks += 1
                if after.kind == "item":
                    assert listed in dict(after.chosen_options).values()
                elif after.kind == "sub_page":
                    for back in after.clickables:
                        click([*path, f"click[{listed}]", f"click[{back}]"])
    return clicks


def test_every_listed_name_can_be_clicked(shop: Shop, tmp_path: Path) -> None:
    odd = odd_shop(tmp_path)
    assert click_everything(odd, ["search[odd wipes]"]) > 5 * 30
    assert click_everything(shop, ["search[lamp]", "search[<r>]", "search[<r> x]"]) > 200


def test_every_listed_name_of_official_products_can_be_clicked(webshop_data: Path) -> None:
    official = official_shop(webshop_data)
    assert click_everything(official, ["search[<r>]", "search[<r> y]", "search[shirt]"]) > 200


ACTIONS = st.one_of(
    st.text(max_size=40),
    st.text(max_size=20).map("search[{}]".format),
    st.text(max_size=20).map("click[{}]".format),
    st.sampled_from(["search[<r>]", "search[<c> beauty]", "search[<q> x]", "search[<a>]"]),
    st.integers(0, 60),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=12), index=st.integers(0, 3000))
def test_any_text_is_an_action(shop: Shop, actions: list[str | int], index: int) -> None:
    episode = Episode(shop, shop.goals[index], "any \ud800 name")
    for action in actions:
        before = episode.page
        if isinstance(action, int):
            names = [name for name in before.clickables if name != "search"] or ["nothing"]
            outcome = episode.step(f"click[{names[action % len(names)]}]")
            assert outcome.executed == (names != ["nothing"])
        else:
            outcome = episode.step(action)
        assert outcome.page is episode.page
        assert outcome.executed or outcome.message
        assert 0.0 <= outcome.score <= 1.0
        if not outcome.executed:
            assert episode.page == before
