"""Convert entries of the official catalogue to products of the shop.

Source: `load_products` of the original's `web_agent_site/engine/engine.py` (field names, price and
option rules), without the fields that no page shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from env_servers.text import well_formed

NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""The attributes of a product that is not in the attribute file."""
NO_RATING = "N.A."
_UNKNOWN_PRICE = 100.0
_NOT_IN_PRICE = re.compile(r"[^\d.]")


class ShopDataError(Exception):
    """A file of the shop's data cannot be used; the message names it and the remedy."""


class Review(msgspec.Struct, frozen=True, array_like=True):
    """A customer's review of a product."""

    author: str
    title: str
    body: str
    stars: float
    """1 to 5."""


class Product(msgspec.Struct, frozen=True, array_like=True):
    """One product as the shop shows it."""

    asin: str
    """Unique id in upper case, at most ten characters."""
    title: str
    description: str
    bullets: tuple[str, ...]
    """The lines of the Features page."""
    pricing: tuple[float, ...]
    """Dollars: one price, or the two ends of a range."""
    price_text: str
    """The price as shown: `$100.0` or `$3.78 to $11.38`."""
    options: tuple[tuple[str, tuple[str, ...]], ...]
    """Option names with their values, all in lower case, in the file's order."""
    category: str
    """The coarse category, such as `fashion`."""
    query: str
    """The search query of the product's listing, in lower case."""
    product_category: str
    """Path of categories, separated by a single right-pointing quotation mark (U+203A)."""
    attributes: tuple[str, ...]
    reviews: tuple[Review, ...]
    rating: str
    """Mean of the reviews' stars, such as `4.3`, or `N.A.` without reviews."""


class Instruction(msgspec.Struct, frozen=True, array_like=True):
    """A customer's request; goals are made from it."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] = ()
    """Requested option values; of human instructions only."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A product with its synthetic instruction, if it has one."""

    product: Product
    instruction: Instruction | None


def parse_record(item: Mapping[str, Any], entry: Mapping[str, Any] | None) -> Record:
    """Parse one product from its entries in the product file and, if present, attribute file.

    `reviews` may be in the product's; the official files have none.

    Raises:
        ValueError: if a field is missing or its form differs from the official files.
    """
    pricing = parse_pricing(item.get("pricing"))
    reviews = tuple(_review(review) for review in _objects(item, "reviews"))
    stars = [review.stars for review in reviews]
    attributes, instruction = _attributes({} if entry is None else entry)
    product = Product(
        asin=_text(item, "asin"),
        title=_text(item, "name"),
        description=_text(item, "full_description", ""),
        bullets=_bullets(item),
        pricing=pricing,
        price_text=" to ".join(f"${price}" for price in pricing),
        options=_options(item),
        category=_text(item, "category", ""),
        query=_text(item, "query", "").lower().strip(),
        product_category=_text(item, "product_category", ""),
        attributes=attributes,
        reviews=reviews,
        rating=f"{math.fsum(stars) / len(stars):.1f}" if stars else NO_RATING,
    )
    return Record(product, instruction)


def parse_human_instruction(entry: Mapping[str, Any]) -> Instruction:
    """Parse one entry of a product's list in the file of human instructions.

    Raises:
        ValueError: if a field is missing or its form differs from the official file.
    """
    return Instruction(
        text=_text(entry, "instruction"),
        attributes=_texts(entry, "instruction_attributes"),
        options=_texts(entry, "instruction_options"),
    )


def parse_pricing(text: object) -> tuple[float, ...]:
    """Return prices in dollars: `"$3.78$11.38"` or `"$3.78 - $11.38"` gives both ends of a range.

    A product without a price costs 100 dollars; of more than two prices the first two count.

    Raises:
        ValueError: for anything except an empty value or text with dollar signs and numbers.
    """
    if text is None or text == "":
        return (_UNKNOWN_PRICE,)
    if not isinstance(text, str):
        raise ValueError(f"'pricing' must be text, not {text!r}")
    try:
        prices = tuple(float(_NOT_IN_PRICE.sub("", part)) for part in text.split("$")[1:])
    except ValueError:
        prices = ()
    if not prices or not all(map(math.isfinite, prices)):
        raise ValueError(f"'pricing' must hold prices such as '$3.78', not {text[:80]!r}")
    return prices[:2]


def indexed_text(product: Product) -> str:
    """Return the text for the search index: title, description, first feature and options."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options)
    bullet = product.bullets[0] if product.bullets else ""
    return " ".join((product.title, product.description, bullet, options)).lower()


def _attributes(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], Instruction | None]:
    attributes = _texts(entry, "attributes") if "attributes" in entry else NO_ATTRIBUTES
    if entry.get("instruction") is None:
        return attributes, None
    wanted = _texts(entry, "instruction_attributes")
    if not wanted:
        raise ValueError("'instruction_attributes' must not be empty if there is an instruction")
    return attributes, Instruction(_text(entry, "instruction"), wanted)


def _options(item: Mapping[str, Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    contents = item.get("customization_options") or {}
    if not isinstance(contents, dict):
        raise ValueError("'customization_options' must be an object")
    options = {}
    for name in contents:
        if contents[name] is not None:
            values = [_text(choice, "value").strip() for choice in _objects(contents, name)]
            shown = tuple(value.replace("/", " | ").lower() for value in values)
            options[well_formed(name).lower()] = shown
    return tuple(options.items())


def _bullets(item: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(item.get("small_description"), list):
        return _texts(item, "small_description")
    return (_text(item, "small_description", ""),)


def _review(review: Mapping[str, Any]) -> Review:
    stars = review.get("rating")
    if isinstance(stars, bool) or not isinstance(stars, int | float) or not 1 <= stars <= 5:
        raise ValueError(f"a review's 'rating' must be a number from 1 to 5, not {stars!r}")
    return Review(_text(review, "author", ""), _text(review, "title", ""),
                  _text(review, "body", ""), float(stars))  # fmt: skip


def _text(item: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = item.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {str(value)[:80]!r}")
    return well_formed(value)


def _texts(item: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(map(well_formed, _list(item.get(name), name, str, "texts")))


def _objects(item: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    values = item.get(name)
    return [] if values is None else _list(values, name, dict, "objects")


def _list(values: Any, name: str, kind: type, kinds: str) -> list[Any]:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name!r} must be a list of {kinds}, not {str(values)[:80]!r}")
    return values
