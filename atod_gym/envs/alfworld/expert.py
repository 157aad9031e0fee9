"""A scripted expert for ALFWorld that acts on the observed texts alone, as an agent does.

It parses the goal sentence, keeps a map of the observed receptacles, and searches the most likely
ones per turn first. It relies on the texts, not on its own actions, so it recovers when other
actions were executed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from atod_gym.envs.alfworld.engine import NOTHING_HAPPENS
from atod_gym.envs.alfworld.generated.furniture import OPENABLE, places
from atod_gym.errors import UnsupportedGameError

_APPLIANCES: Final = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
_CHANGES: Final = {"clean": "clean", "hot": "heat", "cool": "cool"}

_LOOK = re.compile(r"(?:look at|examine) (?:the |a |some )?(\w+) (?:under|with) (?:the |a )?(\w+)")
_TWO = re.compile(r"(?:put|find) two (\w+) (?:and put them )?(?:in|on) (?:the |a )?(\w+)")
_CHANGE = re.compile(
    r"(clean|heat|cool) (?:some|a|the) (\w+) and put it (?:in|on) (?:the |a )?(\w+)"
)
_PUT_CHANGED = re.compile(r"put (?:a|some) (clean|hot|cool) (\w+) (?:in|on) (?:the |a )?(\w+)")
_PUT = re.compile(r"put (?:a|some) (\w+) (?:in|on) (?:the |a )?(\w+)")

_ITEM = re.compile(r"\ban? (\w+ \d+)")
_ROOM = re.compile(r"Looking quickly around you, you see ([^.]*)\.")
_ARRIVE = re.compile(r"You arrive at (\w+ \d+)\.")
_FACING = re.compile(r"You are facing the ([^.]*)\.")
_ON = re.compile(r"On the (\w+ \d+), you see ([^.]*)\.")
_OPEN = re.compile(r"The (\w+ \d+) is open\. In it, you see ([^.]*)\.")
_CLOSED = re.compile(r"(?:The (\w+ \d+) is closed|You close the (\w+ \d+))\.")
_TAKE = re.compile(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.")
_MOVE = re.compile(r"You (?:move|put) the (\w+ \d+) (?:to|in/on) the (\w+ \d+)\.")
_CHANGED = re.compile(r"You (clean|heat|cool) the (\w+ \d+) using the (\w+ \d+)\.")
_SWITCHED = re.compile(r"You turn on the (\w+ \d+)\.")
_CARRYING = re.compile(r"You are carrying: an? (\w+ \d+)")


@dataclass(frozen=True, slots=True)
class Goal:
    """The content of a goal sentence."""

    target: str
    """Kind of object, such as `mug`."""
    destination: str
    """Receptacle kind; empty if the target is to be looked at."""
    lamp: str = ""
    """Kind of lamp to look at the target with; empty for all other goals."""
    change: str = ""
    """clean, heat, cool or empty."""
    count: int = 1


def parse_goal(instruction: str) -> Goal:
    """Read a goal sentence of the official templates.

    Args:
        instruction: With or without `Your task is to:` before it.

    Raises:
        UnsupportedGameError: If the sentence follows none of the templates.
    """
    sentence = instruction.lower().split("your task is to:")[-1].strip()
    if match := _LOOK.match(sentence):
        return Goal(match[1], "", lamp=match[2])
    if match := _TWO.match(sentence):
        return Goal(match[1], match[2], count=2)
    if match := _CHANGE.match(sentence):
        return Goal(match[2], match[3], change=match[1])
    if match := _PUT_CHANGED.match(sentence):
        return Goal(match[2], match[3], change=_CHANGES[match[1]])
    if match := _PUT.match(sentence):
        return Goal(match[1], match[2])
    raise UnsupportedGameError(
        f"The scripted expert cannot read the goal {sentence!r}: it knows the sentences of the "
        "official templates, not free ones. Play this task with a model instead."
    )


def _kind(name: str) -> str:
    return name.split(" ", 1)[0]


def _number(name: str) -> int:
    return int(name.rsplit(" ", 1)[1])


@dataclass
class _Memory:
    """The state of the house according to the texts so far."""

    receptacles: list[str] = field(default_factory=list)
    here: set[str] = field(default_factory=set)
    """Receptacles within reach; several may stand at one location."""
    contents: dict[str, list[str]] = field(default_factory=dict)
    """Receptacle -> objects; only receptacles that were looked into."""
    closed: set[str] = field(default_factory=set)
    held: str = ""
    changed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """clean, heat or cool -> objects."""
    switched: set[str] = field(default_factory=set)

    def read(self, text: str) -> None:
        """Update the memory from a text of the environment."""
        if match := _ROOM.search(text):
            for name in _ITEM.findall(match[1]):
                self.meet(name)
        if match := _ARRIVE.search(text):
            self.here = {match[1]}
        if match := _FACING.search(text):
            self.here = set(re.findall(r"\w+ \d+", match[1]))
        for match in (*_ON.finditer(text), *_OPEN.finditer(text)):
            self.meet(match[1])
            self.contents[match[1]] = _ITEM.findall(match[2])
            self.closed.discard(match[1])
        if match := _CLOSED.search(text):
            name = match[1] or match[2]
            self.meet(name)
            self.closed.add(name)
        self._read_handling(text)

    def _read_handling(self, text: str) -> None:
        if match := _TAKE.search(text):
            self.held = match[1]
            if match[1] in self.contents.get(match[2], ()):
                self.contents[match[2]].remove(match[1])
        if match := _MOVE.search(text):
            self.held = ""
            self.contents.setdefault(match[2], []).append(match[1])
        if match := _CHANGED.search(text):
            self.changed[match[1]].add(match[2])
            opposite = {"heat": "cool", "cool": "heat"}.get(match[1])
            if opposite:
                self.changed[opposite].discard(match[2])
        if match := _SWITCHED.search(text):
            self.switched.add(match[1])
        if match := _CARRYING.search(text):
            self.held = match[1]
        elif "You are not carrying anything" in text:
            self.held = ""

    def meet(self, receptacle: str) -> None:
        """Record that a receptacle exists."""
        if receptacle not in self.receptacles:
            self.receptacles.append(receptacle)

    def find(self, kind: str) -> list[tuple[str, str]]:
        """Return known objects of a kind, as (object, receptacle)."""
        return [
            (thing, receptacle)
            for receptacle, things in self.contents.items()
            for thing in things
            if _kind(thing) == kind
        ]


class ScriptedExpert:
    """Plays one episode after another; call `reset` at the start of each."""

    def __init__(self) -> None:
        self._goal = Goal("", "")
        self._memory = _Memory()
        self._failed: set[tuple[str, frozenset[str], str]] = set()
        self._refused: set[tuple[str, str]] = set()

    def reset(self, instruction: str, text: str) -> None:
        """Start an episode.

        Args:
            instruction: The goal sentence.
            text: The observation's text after the reset.

        Raises:
            UnsupportedGameError: If the goal sentence follows none of the official templates.
        """
        self._goal = parse_goal(instruction)
        self._memory = _Memory()
        self._failed = set()
        self._refused = set()
        self._memory.read(text)

    def act(
        self, text: str, admissible_actions: Sequence[str] = (), last_action: str | None = None
    ) -> str:
        """Choose the next action.

        Args:
            text: The observation's text now.
            admissible_actions: The actions that are possible now; empty if unknown.
            last_action: The action executed since the last call, the expert's or another; None in
                the first turn.

        Returns:
            An action; one of the admissible ones if there are any.
        """
        memory = self._memory
        if last_action is not None:
            memory.read(text)
        possible = frozenset(admissible_actions)
        for action in admissible_actions:
            if action.startswith("go to "):
                memory.meet(action[len("go to ") :])
        self._orient(text, possible, last_action)
        for _ in range(2):
            for action in self._plan():
                if possible:
                    if action in possible:
                        return action
                elif (action, frozenset(memory.here), memory.held) not in self._failed:
                    return action
            # Every receptacle was searched: objects were moved by actions that were not seen.
            memory.contents.clear()
        return "look" if not possible or "look" in possible else sorted(possible)[0]

    def _orient(self, text: str, possible: frozenset[str], last_action: str | None) -> None:
        """Update the memory from the admissible actions, and from an action that failed."""
        memory = self._memory
        if text.strip() == NOTHING_HAPPENS and last_action:
            place = last_action.removeprefix("go to ")
            if place in memory.receptacles:
                # Only a receptacle at the agent's own location cannot be gone to.
                memory.here.add(place)
            self._failed.add((last_action, frozenset(memory.here), memory.held))
        if not possible:
            return
        memory.here = {name for name in memory.receptacles if f"examine {name}" in possible}
        for name in memory.here if memory.held else ():
            is_open = name in memory.contents and name not in memory.closed
            if is_open and possible.isdisjoint(_puts(memory.held, name)):
                self._refused.add((_kind(memory.held), _kind(name)))

    def _plan(self) -> Iterator[str]:
        """Yield the actions to consider now, best first."""
        goal, held = self._goal, self._memory.held
        if held and _kind(held) != goal.target:
            yield from self._drop(held)
        elif held and not goal.lamp:
            yield from self._deliver(held)
        elif held:
            yield from self._light()
        else:
            yield from self._fetch()
        yield from self._search()

    # Parts of the plan: each yields the next action first, and alternatives after it.

    def _reach(self, receptacle: str) -> Iterator[str]:
        """Go to a receptacle, then open it if it is closed."""
        memory = self._memory
        if receptacle not in memory.here:
            yield f"go to {receptacle}"
        elif receptacle in memory.closed:
            yield f"open {receptacle}"

    def _drop(self, held: str) -> Iterator[str]:
        """Put a wrong object down: here if possible, else when the hands are needed."""
        memory, kind = self._memory, _kind(held)
        weights = places(kind)
        for name in sorted(memory.here):
            if name not in memory.closed and (kind, _kind(name)) not in self._refused:
                yield from _puts(held, name)
        known = self._known_targets()
        if not known:
            return
        accepting = [
            name
            for name in memory.receptacles
            if _kind(name) in weights and (kind, _kind(name)) not in self._refused
        ]
        near = {receptacle for _, receptacle in known}
        for name in sorted(accepting, key=lambda n: (n not in near, self._cost(n), _number(n))):
            yield from self._reach(name)
            yield from _puts(held, name)

    def _cost(self, receptacle: str) -> int:
        """Return how many turns it takes until the content of a receptacle is within reach."""
        memory = self._memory
        may_be_closed = receptacle not in memory.contents and _kind(receptacle) in OPENABLE
        is_shut = receptacle in memory.closed or may_be_closed
        return (receptacle not in memory.here) + is_shut

    def _destinations(self) -> list[str]:
        """Return receptacles where the target may go, best first."""
        memory, goal = self._memory, self._goal
        names = [name for name in memory.receptacles if _kind(name) == goal.destination]

        def order(name: str) -> tuple[int, int, int]:
            # Two objects must end in one and the same receptacle.
            there = self._targets_in(name) if goal.count == 2 else 0
            return -there, self._cost(name), _number(name)

        return sorted(names, key=order)

    def _targets_in(self, receptacle: str) -> int:
        things = self._memory.contents.get(receptacle, ())
        return sum(_kind(thing) == self._goal.target for thing in things)

    def _deliver(self, held: str) -> Iterator[str]:
        """Clean, heat or cool the target if the goal asks for it, then deliver it."""
        change, memory = self._goal.change, self._memory
        if change and held not in memory.changed[change]:
            kind = _APPLIANCES[change]
            appliances = [name for name in memory.receptacles if _kind(name) == kind]
            for name in sorted(appliances, key=lambda n: (n not in memory.here, _number(n))):
                if name in memory.here:
                    yield f"{change} {held} with {name}"
                yield f"go to {name}"
            return
        for name in self._destinations():
            if (_kind(held), _kind(name)) in self._refused:
                continue
            yield from self._reach(name)
            if name in memory.here and name not in memory.closed:
                yield from _puts(held, name)

    def _light(self) -> Iterator[str]:
        """Carry the held target to a lamp and switch the lamp on."""
        memory = self._memory
        lamps = memory.find(self._goal.lamp)
        lamps.sort(key=lambda pair: (pair[0] in memory.switched, pair[1] not in memory.here))
        for lamp, receptacle in lamps:
            if receptacle in memory.here:
                yield f"use {lamp}"
            yield f"go to {receptacle}"

    def _known_targets(self) -> list[tuple[str, str]]:
        """Return objects that satisfy the goal, with their receptacles; the nearest first."""
        goal, memory = self._goal, self._memory
        settled: Collection[str] = ()
        if goal.count == 2:
            # Of two destinations with one target each, the one within reach gives its target up.
            names = [n for n in memory.receptacles if _kind(n) == goal.destination]
            settled = sorted(names, key=lambda n: (-self._targets_in(n), n in memory.here, n))[:1]
        elif not goal.change and not goal.lamp:
            settled = [n for n in memory.receptacles if _kind(n) == goal.destination]
        known = [pair for pair in memory.find(goal.target) if pair[1] not in settled]
        ready = memory.changed[goal.change]
        known.sort(key=lambda pair: (pair[0] not in ready, self._cost(pair[1])))
        return known

    def _fetch(self) -> Iterator[str]:
        """Take an object whose location is known."""
        memory = self._memory
        for thing, receptacle in self._known_targets():
            yield from self._reach(receptacle)
            if receptacle in memory.here and receptacle not in memory.closed:
                yield f"take {thing} from {receptacle}"

    def _search(self) -> Iterator[str]:
        """Open or examine receptacles not seen yet, the most likely per turn first."""
        memory, goal = self._memory, self._goal
        weights: dict[str, float] = {}
        needs_target = _kind(memory.held) != goal.target if memory.held else True
        if needs_target and not (goal.lamp and self._known_targets()):
            weights.update(places(goal.target))
        if goal.lamp and not memory.find(goal.lamp):
            for kind, weight in places(goal.lamp).items():
                share = 0.3 if needs_target else 1.0
                weights[kind] = weights.get(kind, 0.0) + share * weight
        counts = Counter(map(_kind, memory.receptacles))

        def promise(name: str) -> float:
            kind = _kind(name)
            return (weights.get(kind, 0.0) + 0.2) / counts[kind] / max(1, self._cost(name))

        unseen = [name for name in memory.receptacles if name not in memory.contents]
        for name in sorted(unseen, key=lambda n: (-promise(n), n)):
            yield from self._reach(name)
            if name in memory.here and name not in memory.closed:
                yield f"examine {name}"


def _puts(thing: str, receptacle: str) -> tuple[str, str]:
    """Return the command to put something down, as newer and as older games spell it."""
    return f"move {thing} to {receptacle}", f"put {thing} in/on {receptacle}"
