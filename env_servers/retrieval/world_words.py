"""Load the words of a generated world from `world_words.json`: name pools, relations, templates.

A passage takes one template of each of its kind's sentences; together they state every relation of
the kind. A question takes one template of its relation. In a bridge question a phrase of the first
relation (`the town where Marta Halden was born`) replaces the entity's name.

Names of entities are combinations: `Marta Halden`, `Halden Mill`, `Halden Brook`, `Halden Works`,
`The Silent Lantern`. One pool of stems serves people, towns, rivers and companies, so every name
shares a word with others. The pools do not depend on the seed.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

import msgspec

Texts = tuple[str, ...]


class Relation(msgspec.Struct, frozen=True):
    """A property of every entity of a kind; it has exactly one value."""

    name: str
    questions: Texts
    """Templates with {x} for the entity."""
    phrases: Texts = ()
    """Templates with {x} that describe the value if it is an entity."""
    target: str | None = None
    """Kind of the value if it is an entity."""
    first: Texts = ()
    """Questions with {x} and {y} for the entity with the smaller year; empty for other values."""
    last: Texts = ()
    """The same for the larger year."""


class Kind(msgspec.Struct, frozen=True):
    """A kind of entities."""

    name: str
    share: float
    """Share of all entities."""
    relations: tuple[Relation, ...]
    sentences: tuple[Texts, ...]
    """Templates with {name} and names of relations; people have {surname}, {She}, {she}, {her} and
    {whom} (her or him) too."""
    subject: str
    """Name of the entity in a question: a template with {name}."""


class _Data(msgspec.Struct):
    words: dict[str, Texts]
    aliases: dict[str, Texts]
    kinds: tuple[Kind, Kind, Kind, Kind, Kind]


_DATA: Final = msgspec.json.decode(
    resources.files(__package__).joinpath("world_words.json").read_bytes(), type=_Data
)
WORDS: Final = _DATA.words
"""Closed pools of words by name."""
ALIASES: Final = _DATA.aliases
"""Aliases of a value; a question with it as answer accepts them, too."""
KINDS: Final = _DATA.kinds
PERSON, TOWN, RIVER, COMPANY, BOOK = KINDS

_STARTS, _ENDS, _MIDDLES = (WORDS[f"stem_{part}"] for part in ("starts", "ends", "middles"))
MAX_STEMS: Final = len(_STARTS) * len(_ENDS) * len(_MIDDLES)


def stems(count: int) -> Texts:
    """Return the first stems, all different; at most `MAX_STEMS`."""
    starts, ends = len(_STARTS), len(_ENDS)
    # Block after block every start gets another end; 11 and 40 have no common factor, so the ends
    # differ within a block as well. Longer stems come after all short ones.
    return tuple(
        _STARTS[i % starts]
        + _MIDDLES[i // (starts * ends)]
        + _ENDS[(i % starts * 11 + i // starts) % ends]
        for i in range(min(count, MAX_STEMS))
    )
