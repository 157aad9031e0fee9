"""A scripted expert for WebShop that acts on instructions and pages alone, as an agent must.

It searches for the words of the instruction and opens products on the first page of results by
rank and price. It reads features and description where the title is not sufficient. It
buys the first product that meets all wishes, or the best one when turns run out. It follows
the pages whatever action was executed, so it recovers from actions that were not its own.

The second half of the file reads instructions and pages, of both text styles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

from atod_gym.envs.webshop.settings import SEARCH_PLACEHOLDER

_TO_READ: Final = ("features", "description")
_APART: Final = 0.5
"""Credit of a wanted word that occurs, but not next to another word of its phrase."""
_ENOUGH: Final = 0.8
"""Minimum coverage of a product that counts as the right one."""
_UNOPENED: Final = (1.3, -2.6, 0.0)
_OPENED: Final = ((2.0, -1.6, 0.5), (-4.5, -1.1, 7.5), (-5.0, -0.8, 8.0))
"""Log odds that buying a product scores 1: constant, per log(rank + 1), per coverage. Unopened, and
opened with 0, 1 and 2 sub pages read; rough fits over generated and official goals."""
_FAR_BELOW: Final = -1.0
"""Log odds of a price far below the limit: limits are usually slightly above the price."""
_USUAL_MARGIN: Final = 40.0
_WORTH_A_LOOK: Final = 0.07
"""Products below this promise are not opened while a better one can be bought."""
_PARTIAL: Final = 0.1
"""Weight of the partial score relative to the probability of the full score."""


@dataclass
class Product:
    """A product on a page, and the facts observed about it."""

    asin: str
    """In upper case; empty on a product's own page."""
    title: str
    prices: tuple[float, ...]
    """Dollars: one price, or the two ends of a range."""
    rank: int = 0
    """Place on its page of results, from 0."""
    words: list[str] = field(init=False, compare=False)
    """Content words of the title and of the sub pages that were read."""
    read: set[str] = field(default_factory=set, compare=False)
    """Those of `_TO_READ` that were seen."""
    axes: dict[str, str] | None = field(default=None, compare=False)
    """Option value -> option name; None until the product's page is seen."""
    coverage: float = field(default=0.0, compare=False)
    """Share of the wanted words among `words`."""

    def __post_init__(self) -> None:
        self.words = content_words(self.title)


