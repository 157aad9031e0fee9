"""Make the entities of a generated world: their names, relations and passages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from env_servers.retrieval.corpus import Passage
from env_servers.retrieval.world_words import (
    BOOK,
    COMPANY,
    KINDS,
    PERSON,
    RIVER,
    TOWN,
    WORDS,
    Kind,
    stems,
)

SPLITS: Final = ("dev", "test", "train")

_EVALUATION: Final = {"dev": 0.067, "test": 0.111}
"""Share of the entities in an evaluation split..."""
_LARGEST_SHARED: Final = 1_000
"""... of at most this many: larger worlds only have a larger training split."""
_LEAST: Final = {PERSON: 2, TOWN: 2, RIVER: 1, COMPANY: 1, BOOK: 1}
"""A split needs towns to be born and to die in, and people to write and to illustrate a book."""

_DEALT: Final = (
    "region", "source", "mouth", "craft", "product", "genre", "profession", "instrument",
)  # fmt: skip
"""Relations whose values are dealt from the pool of that name."""

_STEMS_PER_ENTITY: Final = 0.08
_FIRST_NAMES_PER_ENTITY: Final = 0.03
_FOUNDING_YEARS: Final = range(1700, 1760)
_BIRTH_YEARS: Final = range(1760, 1880)
"""After all foundings: a town must exist before people are born in it."""

_T = TypeVar("_T")


class Draws:
    """Random choices, the same on every machine and every version of Python and NumPy.

    Only the stream of the bit generator counts, which NumPy promises to keep, unlike the
    streams of its `Generator` (NEP 19).

    Args:
        seed: One or more integers of at least 0.
    """

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(seed)
        self._ready: list[int] = []

    def below(self, limit: int) -> int:
        """Draw an integer from 0 to `limit` - 1."""
        if not self._ready:
            self._ready = self._bits.random_raw(4096).tolist()
        return self._ready.pop() % limit

    def choice(self, items: Sequence[_T]) -> _T:
        """Draw one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[_T], count: int) -> list[_T]:
        """Draw different items in random order; all of them if there are not more."""
        rest = list(items)
        count = min(count, len(rest))
        for place in range(count):
            other = place + self.below(len(rest) - place)
            rest[place], rest[other] = rest[other], rest[place]
        return rest[:count]


@dataclass(frozen=True, slots=True)
class Entity:
    """A subject of a passage."""

    id: str
    kind: Kind
    split: str
    name: str
    values: dict[str, str]
    """Relation -> value; a name where the value is an entity."""

    @property
    def subject(self) -> str:
        """Return the name of the entity in a question."""
        return self.kind.subject.format(name=self.name)


def _deck(draws: Draws, pool: Sequence[str]) -> Iterator[str]:
    """Draw from a pool endlessly; an item is repeated only after all others were drawn."""
    while True:
        left = draws.sample(pool, len(pool))
        while left:
            yield left.pop()


