"""What the texts of WebShop say: instructions and pages (style `text`), taken apart.

A page is a row of parts with ` [SEP] ` between them, as the original's text mode has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

SEPARATOR: Final = " [SEP] "
PER_PAGE: Final = 10
"""Offers on one page of results."""

_PRICE_LIMIT: Final = re.compile(r",? and price lower than ([\d.]+) dollars\.?\s*$")
_NEXT_OPTION: Final = re.compile(r", and (?=[a-z][a-z ]*: )")
_PAGE: Final = re.compile(r"Page (\d+) \(Total results: (\d+)\)")
_ASIN: Final = re.compile(r"[A-Z0-9]{2,10}")
_DOLLARS: Final = re.compile(r"\$([\d.]+)")
_WORD: Final = re.compile(r"[a-z0-9]+")
_BETWEEN_PHRASES: Final = re.compile(r",| with | for | that | and | in | by ")
_EMPTY: Final = frozenset(
    """a am an and any are as asked at be buy by can could d find for friend from get give has have
    help i if in is it like look looking love m me my need of on one or order our please s shop show
    some something t that the there these they thing this to us want wants we where which who will
    with would you""".split()  # noqa: SIM905
)
"""Words of a request that say nothing about the product."""

PageKind = Literal["search", "results", "item", "sub_page", "other"]


@dataclass(frozen=True, slots=True)
class ShoppingList:
    """What an instruction asks for."""

    phrases: tuple[tuple[str, ...], ...]
    """Words as `content_words` has them; the words of one phrase belong together."""
    options: tuple[tuple[str, str], ...]
    """(name, value) pairs in lower case."""
    price_limit: float
    """Dollars; infinite where there is none."""
    query: str
    """Words to search with."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A product as a page of results lists it."""

    asin: str
    """In upper case."""
    title: str
    prices: tuple[float, ...]
    """Dollars: one price, or the two ends of a range."""
    rank: int
    """Place in all results, from 0."""


@dataclass(frozen=True, slots=True)
class PageText:
    """One page."""

    kind: PageKind
    number: int = 1
    """Of a page of results, from 1."""
    total: int = 0
    """Results on all pages."""
    offers: tuple[Offer, ...] = ()
    """On a page of results."""
    title: str = ""
    """On a product's page."""
    prices: tuple[float, ...] = ()
    """On a product's page, as in `Offer`."""
    lines: tuple[str, ...] = ()
    """A product's page: option names, each before its values. A sub page: its text."""


def parse_instruction(instruction: str) -> ShoppingList:
    """Reads an instruction, with its options and price limit if it ends in those.

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
    # Words said twice count twice: options tell products apart better than anything else.
    query = " ".join([*spoken, *(2 * [value for _, value in options])])
    return ShoppingList(
        phrases=tuple(dict.fromkeys(phrase for phrase in phrases if phrase)),
        options=options,
        price_limit=limit,
        # Brackets would end the action.
        query=re.sub(r"[\[\]]", " ", query) or "gift",
    )


def content_words(text: str) -> list[str]:
    """The words that tell something about a product, in lower case, plurals without their s."""
    words = (word for word in _WORD.findall(text.lower()) if word not in _EMPTY)
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words]


def parse_page(text: str) -> PageText:
    """Reads a page; one of another form than expected is `other`."""
    parts = [part.strip() for part in text.split(SEPARATOR)]
    if parts[0] == "WebShop":
        return PageText("search")
    if len(parts) < 4 or parts[2] != "Back to Search":
        return PageText("other")
    if match := _PAGE.fullmatch(parts[3]):
        number = int(match[1])
        return PageText("results", number, int(match[2]), _offers(parts, number))
    if parts[-1] != "Buy Now":
        return PageText("sub_page", lines=tuple(parts[4:]))
    prices = [index for index, part in enumerate(parts) if part.startswith("Price: ")]
    if not prices:
        return PageText("other")
    end = prices[-1]
    return PageText(
        "item", title=parts[end - 1], prices=_dollars(parts[end]), lines=tuple(parts[4 : end - 1])
    )


def _offers(parts: list[str], page_number: int) -> tuple[Offer, ...]:
    starts = [
        index
        for index in range(4, len(parts) - 2)
        if _ASIN.fullmatch(parts[index]) and _DOLLARS.match(parts[index + 2])
    ]
    first = PER_PAGE * (page_number - 1)
    return tuple(
        Offer(parts[start], parts[start + 1], _dollars(parts[start + 2]), first + row)
        for row, start in enumerate(starts)
    )


def _dollars(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in _DOLLARS.findall(text))
