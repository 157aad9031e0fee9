"""Draw and order the goals of customers as the original does.

Source: `web_agent_site/engine/goal.py`, `generate_product_prices` of `engine.py`, and
`SimServer.__init__` of the original. Prices and limits of one run are one stream of
`random.Random`. Every combination of a product's options is one goal, so the full
catalogue has millions of them. They are stored as numbers; a goal is made on access.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.catalogue import Catalogue, Columns
from env_servers.webshop.products import Instruction, Product, ShopDataError

MOST_GOALS = 2**32 - 1
_CACHED_GOALS = 4096
_CACHED_WISHES = 1024
_Pair = tuple[str, str]
NO_LIMIT = 1_000_000.0
"""The price limit of a goal whose product costs more than nearly all limits."""
_LIMITS = [10.0 * step for step in range(1, 100)]
_CANDIDATES = 4


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal: the instruction, and the criteria of the reward."""

    index: int
    """Index in the original's order after its shuffle."""
    asin: str
    """The product of the goal."""
    name: str
    """The title of this product."""
    instruction: str
    price_upper: float
    """Highest acceptable price in dollars; 1,000,000 if there is no limit."""
    options: tuple[tuple[str, str], ...] | tuple[str, ...]
    """Synthetic goals: (name, value) pairs sorted by name. Human goals: values."""
    attributes: tuple[str, ...]
    category: str
    """The coarse category, which is the type of the task."""
    query: str
    product_category: str


@dataclass(frozen=True, slots=True)
class GoalTable:
    """The drawn numbers behind the goals.

    A wish is the common part of several goals: an instruction of a product with a price limit.
    """

    prices: NDArray[np.float64]
    """[products]: the drawn prices in dollars."""
    rows: NDArray[np.int32]
    """[wishes]: row of the product in the catalogue."""
    limits: NDArray[np.float64]
    """[wishes]: price limit in dollars."""
    ends: NDArray[np.int64]
    """[wishes]: number of goals up to and with this wish, before the shuffle."""
    order: NDArray[np.uint32]
    """[goals]: index before the shuffle of the goal at each index after it."""


def draw_synthetic(columns: Columns, seed: int) -> GoalTable:
    """Draw prices, limits and order of the synthetic goals.

    Raises:
        ShopDataError: if there are no goals, or too many to shuffle.
    """
    total = float(np.sum(columns.combinations, dtype=np.float64))
    if not 0 < total <= MOST_GOALS:
        raise ShopDataError(
            f"The instructions give {int(total):,} goals; a shop needs from "
            f"1 to {MOST_GOALS:,}. Use human_goals=True or another attribute file."
        )
    return _draw(columns, columns.goal_rows, columns.combinations, seed)


def draw_human(
    columns: Columns, instructions: Mapping[str, Sequence[Instruction]], seed: int
) -> tuple[GoalTable, tuple[Instruction, ...]]:
    """Draw prices, limits and order of the human goals.

    Returns:
        The table, and the instruction of each wish.

    Raises:
        ShopDataError: if no human instruction belongs to a product of the catalogue.
    """
    found = {row: asin for asin in instructions if (row := columns.find(asin)) is not None}
    wishes = [
        (row, instruction)
        for row in sorted(found)
        for instruction in instructions[found[row]]
        if instruction.attributes
    ]
    if not wishes:
        raise ShopDataError(
            "No human instruction belongs to a product of this catalogue: items_human_ins and "
            "items_shuffle are not from the same set. Get both from one place, or use "
            "human_goals=False."
        )
    rows = np.array([row for row, _ in wishes], np.int32)
    table = _draw(columns, rows, np.ones(len(rows), np.int64), seed)
    return table, tuple(instruction for _, instruction in wishes)


def _draw(
    columns: Columns, rows: NDArray[np.int32], goals: NDArray[np.int64], seed: int
) -> GoalTable:
    """Draw the numbers of wishes from their products and their numbers of goals."""
    rng = Random(seed)
    prices = draw_prices(columns.low, columns.high, rng)
    limits = [draw_limit(price, rng) for price in prices[rows].tolist()]
    ends = np.cumsum(goals)
    order = array("I", range(ends[-1]))
    # The original seeds a second time here.
    Random(seed).shuffle(order)
    return GoalTable(prices, rows, np.array(limits), ends, np.array(order, np.uint32))