class _Maker:
    """Makes the entities of one split after the other, `train` first. Names are unique.

    Pools are dealt like decks of cards, and years of evaluation splits are years of the training
    split: so in large worlds the training split has every word of the others.
    """

    def __init__(self, draws: Draws, entities: int) -> None:
        self._draws = draws
        pools = {relation: WORDS[f"{relation}s"] for relation in _DEALT} | {
            "fish": WORDS["fish"],
            "founded": tuple(map(str, _FOUNDING_YEARS)),
            "birth_year": tuple(map(str, _BIRTH_YEARS)),
        }
        self._decks = {relation: _deck(draws, pool) for relation, pool in pools.items()}
        surnames = stems(max(12, round(_STEMS_PER_ENTITY * entities)))
        adjectives = WORDS["title_adjectives"]
        if BOOK.share * entities > len(adjectives) * len(WORDS["title_nouns"]) / 3:
            adjectives += surnames
        first_names = max(8, round(_FIRST_NAMES_PER_ENTITY * entities))
        parts: dict[str, tuple[Sequence[str], Sequence[str]]] = {
            "woman": (WORDS["women"][:first_names], surnames),
            "man": (WORDS["men"][:first_names], surnames),
            TOWN.name: (surnames, WORDS["places"]),
            RIVER.name: (surnames, WORDS["waters"]),
            COMPANY.name: (surnames, WORDS["firms"]),
            BOOK.name: ([f"The {word}" for word in adjectives], WORDS["title_nouns"]),
        }
        self._names = {
            sort: (_deck(draws, first), _deck(draws, last)) for sort, (first, last) in parts.items()
        }
        self._taken: set[str] = set()
        self._years: set[int] = set()
        """Years of the training split; empty while it is made."""
        self._made: dict[Kind, list[Entity]] = {}

    def make(self, split: str, counts: dict[Kind, int], ids: Iterator[str]) -> list[Entity]:
        facts: dict[Kind, Callable[[], dict[str, str]]] = {
            RIVER: self._river, TOWN: self._town, PERSON: self._person,
            COMPANY: self._company, BOOK: self._book,
        }  # fmt: skip
        self._made = {}
        for kind, draw_facts in facts.items():
            fresh = []
            for _ in range(counts[kind]):
                sort = self._draws.choice(("woman", "man")) if kind is PERSON else kind.name
                name = self._name(sort)
                fresh.append(Entity(next(ids), kind, split, name, draw_facts()))
            self._made[kind] = fresh
        made = [entity for several in self._made.values() for entity in several]
        if split == "train":
            years = (value for entity in made for value in entity.values.values())
            self._years = {int(year) for year in years if year.isdigit()}
        return made

    def _name(self, sort: str) -> str:
        first, last = self._names[sort]
        while (name := f"{next(first)} {next(last)}") in self._taken:
            pass
        self._taken.add(name)
        return name

    def _dealt(self, *relations: str) -> dict[str, str]:
        return {relation: next(self._decks[relation]) for relation in relations}

    def _later(self, year: str, low: int, high: int) -> str:
        """Draw a year that is `low` to `high` years later."""
        possible = range(int(year) + low, int(year) + high + 1)
        known = [later for later in possible if later in self._years]
        return str(self._draws.choice(known or possible))

    def _two(self, kind: Kind) -> tuple[Entity, Entity]:
        made = self._made[kind]
        first, second = self._draws.below(len(made)), self._draws.below(len(made) - 1)
        return made[first], made[second + (second >= first)]

    def _river(self) -> dict[str, str]:
        return self._dealt("region", "source", "mouth", "fish")

    def _town(self) -> dict[str, str]:
        facts = self._dealt("founded", "craft")
        river = self._draws.choice(self._made[RIVER])
        facts["river"], facts["region"] = river.name, river.values["region"]
        facts["charter"] = self._later(facts["founded"], 20, 60)
        return facts

    def _person(self) -> dict[str, str]:
        facts = self._dealt("birth_year", "profession", "instrument")
        first, last = self._two(TOWN)
        facts["birthplace"], facts["deathplace"] = first.name, last.name
        facts["death_year"] = self._later(facts["birth_year"], 50, 85)
        return facts

    def _company(self) -> dict[str, str]:
        facts = self._dealt("product")
        founder = self._draws.choice(self._made[PERSON])
        headquarters, factory = self._two(TOWN)
        facts["founder"] = founder.name
        facts["founded"] = self._later(founder.values["birth_year"], 22, 45)
        facts["headquarters"], facts["factory"] = headquarters.name, factory.name
        return facts

    def _book(self) -> dict[str, str]:
        facts = self._dealt("genre")
        people = self._made[PERSON]
        author, other = self._two(PERSON)
        # An illustrator should be of the author's time.
        others = [other, *(self._draws.choice(people) for _ in range(7))]
        year = int(author.values["birth_year"])
        illustrator = min(
            (person for person in others if person is not author),
            key=lambda person: abs(int(person.values["birth_year"]) - year),
        )
        facts["author"], facts["illustrator"] = author.name, illustrator.name
        facts["published"] = self._later(author.values["birth_year"], 24, 48)
        facts["setting"] = self._draws.choice(self._made[TOWN]).name
        return facts


def make_entities(draws: Draws, entities: int) -> list[Entity]:
    """Make all entities, sorted by id; an id is the row in decimal digits, all equally long.

    Entities that are values belong to the same split, and every split has its own entities: no
    passage of one split names an entity of another one.
    """
    least = sum(_LEAST.values())
    shared = min(entities, _LARGEST_SHARED)
    sizes = {split: max(least, round(share * shared)) for split, share in _EVALUATION.items()}
    sizes["train"] = entities - sum(sizes.values())
    width = len(str(entities - 1))
    ids = iter([f"{row:0{width}d}" for row in draws.sample(range(entities), entities)])
    maker = _Maker(draws, entities)
    made = []
    for split in ("train", "dev", "test"):
        counts = {kind: max(_LEAST[kind], int(kind.share * sizes[split])) for kind in KINDS}
        counts[PERSON] += sizes[split] - sum(counts.values())
        made += maker.make(split, counts, ids)
    return sorted(made, key=lambda entity: entity.id)


def passage(draws: Draws, entity: Entity) -> Passage:
    """Draw the wording of an entity's passage; the first sentence always comes first."""
    kind = entity.kind
    words = {**entity.values, "name": entity.name}
    if kind is PERSON:
        first, words["surname"] = entity.name.split()
        she, her, whom = ("she", "her", "her") if first in WORDS["women"] else ("he", "his", "him")
        words |= {"She": she.capitalize(), "she": she, "her": her, "whom": whom}
    opening, *others = (draws.choice(templates) for templates in kind.sentences)
    if draws.below(2):
        others.reverse()
    text = " ".join([opening, *others]).format_map(words)
    return Passage(entity.id, f'"{entity.name}"\n{text}')
