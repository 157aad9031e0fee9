"""Compute the reward of a purchase, with all its parts.

Source: `web_agent_site/engine/goal.py` and `normalize.py` of the original. Texts agree if
their token-set ratio, rounded, is above 85; texts are preprocessed as by the original's matching
library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz import fuzz

from env_servers.webshop.goals import Goal
from env_servers.webshop.nouns import NounTagger
from env_servers.webshop.products import Product

# Ratios are rounded before they are compared with 85, halves to the even number.
_AGREE = 85.5
_NOT_A_WORD = re.compile(r"\W")
_DELETED = dict.fromkeys(range(0x80, 0x100))
_PATH_MARK = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
_COLOUR_LIST = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower "
    "tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
_COLOURS = tuple(_COLOUR_LIST.split())


@dataclass(frozen=True, slots=True)
class RewardDetails:
    """The parts of the reward; names as in the original, except `noun_tagger`.

    reward = (r_att w_att + r_option w_option + r_price w_price) r_type
    """

    reward: float
    r_type: float
    r_att: float
    """Share of the goal's attributes that the product has."""
    w_att: float
    r_option: float | None
    """Share of the goal's options that were chosen; None if the goal has none."""
    w_option: float | None
    r_price: bool
    """Whether the price is within the goal's limit."""
    w_price: float
    query_match: bool
    category_match: bool
    title_score: float
    """Agreement of the nouns of both titles, 0 to 1."""
    noun_tagger: str
    """Name of the tagger that found the nouns."""


def reward_details(
    goal: Goal, product: Product, price: float, chosen: Iterable[str], tagger: NounTagger
) -> RewardDetails:
    """Compute the reward of buying a product at a price in dollars with chosen option values."""
    attributes = sum(_has_attributes(goal.attributes, product))
    options = sum(_has_options(goal, chosen))
    within_limit = price <= goal.price_upper
    query_match = product.query == goal.query
    category_match = len(_path(product.product_category) & _path(goal.product_category)) >= 2
    title_score = _title_score(tagger.nouns(product.title), tagger.nouns(goal.name))
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    # These two override a match of query or category, as in the original.
    if title_score < 0.1:
        r_type = 0.1
    if title_score == 0.0:
        r_type = 0.0
    parts = len(goal.attributes) + len(goal.options) + 1
    has_options = bool(goal.options)
    return RewardDetails(
        reward=(attributes + options + within_limit) / parts * r_type,
        r_type=r_type,
        r_att=attributes / len(goal.attributes),
        w_att=len(goal.attributes) / parts,
        r_option=options / len(goal.options) if has_options else None,
        w_option=len(goal.options) / parts if has_options else None,
        r_price=within_limit,
        w_price=1 / parts,
        query_match=query_match,
        category_match=category_match,
        title_score=title_score,
        noun_tagger=tagger.name,
    )


def missed_parts(
    goal: Goal, product: Product, chosen: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the goal's attributes and options that a purchase does not meet, as texts."""
    attributes = zip(goal.attributes, _has_attributes(goal.attributes, product), strict=True)
    options = zip(goal.options, _has_options(goal, chosen), strict=True)
    return (
        tuple(attribute for attribute, is_met in attributes if not is_met),
        tuple(
            option if isinstance(option, str) else ": ".join(option)
            for option, is_met in options
            if not is_met
        ),
    )


def _has_attributes(wanted: tuple[str, ...], product: Product) -> list[bool]:
    """Return for each attribute whether the product lists it in similar words or names it."""
    texts = (product.title.lower(), " ".join(product.bullets).lower(), product.description.lower())
    return [
        any(_agree(offered, attribute) for offered in product.attributes)
        or any(attribute in text for text in texts)
        for attribute in wanted
    ]


def _has_options(goal: Goal, chosen: Iterable[str]) -> list[bool]:
    """Return for each option of the goal whether any chosen value agrees with it."""
    values = [_colour_or_text(value) for value in chosen]
    found = []
    for option in goal.options:
        if isinstance(option, str):
            text = _colour_or_text(option)
        else:
            # The original compares with the pair of name and value as Python prints it, unless one
            # of the two is exactly a colour.
            text = next((c for c in _COLOURS if c in option), "") or repr(option)
        found.append(any(_agree(value, text) for value in values))
    return found


@lru_cache(4096)
def _colour_or_text(value: str) -> str:
    """Return the first colour word of the list that the value contains, else the value."""
    return next((colour for colour in _COLOURS if colour in value), value)


def _agree(first: str, second: str) -> bool:
    if first == second:
        return True
    one, other = _words(first), _words(second)
    if not one or not other:
        return False
    return fuzz.token_set_ratio(one, other, score_cutoff=_AGREE) >= _AGREE


@lru_cache(32768)
def _words(text: str) -> str:
    """Return words in lower case, marks as spaces, without Latin-1 letters above ASCII."""
    return _NOT_A_WORD.sub(" ", text.translate(_DELETED)).lower().strip()


@lru_cache(4096)
def _path(product_category: str) -> frozenset[str]:
    return frozenset(part.strip() for part in product_category.split(_PATH_MARK))


def _title_score(bought: tuple[str, ...], wanted: tuple[str, ...]) -> float:
    """Return common nouns per noun of the goal's title, with repeats; 0.2 if it has none."""
    return len(set(bought) & set(wanted)) / len(wanted) if wanted else 0.2
