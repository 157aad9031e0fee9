"""Generate households: the tasks, and the house, objects and goal of each.

A task id `<size>-<split>-<index>-<task type>` determines house and problem through a hash and a bit
generator whose stream never changes: the same id is the same game on every machine.

Splits are disjoint by construction. train and valid_seen share houses, but a hash of (layout, task
type, target, destination, where the target starts) gives each such problem to one of them alone.
The layouts of valid_unseen occur in neither.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import Final, NamedTuple

from atod_gym.envs.alfworld.generated.draws import Draws
from atod_gym.envs.alfworld.generated.furniture import CLEANABLE, COOLABLE, HEATABLE, ROOMS, places
from atod_gym.errors import DataNotFoundError, TaskNotFoundError

GENERATOR_VERSION: Final = 1
"""Raise it when the game of any task id changes."""


class TaskKind(NamedTuple):
    """The properties of a task type."""

    sentences: tuple[str, str]
    """Goal sentences with places for the object `{o}` and the receptacle (or lamp) `{r}`."""
    rooms: tuple[str, ...]
    """Kinds of main rooms, as often as they are drawn."""
    verb: str = ""
    """Command that changes the object; empty where nothing is changed."""
    appliance: str = ""
    """Receptacle kind that it needs."""
    state: str = ""
    """Predicate that holds afterwards."""
    objects: frozenset[str] = frozenset()
    """Object kinds that can be changed so; empty: all."""


KINDS: Final[Mapping[str, TaskKind]] = {
    "pick_and_place_simple": TaskKind(("put a {o} in {r}.", "put some {o} on {r}."), tuple(ROOMS)),
    "look_at_obj_in_light": TaskKind(
        ("look at {o} under the {r}.", "examine the {o} with the {r}."),
        ("bedroom", "living room"),
    ),
    "pick_clean_then_place_in_recep": TaskKind(
        ("put a clean {o} in {r}.", "clean some {o} and put it in {r}."),
        ("kitchen", "kitchen", "bathroom"),
        *("clean", "sinkbasin", "isClean", CLEANABLE),
    ),
    "pick_heat_then_place_in_recep": TaskKind(
        ("put a hot {o} in {r}.", "heat some {o} and put it in {r}."),
        ("kitchen",),
        *("heat", "microwave", "isHot", HEATABLE),
    ),
    "pick_cool_then_place_in_recep": TaskKind(
        ("put a cool {o} in {r}.", "cool some {o} and put it in {r}."),
        ("kitchen",),
        *("cool", "fridge", "isCool", COOLABLE),
    ),
    "pick_two_obj_and_place": TaskKind(
        ("put two {o} in {r}.", "find two {o} and put them in {r}."), tuple(ROOMS)
    ),
}
"""The six goal types, named as in the official data."""

TASK_TYPES: Final = tuple(KINDS)

SPLIT_SIZES: Final[Mapping[str, int]] = {"train": 3000, "valid_seen": 200, "valid_unseen": 200}
"""Number of tasks of each split, for every house size."""

_COMPANIONS: Final = {
    "kitchen": ("living room",),
    "bedroom": ("bathroom", "living room"),
    "living room": ("bedroom", "kitchen"),
    "bathroom": ("bedroom",),
}
_TASK_ID: Final = re.compile(r"(\w+)-(\w+)-([0-9]{4})-(\w+)")
# Per house size and main room.
_SHARED_HOUSES: Final = 120
_UNSEEN_HOUSES: Final = 40
_MOST_COPIES: Final = 3


class _SizeRange(NamedTuple):
    receptacles: tuple[int, int]
    """Fewest and most."""
    things: tuple[int, int]


_SIZES: Final = {
    "tiny": _SizeRange((5, 7), (4, 7)),
    "small": _SizeRange((9, 12), (10, 15)),
    "medium": _SizeRange((15, 20), (20, 30)),
    "official": _SizeRange((25, 40), (30, 50)),
}
HOUSE_SIZES: Final = tuple(_SIZES)
"""House sizes, smallest first."""


class Entity(NamedTuple):
    """A receptacle or an object."""

    kind: str
    number: int
    """Counts within the kind, from 1."""

    @property
    def name(self) -> str:
        """Return the name that the player reads: `mug 2`."""
        return f"{self.kind} {self.number}"

    @property
    def id(self) -> str:
        """Return the name in the game file.

        The engines name the entities of a kind in falling order of their sorted ids, and append
        "basin" to the noun of an id that has it.
        """
        if self.kind.endswith("basin"):
            return f"{self.kind[:-5]}_bar_{99 - self.number}_bar_{self.kind}"
        return f"{self.kind}_bar_{99 - self.number}"


@dataclass(frozen=True, slots=True, eq=False)
class House:
    """A layout: rooms and their receptacles, without things."""

    key: str
    rooms: tuple[str, ...]
    receptacles: tuple[Entity, ...]
    layout: str
    """The receptacles' sorted names: equal for houses that look alike to a player."""

    def of_kind(self, kind: str) -> tuple[Entity, ...]:
        """Return the receptacles of a kind."""
        return tuple(receptacle for receptacle in self.receptacles if receptacle.kind == kind)


