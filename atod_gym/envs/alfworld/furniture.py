"""The furniture and the things of a household: what exists, what it can do, where it is found.

The numbers of `_PLACES` are per cent of the copies of an object that lie in receptacles of a kind,
counted over the official ALFWorld games and rounded; 1 also stands for places that accept the
object although it is rarely found there. The game generator furnishes houses from them, and the
scripted expert searches in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final


def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


OPENABLE: Final = frozenset({"cabinet", "drawer", "fridge", "microwave", "safe"})
"""Kinds of receptacles that have a door or a lid; all others show what they hold."""

CLEANABLE: Final = _kinds(
    "apple bowl butterknife cloth cup dishsponge egg fork kettle knife ladle lettuce mug pan plate "
    "pot potato soapbar spatula spoon tomato"
)
HEATABLE: Final = _kinds("apple bread cup egg mug plate potato tomato")
COOLABLE: Final = _kinds(
    "apple bowl bread cup egg lettuce mug pan plate pot potato tomato winebottle"
)
SLICEABLE: Final = _kinds("apple bread egg lettuce potato tomato")
VESSELS: Final = _kinds("bowl box cup mug pan plate pot")
"""Objects that could hold others; examining one tells that it holds nothing."""
LAMPS: Final = frozenset({"desklamp", "floorlamp"})
"""Objects that can be switched on but not carried."""

_PLACES: Final = {
    "alarmclock": "desk 34, shelf 21, sidetable 19, dresser 17, diningtable 7, countertop 1",
    "apple": (
        "countertop 24, fridge 24, diningtable 15, microwave 13, garbagecan 12, sinkbasin 9, "
        "sidetable 2"
    ),
    "book": (
        "bed 37, desk 14, countertop 10, drawer 10, dresser 6, diningtable 5, cabinet 4, "
        "sidetable 4, armchair 3, coffeetable 3, shelf 2, sofa 2, ottoman 1"
    ),
    "bowl": (
        "cabinet 30, countertop 18, fridge 17, diningtable 15, desk 6, shelf 6, sinkbasin 3, "
        "dresser 2, microwave 2, coffeetable 1, sidetable 1, tvstand 1"
    ),
    "box": (
        "diningtable 23, sofa 22, coffeetable 20, shelf 8, sidetable 7, desk 6, cabinet 4, "
        "armchair 3, dresser 3, tvstand 2, ottoman 1"
    ),
    "bread": "countertop 56, diningtable 31, fridge 12, garbagecan 1, microwave 1, sidetable 1",
    "butterknife": "countertop 58, diningtable 27, drawer 8, sinkbasin 6, sidetable 1",
    "candle": (
        "countertop 28, toilet 28, cabinet 12, drawer 12, shelf 7, sidetable 5, cart 2, "
        "coffeetable 2, diningtable 2, dresser 1, tvstand 1"
    ),
    "cd": (
        "drawer 28, desk 20, dresser 14, sidetable 13, garbagecan 8, shelf 7, diningtable 6, "
        "armchair 2, cabinet 2, countertop 1, safe 1"
    ),
    "cellphone": (
        "bed 21, drawer 21, desk 13, dresser 9, sidetable 9, countertop 7, diningtable 6, shelf "
        "6, armchair 3, coffeetable 2, safe 2, cabinet 1, ottoman 1, sofa 1"
    ),
    "cloth": (
        "bathtubbasin 30, cabinet 20, countertop 16, drawer 15, sinkbasin 8, shelf 5, toilet 3, "
        "cart 2, armchair 1, desk 1, diningtable 1, dresser 1, garbagecan 1, laundryhamper 1, "
        "sidetable 1"
    ),
    "creditcard": (
        "drawer 24, shelf 13, sidetable 12, desk 9, dresser 9, armchair 7, sofa 7, coffeetable "
        "5, countertop 5, diningtable 5, tvstand 3, ottoman 1, safe 1"
    ),
    "cup": (
        "cabinet 23, countertop 21, fridge 21, diningtable 15, sinkbasin 10, microwave 7, shelf "
        "2, sidetable 2"
    ),
    "desklamp": "sidetable 40, desk 29, dresser 21, shelf 9, coffeetable 2",
    "dishsponge": (
        "countertop 25, cabinet 22, drawer 21, diningtable 12, sinkbasin 8, garbagecan 5, shelf "
        "3, bathtubbasin 2, cart 1, sidetable 1, toilet 1"
    ),
    "egg": (
        "fridge 25, countertop 24, garbagecan 13, sinkbasin 13, diningtable 12, microwave 12, "
        "sidetable 2"
    ),
    "floorlamp": "sidetable 40, dresser 20, desk 20, coffeetable 10, tvstand 10",
    "fork": "countertop 44, diningtable 24, drawer 22, sinkbasin 9, sidetable 2",
    "glassbottle": (
        "cabinet 31, countertop 27, diningtable 13, sinkbasin 10, fridge 9, garbagecan 7, shelf "
        "3, microwave 1"
    ),
    "handtowel": (
        "handtowelholder 96, countertop 4, bathtubbasin 1, cabinet 1, cart 1, drawer 1, "
        "garbagecan 1, shelf 1, sidetable 1, sinkbasin 1, toilet 1"
    ),
    "kettle": (
        "stoveburner 42, countertop 26, cabinet 24, diningtable 7, sinkbasin 2, shelf 1, "
        "sidetable 1"
    ),
    "keychain": (
        "drawer 23, sidetable 16, desk 12, shelf 12, dresser 11, coffeetable 7, armchair 5, "
        "diningtable 5, sofa 4, safe 3, tvstand 3, cabinet 1, countertop 1, ottoman 1"
    ),
    "knife": "countertop 48, diningtable 25, drawer 21, sinkbasin 5, sidetable 1",
    "ladle": "countertop 42, cabinet 25, drawer 17, diningtable 14, sinkbasin 2",
    "laptop": (
        "bed 47, desk 12, sofa 10, coffeetable 9, diningtable 9, dresser 5, armchair 3, "
        "sidetable 3, tvstand 2, countertop 1, ottoman 1"
    ),
    "lettuce": "countertop 41, diningtable 29, fridge 23, sinkbasin 5, garbagecan 1, sidetable 1",
    "mug": (
        "countertop 24, coffeemachine 15, cabinet 14, fridge 12, diningtable 10, microwave 6, "
        "desk 5, sinkbasin 5, shelf 4, sidetable 3, dresser 2"
    ),
    "newspaper": (
        "sofa 20, coffeetable 17, diningtable 17, sidetable 14, shelf 11, dresser 8, armchair "
        "7, tvstand 3, drawer 2, cabinet 1, garbagecan 1, ottoman 1"
    ),
    "pan": (
        "stoveburner 52, countertop 33, cabinet 7, diningtable 4, fridge 4, sidetable 1, "
        "sinkbasin 1"
    ),
    "papertowelroll": (
        "countertop 54, diningtable 15, garbagecan 15, shelf 10, toilet 4, sidetable 2, cart 1"
    ),
    "pen": (
        "desk 22, drawer 17, dresser 14, shelf 13, sidetable 13, diningtable 10, countertop 5, "
        "coffeetable 3, garbagecan 2, tvstand 1"
    ),
    "pencil": (
        "drawer 20, desk 19, sidetable 17, shelf 14, dresser 10, diningtable 8, garbagecan 6, "
        "countertop 4, coffeetable 3, tvstand 1"
    ),
    "peppershaker": "cabinet 33, countertop 31, diningtable 16, drawer 15, shelf 3, sidetable 2",
    "pillow": "bed 69, sofa 24, armchair 6, ottoman 1",
    "plate": (
        "cabinet 37, countertop 27, diningtable 19, fridge 8, shelf 3, coffeetable 2, sinkbasin "
        "2, dresser 1, microwave 1, sidetable 1, tvstand 1"
    ),
    "pot": (
        "stoveburner 73, countertop 14, diningtable 4, fridge 4, cabinet 3, shelf 1, sidetable "
        "1, sinkbasin 1"
    ),
    "potato": (
        "countertop 29, fridge 26, diningtable 16, sinkbasin 11, microwave 10, garbagecan 6, "
        "sidetable 1"
    ),
    "remotecontrol": (
        "coffeetable 20, sofa 16, sidetable 13, diningtable 10, armchair 8, drawer 8, dresser "
        "8, tvstand 7, desk 4, shelf 3, countertop 1, ottoman 1"
    ),
    "saltshaker": "cabinet 32, countertop 32, diningtable 17, drawer 14, shelf 3, sidetable 2",
    "soapbar": (
        "countertop 20, sinkbasin 15, toilet 15, bathtubbasin 12, cabinet 12, drawer 11, "
        "garbagecan 7, shelf 4, sidetable 2, cart 1"
    ),
    "soapbottle": (
        "countertop 32, cabinet 28, diningtable 15, garbagecan 10, toilet 6, shelf 5, drawer 2, "
        "cart 1, dresser 1, sidetable 1"
    ),
    "spatula": "countertop 45, diningtable 25, drawer 21, sinkbasin 9, sidetable 1",
    "spoon": "countertop 37, drawer 28, diningtable 22, sinkbasin 11, sidetable 2",
    "spraybottle": (
        "countertop 32, toilet 23, cabinet 19, garbagecan 10, shelf 6, cart 3, diningtable 3, "
        "dresser 2, sidetable 2, drawer 1"
    ),
    "statue": (
        "shelf 29, coffeetable 16, countertop 14, diningtable 14, sidetable 13, dresser 7, "
        "tvstand 5, desk 2, safe 1"
    ),
    "teddybear": "bed 90, sofa 5, armchair 4, shelf 1",
    "tissuebox": (
        "shelf 18, coffeetable 15, drawer 14, countertop 13, diningtable 11, sidetable 11, desk "
        "8, tvstand 3, cabinet 2, cart 1, dresser 1, garbagecan 1, toilet 1"
    ),
    "toiletpaper": (
        "toilet 23, countertop 22, cabinet 12, toiletpaperhanger 12, drawer 11, garbagecan 9, "
        "shelf 6, cart 2, dresser 2, sidetable 1"
    ),
    "tomato": (
        "fridge 33, countertop 30, diningtable 20, garbagecan 9, sinkbasin 7, sidetable 2, "
        "microwave 1"
    ),
    "towel": "towelholder 90, countertop 5, bathtubbasin 5",
    "vase": (
        "shelf 35, cabinet 15, countertop 15, coffeetable 9, diningtable 8, dresser 7, "
        "sidetable 6, tvstand 3, desk 1, safe 1"
    ),
    "watch": (
        "drawer 22, coffeetable 21, sidetable 16, diningtable 12, dresser 10, tvstand 8, shelf "
        "7, desk 3"
    ),
    "wateringcan": (
        "coffeetable 53, shelf 38, sidetable 9, cabinet 1, desk 1, diningtable 1, drawer 1, "
        "dresser 1"
    ),
    "winebottle": (
        "countertop 37, cabinet 25, diningtable 24, garbagecan 9, shelf 3, fridge 2, sidetable 1"
    ),
}


@cache
def places(object_kind: str) -> Mapping[str, int]:
    """Receptacle kinds that accept an object kind, most likely first, with their weights.

    Args:
        object_kind: such as `mug`; an unknown kind has no places.

    Returns:
        A read-only mapping of receptacle kind to a weight of at least 1.
    """
    entries = _PLACES.get(object_kind, "")
    if not entries:
        return MappingProxyType({})
    pairs = (entry.split() for entry in entries.split(", "))
    return MappingProxyType({kind: int(weight) for kind, weight in pairs})


@dataclass(frozen=True, slots=True)
class Room:
    """What a kind of room is furnished with."""

    essentials: tuple[str, ...]
    """Receptacle kinds that every such room has, one each."""
    furniture: Mapping[str, tuple[int, int]]
    """Receptacle kind -> (weight, most in one room) of what may be added."""
    things: Mapping[str, int]
    """Object kind -> how often it is found in such a room."""


def _weights(text: str) -> Mapping[str, int]:
    pairs = (entry.split() for entry in text.split(", "))
    return MappingProxyType({kind: int(weight) for kind, weight in pairs})


def _furniture(text: str) -> Mapping[str, tuple[int, int]]:
    triples = (entry.split() for entry in text.split(", "))
    return MappingProxyType({kind: (int(weight), int(most)) for kind, weight, most in triples})


ROOMS: Final[Mapping[str, Room]] = MappingProxyType(
    {
        "kitchen": Room(
            essentials=("fridge", "microwave", "sinkbasin", "countertop"),
            furniture=_furniture(
                "cabinet 10 14, drawer 6 10, countertop 4 3, diningtable 3 2, stoveburner 4 4, "
                "coffeemachine 3 1, garbagecan 3 1, shelf 2 3, toaster 1 1, sidetable 1 1"
            ),
            things=_weights(
                "apple 4, bowl 4, bread 3, butterknife 4, cup 4, dishsponge 4, egg 4, fork 4, "
                "kettle 2, knife 4, ladle 2, lettuce 4, mug 4, pan 3, peppershaker 4, plate 4, "
                "pot 3, potato 4, saltshaker 4, soapbottle 4, spatula 4, spoon 4, tomato 4, "
                "glassbottle 1, papertowelroll 1, statue 1, vase 1, winebottle 2"
            ),
        ),
        "bedroom": Room(
            essentials=("bed", "desk", "sidetable"),
            furniture=_furniture(
                "drawer 8 8, shelf 5 6, dresser 3 1, garbagecan 3 1, sidetable 2 2, armchair 2 1, "
                "cabinet 2 4, desk 1 1, bed 1 1, laundryhamper 1 1, safe 1 1, diningtable 1 1"
            ),
            things=_weights(
                "alarmclock 4, book 4, bowl 2, box 1, cd 5, cellphone 5, cloth 1, creditcard 4, "
                "keychain 4, laptop 3, mug 2, pen 4, pencil 4, pillow 4, remotecontrol 1, "
                "statue 1, teddybear 1, tissuebox 1, vase 1, watch 1"
            ),
        ),
        "living room": Room(
            essentials=("sofa", "coffeetable", "sidetable"),
            furniture=_furniture(
                "armchair 4 2, drawer 6 6, shelf 4 6, sidetable 3 3, dresser 2 1, diningtable 2 1, "
                "tvstand 2 1, garbagecan 3 1, cabinet 2 4, ottoman 1 1, coffeetable 1 1"
            ),
            things=_weights(
                "book 2, box 3, candle 1, cellphone 2, creditcard 5, keychain 5, laptop 3, "
                "newspaper 3, pen 1, pencil 1, pillow 3, plate 1, remotecontrol 5, statue 4, "
                "tissuebox 2, vase 3, watch 3, wateringcan 1"
            ),
        ),
        "bathroom": Room(
            essentials=("sinkbasin", "toilet", "countertop"),
            furniture=_furniture(
                "cabinet 5 4, drawer 4 4, shelf 3 3, garbagecan 3 1, handtowelholder 3 2, "
                "towelholder 3 2, toiletpaperhanger 3 1, bathtubbasin 2 1, sinkbasin 2 1, "
                "cart 1 1, sidetable 1 1, countertop 1 1"
            ),
            things=_weights(
                "candle 5, cloth 4, dishsponge 2, handtowel 3, soapbar 5, soapbottle 5, "
                "spraybottle 5, tissuebox 1, toiletpaper 5, towel 2, papertowelroll 1"
            ),
        ),
    }
)
"""The kinds of rooms."""