class ScriptedShopper:
    """Plays one episode after another; call `reset` at the start of each."""

    def __init__(self, max_turns: int = 15) -> None:
        """Prepare a shopper for episodes of at most `max_turns` turns; it buys before they end."""
        self.max_turns = max_turns
        self.reset("", "")

    def reset(self, instruction: str, text: str) -> None:
        """Start an episode.

        Args:
            instruction: The product to buy.
            text: The first page; not used, as it repeats the instruction.
        """
        del text
        self._list = parse_instruction(instruction)
        self._products: dict[str, Product] = {}
        self._current: Product | None = None
        self._is_own_search = True
        self._chosen: dict[str, str] = {}
        self._turns_left = self.max_turns + 1

    def act(
        self, text: str, admissible_actions: Sequence[str] = (), last_action: str | None = None
    ) -> str:
        """Choose the next action.

        Args:
            text: The current page, in either text style.
            admissible_actions: The possible actions; empty if unknown.
            last_action: The action executed since the last call, the shopper's choice or not; None
                in the first turn.

        Returns:
            An action; one of the admissible ones if there are any, or a search where those hold
            `SEARCH_PLACEHOLDER`.
        """
        self._turns_left -= 1
        page = parse_page(text)
        possible = frozenset(admissible_actions)
        self._follow(page, possible, last_action or "")
        for action in self._plan(page):
            is_search = action.startswith("search[") and SEARCH_PLACEHOLDER in possible
            if not possible or is_search or action in possible:
                return action
        # No planned action is possible: take any that leads to another page.
        ways = sorted(possible - {SEARCH_PLACEHOLDER, "click[buy now]"})
        return ways[0] if ways else self._search()

    def _search(self) -> str:
        return f"search[{self._list.query}]"

    # Reading the pages.

    def _follow(self, page: Page, possible: frozenset[str], last_action: str) -> None:
        """Record a page and the action that led to it."""
        if last_action.startswith("search["):
            self._is_own_search = last_action == self._search()
        clicked = last_action[len("click[") : -1] if last_action.startswith("click[") else ""
        product = self._current
        if page.kind in ("search", "results"):
            self._chosen = {}
        if page.kind == "results" and page.number == 1 and self._is_own_search:
            for listed in page.products:
                if listed.asin not in self._products:
                    self._products[listed.asin] = self._assess(listed)
        elif page.kind == "item":
            self._read_item(page, possible, clicked)
        elif page.kind == "sub_page" and product and clicked in {*_TO_READ} - product.read:
            product.read.add(clicked)
            product.words += content_words(" ".join(page.lines))
            self._assess(product)

    def _read_item(self, page: Page, possible: frozenset[str], clicked: str) -> None:
        [shown] = page.products
        self._current = self._products.get(clicked.upper(), self._current)
        if self._current is None or self._current.title != shown.title:
            # The page was reached by an action that was not observed.
            known = [one for one in self._products.values() if one.title == shown.title]
            self._current = known[0] if known else self._assess(shown)
        names = {name for name, _ in self._list.options}
        axes, name = {}, ""
        for line in page.lines:
            if f"click[{line}]" not in possible if possible else line in names:
                name = line
            else:
                axes[line] = name
        self._current.axes = axes
        if clicked in axes:
            self._chosen[axes[clicked]] = clicked

    # Judging the products.

    def _assess(self, product: Product) -> Product:
        """Compute the coverage of a product; a word apart from its phrase counts half."""
        known, pairs = set(product.words), set(pairwise(product.words))
        credits = []
        for phrase in self._list.phrases:
            for index, word in enumerate(phrase):
                neighbours = [*phrase[max(0, index - 1) : index], *phrase[index + 1 : index + 2]]
                joined = any((word, b) in pairs or (b, word) in pairs for b in neighbours)
                credits.append(
                    (1.0 if joined or not neighbours else _APART) if word in known else 0.0
                )
        product.coverage = math.fsum(credits) / len(credits) if credits else 1.0
        return product

    def _values(self, product: Product) -> list[str]:
        """Return the values to choose for the wanted options, as far as the product has them."""
        found = []
        axes = product.axes or {}
        for name, wanted in self._list.options:
            # A value matches if all its words are wanted, as in the reward.
            spoken = {*content_words(name), *content_words(wanted)}
            words = {v: content_words(v) for v in axes if axes[v] == name}
            alike = [v for v in words if words[v] and spoken.issuperset(words[v])]
            if wanted in axes:
                found.append(wanted)
            elif alike:
                found.append(max(alike, key=len))
        return found

    def _promise(self, product: Product) -> float:
        """Return the probability of the full score, plus a small weight for a part of it."""
        options, limit, has = len(self._list.options), self._list.price_limit, self._values(product)
        lowest = min(product.prices, default=0.0)
        constant, per_rank, per_coverage = (
            _UNOPENED if product.axes is None else _OPENED[len(product.read)]
        )
        odds = constant + per_rank * math.log(product.rank + 1) + per_coverage * product.coverage
        if math.isfinite(limit) and lowest < limit - _USUAL_MARGIN:
            odds += _FAR_BELOW
        chance = 1.0 / (1.0 + math.exp(-odds))
        if lowest > limit or (product.axes is not None and len(has) < options):
            chance = 0.0
        elif self._is_right(product):
            chance = 1.0
        attributes = max(1, len(self._list.phrases))
        is_cheap = max(product.prices, default=0.0) <= limit
        parts = product.coverage * attributes + len(has) + is_cheap
        return chance + _PARTIAL * parts / (attributes + options + 1)

    def _is_right(self, product: Product) -> bool:
        """Return whether a product seems to meet all wishes."""
        return (
            product.axes is not None
            and len(self._values(product)) == len(self._list.options)
            and min(product.prices, default=0.0) <= self._list.price_limit
            and product.coverage >= _ENOUGH
        )

    # Parts of the plan: each yields the next action first, then alternatives.

    def _plan(self, page: Page) -> Iterator[str]:
        if page.kind == "search":
            yield self._search()
        elif page.kind == "results" and self._is_own_search and page.number == 1:
            yield from self._browse()
        elif page.kind == "item" and self._current is not None:
            yield from self._judge(self._current)
        if page.kind != "results" or (self._is_own_search and page.number > 1):
            yield "click[< prev]"
        yield "click[back to search]"

    def _browse(self) -> Iterator[str]:
        """On the page of results, open a product."""
        known = list(self._products.values())
        opened = [one for one in known if one.axes is not None]
        fresh = [one for one in known if one.axes is None and self._promise(one) > _WORTH_A_LOOK]
        best = max(opened, key=self._promise, default=None)
        target = max(fresh, key=self._promise, default=None)
        if best is not None and self._is_right(best):
            target = best
        elif best is not None and self._turns_left < len(self._list.options) + 4:
            # No turns left to open another product and come back.
            target = max(best, target or best, key=self._promise)
        target = target or best or max(known, key=self._promise, default=None)
        if target is not None:
            yield f"click[{target.asin.lower()}]"

    def _judge(self, product: Product) -> Iterator[str]:
        """On a product's page, read more, leave, or choose the options and buy."""
        options = len(self._list.options)
        to_choose = [v for v in self._values(product) if v not in self._chosen.values()]
        spare = self._turns_left - len(to_choose) - 1
        if not self._is_right(product) and spare >= 2:
            own, fresh, known = self._promise(product), 0.0, 0.0
            for other in self._products.values():
                if other is not product and options + 2 < self._turns_left:
                    promise = self._promise(other)
                    fresh = max(fresh, promise) if other.axes is None else fresh
                    known = max(known, promise) if other.axes is not None else known
            unread = [name for name in _TO_READ if name not in product.read]
            # Descriptions rarely add to the features.
            if unread and fresh < (own if len(unread) == 2 else _WORTH_A_LOOK):
                yield f"click[{unread[0]}]"
            # Two turns to see another product and two to come back.
            may_return = self._turns_left >= options + 5
            if max(fresh, known) > own or (may_return and fresh > _WORTH_A_LOOK):
                yield "click[< prev]"
        for value in to_choose:
            yield f"click[{value}]"
        yield "click[buy now]"


