"""The scripted shopper: it reads instructions and pages, and buys well from what it can see."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pytest

from atod_gym.envs.webshop.expert import (
    Page,
    Product,
    ScriptedShopper,
    ShoppingList,
    parse_instruction,
    parse_page,
)
from atod_gym.envs.webshop.settings import CHOICES, SEARCH_PLACEHOLDER
from env_servers.webshop.episode import Episode
from env_servers.webshop.goals import Goal
from env_servers.webshop.pages import Page as ShopPage
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

WANTED = (
    "i need a non stick pan with color: red, and size: 8 inch, and price lower than 30.00 dollars"
)
HEAD = f"Instruction: [SEP] {WANTED} [SEP] Back to Search"
SEARCH = f"WebShop [SEP] Instruction: [SEP] {WANTED} [SEP] Search"
RESULTS = (
    f"{HEAD} [SEP] Page 1 (Total results: 3) [SEP] Next > [SEP] B0AAAAAAAA [SEP] Non Stick Pan"
    " [SEP] $45.5 [SEP] B0BBBBBBBB [SEP] Steel Pan [SEP] $12.0 [SEP] B0CCCCCCCC [SEP] Mira Pan"
    " [SEP] $25.0 to $28.0"
)
PAN = (
    f"{HEAD} [SEP] < Prev [SEP] color [SEP] red [SEP] blue [SEP] size [SEP] 8 inch [SEP] 10 inch"
    " [SEP] {title} [SEP] Price: $12.0 [SEP] Rating: N.A. [SEP] Description [SEP] Features"
    " [SEP] Reviews [SEP] Buy Now"
)
STEEL, MIRA = PAN.format(title="Steel Pan"), PAN.format(title="Mira Pan")


@lru_cache(maxsize=2)
def opened(data: str) -> Shop:
    return Shop.open(ShopSettings(data=data, noun_tagger="words"))


def sample(shop: Shop, count: int, seed: int) -> list[Goal]:
    return [shop.goals[i] for i in random.Random(seed).sample(range(len(shop.goals)), count)]


def admissible(page: ShopPage) -> tuple[str, ...]:
    """Return the admissible actions that an agent is shown."""
    actions = {f"click[{name}]" for name in page.clickables if name != "search"}
    return tuple(sorted(actions | ({SEARCH_PLACEHOLDER} if page.has_search_bar else set())))


def shop_once(
    shop: Shop, goal: Goal, *, noise: float = 0.0, max_turns: int = 15, knows_actions: bool = True
) -> tuple[float, int]:
    """Plays one episode; the score (-1 if nothing was bought) and the turns taken."""
    episode = Episode(shop, goal, "test")
    shopper, last, rng = ScriptedShopper(max_turns), None, random.Random(goal.instruction)
    shopper.reset(goal.instruction, episode.page.text)
    seen: list[str] = []
    for turn in range(1, max_turns + 1):
        actions = admissible(episode.page)
        seen += actions
        last = shopper.act(episode.page.text, actions if knows_actions else (), last)
        assert last in actions or (last.startswith("search[") and SEARCH_PLACEHOLDER in actions)
        if rng.random() < noise:
            last = rng.choice(seen)
        outcome = episode.step(last)
        if outcome.over:
            return outcome.score, turn
    return -1.0, max_turns


def success(scores: Iterable[float]) -> float:
    every = list(scores)
    return sum(score == 1.0 for score in every) / len(every)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (
            "i need a non stick, oven safe frying pan with cast iron for small kitchens with"
            " color: red, and size: 8 inch, and price lower than 40.00 dollars",
            ShoppingList(
                (("non", "stick"), ("oven", "safe", "frying", "pan"), ("cast", "iron"),
                 ("small", "kitchen")),
                (("color", "red"), ("size", "8 inch")),
                40.0,
                "non stick oven safe frying pan cast iron small kitchens red 8 inch red 8 inch",
            ),
        ),
        (
            "Find me machine wash men's dress shirts with cotton spandex with fit type: women, and"
            " color: black, white [2] and price lower than 9.50 dollars",
            ShoppingList(
                (("machine", "wash", "men", "dress", "shirt"), ("cotton", "spandex")),
                (("fit type", "women"), ("color", "black, white [2]")),
                9.5,
                "machine wash men dress shirts cotton spandex women black, white  2  women black,"
                " white  2 ",
            ),
        ),
        (
            "I would like a glass kettle that is blue.",
            ShoppingList((("glass", "kettle"), ("blue",)), (), float("inf"), "glass kettle blue"),
        ),
        ("", ShoppingList((), (), float("inf"), "gift")),
    ],
)  # fmt: skip
def test_instructions(instruction: str, expected: ShoppingList) -> None:
    assert parse_instruction(instruction) == expected


def test_pages() -> None:
    assert parse_page(SEARCH) == Page("search")
    products = (
        Product("B0AAAAAAAA", "Non Stick Pan", (45.5,), 0),
        Product("B0BBBBBBBB", "Steel Pan", (12.0,), 1),
        Product("B0CCCCCCCC", "Mira Pan", (25.0, 28.0), 2),
    )
    assert parse_page(RESULTS) == Page("results", 1, products)
    second = RESULTS.replace("Page 1", "Page 2").replace("Next >", "< Prev [SEP] Next >")
    assert parse_page(second) == Page("results", 2, products)
    lines = ("color", "red", "blue", "size", "8 inch", "10 inch")
    steel = Product("", "Steel Pan", (12.0,))
    assert parse_page(STEEL) == Page("item", products=(steel,), lines=lines)
    features = f"{HEAD} [SEP] < Prev [SEP] Non stick: yes [SEP] Light"
    assert parse_page(features) == Page("sub_page", lines=("Non stick: yes", "Light"))
    assert parse_page("Thank you for shopping with us!") == Page("other")
    assert parse_page("") == Page("other")


def test_pages_of_both_text_styles_say_the_same() -> None:
    shops = [
        Shop.open(
            ShopSettings(data="generated", products=60, text_style=style, noun_tagger="words")
        )
        for style in CHOICES["text_style"]
    ]
    rng = random.Random(0)
    for index in range(0, 100, 4):
        episodes = [Episode(shop, shop.goals[index], "0") for shop in shops]
        action = f"search[{shops[0].goals[index].instruction[9:30]}]"
        for _ in range(12):
            outcomes = [episode.step(action) for episode in episodes]
            texts = [parse_page(outcome.page.text) for outcome in outcomes]
            if texts[0].kind == "sub_page":
                # A line break within a part begins a line of its own.
                assert " ".join(texts[0].lines).split() == " ".join(texts[1].lines).split()
            else:
                assert texts[0] == texts[1]
            if outcomes[0].over:
                break
            action = rng.choice(admissible(outcomes[0].page))


@pytest.mark.parametrize("knows_actions", [True, False])
def test_a_whole_episode(knows_actions: bool) -> None:
    shopper = ScriptedShopper()
    shopper.reset(WANTED, SEARCH)
    item = ("back to search", "< prev", "description", "features", "reviews", "buy now", "red",
            "blue", "8 inch", "10 inch")  # fmt: skip
    sub = ("back to search", "< prev")
    results = ("back to search", "next >", "b0aaaaaaaa", "b0bbbbbbbb", "b0cccccccc")
    plain = f"{HEAD} [SEP] < Prev [SEP] Light: half a pound"
    right = f"{HEAD} [SEP] < Prev [SEP] Non stick: yes"
    dialogue = [
        (SEARCH, (), "search[non stick pan red 8 inch red 8 inch]"),
        (RESULTS, results, "click[b0bbbbbbbb]"),  # the first costs too much
        (STEEL, item, "click[features]"),
        (plain, sub, "click[< prev]"),
        (STEEL, item, "click[< prev]"),
        (RESULTS, results, "click[b0cccccccc]"),
        (MIRA, item, "click[features]"),
        (right, sub, "click[< prev]"),
        (MIRA, item, "click[red]"),
        (MIRA, item, "click[8 inch]"),
        (MIRA, item, "click[buy now]"),
    ]
    last = None
    for text, names, expected in dialogue:
        actions = tuple(f"click[{name}]" for name in names) or (SEARCH_PLACEHOLDER,)
        last = shopper.act(text, actions if knows_actions else (), last)
        assert last == expected


def test_a_foreign_search_is_left() -> None:
    shopper = ScriptedShopper()
    shopper.reset(WANTED, SEARCH)
    own = shopper.act(SEARCH, (SEARCH_PLACEHOLDER,), None)
    actions = ("click[back to search]", "click[b0bbbbbbbb]", "click[next >]")
    assert shopper.act(RESULTS, actions, "search[hats]") == "click[back to search]"
    assert shopper.act(SEARCH, (SEARCH_PLACEHOLDER,), "click[back to search]") == own
    assert shopper.act(RESULTS, actions, own) == "click[b0bbbbbbbb]"


def test_a_changed_option_is_chosen_again() -> None:
    shopper = ScriptedShopper()
    shopper.reset(WANTED, SEARCH)
    names = ("back to search", "< prev", "buy now", "red", "blue", "8 inch", "10 inch")
    actions = tuple(f"click[{name}]" for name in names)
    right = PAN.format(title="Non Stick Pan")
    assert shopper.act(right, actions, None) == "click[red]"
    assert shopper.act(right, actions, "click[red]") == "click[8 inch]"
    assert shopper.act(right, actions, "click[blue]") == "click[red]"


def test_an_unknown_page_is_no_error() -> None:
    shopper = ScriptedShopper()
    shopper.reset("", "")
    assert shopper.act("Thank you for shopping with us!", (), None)
    assert shopper.act("???", ("click[somewhere]",), "jump") == "click[somewhere]"
    assert shopper.act("???", ("click[buy now]",), "jump") == "search[gift]"


@pytest.mark.slow
def test_it_solves_most_generated_tasks() -> None:
    shop = opened("generated")
    played = [shop_once(shop, goal) for goal in sample(shop, 300, seed=1)]
    assert success(score for score, _ in played) > 0.9
    assert sum(turns for _, turns in played) / len(played) < 9
    assert min(score for score, _ in played) >= 0.0


def test_it_needs_no_list_of_actions() -> None:
    shop = opened("generated")
    goals = sample(shop, 60, seed=2)
    known = [shop_once(shop, goal) for goal in goals]
    assert [shop_once(shop, goal, knows_actions=False) for goal in goals] == known


def test_it_recovers_from_actions_of_others() -> None:
    """Random actions may buy something wrong; what they leave open is still solved."""
    shop = opened("generated")
    goals = sample(shop, 200, seed=3)
    assert success(shop_once(shop, goal, noise=0.2)[0] for goal in goals) > 0.7


@pytest.mark.parametrize("max_turns", [6, 9])
def test_it_buys_before_the_turns_run_out(max_turns: int) -> None:
    shop = opened("generated")
    goals = sample(shop, 100, seed=4)
    played = [shop_once(shop, goal, max_turns=max_turns) for goal in goals]
    assert min(score for score, _ in played) >= 0.0
    assert sum(score for score, _ in played) / len(played) > 0.7


@pytest.mark.slow
def test_it_shops_in_the_official_shop(data_folder: Path) -> None:
    shop = opened(str(data_folder / "webshop"))
    played = [shop_once(shop, goal) for goal in sample(shop, 150, seed=5)]
    assert min(score for score, _ in played) >= 0.0
    assert sum(score for score, _ in played) / len(played) > 0.85
    assert success(score for score, _ in played) > 0.7


def test_it_reads_human_instructions(data_folder: Path) -> None:
    settings = ShopSettings(
        data=str(data_folder / "webshop"), human_goals=True, noun_tagger="words"
    )
    shop = Shop.open(settings)
    scores = [shop_once(shop, shop.goals[index])[0] for index in range(len(shop.goals))]
    assert min(scores) >= 0.0
    assert sum(scores) / len(scores) > 0.4
