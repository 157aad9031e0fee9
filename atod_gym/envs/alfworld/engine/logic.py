"""Compile a game's rules (PDDL domain and TWL2 grammar) into Python functions.

All official games share their rules except one sentence. Rules are therefore compiled once per
process, and a game only fills indexes. The compiled functions take `S`, the state (a list of slots,
see `joins`), and `N`, the entity names. Commands that depend on one fluent predicate alone (the
agent's location) are enumerated once per location and game; the others on every step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from atod_gym.envs.alfworld.engine.grammar import (
    Scope,
    TextGrammar,
    TextWriter,
    enumerate_items,
    parse_grammar,
    parse_query,
    parse_symbols,
)
from atod_gym.envs.alfworld.engine.joins import (
    Conjunction,
    FactIndex,
    Loops,
    Slot,
    conjunctions,
    insert,
    local_name,
    remove,
    tuple_source,
)
from atod_gym.envs.alfworld.engine.pddl import (
    ActionSchema,
    Atom,
    Condition,
    Domain,
    Junction,
    check_atom,
    check_facts,
    literals_of,
    parse_condition,
    parse_domain,
    parse_expression,
    unsupported,
)
from atod_gym.errors import InvalidGameError

State = list[Slot]
Names = Mapping[str, str]
Operation = tuple[Any, ...]
"""Number of the action schema, then its arguments."""
Commands = dict[str, Operation]


class Fluent(NamedTuple):
    """A slot that commands can change."""

    number: int
    predicate: str
    bound: tuple[int, ...]
    arity: int


@dataclass(frozen=True, slots=True)
class Program:
    """The functions compiled for one layout of the state."""

    slots: int
    fluents: tuple[Fluent, ...]
    arity: Mapping[str, int]
    """Of every predicate."""
    place_slot: int
    """Slot of the fluent that `place_commands` depends on: all its facts under the key ()."""
    place_commands: Callable[[State, Names], Commands]
    other_commands: Callable[[State, Names], Commands]
    apply: tuple[Callable[..., None], ...]
    feedback: tuple[Callable[..., str], ...]
    changes: tuple[frozenset[str], ...]
    """Per action schema: the predicates it changes that something reads."""
    intro: Callable[[State, Names], str]


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal's shape: constants are parameters `C`, so that many games share one function."""

    won: Callable[[State, Sequence[str]], bool]
    predicates: frozenset[str]


@dataclass(slots=True)
class Logic:
    """The rules of a game, compiled; grows when a goal of a new shape needs more slots."""

    domain: Domain
    grammar: TextGrammar
    index: FactIndex
    _goals: dict[tuple[str, ...], Goal] = field(default_factory=dict)
    _program: Program | None = None

    def goal(self, text: str) -> tuple[Goal, tuple[str, ...]]:
        """Return the compiled goal and the constants to call it with."""
        tokens = re.findall(r"[()]|[^\s()]+", text)
        expression = parse_expression(text)
        if len(expression) != 2:
            raise InvalidGameError(f"the goal has {len(expression) - 1} conditions, not one.")
        try:
            condition = parse_condition(expression[1])
        except (IndexError, TypeError, AttributeError) as error:
            raise InvalidGameError(f"the goal cannot be read ({error!r}).") from error
        literals = list(literals_of(condition))
        terms = [term for x in literals for term in x.atom.terms if not term.startswith("?")]
        constants = tuple(dict.fromkeys(terms))
        reserved = {"and", "or", "not", "exists", "=", *self.domain.predicates, *self.domain.types}
        names = {c: f"C[{i}]" for i, c in enumerate(constants) if c not in reserved}
        shape = tuple(names.get(token, token) for token in tokens)
        if shape not in self._goals:
            for literal in literals:
                check_atom(self.domain, literal.atom, "the goal")
            writer = _TruthWriter(self.index, self.domain, names)
            expr = writer.truth(condition)
            source = "\n".join([*writer.functions, f"def won(S, C):\n    return {expr}\n"])
            predicates = frozenset(x.atom.predicate for x in literals)
            self._goals[shape] = Goal(_execute(source)["won"], predicates)
        return self._goals[shape], constants

    def program(self) -> Program:
        """Return the functions for the slots known so far."""
        writer = _ProgramWriter(self.domain, self.grammar, self.index)
        if self._program is None:
            self._program = writer.program()
        elif self._program.slots != len(self.index.slots):
            self._program = replace(self._program, **writer.changes())
        return self._program