SEPARATOR: Final = " [SEP] "

_PRICE_LIMIT: Final = re.compile(r",? and price lower than ([\d.]+) dollars\.?\s*$")
_NEXT_OPTION: Final = re.compile(r", and (?=[a-z][a-z ]*: )")
_PAGE: Final = re.compile(r"Page (\d+) \(Total results: \d+\)")
_ASIN: Final = re.compile(r"[A-Z0-9]{2,10}")
_RICH_PART: Final = re.compile(r" *\[((?:clicked )?button)\] (.*?) \[\1_\]|[^\n]+", re.DOTALL)
_DOLLARS: Final = re.compile(r"\$([\d.]+)")
_WORD: Final = re.compile(r"[a-z0-9]+")
_BETWEEN_PHRASES: Final = re.compile(r",| with | for | that | and | in | by ")
_EMPTY: Final = frozenset(
    """a am an and any are as asked at be buy by can could d find for friend from get give has have
    help i if in is it like look looking love m me my need of on one or order our please s shop show
    some something t that the there these they thing this to us want wants we where which who will
    with would you""".split()  # noqa: SIM905
)
"""Words of a request that do not describe the product."""


@dataclass(frozen=True, slots=True)
class ShoppingList:
    """The wishes in an instruction."""

    phrases: tuple[tuple[str, ...], ...]
    """Words as returned by `content_words`; the words of one phrase belong together."""
    options: tuple[tuple[str, str], ...]
    """(name, value) pairs in lower case."""
    price_limit: float
    """Dollars; infinite where there is none."""
    query: str
    """Words to search with."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page."""

    kind: Literal["search", "results", "item", "sub_page", "other"]
    number: int = 1
    """Of a page of results, from 1."""
    products: tuple[Product, ...] = ()
    """Those of a page of results; the one of a product's page."""
    lines: tuple[str, ...] = ()
    """A product's page: option names, each before its values. A sub page: its text."""