def draw_prices(
    low: NDArray[np.float64], high: NDArray[np.float64], rng: Random
) -> NDArray[np.float64]:
    """Draw one price for each product, in dollars; see `Columns` for the two arrays.

    Nothing is drawn for a product with one price. `rng` has the original's initial state.
    """
    prices: NDArray[np.float64] = np.array(low)
    for row in np.flatnonzero(~np.isnan(high)).tolist():
        prices[row] = rng.uniform(float(low[row]), float(high[row]))
    return prices


def draw_limit(price: float, rng: Random) -> float:
    """Return a price limit in dollars: the larger of two of the next four tens above the price."""
    first = bisect_right(_LIMITS, price)
    candidates = _LIMITS[first : first + _CANDIDATES]
    return max(rng.sample(candidates, 2)) if len(candidates) >= 2 else NO_LIMIT


class _Wish(NamedTuple):
    product: Product
    instruction: Instruction
    choices: tuple[tuple[_Pair, ...], ...]
    """(name, value) pairs of each option, sorted by name."""
    limit: float
    limit_text: str
    start: int
    """Number of goals before this wish's."""


class Goals(Sequence[Goal]):
    """All goals of a shop in the original's order, made on access. Thread-safe."""

    def __init__(
        self, catalogue: Catalogue, table: GoalTable, human: Sequence[Instruction] | None = None
    ) -> None:
        """Take a catalogue and the numbers that were drawn for it.

        `human` is the instruction of each wish; None: the synthetic ones of the products.
        """
        self._catalogue = catalogue
        self._table = table
        self._human = human
        # Reading single numbers is much faster through these than from arrays.
        self._order, self._ends = memoryview(table.order), memoryview(table.ends)  # type: ignore[arg-type]
        self._wish = lru_cache(_CACHED_WISHES)(self._make_wish)
        self._goal = lru_cache(_CACHED_GOALS)(self._make_goal)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Goal:  # type: ignore[override]
        if not 0 <= index < len(self._order):
            raise IndexError(f"no goal {index}; there are {len(self)}")
        return self._goal(index)

    def __iter__(self) -> Iterator[Goal]:
        return map(self._make_goal, range(len(self)))

    def price(self, row: int) -> float:
        """Return the drawn price of a product, in dollars."""
        return float(self._table.prices[row])

    def _make_goal(self, index: int) -> Goal:
        place = self._order[index]
        wish = self._wish(bisect_right(self._ends, place))
        product, instruction = wish.product, wish.instruction
        options: tuple[_Pair, ...] | tuple[str, ...]
        if self._human is None:
            options = _combination(wish.choices, place - wish.start)
            chosen = ", and ".join([f"{name}: {value}" for name, value in options])
            text = f"{instruction.text} with {chosen}" if chosen else instruction.text
        else:
            options = instruction.options
            text = instruction.text.strip(".")
        return Goal(
            index=index,
            asin=product.asin,
            name=product.title,
            instruction=text + wish.limit_text,
            price_upper=wish.limit,
            options=options,
            attributes=instruction.attributes,
            category=product.category,
            query=product.query,
            product_category=product.product_category,
        )

    def _make_wish(self, number: int) -> _Wish:
        row = int(self._table.rows[number])
        product = self._catalogue[row]
        if self._human is not None:
            instruction = self._human[number]
        else:
            instruction = cast("Instruction", self._catalogue.instruction(row))
        choices = tuple(
            tuple((name, value) for value in values) for name, values in sorted(product.options)
        )
        limit = float(self._table.limits[number])
        named = "" if limit == NO_LIMIT else f", and price lower than {limit:.2f} dollars"
        start = self._ends[number - 1] if number else 0
        return _Wish(product, instruction, choices, limit, named, start)


def _combination(choices: tuple[tuple[_Pair, ...], ...], number: int) -> tuple[_Pair, ...]:
    """Return one combination of options; the last option changes fastest."""
    chosen = []
    for pairs in reversed(choices):
        number, place = divmod(number, len(pairs))
        chosen.append(pairs[place])
    chosen.reverse()
    return tuple(chosen)
