"""What a generated world says: kinds of entities, their relations, sentences and questions.

A passage takes one template of each of its kind's sentences; together they state every relation of
the kind. A question takes one template of its relation. In a bridge question a phrase of the first
relation (`the town where Marta Halden was born`) stands where the entity's name would stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Relation:
    """One thing that is said of every entity of a kind; it has exactly one value."""

    name: str
    questions: tuple[str, ...]
    """Templates with {x} for the entity."""
    phrases: tuple[str, ...] = ()
    """Templates with {x} that stand for the value where it is an entity."""
    target: str | None = None
    """Kind of the value where it is an entity."""
    first: tuple[str, ...] = ()
    """Questions with {x} and {y} for the entity with the smaller year; empty for other values."""
    last: tuple[str, ...] = ()
    """The same for the larger year."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of entities."""

    name: str
    share: float
    """Share of all entities."""
    relations: tuple[Relation, ...]
    sentences: tuple[tuple[str, ...], ...]
    """Templates with {name} and names of relations; people have {surname}, {She}, {she}, {her} and
    {whom} (her or him) too."""
    subject: str = "{name}"
    """How a question names the entity."""


_FOUNDED: Final = Relation(
    "founded",
    ("When was {x} founded?", "In what year was {x} founded?",
     "What is the founding year of {x}?"),
    first=("Which was founded first, {x} or {y}?", "Which is older, {x} or {y}?"),
    last=("Which was founded later, {x} or {y}?", "Which is younger, {x} or {y}?"),
)  # fmt: skip

PERSON: Final = Kind(
    "person",
    0.36,
    (
        Relation(
            "birthplace",
            ("Where was {x} born?", "In which town was {x} born?",
             "What is the birthplace of {x}?"),
            ("the town where {x} was born", "the birthplace of {x}"),
            "town",
        ),
        Relation(
            "birth_year",
            ("When was {x} born?", "In what year was {x} born?"),
            first=("Who was born first, {x} or {y}?", "Who was born earlier, {x} or {y}?"),
            last=("Who was born later, {x} or {y}?",),
        ),
        Relation(
            "deathplace",
            ("Where did {x} die?", "In which town did {x} die?"),
            ("the town where {x} died", "the place where {x} died"),
            "town",
        ),
        Relation(
            "death_year",
            ("When did {x} die?", "In what year did {x} die?"),
            first=("Who died first, {x} or {y}?", "Who died earlier, {x} or {y}?"),
            last=("Who died later, {x} or {y}?",),
        ),
        Relation(
            "profession",
            ("What was the profession of {x}?", "What did {x} do for a living?",
             "What was {x} by profession?"),
        ),
        Relation(
            "instrument",
            ("Which instrument did {x} play?", "What musical instrument was played by {x}?"),
        ),
    ),
    (
        (
            "{name} was a {profession} who was born in {birthplace} in {birth_year}.",
            "Born in {birthplace} in {birth_year}, {name} worked as a {profession}.",
            "{name} was born in {birth_year} in the town of {birthplace} and became a"
            " {profession}.",
        ),
        (
            "{She} died in {deathplace} in {death_year}.",
            "In later life {surname} moved to {deathplace}, where {she} died in {death_year}.",
            "{surname} spent {her} last years in {deathplace} and died there in {death_year}.",
        ),
        (
            "All {her} life {surname} played the {instrument}.",
            "Friends often heard {whom} play the {instrument} in the evening.",
            "At school {she} had learned to play the {instrument}.",
        ),
    ),
)  # fmt: skip

TOWN: Final = Kind(
    "town",
    0.18,
    (
        Relation(
            "region",
            ("In which region does {x} lie?", "In which region lies {x}?",
             "In which region is {x}?"),
        ),
        Relation(
            "river",
            ("On which river does {x} lie?", "Which river flows through {x}?"),
            ("the river on which {x} lies", "the river that flows through {x}"),
            "river",
        ),
        _FOUNDED,
        Relation(
            "charter",
            ("When did {x} receive its charter?",
             "In what year did {x} receive its town charter?"),
        ),
        Relation("craft", ("What is {x} known for?", "Which product is {x} known for?")),
    ),
    (
        (
            "{name} is a town in the {region} on the {river}.",
            "{name} is a small town on the {river} in the {region}.",
            "The town of {name} lies in the {region}, on the banks of the {river}.",
        ),
        (
            "It was founded in {founded} and received its town charter in {charter}.",
            "Settlers founded it in {founded}, and its town charter dates from {charter}.",
            "The town charter was granted in {charter}, but the town was founded in {founded}.",
        ),
        (
            "{name} is known for its {craft}.",
            "Visitors know the town for its {craft}.",
            "The market of {name} is best known for its {craft}.",
        ),
    ),
)  # fmt: skip