def parse_instruction(instruction: str) -> ShoppingList:
    """Read an instruction, with its options and price limit if it ends with those.

    Args:
        instruction: Such as `Find me .. with color: red, and price lower than 40.00 dollars`; any
            sentence is accepted.
    """
    sentence = " ".join(instruction.lower().split())
    limit = float("inf")
    if match := _PRICE_LIMIT.search(sentence):
        limit = float(match[1])
        sentence = sentence[: match.start()]
    options: tuple[tuple[str, str], ...] = ()
    head, colon, _ = sentence.partition(": ")
    start = head.rfind(" with ")
    if colon and start >= 0:
        pairs = _NEXT_OPTION.split(sentence[start + len(" with ") :])
        options = tuple((name, value) for name, _, value in (p.partition(": ") for p in pairs))
        sentence = sentence[:start]
    phrases = (tuple(content_words(part)) for part in _BETWEEN_PHRASES.split(sentence))
    spoken = [word for word in _WORD.findall(sentence) if word not in _EMPTY]
    # A repeated word counts twice: options distinguish products best.
    query = " ".join([*spoken, *(2 * [value for _, value in options])])
    return ShoppingList(
        phrases=tuple(dict.fromkeys(phrase for phrase in phrases if phrase)),
        options=options,
        price_limit=limit,
        # Brackets would end the action.
        query=re.sub(r"[\[\]]", " ", query) or "gift",
    )


def content_words(text: str) -> list[str]:
    """Return the words that describe a product, in lower case, plurals without their s."""
    words = (word for word in _WORD.findall(text.lower()) if word not in _EMPTY)
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words]


def parse_page(text: str) -> Page:
    """Read a page in either text style; one of an unexpected form is `other`."""
    parts = _parts(text)
    if parts[:1] == ["WebShop"]:
        return Page("search")
    if "Back to Search" not in parts[:-1]:
        return Page("other")
    parts = parts[parts.index("Back to Search") + 1 :]
    if match := _PAGE.fullmatch(parts[0]):
        return Page("results", int(match[1]), _listed(parts))
    if parts[-1] != "Buy Now":
        return Page("sub_page", lines=tuple(parts[1:]))
    prices = [index for index, part in enumerate(parts) if part.startswith("Price: ")]
    if not prices:
        return Page("other")
    end = prices[-1]
    product = Product("", parts[end - 1], _dollars(parts[end]))
    return Page("item", products=(product,), lines=tuple(parts[1 : end - 1]))


def _parts(text: str) -> list[str]:
    """Return the parts of a page without their marks.

    The style `text` has ` [SEP] ` between parts; `text_rich` has lines and marked buttons, whose
    names may have line breaks.
    """
    if SEPARATOR in text:
        return [part.strip() for part in text.split(SEPARATOR)]
    text = re.sub("^You have clicked .*$", "", text, flags=re.MULTILINE)
    parts = (match[2] if match[1] else match[0].strip() for match in _RICH_PART.finditer(text))
    return [part for part in parts if part]


def _listed(parts: list[str]) -> tuple[Product, ...]:
    starts = [
        index
        for index in range(1, len(parts) - 2)
        if _ASIN.fullmatch(parts[index]) and _DOLLARS.match(parts[index + 2])
    ]
    return tuple(
        Product(parts[start], parts[start + 1], _dollars(parts[start + 2]), rank)
        for rank, start in enumerate(starts)
    )


def _dollars(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in _DOLLARS.findall(text))
