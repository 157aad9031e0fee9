"""Generate a world: passages about people, towns, rivers, companies and books, and questions.

Everything is determined by the seed and the number of entities, on every machine alike. Every
relation has one value and every name belongs to one entity. The passage of an entity states all its
relations. So every question has exactly one answer, which is in a support passage.

An entity belongs to one split, and so do all entities that it is related to. No fact that an
evaluation question needs (at any hop) is needed by a training question. No name in an evaluation
question, its answer or its support passages occurs in a training question or a training passage.
Splits share closed pools only: words that names are made of, regions, professions, years and so on.
In worlds of 1,000 entities or more every word of the evaluation splits is in the training split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from env_servers.retrieval.world_entities import SPLITS, Draws, Entity, make_entities, passage
from env_servers.retrieval.world_words import ALIASES, KINDS

__all__ = ["MAX_ENTITIES", "MIN_ENTITIES", "SPLITS", "Question", "World"]

MIN_ENTITIES: Final = 50
MAX_ENTITIES: Final = 100_000

_QUESTIONS_PER_ENTITY: Final = 4.5
_BRIDGES: Final = 0.25
_COMPARISONS: Final = 0.15
_ATTEMPTS: Final = 50
"""Pairs drawn for each comparison; very small splits do not have enough."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the world."""

    id: str
    """The facts that the question needs, as ids of passages and relations, without the answer."""
    question: str
    golden_answers: tuple[str, ...]
    """The answer as in the passage, then its aliases."""
    kind: str
    """`one_hop`, `bridge` or `comparison`; the beginning of the id."""
    support: tuple[str, ...]
    """Ids of the passages with the facts it needs, in the order of the hops; one or two."""


class World:
    """Passages and questions that are determined by two numbers.

    Args:
        entities: number of passages, 50 to 100,000.
        seed: 0 or more; another seed gives another world of the same words.

    Raises:
        ValueError: for other numbers.
    """

    def __init__(self, entities: int = 1_000, seed: int = 0) -> None:
        for name, value in (("entities", entities), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, not {value!r}")
        if not MIN_ENTITIES <= entities <= MAX_ENTITIES:
            raise ValueError(
                f"entities must be from {MIN_ENTITIES} to {MAX_ENTITIES:,}, not {entities}"
            )
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}")
        draws = Draws(seed, entities)
        self.entities, self.seed = entities, seed
        self._made = make_entities(draws, entities)
        self.passages = tuple(passage(draws, entity) for entity in self._made)
        """One for each entity, sorted by id."""
        self._questions: dict[str, tuple[Question, ...]] = {}

    def questions(self, split: str) -> tuple[Question, ...]:
        """Return the questions of a split, sorted by id; about 4.5 for each of its entities.

        60 % ask for one fact, 25 % are bridges and 15 % comparisons, except that splits of a few
        entities may have fewer comparisons. The evaluation splits have about 500 (`test`) and 300
        (`dev`) questions in worlds of 1,000 entities or more.

        Raises:
            ValueError: for a split other than `dev`, `test` and `train`.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if split not in self._questions:
            draws = Draws(self.seed, self.entities, 1 + SPLITS.index(split))
            members = tuple(entity for entity in self._made if entity.split == split)
            asked = _questions(draws, members)
            self._questions[split] = tuple(sorted(asked, key=lambda question: question.id))
        return self._questions[split]


def _questions(draws: Draws, members: tuple[Entity, ...]) -> Iterator[Question]:
    total = round(_QUESTIONS_PER_ENTITY * len(members))
    bridges, comparisons = round(_BRIDGES * total), round(_COMPARISONS * total)
    facts = [(entity, relation) for entity in members for relation in entity.kind.relations]
    for entity, relation in draws.sample(facts, total - bridges - comparisons):
        text = draws.choice(relation.questions).format(x=entity.subject)
        name = f"one_hop-{entity.id}-{relation.name}"
        yield _question(name, text, entity.values[relation.name], entity)
    kinds = {kind.name: kind for kind in KINDS}
    by_name = {entity.name: entity for entity in members}
    chains = [
        (entity, relation, by_name[entity.values[relation.name]], following)
        for entity, relation in facts
        if relation.target
        for following in kinds[relation.target].relations
        # A town is in the region of its river: one hop would do.
        if (relation.name, following.name) != ("river", "region")
    ]
    for entity, relation, between, following in draws.sample(chains, bridges):
        phrase = draws.choice(relation.phrases).format(x=entity.subject)
        text = draws.choice(following.questions).format(x=phrase)
        name = f"bridge-{entity.id}-{relation.name}-{following.name}"
        yield _question(name, text, between.values[following.name], entity, between)
    yield from _comparisons(draws, members, comparisons)


def _question(name: str, text: str, answer: str, *support: Entity) -> Question:
    answers = (answer, *ALIASES.get(answer, ()))
    return Question(
        name, text, answers, name.partition("-")[0], tuple(entity.id for entity in support)
    )


def _comparisons(draws: Draws, members: tuple[Entity, ...], count: int) -> Iterator[Question]:
    """Yield questions about pairs of one kind whose years differ."""
    dated = {kind: [relation for relation in kind.relations if relation.first] for kind in KINDS}
    groups = {kind: [e for e in members if e.kind is kind] for kind in KINDS if dated[kind]}
    pool = [entity for group in groups.values() for entity in group]
    asked: set[str] = set()
    for _ in range(_ATTEMPTS * count):
        if len(asked) == count:
            break
        first = draws.choice(pool)
        relation, second = draws.choice(dated[first.kind]), draws.choice(groups[first.kind])
        low, high = sorted((first.id, second.id))
        name = f"comparison-{low}-{high}-{relation.name}"
        years = int(first.values[relation.name]), int(second.values[relation.name])
        wants_first = bool(draws.below(2))
        template = draws.choice(relation.first if wants_first else relation.last)
        if years[0] == years[1] or name in asked:
            continue
        asked.add(name)
        answer = first if (years[0] < years[1]) == wants_first else second
        text = template.format(x=first.subject, y=second.subject)
        yield _question(name, text, answer.name, first, second)
