"""Generate a shop from a seed: products and instructions in the official file format.

Every attribute of a product is in its title, features or description, and no other text there
implies it; every goal can be met exactly by its own product. About one product in four is a near
miss of another one: the same brand and name, but one attribute, the price or an option differs.
Equal settings give equal bytes on every machine: the only source of randomness is
`random.Random.random`, whose stream for an integer seed the standard library keeps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from env_servers.webshop.shop_words import CATEGORIES, WORDS, Attribute, Kind

_PRODUCTS_PER_KIND: Final = 12
"""A small shop has fewer kinds, not kinds without alternatives."""
_MAX_COMBINATIONS: Final = 16
"""Limit of combinations of options of one product; each combination is a goal."""
_WITH_INSTRUCTION: Final = 0.65
_NEAR_MISSES: Final = 0.25
_PRICE_RANGES: Final = 0.1
_ID_MARKS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GeneratedShop:
    """Two files of the official format, as JSON values."""

    items: list[dict[str, Any]]
    """The product file, and `reviews`: objects with author, rating (1 to 5), title, body."""
    instructions: dict[str, dict[str, Any]]
    """The attribute file: asin -> attributes, and instruction and instruction_attributes where
    the product has a goal."""


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A product before its texts are written."""

    kind: Kind
    brand: str
    line: str
    attributes: tuple[Attribute, ...]
    """Three to five; at most one material."""
    options: tuple[tuple[str, tuple[str, ...]], ...]
    cents: int