def compile_logic(
    domain_text: str, grammar_text: str, sample: Mapping[str, Sequence[Sequence[str]]]
) -> Logic:
    """Compile the rules of a game; `sample` (facts of one game) only guides loop order.

    Raises:
        InvalidGameError: a text is malformed.
        UnsupportedGameError: a text uses a construct that the native engine does not support.
    """
    domain = parse_domain(domain_text)
    check_facts(domain, sample)
    arity = {name: len(kinds) for name, kinds in domain.predicates.items()}
    return Logic(domain, parse_grammar(grammar_text), FactIndex(arity, sample))


def _execute(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {
        "InvalidGameError": InvalidGameError,
        "enumerate_items": enumerate_items,
        "insert": insert,
        "remove": remove,
    }
    exec(compile(source, "<game logic>", "exec"), namespace)
    return namespace


class _TruthWriter:
    """Writes functions that return whether a closed condition holds."""

    def __init__(self, index: FactIndex, domain: Domain, names: Mapping[str, str]) -> None:
        self._index, self._domain, self._names = index, domain, names
        self.functions: list[str] = []

    def truth(self, condition: Condition) -> str:
        """Return source of the condition's truth value."""
        if isinstance(condition, Junction):
            parts = [self.truth(part) for part in condition.parts]
            return "(" + (f" {condition.kind} ".join(parts) or "True") + ")"
        calls = []
        for conjunction in conjunctions(condition, {}):
            loops = Loops(self._index, self._domain, self._names)
            if loops.solve(conjunction, {}) is not None:
                loops.write("return True")
                name = f"g{len(self.functions)}"
                self.functions.append(loops.function(f"{name}(S, C)", "return False"))
                calls.append(f"{name}(S, C)")
        return "(" + (" or ".join(calls) or "False") + ")"


@dataclass(slots=True)
class _Way:
    """One alternative of an action's precondition, with its command."""

    number: int
    action: ActionSchema
    conjunction: Conjunction
    command: str
    depends: set[str]


class _ProgramWriter:
    """Writes the functions of a `Program`."""

    def __init__(self, domain: Domain, grammar: TextGrammar, index: FactIndex) -> None:
        self._domain, self._grammar, self._index = domain, grammar, index
        self._fluents = domain.fluents()
        self._text = TextWriter(grammar, domain, index)

    def program(self) -> Program:
        """Compile everything; the state-changing functions last, when all slots are known."""
        ways = [
            way for i, action in enumerate(self._domain.actions) for way in self._ways(i, action)
        ]
        alone = Counter(next(iter(way.depends)) for way in ways if len(way.depends) == 1)
        if not alone:
            raise unsupported("a game in which no command depends on one changing fact alone")
        place = alone.most_common(1)[0][0]
        place_slot = self._index.slot(place, ())
        sources = [
            self._commands("place_commands", [w for w in ways if w.depends <= {place}]),
            self._commands("other_commands", [w for w in ways if not w.depends <= {place}]),
        ]
        for number, action in enumerate(self._domain.actions):
            sources.append(self._feedback(number, action))
        intro = self._text.text("#intro#", {})
        sources.append(f"def intro(S, N):\n    return {intro}\n")
        self._check_queries()
        namespace = _execute("\n".join([*self._text.functions, *sources]))
        count = range(len(self._domain.actions))
        return Program(
            place_slot=place_slot,
            place_commands=namespace["place_commands"],
            other_commands=namespace["other_commands"],
            feedback=tuple(namespace[f"feedback_{i}"] for i in count),
            intro=namespace["intro"],
            **self.changes(),
        )

    def changes(self) -> dict[str, Any]:
        """Return the fields of a `Program` that depend on the slots."""
        count = -1
        while count != len(self._index.slots):  # the condition of an effect may need a slot
            count = len(self._index.slots)
            sources = [self._apply(i, action) for i, action in enumerate(self._domain.actions)]
        namespace = _execute("\n".join(sources))
        fluents = tuple(
            Fluent(number, predicate, bound, self._index.arity[predicate])
            for (predicate, bound), number in self._index.slots.items()
            if predicate.removeprefix("not_") in self._fluents
        )
        return {
            "slots": count,
            "fluents": fluents,
            "arity": self._index.arity,
            "apply": tuple(namespace[f"apply_{i}"] for i in range(len(self._domain.actions))),
            "changes": tuple(self._changes(action) for action in self._domain.actions),
        }

    # -- commands --------------------------------------------------------------------------------

    def _ways(self, number: int, action: ActionSchema) -> list[_Way]:
        text = self._grammar.actions.get(action.name)
        if text is None:
            raise InvalidGameError(f"the grammar has no text for the action {action.name}.")
        scope = _scope(action)
        ways = []
        for conjunction in conjunctions(action.precondition, dict(action.parameters)):
            facts = {literal.atom for literal in conjunction.literals if literal.positive}
            template = self._plain_template(text.template, scope, facts)
            depends = {
                literal.atom.predicate
                for literal in (
                    *conjunction.literals,
                    *(x for junction in conjunction.disjunctions for x in literals_of(junction)),
                )
            }
            for symbol in parse_symbols(template):
                if symbol.kind == "rule" or symbol.text.startswith("#"):
                    depends |= self._fluents  # the queries inside the rule are not followed
                if symbol.query:
                    depends |= {name.removeprefix("not_") for name, _ in parse_query(symbol.query)}
            command = self._text.text(template, scope)
            ways.append(_Way(number, action, conjunction, command, depends & self._fluents))
        return ways

    def _plain_template(self, template: str, scope: Scope, facts: set[Atom]) -> str:
        """Return the template with `{x}` for `[{x | query}]` where the query always holds."""
        for symbol in parse_symbols(template):
            if symbol.query and self._text.holds_always(symbol.query, scope, facts):
                pattern = re.escape("{" + symbol.text) + r"\s*\|[^}]*\}"
                pattern = rf"\[{pattern}\]" if symbol.kind == "list" else pattern
                template = re.sub(pattern, "{" + symbol.text + "}", template)
        return template

    def _commands(self, name: str, ways: Sequence[_Way]) -> str:
        loops = Loops(self._index, self._domain)
        loops.write("D = {}")
        for way in ways:
            loops.indent = 1
            found = loops.solve(way.conjunction, {})
            if found is None:
                continue
            useless = _no_change(way.action, way.conjunction, found)
            if useless:
                loops.write(f"if not ({useless}):")
                loops.indent += 1
            arguments = [found[name] for name, _ in way.action.parameters]
            loops.write(f"D[{way.command}] = ({', '.join([str(way.number), *arguments])},)")
        return loops.function(f"{name}(S, N)", "return D")

    def _feedback(self, number: int, action: ActionSchema) -> str:
        scope = _scope(action)
        text = self._text.text(self._grammar.actions[action.name].feedback, scope)
        return f"def feedback_{number}({self._text.argument_list(scope)}):\n    return {text}\n"

    # -- changes ---------------------------------------------------------------------------------

    def _slots_of(self, predicate: str) -> list[tuple[int, tuple[int, ...]]]:
        return [(n, bound) for (name, bound), n in self._index.slots.items() if name == predicate]

    def _changes(self, action: ActionSchema) -> frozenset[str]:
        names = {effect.literal.atom.predicate for effect in action.effects}
        return frozenset(n for n in names if self._slots_of(n) or self._slots_of(f"not_{n}"))

    def _apply(self, number: int, action: ActionSchema) -> str:
        """Write the effects: conditions read the old state; deletions precede additions."""
        scope = {name: local_name(name[1:]) for name, _ in action.parameters}
        loops = Loops(self._index, self._domain)
        effects = [(f"c{i}", effect) for i, effect in enumerate(action.effects)]
        for name, effect in effects:
            if effect.conditions:
                loops.write(
                    f"{name} = {loops.condition(Junction('and', effect.conditions), scope)}"
                )
        for positive in (False, True):
            for name, effect in effects:
                if effect.literal.positive != positive:
                    continue
                loops.indent = 1
                if effect.conditions:
                    loops.write(f"if {name}:")
                    loops.indent = 2
                atom = effect.literal.atom
                terms = [loops.term(term, scope) for term in atom.terms]
                lines = [
                    *self._update(atom.predicate, terms, positive),
                    *self._update(f"not_{atom.predicate}", terms, not positive),
                ]
                for line in lines or ["pass"]:
                    loops.write(line)
        return loops.function(f"apply_{number}({', '.join(['S', *scope.values()])})", "return")

    def _update(self, predicate: str, terms: Sequence[str], add: bool) -> list[str]:
        lines = []
        for number, bound in self._slots_of(predicate):
            key = tuple_source([terms[i] for i in bound]) if bound else "()"
            if len(bound) == len(terms):
                lines.append(f"S[{number}].{'add' if add else 'discard'}({key})")
            else:
                value = tuple_source([terms[i] for i in range(len(terms)) if i not in bound])
                lines.append(f"{'insert' if add else 'remove'}(S[{number}], {key}, {value})")
        return lines

    def _check_queries(self) -> None:
        """Refuse grammar queries whose official answer depends on Fast Downward's grounding.

        TextWorld keeps facts for queries apart from the planner's state: it writes all effects of
        an action there, whatever their conditions. A deleted fact leaves an explicit negation only
        if the planner finds that the fact could ever hold.
        """
        for action in self._domain.actions:
            kinds = dict(action.parameters)
            ways = conjunctions(action.precondition, kinds)
            required = set.intersection(
                *({x.atom for x in way.literals if x.positive} for way in ways)
            )
            for effect in action.effects:
                atom = effect.literal.atom
                if atom.predicate not in self._text.read:
                    continue
                declared = self._domain.predicates[atom.predicate]
                if effect.conditions or declared != tuple(kinds.get(t, "") for t in atom.terms):
                    raise unsupported(
                        f"a grammar query about {atom.predicate}, which {action.name} changes"
                    )
                deleted = not effect.literal.positive
                if deleted and atom.predicate in self._text.negated and atom not in required:
                    raise unsupported(
                        f"a grammar query about not_{atom.predicate}, which {action.name} may "
                        "delete where it does not hold"
                    )


def _scope(action: ActionSchema) -> Scope:
    scope = {name[1:]: kind for name, kind in action.parameters}
    if not all(name.isidentifier() for name in scope):
        raise unsupported(f"a parameter name of the action {action.name}")
    return scope


def _no_change(action: ActionSchema, conjunction: Conjunction, found: Mapping[str, str]) -> str:
    """Return source of whether all effects hold already; empty if they never do.

    Fast Downward drops a grounded action that changes nothing: `go to` where the agent is.
    """

    def same(a: Atom, b: Atom) -> str | None:
        if a.predicate != b.predicate:
            return None
        pairs = [(x, y) for x, y in zip(a.terms, b.terms, strict=True) if x != y]
        if any(not (x.startswith("?") and y.startswith("?")) for x, y in pairs):
            return None
        return " and ".join(f"{found[x]} == {found[y]}" for x, y in pairs) or "True"

    added = [e.literal.atom for e in action.effects if e.literal.positive and not e.conditions]
    every = []
    for effect in action.effects:
        atom, positive = effect.literal.atom, effect.literal.positive
        known = [x.atom for x in conjunction.literals if x.positive == positive]
        if not positive:
            known += added
        cases = [case for case in (same(atom, other) for other in known) if case]
        if effect.conditions or not cases:
            return ""
        every.append("(" + " or ".join(cases) + ")")
    return " and ".join(every)
