"""Furniture and objects of a household: kinds, properties and locations.

The data is in `furniture.json`. Its `places` give, for each object kind, the percentage of copies
that lie in receptacles of a kind, counted over the official ALFWorld games and rounded. A weight of
1 also marks receptacles that accept the object but rarely hold it. The generator furnishes houses
from these weights, and the scripted expert searches in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_DATA: Final[dict[str, Any]] = json.loads(
    Path(__file__).with_name("furniture.json").read_text(encoding="utf-8")
)

OPENABLE: Final = frozenset(_DATA["openable"])
"""Kinds of receptacles that have a door or a lid; all others show what they hold."""

CLEANABLE: Final = frozenset(_DATA["cleanable"])
HEATABLE: Final = frozenset(_DATA["heatable"])
COOLABLE: Final = frozenset(_DATA["coolable"])
SLICEABLE: Final = frozenset(_DATA["sliceable"])
VESSELS: Final = frozenset(_DATA["vessels"])
"""Objects that could hold others; examining one shows that it holds nothing."""
LAMPS: Final = frozenset(_DATA["lamps"])
"""Objects that can be switched on but not carried."""


def places(object_kind: str) -> Mapping[str, int]:
    """Return the receptacle kinds that accept an object kind, most likely first.

    Args:
        object_kind: such as `mug`; an unknown kind has no places.

    Returns:
        Receptacle kind to a weight of at least 1.
    """
    weights: Mapping[str, int] = _DATA["places"].get(object_kind, {})
    return weights


@dataclass(frozen=True, slots=True)
class Room:
    """Furniture and objects of a kind of room."""

    essentials: Sequence[str]
    """Receptacle kinds that every such room has, one each."""
    furniture: Mapping[str, Sequence[int]]
    """Receptacle kind -> [weight, most in one room] of further receptacles."""
    things: Mapping[str, int]
    """Object kind -> how often it is found in such a room."""


ROOMS: Final[Mapping[str, Room]] = {name: Room(**room) for name, room in _DATA["rooms"].items()}
"""The kinds of rooms."""