RIVER: Final = Kind(
    "river",
    0.10,
    (
        Relation(
            "region",
            ("Through which region does {x} flow?", "In which region is {x}?"),
        ),
        Relation("source", ("Where is the source of {x}?", "In which hills does {x} rise?")),
        Relation("mouth", ("Into which lake does {x} flow?", "Which lake does {x} flow into?")),
        Relation("fish", ("Which fish is {x} known for?", "What do anglers catch in {x}?")),
    ),
    (
        (
            "The {name} is a river in the {region}.",
            "The {name} is a river that flows through the {region}.",
            "The {name} is one of the rivers of the {region}.",
        ),
        (
            "It rises in the {source} and flows into {mouth}.",
            "From its source in the {source} it runs down to {mouth}.",
            "Its source lies in the {source}, and its waters end in {mouth}.",
        ),
        (
            "Anglers know the {name} for its {fish}.",
            "It is known among anglers for its {fish}.",
            "Many anglers come to catch {fish} there.",
        ),
    ),
    "the {name}",
)  # fmt: skip

COMPANY: Final = Kind(
    "company",
    0.16,
    (
        Relation("product", ("What does {x} make?", "What is made by {x}?")),
        Relation(
            "headquarters",
            ("Where is {x} headquartered?", "In which town is {x} headquartered?",
             "Where are the headquarters of {x}?"),
            ("the town where {x} is headquartered", "the town where {x} has its headquarters"),
            "town",
        ),
        Relation(
            "founder",
            ("Who founded {x}?", "Who was the founder of {x}?", "By whom was {x} founded?"),
            ("the founder of {x}", "the person who founded {x}"),
            "person",
        ),
        _FOUNDED,
        Relation(
            "factory",
            ("Where is the factory of {x}?", "In which town does {x} have a factory?"),
            ("the town where {x} has a factory",),
            "town",
        ),
    ),
    (
        (
            "{name} is a maker of {product} with headquarters in {headquarters}.",
            "{name} makes {product} and is headquartered in {headquarters}.",
            "{name} is a company based in {headquarters} that makes {product}.",
        ),
        (
            "It was founded in {founded} by {founder}.",
            "{founder} founded the company in {founded}.",
            "The company was established by {founder} in {founded}.",
        ),
        (
            "Most of its goods come from a factory in {factory}.",
            "The only factory of {name} stands in {factory}.",
            "It also runs a factory in the town of {factory}.",
        ),
    ),
)  # fmt: skip

BOOK: Final = Kind(
    "book",
    0.20,
    (
        Relation("genre", ("What kind of novel is {x}?", "To which genre does {x} belong?")),
        Relation(
            "author",
            ("Who wrote {x}?", "Who is the author of {x}?", "By whom was {x} written?"),
            ("the author of {x}", "the person who wrote {x}"),
            "person",
        ),
        Relation(
            "published",
            ("When was {x} published?", "In what year was {x} published?"),
            first=("Which was published first, {x} or {y}?",
                   "Which was published earlier, {x} or {y}?"),
            last=("Which was published later, {x} or {y}?",),
        ),
        Relation(
            "setting",
            ("Where is {x} set?", "In which town is {x} set?"),
            ("the town in which {x} is set", "the setting of {x}"),
            "town",
        ),
        Relation(
            "illustrator",
            ("Who illustrated {x}?", "Who drew the pictures for {x}?"),
            ("the illustrator of {x}", "the person who illustrated {x}"),
            "person",
        ),
    ),
    (
        (
            "{name} is a {genre} novel by {author}, first published in {published}.",
            "{name} is a {genre} novel that was written by {author} and published in"
            " {published}.",
            "Published in {published}, {name} is a {genre} novel written by {author}.",
        ),
        (
            "The story is set in {setting}.",
            "It is set in the town of {setting}.",
            "Its events take place in {setting}.",
        ),
        (
            "The first edition was illustrated by {illustrator}.",
            "{illustrator} drew the pictures for {name}.",
            "The book contains drawings by {illustrator}.",
        ),
    ),
)  # fmt: skip

KINDS: Final = (PERSON, TOWN, RIVER, COMPANY, BOOK)
