"""Choose the placeholder of a product's picture: a simple shape in the product's colour.

The shapes are drawn in `templates/picture.html`; catalogues contain no pictures that could be
shown without requests to another machine.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from env_servers.webshop.products import Product

_WORD = re.compile(r"[a-z]+")
_DEFAULT_SHAPE = "parcel"

# Shape -> its words (the last such word of a title decides, as in "shoe rack"),
# coarse category -> shape, colour word -> `#rrggbb`, and colours for products without such a word.
_DATA: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_bytes())
_SHAPE_OF: dict[str, str] = {
    word: shape for shape, words in _DATA["shapes"].items() for word in words.split()
}
_COLOURS: dict[str, str] = _DATA["colours"]
_OTHER_COLOURS: list[str] = _DATA["other_colours"]


class Picture(NamedTuple):
    """A placeholder for one product."""

    shape: str
    """Name of a shape in `templates/picture.html`."""
    colour: str
    """`#rrggbb`."""


def picture_of(product: Product, chosen_options: Iterable[tuple[str, str]] = ()) -> Picture:
    """Return a product's placeholder in a chosen colour, else the title's, else a fixed one."""
    texts = [*(value for _, value in chosen_options), product.title]
    texts += [value for _, values in product.options for value in values[:1]]
    named = (_COLOURS[word] for text in texts for word in _words(text) if word in _COLOURS)
    # Not hash(), which differs between processes.
    other = _OTHER_COLOURS[zlib.crc32(product.asin.encode()) % len(_OTHER_COLOURS)]
    return Picture(_shape(product), next(named, other))


def _shape(product: Product) -> str:
    path = product.product_category.rpartition("\u203a")[2]
    # The head of a title comes before "for" and "with": "case for iphone", "lamp with shade".
    title = re.split(r" (?:for|with) |[,(|]| - ", product.title.lower())[0]
    for text in (title, path, product.title, product.query):
        for word in reversed(_words(text)):
            if word in _SHAPE_OF:
                return _SHAPE_OF[word]
    shapes: dict[str, str] = _DATA["category_shapes"]
    return shapes.get(product.category, _DEFAULT_SHAPE)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