@dataclass(frozen=True, slots=True)
class Problem:
    """A house with things in it, and a goal that does not hold yet."""

    task_id: str
    task_type: str
    house: House
    target: str
    """Object kind."""
    destination: str
    """Receptacle kind; the kind of lamp for look_at_obj_in_light."""
    template: int
    """Index of the goal sentence, of two for each type."""
    things: tuple[tuple[Entity, Entity], ...]
    """Every object with the receptacle that holds it; the targets to use come first."""


def generated_task_ids(split: str, house_size: str) -> tuple[str, ...]:
    """Return all task ids of a split, sorted; the six types alternate.

    Raises:
        DataNotFoundError: For an unknown split.
    """
    if split not in SPLIT_SIZES:
        raise DataNotFoundError(
            f"Generated data has no split {split!r}; known: {', '.join(SPLIT_SIZES)}."
        )
    return tuple(
        f"{house_size}-{split}-{index:04d}-{TASK_TYPES[index % len(TASK_TYPES)]}"
        for index in range(SPLIT_SIZES[split])
    )


def read_task_id(task_id: str) -> tuple[str, str, str]:
    """Return house size, split and task type of a generated task.

    Raises:
        TaskNotFoundError: If there is no such task.
    """
    match = _TASK_ID.fullmatch(task_id)
    if match:
        size, split, index, task_type = match.groups()
        known = size in _SIZES and int(index) < SPLIT_SIZES.get(split, 0)
        if known and task_type == TASK_TYPES[int(index) % len(TASK_TYPES)]:
            return size, split, task_type
    raise TaskNotFoundError(
        f"Unknown generated task {task_id!r}. Ids look like 'tiny-train-0000-{TASK_TYPES[0]}'; "
        "generated_task_ids(split, house_size) lists them."
    )


@cache
def build_house(house_size: str, room: str, number: int) -> House:
    """Return the layout number `number` among houses of a size whose main room is `room`."""
    key = f"{house_size}/{room}/{number}"
    draws = Draws(f"{GENERATOR_VERSION}/{key}")
    size = draws.between(*_SIZES[house_size].receptacles)
    rooms: tuple[str, ...] = (room,)
    if size > (40 if room == "kitchen" else 20):
        rooms += (draws.choice(_COMPANIONS[room]),)
    kinds = [kind for each in rooms for kind in ROOMS[each].essentials]
    weights: Counter[str] = Counter()
    room_left: Counter[str] = Counter()
    for each in rooms:
        for kind, (weight, most) in ROOMS[each].furniture.items():
            weights[kind] += weight
            room_left[kind] += most
    while len(kinds) < size:
        kind = draws.weighted(weights)
        kinds.append(kind)
        room_left[kind] -= 1
        if not room_left[kind]:
            del weights[kind]
    numbers: Counter[str] = Counter()
    receptacles = []
    for kind in kinds:
        numbers[kind] += 1
        receptacles.append(Entity(kind, numbers[kind]))
    layout = ",".join(sorted(receptacle.name for receptacle in receptacles))
    return House(key, rooms, tuple(receptacles), layout)


@cache
def _unseen_houses(house_size: str, room: str) -> tuple[House, ...]:
    """Return the houses of valid_unseen: the first whose layouts train and valid_seen lack."""
    known = {build_house(house_size, room, number).layout for number in range(_SHARED_HOUSES)}
    later = (build_house(house_size, room, number) for number in count(_SHARED_HOUSES))
    return tuple(islice((house for house in later if house.layout not in known), _UNSEEN_HOUSES))


def _things_of(house: House) -> dict[str, int]:
    """Return the object kinds that a house may have -> weight; only those with a location in it."""
    present = {receptacle.kind for receptacle in house.receptacles}
    weights: Counter[str] = Counter()
    for room in house.rooms:
        for kind, weight in ROOMS[room].things.items():
            if not present.isdisjoint(places(kind)):
                weights[kind] += weight
    return dict(weights)


