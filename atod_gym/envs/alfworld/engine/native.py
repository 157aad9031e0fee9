"""The native engine: plays ALFWorld game files exactly as the official engine, only faster.

The official engine (textworld's PddlEnv behind alfworld's AlfredDemangler) parses the grammar at
each derivation and runs a planner's translator at each reset. Here the rules are compiled once per
process (`logic`), a game file fills indexes, and a step is a few loops over them.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atod_gym.envs.alfworld.engine import (
    NOTHING_HAPPENS,
    EngineState,
    read_game,
    read_walkthrough,
)
from atod_gym.envs.alfworld.engine.joins import TYPE_PREDICATE, change_slot, new_facts
from atod_gym.envs.alfworld.engine.logic import Commands, Goal, Logic, Program, State, compile_logic
from atod_gym.envs.alfworld.engine.pddl import Problem, check_facts, objects_of_type, parse_problem
from atod_gym.errors import AtodError, InvalidGameError, InvalidSettingError

_TASK_MARK = "@@task@@"
_TASK_RULE = re.compile(
    r'("task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*")([^"\\;|<>\[\]#{}\s][^"\\;|<>\[\]#{}\t]*)"'
)
_LOGICS_KEPT = 64
_logics: dict[tuple[str, str], Logic] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class NativeGame:
    """A compiled game; shared by all engines that play it, never changed by them."""

    program: Program
    goal: Goal
    constants: tuple[str, ...]
    names: dict[str, str]
    """Entity id to displayed name."""
    facts: State
    """The state at the start."""
    walkthrough: tuple[str, ...]
    start: EngineState
    places: dict[Any, tuple[Commands, list[str]]] = field(default_factory=dict)
    """Per place: the commands that depend on nothing else, and their sorted names."""

    def place(self, state: State) -> tuple[Commands, list[str]]:
        """Return the commands that depend on the agent's place alone, enumerated once per place."""
        key = state[self.program.place_slot].get(())
        found = self.places.get(key)
        if found is None:
            commands = self.program.place_commands(state, self.names)
            found = self.places[key] = (commands, sorted(commands))
        return found

    def admissible(self, state: State) -> tuple[Commands, Commands, tuple[str, ...]]:
        """Return operations by command (of the place, of the rest) and all commands sorted."""
        place, names = self.place(state)
        others = self.program.other_commands(state, self.names)
        if others.keys().isdisjoint(place):
            return place, others, tuple(sorted([*names, *others]))
        return place, others, tuple(sorted({*names, *others}))


def entity_names(entities: set[str]) -> dict[str, str]:
    """Return the name of each entity, as alfworld's Demangler gives it: noun and number.

    The noun is the part before the first `_bar_`, with `basin` appended to parts of a sink;
    numbers count down along the sorted ids of a noun.
    """
    nouns = {
        entity: entity.split("_bar_", 1)[0] + ("basin" if "basin" in entity else "")
        for entity in entities
        if "_bar_" in entity
    }
    left = Counter(nouns.values())
    names = {entity: f"{entity} " for entity in entities if entity not in nouns}
    for entity in sorted(nouns):
        noun = nouns[entity]
        names[entity] = f"{noun} {left[noun]}"
        left[noun] -= 1
    return names


def _logic_for(domain: str, grammar: str, problem: Problem) -> tuple[Logic, str]:
    """Return the compiled rules, shared by games that differ in the task sentence only."""
    match = _TASK_RULE.search(grammar)
    task = match.group(2) if match else ""
    if match and grammar.count(_TASK_MARK) == 0:
        grammar = f"{grammar[: match.start(2)]}{_TASK_MARK}{grammar[match.end(2) :]}"
    key = (domain, grammar)
    logic = _logics.get(key)
    if logic is None:
        if len(_logics) >= _LOGICS_KEPT:
            _logics.clear()
        logic = _logics[key] = compile_logic(domain, grammar, problem.facts)
    return logic, task


def compile_game(game: Mapping[str, Any]) -> NativeGame:
    """Compile a game file's content.

    Raises:
        InvalidGameError: a key is missing or a text is broken.
        UnsupportedGameError: the domain or grammar is beyond the native engine.
    """
    game = read_game(game)
    problem = parse_problem(game["pddl_problem"])
    with _lock:
        logic, task = _logic_for(game["pddl_domain"], game["grammar"], problem)
        goal, constants = logic.goal(problem.goal)
        program = logic.program()
        entities: set[str] = set()
        for facts in problem.facts.values():
            for fact in facts:
                entities.update(fact[1:])
        state = logic.index.build(_facts(problem, logic, entities))
    names = entity_names(entities)
    intro = program.intro(state, names).replace(_TASK_MARK, task)
    won = goal.won(state, constants)
    compiled = NativeGame(
        program, goal, constants, names, state, read_walkthrough(game), EngineState(intro, (), won)
    )
    start = EngineState(intro, compiled.admissible(state)[2], won)
    return replace(compiled, start=start)


