"""Load the words of the generated shop from `shop_words.json`.

Kinds of products, attributes, options, brands, and the sentences of titles, descriptions,
features, reviews and instructions. The lists are short on purpose: a model with a
vocabulary of some hundred words can learn this shop. Two attributes of one kind must never match
in the reward's fuzzy comparison, nor two values of one option; the tests check that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

Role = Literal["is", "with", "for"]
Texts = tuple[str, ...]


class Attribute(msgspec.Struct, frozen=True):
    """A property, part or purpose of a product."""

    phrase: str
    """The text in titles and instructions, in lower case."""
    role: Role
    """Role in an instruction: `a non stick pan`, `with cast iron`, `for small kitchens`."""
    benefit: str
    """The rest of the line on the Features page."""


class Axis(msgspec.Struct, frozen=True):
    """A choice that a customer makes for a product.

    Several axes may share a name, but never within one kind of product. A name is never a word of
    its values: names and values are compared as one sequence of words.
    """

    name: str
    values: Texts
    """All values that products may offer, in listing order."""
    fewest: int = 2
    most: int = 6
    """Maximum number of values that one product offers."""


class Kind(msgspec.Struct, frozen=True):
    """One kind of product."""

    category: str
    """The coarse category, such as `kitchen`."""
    name: str
    """The text in titles and instructions, in lower case."""
    query: str
    """The search query of this kind: its plural."""
    path: str
    """Path of categories, with a single right-pointing angle quotation mark between them."""
    dollars: tuple[int, int]
    """Lowest and highest price."""
    materials: tuple[Attribute, ...]
    """A product has at most one of them."""
    features: tuple[Attribute, ...]
    axes: tuple[Axis, ...]

    @property
    def is_plural(self) -> bool:
        """Whether the name is a plural, such as `sandals`."""
        return self.name == self.query


class _Words(msgspec.Struct, rename={"being": "is", "having": "with", "serving": "for"},
             forbid_unknown_fields=True):  # fmt: skip
    """The file."""

    being: dict[str, str]
    having: dict[str, str]
    serving: dict[str, str]
    axes: dict[str, Axis]
    brands: dict[str, Texts]
    lines: Texts
    titles: Texts
    openings: Texts
    claims: Texts
    closings: Texts
    plain_bullets: Texts
    authors: Texts
    reviews: dict[int, tuple[tuple[str, str], ...]]
    requests: Texts
    kinds: tuple[dict[str, Any], ...]
    """`Kind` with attributes and axes by their keys, and an incomplete path."""


WORDS = msgspec.json.decode(Path(__file__).with_suffix(".json").read_bytes(), type=_Words)
"""Titles: `list` needs one attribute or more, `first` one, `rest` one more. Reviews: stars ->
(title, text). Requests begin an instruction; the shop adds options and the price limit."""

_ROLES: dict[Role, dict[str, str]] = {
    "is": WORDS.being, "with": WORDS.having, "for": WORDS.serving,
}  # fmt: skip
_ATTRIBUTES = {
    phrase: Attribute(phrase, role, benefit)
    for role, phrases in _ROLES.items()
    for phrase, benefit in phrases.items()
}
CATEGORIES: dict[str, tuple[Kind, ...]] = {}
"""Category -> its kinds."""
for _row in WORDS.kinds:
    _row["path"] = f"{_row['path']} > {_row['query'].title()}".replace(">", "\u203a")
    for _list, _values in (
        ("materials", _ATTRIBUTES), ("features", _ATTRIBUTES), ("axes", WORDS.axes)
    ):  # fmt: skip
        _row[_list] = tuple(_values[key] for key in _row[_list])
    _kind = Kind(**{**_row, "dollars": tuple(_row["dollars"])})
    CATEGORIES[_kind.category] = (*CATEGORIES.get(_kind.category, ()), _kind)
