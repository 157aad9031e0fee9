"""Generate ALFWorld games: a task id becomes an ordinary game file.

Games are mappings with the keys of the official files (pddl_domain, grammar, pddl_problem,
solvable, walkthrough), so the native and the official engine play them alike. Domain and grammar
are this package's own texts; their sentences are those of the official games, so an agent can play
both. Every game is solvable by construction: its walkthrough, made with full
knowledge, wins on its last command.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from atod_gym.envs.alfworld.generated.furniture import (
    CLEANABLE,
    COOLABLE,
    HEATABLE,
    LAMPS,
    OPENABLE,
    SLICEABLE,
    VESSELS,
    places,
)
from atod_gym.envs.alfworld.generated.houses import KINDS, Entity, Problem, build_problem

_ATTRIBUTES: Final = (
    ("cleanable", CLEANABLE),
    ("heatable", HEATABLE),
    ("coolable", COOLABLE),
    ("sliceable", SLICEABLE),
    ("isReceptacleObject", VESSELS),
)
_NAMED_BY_DOMAIN: Final = {
    "rtype": ("sinkbasin", "microwave", "fridge"),
    "otype": ("knife", "butterknife"),
}


def generate_game(task_id: str) -> dict[str, object]:
    """Return the game of a task, with the keys and types of an official game file.

    Raises:
        TaskNotFoundError: If there is no such task.
    """
    problem = build_problem(task_id)
    sentence = KINDS[problem.task_type].sentences[problem.template]
    task = sentence.format(o=problem.target, r=problem.destination)
    return {
        "pddl_domain": _text("domain.pddl"),
        "grammar": _text("grammar.twl2").replace("@TASK@", task),
        "pddl_problem": _pddl(problem),
        "solvable": True,
        "walkthrough": _walkthrough(problem),
    }


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _pddl(problem: Problem) -> str:
    """Return the problem as PDDL: objects, initial facts, goal."""
    receptacles = problem.house.receptacles
    locations = {receptacle: f"loc_bar_{i}" for i, receptacle in enumerate(receptacles, start=1)}
    rtypes = sorted({*_NAMED_BY_DOMAIN["rtype"], *(r.kind for r in receptacles)})
    otypes = sorted({*_NAMED_BY_DOMAIN["otype"], *(o.kind for o, _ in problem.things)})

    objects = ["agent1 - agent", "loc_bar_0 - location"]
    objects += [f"{kind}Type - rtype" for kind in rtypes]
    objects += [f"{kind}Type - otype" for kind in otypes]
    facts = ["(atLocation agent1 loc_bar_0)"]
    for receptacle, location in locations.items():
        objects += [f"{location} - location", f"{receptacle.id} - receptacle"]
        facts.append(f"(receptacleType {receptacle.id} {receptacle.kind}Type)")
        facts.append(f"(receptacleAtLocation {receptacle.id} {location})")
        if receptacle.kind in OPENABLE:
            facts.append(f"(openable {receptacle.id})")
    for kind in otypes:
        facts += [f"(canContain {r}Type {kind}Type)" for r in places(kind) if r in rtypes]
    for thing, receptacle in problem.things:
        objects.append(f"{thing.id} - object")
        facts.append(f"(objectType {thing.id} {thing.kind}Type)")
        facts.append(f"(inReceptacle {thing.id} {receptacle.id})")
        facts.append(f"(objectAtLocation {thing.id} {locations[receptacle]})")
        facts.append(f"({'toggleable' if thing.kind in LAMPS else 'pickupable'} {thing.id})")
        facts += [f"({name} {thing.id})" for name, kinds in _ATTRIBUTES if thing.kind in kinds]

    indented = "\n    "
    return (
        f"(define (problem {problem.task_id})\n  (:domain alfred)\n"
        f"  (:objects\n    {indented.join(objects)})\n"
        f"  (:init\n    {indented.join(facts)})\n"
        f"  (:goal\n    {_goal(problem)}))\n"
    )


def _goal(problem: Problem) -> str:
    """Return the goal as PDDL."""
    target, destination = f"{problem.target}Type", f"{problem.destination}Type"
    if problem.task_type == "look_at_obj_in_light":
        return (
            "(and\n"
            "      (exists (?lamp - object ?r - receptacle ?a - agent ?l - location) (and\n"
            f"        (objectType ?lamp {destination}) (toggleable ?lamp) (isToggled ?lamp)\n"
            "        (inReceptacle ?lamp ?r) (receptacleAtLocation ?r ?l) (atLocation ?a ?l)))\n"
            "      (exists (?o - object ?a - agent) (and\n"
            f"        (objectType ?o {target}) (holds ?a ?o))))"
        )
    if problem.task_type == "pick_two_obj_and_place":
        return (
            f"(exists (?r - receptacle) (and (receptacleType ?r {destination})\n"
            f"      (exists (?o1 - object) (and (objectType ?o1 {target}) (inReceptacle ?o1 ?r)\n"
            "        (exists (?o2 - object) (and\n"
            f"          (not (= ?o1 ?o2)) (objectType ?o2 {target}) (inReceptacle ?o2 ?r)))))))"
        )
    state = KINDS[problem.task_type].state
    changed = f" ({state} ?o)" if state else ""
    return (
        "(exists (?r - receptacle ?o - object) (and\n"
        f"      (objectType ?o {target}) (receptacleType ?r {destination})"
        f" (inReceptacle ?o ?r){changed}))"
    )


class _Walk:
    """Commands of the walkthrough, written with full knowledge of the house."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self._position: Entity | None = None
        self.opened: set[Entity] = set()

    def reach(self, receptacle: Entity, *, inside: bool) -> None:
        """Go to a receptacle; `inside`: opens it if it is closed."""
        if self._position != receptacle:
            self.commands.append(f"go to {receptacle.name}")
            self._position = receptacle
        if inside and receptacle.kind in OPENABLE and receptacle not in self.opened:
            self.commands.append(f"open {receptacle.name}")
            self.opened.add(receptacle)

    def take(self, thing: Entity, receptacle: Entity) -> None:
        """Go to an object and take it."""
        self.reach(receptacle, inside=True)
        self.commands.append(f"take {thing.name} from {receptacle.name}")

    def move(self, thing: Entity, receptacle: Entity) -> None:
        """Bring the held object to a receptacle."""
        self.reach(receptacle, inside=True)
        self.commands.append(f"move {thing.name} to {receptacle.name}")


def _walkthrough(problem: Problem) -> list[str]:
    """Return commands that win exactly on the last one."""
    walk = _Walk()
    (thing, start), *rest = problem.things
    if problem.task_type == "look_at_obj_in_light":
        lamp, where = next(pair for pair in rest if pair[0].kind == problem.destination)
        walk.take(thing, start)
        walk.reach(where, inside=False)
        walk.commands.append(f"use {lamp.name}")
        return walk.commands

    destinations = problem.house.of_kind(problem.destination)
    destination = destinations[0]
    if problem.task_type == "pick_two_obj_and_place":
        second, second_start = rest[0]
        if second_start in destinations:
            destination = second_start
        else:
            walk.take(second, second_start)
            walk.move(second, destination)
    walk.take(thing, start)
    kind = KINDS[problem.task_type]
    if kind.appliance:
        appliances = problem.house.of_kind(kind.appliance)
        appliance = start if start in appliances else appliances[0]
        walk.reach(appliance, inside=False)
        walk.commands.append(f"{kind.verb} {thing.name} with {appliance.name}")
        if start in destinations:
            destination = start
    walk.move(thing, destination)
    return walk.commands
