"""Closed pools of words that a generated world takes its names and values from.

Names of entities are combinations: `Marta Halden`, `Halden Mill`, `Halden Brook`, `Halden Works`,
`The Silent Lantern`. One pool of stems serves people, towns, rivers and companies alike, so that
every name has neighbours that share a word with it. The pools do not depend on the seed: worlds of
one size share their words.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN: Final = _words(
    "Ada Agnes Alma Anna Berta Clara Cora Dora Edith Elsa Emma Flora Greta Hanna Helga Ida Irma Ivy"
    " Judith Klara Lena Lydia Marta Mina Nora Olga Petra Rosa Thea Vera"
)
MEN: Final = _words(
    "Albert Anton Arno Bruno Conrad David Edgar Emil Felix Frank Gustav Henry Hugo Ivan Jakob Jonas"
    " Karl Leo Lukas Martin Max Oscar Otto Paul Peter Rudolf Simon Theo Viktor Walter"
)
_STEM_STARTS: Final = _words(
    "Hal Nor Kel Bran Wen Ost Dor Fal Gren Ing Lor Mer Pel Ros Sten Tal Ul Ver Zan Ald Bel Cor Eld"
    " Fen Gil Hol Jor Lan Mor Ran Sel Tor Val Wal Cal Dal Har Kor Mal Sal"
)
_STEM_ENDS: Final = _words(
    "den vik sen wick mar ton by ley mund rik sel dar gan ham lin low mere nick ock orn ro sby stad"
    " stow tin va vin win wood worth yard ard eck el en ver ia tor dorf brook"
)
_STEM_MIDDLES: Final = ("", "er", "an", "is", "ol")
PLACES: Final = _words(
    "Mill Ferry Bridge Harbor Cross Green Hill Market Haven Gate Wells Field Castle Grove Common"
    " Landing Abbey Moor Ridge Heath"
)
WATERS: Final = _words("Brook Creek Water Beck Burn Stream River Run Rill Fleet")
FIRMS: Final = _words(
    "Works Brothers Company Industries Group Partners Union Workshop Trading Sons Holdings House"
    " Guild Supply Stores Products Enterprises Corporation Associates Ventures"
)
TITLE_ADJECTIVES: Final = _words(
    "Silent Golden Broken Hidden Last Distant Frozen Burning Lost Crimson Empty Secret Quiet Iron"
    " Paper Second Velvet Copper Wooden Patient Painted Forgotten Restless Narrow Bitter Gentle"
    " Blind Wandering Northern Crooked"
)
TITLE_NOUNS: Final = _words(
    "Lantern Orchard Letter Garden Winter Voyage Mirror Window Island Clock Bell Road Forest Key"
    " Daughter Stranger Promise Shadow Summer Tower Ship Song Map Door Storm Bride Witness Harvest"
    " Crown Ladder Candle Raven Compass Anchor Feather Carriage"
)

PROFESSIONS: Final = _words(
    "botanist painter baker carpenter physician lawyer teacher composer sculptor printer surveyor"
    " watchmaker gardener tailor miller geologist historian journalist photographer chemist"
)
MUSIC: Final = _words("violin cello piano flute harp organ guitar trumpet clarinet lute oboe drum")
REGIONS: Final = (
    "Amber Coast", "Salt Coast", "White Coast", "Grey Highlands", "Pine Highlands",
    "Western Highlands", "Long Valley", "Stone Valley", "Apple Valley", "Eastern Plain",
    "Great Plain", "Barley Plain",
)  # fmt: skip
CRAFTS: Final = _words(
    "cheese lace glass pottery honey cider paper leather silk rope salt wine furniture wool soap"
    " bread"
)
GOODS: Final = _words(
    "bicycles pianos lamps boots carpets hats clocks stoves umbrellas tools candles toys pumps"
    " scales bricks locks"
)
GENRES: Final = _words(
    "historical romantic satirical comic gothic philosophical political pastoral"
)
HILLS: Final = tuple(
    f"{word} {kind}"
    for kind in ("Hills", "Mountains")
    for word in _words("Raven Wolf Copper Granite Eagle Juniper")
)
LAKES: Final = tuple(
    f"Lake {word}" for word in _words("Aurel Brona Celis Dunn Estra Fiora Gilda Hesper Illen Juno")
)
FISH: Final = _words("trout salmon pike perch carp bream eel roach")

ALIASES: Final = {
    "physician": ("doctor",),
    "lawyer": ("attorney",),
    "watchmaker": ("clockmaker",),
    "violin": ("fiddle",),
}
"""Other words for a value; a question whose answer it is takes them as well."""

MAX_STEMS: Final = len(_STEM_STARTS) * len(_STEM_ENDS) * len(_STEM_MIDDLES)


def stems(count: int) -> tuple[str, ...]:
    """The first stems, all different; at most `MAX_STEMS`."""
    starts, ends = len(_STEM_STARTS), len(_STEM_ENDS)
    # Block after block every start gets another end; 11 and 40 have no common factor, so that the
    # ends differ within a block as well. Longer stems come after all short ones.
    return tuple(
        _STEM_STARTS[i % starts]
        + _STEM_MIDDLES[i // (starts * ends)]
        + _STEM_ENDS[(i % starts * 11 + i // starts) % ends]
        for i in range(min(count, MAX_STEMS))
    )