class _Draws:
    """Random choices, the same on every machine and Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def between(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[_T]) -> _T:
        return items[self.between(0, len(items) - 1)]

    def sample(self, items: Iterable[_T], count: int) -> list[_T]:
        """Return different items in random order; all of them if there are not more."""
        rest = list(items)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(min(count, len(rest)))]

    def shuffled(self, items: Iterable[_T]) -> list[_T]:
        every = list(items)
        return self.sample(every, len(every))


def generate_shop(seed: int = 0, products: int = 1_000) -> GeneratedShop:
    """Make a shop of 1 product or more from a seed of 0 or more.

    Raises:
        ValueError: for an invalid seed or number of products.
    """
    for name, value, least in (("seed", seed, 0), ("products", products, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more, not {value!r}")
    draws = _Draws(seed)
    kinds = _kinds(draws, products)
    sketches: dict[Kind, list[_Sketch]] = {kind: [] for kind in kinds}
    for index in range(products):
        kind = kinds[index % len(kinds)]
        rivals = sketches[kind]
        if rivals and draws.chance(_NEAR_MISSES):
            rivals.append(_near_miss(draws, draws.choice(rivals)))
        else:
            rivals.append(_sketch(draws, kind))
    shop = GeneratedShop([], {})
    for sketch in draws.shuffled(sketch for rivals in sketches.values() for sketch in rivals):
        asin = _new_asin(draws, shop.instructions)
        shop.items.append(_item(draws, sketch, asin))
        shop.instructions[asin] = _instruction(draws, sketch)
    return shop


def _kinds(draws: _Draws, products: int) -> list[Kind]:
    """Return the shop's kinds, spread evenly over the categories."""
    shelves = [draws.shuffled(kinds) for kinds in CATEGORIES.values()]
    in_turn = [kind for row in zip(*shelves, strict=True) for kind in row]
    return in_turn[: max(1, products // _PRODUCTS_PER_KIND)]


def _new_asin(draws: _Draws, taken: dict[str, dict[str, Any]]) -> str:
    while True:
        asin = "B0" + "".join(draws.choice(_ID_MARKS) for _ in range(8))
        if asin not in taken:
            return asin


def _sketch(draws: _Draws, kind: Kind) -> _Sketch:
    attributes = draws.sample(kind.features, draws.between(2, 4))
    if kind.materials:
        attributes.append(draws.choice(kind.materials))
    elif len(attributes) == 2:
        attributes = draws.sample(kind.features, 3)
    low, high = kind.dollars
    # Cheap products are more common than dear ones.
    dollars = min(draws.between(low, high), draws.between(low, high))
    return _Sketch(
        kind=kind,
        brand=draws.choice(WORDS.brands[kind.category]),
        line=draws.choice(WORDS.lines),
        attributes=tuple(draws.shuffled(attributes)),
        options=_options(draws, kind),
        cents=100 * dollars + draws.choice((0, 49, 95, 99)),
    )


def _options(draws: _Draws, kind: Kind) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the option names of a product with their values."""
    count = draws.choice((0, 0, 1, 1, 1, 2, 2, 2, 3, 3))
    chosen = {axis.name: axis for axis in draws.sample(kind.axes, count)}
    values = {}
    for name, axis in chosen.items():
        offered = draws.sample(axis.values, draws.between(axis.fewest, axis.most))
        values[name] = [value for value in axis.values if value in offered]
    while math.prod(map(len, values.values())) > _MAX_COMBINATIONS:
        longest = max(values.values(), key=len)
        longest.pop(draws.between(0, len(longest) - 1))
    return tuple((name, tuple(values[name])) for name in values)


def _near_miss(draws: _Draws, original: _Sketch) -> _Sketch:
    """Return a product that is easily mistaken for another one."""
    way = draws.between(0, 3)
    if way == 0:
        return replace(original, cents=original.cents + 100 * draws.between(20, 60))
    if way == 1 and any(len(values) > 2 for _, values in original.options):
        return replace(
            original,
            options=tuple(
                (name, tuple(v for v in values if v != missing or len(values) == 2))
                for name, values in original.options
                for missing in [draws.choice(values)]
            ),
        )
    feature = next(a for a in original.attributes if a in original.kind.features)
    others = [a for a in original.kind.features if a not in original.attributes]
    swapped = [draws.choice(others) if a == feature else a for a in original.attributes]
    return replace(
        original,
        attributes=tuple(swapped),
        cents=original.cents + draws.choice((-100, 0, 0, 100, 200)),
    )


def _item(draws: _Draws, sketch: _Sketch, asin: str) -> dict[str, Any]:
    """Return a product as an entry of the product file."""
    title, titled = _title(draws, sketch)
    described = [a for a in sketch.attributes if draws.chance(0.25)]
    listed = [a for a in sketch.attributes if a not in described or draws.chance(0.6)]
    listed = [a for a in listed if a not in titled or draws.chance(0.6)]
    bullets = [f"{_capital(a.phrase)}: {a.benefit}" for a in draws.shuffled(listed)]
    plain = draws.sample(WORDS.plain_bullets, max(3 - len(bullets), draws.between(0, 2)))
    bullets = (bullets + [text.format(brand=sketch.brand) for text in plain])[:6]
    reviews: list[dict[str, Any]] = []
    for author in draws.sample(WORDS.authors, draws.between(0, 6)):
        rating = draws.choice((5, 5, 5, 4, 4, 4, 3, 3, 2, 1))
        about, body = draws.choice(WORDS.reviews[rating])
        reviews.append({"author": author, "rating": rating, "title": about, "body": body})
    stars = [review["rating"] for review in reviews]
    return {
        "name": title,
        "full_description": _description(draws, sketch, described),
        "pricing": _pricing(draws, sketch.cents),
        "images": [],
        "product_category": sketch.kind.path,
        "average_rating": round(sum(stars) / len(stars), 1) if stars else "",
        "small_description": bullets,
        "customization_options": {
            name: [{"is_selected": False, "is_available": True, "value": v} for v in values]
            for name, values in sketch.options
        }
        or "",
        "asin": asin,
        "category": sketch.kind.category,
        "query": sketch.kind.query,
        "page": 1,
        "reviews": reviews,
    }


def _title(draws: _Draws, sketch: _Sketch) -> tuple[str, Sequence[Attribute]]:
    """Return a title, and the attributes that it names."""
    pattern = draws.choice(WORDS.titles)
    named: Sequence[Attribute] = ()
    if "{first}" in pattern or "{list}" in pattern:
        fewest = 2 if "{rest}" in pattern else 1
        named = sketch.attributes[: draws.between(fewest, 3)]
        if "{first}" in pattern and "{rest}" not in pattern:
            named = named[:1]
    phrases = [_title_case(attribute.phrase) for attribute in named]
    title = pattern.format(
        brand=sketch.brand, line=sketch.line, kind=_title_case(sketch.kind.name),
        list=", ".join(phrases), first="".join(phrases[:1]), rest=", ".join(phrases[1:]),
    )  # fmt: skip
    return title, named


def _description(draws: _Draws, sketch: _Sketch, attributes: Sequence[Attribute]) -> str:
    """Return one to four sentences with the attributes."""
    sentences = [draws.choice(WORDS.openings)]
    if attributes:
        roles = {"is": "", "with": "with ", "for": "made for "}
        said = _joined([roles[attribute.role] + attribute.phrase for attribute in attributes])
        sentences.append(draws.choice(WORDS.claims).replace("{said}", said))
    sentences += draws.sample(WORDS.closings, draws.between(0, 2))
    kind = sketch.kind
    be = "are" if kind.is_plural else "is"
    return " ".join(sentences).format(
        brand=sketch.brand, line=sketch.line, kind=kind.name, query=kind.query, be=be
    )


def _pricing(draws: _Draws, cents: int) -> str:
    price = f"${cents // 100}.{cents % 100:02d}"
    if not draws.chance(_PRICE_RANGES):
        return price
    return f"{price}${cents // 100 + draws.between(2, 12)}.{cents % 100:02d}"


def _instruction(draws: _Draws, sketch: _Sketch) -> dict[str, Any]:
    """Return a product as an entry of the attribute file."""
    entry: dict[str, Any] = {"attributes": [a.phrase for a in sketch.attributes]}
    if not draws.chance(_WITH_INSTRUCTION):
        return entry
    wanted = draws.sample(sketch.attributes, draws.choice((1, 2, 2, 2, 3, 3)))
    thing = _thing(draws, sketch.kind, wanted)
    entry["instruction"] = draws.choice(WORDS.requests).format(thing=thing)
    entry["instruction_attributes"] = [attribute.phrase for attribute in wanted]
    return entry


def _thing(draws: _Draws, kind: Kind, wanted: Sequence[Attribute]) -> str:
    """Return the wanted thing, such as `a non stick frying pan with cast iron`."""
    being, having, serving = (
        [attribute.phrase for attribute in wanted if attribute.role == role]
        for role in ("is", "with", "for")
    )
    words = kind.name
    if being and draws.chance(0.6):
        words = f"{', '.join(being)} {words}"
        being = []
    if not kind.is_plural:
        words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    be = "that are" if kind.is_plural else "that is"
    for link, phrases in (("with", having), ("for", serving), (be, being)):
        if phrases:
            words += f" {link} {_joined(phrases)}"
    return words


def _joined(phrases: Sequence[str]) -> str:
    """Join phrases as `a, b and c`."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _title_case(phrase: str) -> str:
    return " ".join(_capital(word) for word in phrase.split(" "))


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]