def _facts(problem: Problem, logic: Logic, entities: set[str]) -> dict[str, list[list[str]]]:
    """Return the problem's facts, plus the objects of each type that some slot lists."""
    check_facts(logic.domain, problem.facts)
    listed_types = [name for name, _ in logic.index.slots if name.startswith(TYPE_PREDICATE)]
    if not listed_types:
        return problem.facts
    facts = dict(problem.facts)
    for name in listed_types:
        declared = objects_of_type(problem.objects, name.removeprefix(TYPE_PREDICATE))
        facts[name] = [[name, entity] for entity in declared if entity in entities]
    return facts


@functools.lru_cache(maxsize=256)
def _load_cached(path: str, modified: int, size: int) -> NativeGame:
    game = read_game(path)
    try:
        return compile_game(game)
    except AtodError as error:
        raise type(error)(f"{path} cannot be played: {error}") from error


def load_game(path: str | os.PathLike[str]) -> NativeGame:
    """Read and compile a game file; recent games are cached, since groups replay them.

    Raises:
        InvalidGameError: the file cannot be read as a game.
        UnsupportedGameError: its domain or grammar is beyond the native engine.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidGameError(f"{path} cannot be read ({error.strerror}).") from error
    return _load_cached(str(path), status.st_mtime_ns, status.st_size)


class NativeEngine:
    """Plays one game, given by the path or the content of its file; implements `GameEngine`."""

    def __init__(self, game: str | os.PathLike[str] | Mapping[str, Any]) -> None:
        self._game = compile_game(game) if isinstance(game, Mapping) else load_game(game)
        self.walkthrough = self._game.walkthrough
        self.start = self._game.start
        """The state that `reset` returns."""
        self.last = self.reset()
        """The last state that `reset` or `step` returned."""

    def reset(self) -> EngineState:
        """Restart the game."""
        game = self._game
        self._state = state = self._copied_facts()
        self._place = game.place(state)[0]
        self._others = game.program.other_commands(state, game.names)
        self.last = game.start
        return self.last

    def step(self, command: str) -> EngineState:
        """Execute a command; one that is not admissible gives `Nothing happens.`."""
        command = command.strip()
        operation = self._others.get(command) or self._place.get(command)
        last = self.last
        if operation is None:
            self.last = EngineState(NOTHING_HAPPENS, last.admissible_commands, last.won)
            return self.last
        game, program, state = self._game, self._game.program, self._state
        number, *arguments = operation
        program.apply[number](state, *arguments)
        feedback = program.feedback[number](state, game.names, *arguments)
        commands, won = last.admissible_commands, last.won
        changes = program.changes[number]
        if changes:
            self._place, self._others, commands = game.admissible(state)
            if not changes.isdisjoint(game.goal.predicates):
                won = game.goal.won(state, game.constants)
        self.last = EngineState(feedback, commands, won)
        return self.last

    def _copied_facts(self) -> State:
        state = self._game.facts[:]
        for fluent in self._game.program.fluents:
            state[fluent[0]] = state[fluent[0]].copy()
        return state

    def changes(self) -> tuple[list[list[str]], list[list[str]]]:
        """Return the facts `[predicate, argument, ..]` added and removed since the start."""
        added: list[list[str]] = []
        removed: list[list[str]] = []
        seen = set()
        for number, name, bound, arity in self._game.program.fluents:
            now, before = self._state[number], self._game.facts[number]
            if name not in seen and now != before:
                added += [[name, *entities] for entities in new_facts(now, before, bound, arity)]
                removed += [[name, *entities] for entities in new_facts(before, now, bound, arity)]
                seen.add(name)
        return added, removed

    def restore(
        self, added: Sequence[Sequence[str]], removed: Sequence[Sequence[str]], feedback: str
    ) -> EngineState:
        """Continue from the start of the game with these changes of its facts.

        Args:
            added: from `changes` of an engine of the same game.
            removed: from there, too.
            feedback: the last displayed text.

        Raises:
            InvalidSettingError: if a fact is not of this game; the state is then unchanged.
        """
        game, program = self._game, self._game.program
        state = self._copied_facts()
        for facts, add in ((removed, False), (added, True)):
            for fact in facts:
                is_known = program.arity.get(fact[0]) == len(fact) - 1
                if not is_known or any(entity not in game.names for entity in fact[1:]):
                    raise InvalidSettingError(f"The fact ({' '.join(fact)}) is not of this game.")
                for number, name, bound, arity in program.fluents:
                    if name == fact[0]:
                        change_slot(state[number], fact, bound, arity, add=add)
        self._state = state
        self._place, self._others, commands = game.admissible(state)
        self.last = EngineState(feedback, commands, game.goal.won(state, game.constants))
        return self.last

    def close(self) -> None:
        """Do nothing: there are no resources to free."""