@cache
def _possible_goals(house: House, task_type: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return target kinds with their possible destinations in this house."""
    present = {receptacle.kind for receptacle in house.receptacles}
    kind = KINDS[task_type]
    goals = []
    for target in _things_of(house):
        if kind.objects and target not in kind.objects:
            continue
        accepting = [where for where in places(target) if where in present]
        if task_type == "look_at_obj_in_light":
            lamps = ("desklamp",) if house.rooms[0] == "bedroom" else ("desklamp", "floorlamp")
            destinations = [lamp for lamp in lamps if not present.isdisjoint(places(lamp))]
        else:
            # The target must be able to start somewhere else.
            destinations = [k for k in accepting if k != kind.appliance and len(accepting) > 1]
        if destinations:
            goals.append((target, tuple(destinations)))
    return tuple(goals)


def _place(draws: Draws, house: House, kind: str, excluded: str = "") -> Entity:
    """Return a receptacle for an object: first a kind, by the weights, then one of that kind."""
    present = {receptacle.kind for receptacle in house.receptacles} - {excluded}
    weights = {where: weight for where, weight in places(kind).items() if where in present}
    return draws.choice(house.of_kind(draws.weighted(weights)))


def _is_held_out(problem_key: str) -> bool:
    """Return whether a problem of the shared houses belongs to valid_seen; one in eight does."""
    return hashlib.sha256(problem_key.encode()).digest()[0] < 32


def build_problem(task_id: str) -> Problem:
    """Return house, things and goal of a task; takes well under a millisecond for small houses.

    Raises:
        TaskNotFoundError: If there is no such task.
    """
    size, split, task_type = read_task_id(task_id)
    draws = Draws(f"{GENERATOR_VERSION}/{task_id}")
    while True:
        room = draws.choice(KINDS[task_type].rooms)
        if split == "valid_unseen":
            house = draws.choice(_unseen_houses(size, room))
        else:
            house = build_house(size, room, draws.below(_SHARED_HOUSES))
        goals = _possible_goals(house, task_type)
        if not goals:
            continue
        target, destinations = draws.choice(goals)
        destination = draws.choice(destinations)
        # Only an object that gets cleaned, heated or cooled may start where it must end.
        start = _place(draws, house, target, "" if KINDS[task_type].appliance else destination)
        if split == "valid_unseen":
            break
        key = f"{house.layout}/{task_type}/{target}/{destination}/{start.name}"
        if _is_held_out(key) == (split == "valid_seen"):
            break
    things = _furnish(draws, house, size, task_type, target, destination, start)
    return Problem(task_id, task_type, house, target, destination, draws.below(2), things)


def _furnish(
    draws: Draws,
    house: House,
    size: str,
    task_type: str,
    target: str,
    destination: str,
    start: Entity,
) -> tuple[tuple[Entity, Entity], ...]:
    """Place the targets, a lamp and other things, such that the goal does not hold yet."""
    keep_out = "" if KINDS[task_type].appliance else destination
    placed = [(target, start)]
    if task_type == "pick_two_obj_and_place":
        if draws.below(6) == 0:
            placed.append((target, draws.choice(house.of_kind(destination))))
        else:
            placed.append((target, _place(draws, house, target, keep_out)))
    if task_type == "look_at_obj_in_light":
        placed.append((destination, _place(draws, house, destination)))
    elif "bedroom" in house.rooms and draws.below(2):
        placed.append(("desklamp", _place(draws, house, "desklamp")))
    if draws.below(3) == 0:
        placed.append((target, _place(draws, house, target, keep_out)))

    weights = _things_of(house)
    weights.pop(target)
    copies: Counter[str] = Counter()
    most = draws.between(*_SIZES[size].things)
    while len(placed) < most and weights:
        kind = draws.weighted(weights)
        placed.append((kind, _place(draws, house, kind)))
        copies[kind] += 1
        if copies[kind] == _MOST_COPIES:
            del weights[kind]

    # Numbers are given in random order, so that the target is not always the first of its kind.
    numbers: Counter[str] = Counter()
    named: dict[int, Entity] = {}
    for index in draws.shuffled(range(len(placed))):
        kind = placed[index][0]
        numbers[kind] += 1
        named[index] = Entity(kind, numbers[kind])
    return tuple((named[index], where) for index, (_, where) in enumerate(placed))
