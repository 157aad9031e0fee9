"""Compile conditions over facts into Python loops over indexes: the native engine's queries.

A state is a list of *slots*. A slot is one index of one predicate: for the positions `bound` it
maps their values to the sorted values of the other positions (or, with every position bound, it is
the set of facts). `FactIndex` decides which slots a program needs and builds them from facts;
`Loops` writes the nested loops that enumerate the solutions of a conjunction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from atod_gym.envs.alfworld.engine.pddl import (
    Atom,
    Condition,
    Domain,
    Exists,
    Junction,
    Literal,
    literals_of,
    unsupported,
)

Slot = Any
"""A set of facts, or a dict from bound values to a sorted tuple of the free ones."""

TYPE_PREDICATE = "type:"
"""Prefix of the pseudo-predicates that list the objects of a type."""


@dataclass(slots=True)
class FactIndex:
    """The slots of a program; slots are only ever added."""

    arity: dict[str, int]
    sample: Mapping[str, Sequence[Sequence[str]]]
    """Facts of one game, to estimate how many solutions a literal has; affects speed only."""
    slots: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def slot(self, predicate: str, bound: tuple[int, ...]) -> int:
        """Return number of the slot for this predicate and these bound positions."""
        return self.slots.setdefault((predicate, bound), len(self.slots))

    def fan_out(self, predicate: str, bound: tuple[int, ...]) -> float:
        """Return how many facts match once the bound positions have values, in the sample."""
        facts = self.sample.get(predicate, ())
        keys = {tuple(fact[i + 1] for i in bound) for fact in facts}
        return len(facts) / max(1, len(keys))

    def build(self, facts: Mapping[str, Sequence[Sequence[str]]]) -> list[Slot]:
        """Return all slots filled with these facts, each `[predicate, argument, ..]`."""
        return [
            _build_slot(facts.get(predicate, ()), bound, self.arity[predicate])
            for predicate, bound in self.slots
        ]


def _build_slot(facts: Iterable[Sequence[str]], bound: tuple[int, ...], arity: int) -> Slot:
    if len(bound) == arity:
        if arity == 1:
            return {fact[1] for fact in facts}
        return {tuple(fact[1:]) for fact in facts}
    free = [i for i in range(arity) if i not in bound]
    index: dict[Any, Any] = defaultdict(list)
    key_of, value_of = _picker(bound), _picker(free)
    for fact in facts:
        index[key_of(fact)].append(value_of(fact))
    return {key: tuple(sorted(values)) for key, values in index.items()}


def new_facts(slot: Slot, base: Slot, bound: tuple[int, ...], arity: int) -> list[tuple[str, ...]]:
    """Return the arguments of the facts that are in `slot` and not in `base`, sorted."""
    if len(bound) == arity:
        return sorted(map(_as_tuple, slot - base))
    order = [*bound, *(i for i in range(arity) if i not in bound)]
    found = []
    for key, values in slot.items():
        before = base.get(key, ())
        if values is not before:  # tuples are shared until they change
            for value in values:
                if value not in before:
                    placed = zip(order, (*_as_tuple(key), *_as_tuple(value)), strict=True)
                    found.append(tuple(entity for _, entity in sorted(placed)))
    return sorted(found)


def change_slot(
    slot: Slot, fact: Sequence[str], bound: tuple[int, ...], arity: int, *, add: bool
) -> None:
    """Add or remove a fact `[predicate, argument, ..]`."""
    key, free = _picker(bound)(fact), [i for i in range(arity) if i not in bound]
    if not free:
        (slot.add if add else slot.discard)(key)
    else:
        (insert if add else remove)(slot, key, _picker(free)(fact))


def _as_tuple(item: Any) -> tuple[str, ...]:
    return item if isinstance(item, tuple) else (item,)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[str]], Any]:
    """Return a reader of the arguments at these positions: bare if one, else a tuple."""
    if not positions:
        return lambda fact: ()
    return itemgetter(*(i + 1 for i in positions))


def insert(index: dict[Any, tuple[Any, ...]], key: Any, value: Any) -> None:
    """Add a value under a key, keeping the values sorted and without duplicates."""
    values = index.get(key, ())
    if value not in values:
        index[key] = tuple(sorted((*values, value)))


def remove(index: dict[Any, tuple[Any, ...]], key: Any, value: Any) -> None:
    """Remove a value under a key, if it is there."""
    values = index.get(key, ())
    if value in values:
        index[key] = tuple(other for other in values if other != value)


def tuple_source(items: Sequence[str]) -> str:
    """Return source of a key: the item itself if there is one, else a tuple of them."""
    return items[0] if len(items) == 1 else "(" + ", ".join(items) + ("," if items else "") + ")"


def local_name(placeholder: str) -> str:
    """Return the Python variable that holds a placeholder's value; different for each name."""
    is_plain = placeholder.isascii() and placeholder.isidentifier()
    return f"ph_{placeholder}" if is_plain else f"px_{placeholder.encode().hex()}"


# -- conjunctions --------------------------------------------------------------------------------


@dataclass(slots=True)
class Conjunction:
    """Literals and quantifier-free disjunctions that must all hold, over typed variables."""

    variables: dict[str, str]
    literals: list[Literal] = field(default_factory=list)
    disjunctions: list[Junction] = field(default_factory=list)


def conjunctions(condition: Condition, variables: Mapping[str, str]) -> list[Conjunction]:
    """Return the condition as alternatives, none of which contains a quantifier.

    A disjunction stays inside its conjunction, as a test, when the literals around it bind all of
    its variables; otherwise it is multiplied out.
    """
    alternatives = [Conjunction(dict(variables))]
    pending: list[list[Condition]] = [[condition]]
    done: list[Conjunction] = []
    while alternatives:
        current, todo = alternatives.pop(), pending.pop()
        split = _flatten(current, todo)
        if split is None:
            done.append(current)
            continue
        for part in split.parts:
            literals, disjunctions = list(current.literals), list(current.disjunctions)
            alternatives.append(Conjunction(dict(current.variables), literals, disjunctions))
            pending.append([*todo, part])
    return done[::-1]


def _flatten(current: Conjunction, todo: list[Condition]) -> Junction | None:
    """Move all of `todo` into `current`; return a disjunction that must be multiplied out."""
    waiting: list[Junction] = []
    while todo:
        condition = todo.pop(0)
        if isinstance(condition, Literal):
            current.literals.append(condition)
        elif isinstance(condition, Exists):
            for name, kind in condition.variables:
                if current.variables.get(name, kind) != kind:
                    raise unsupported(f"the variable {name} in two roles")
                current.variables[name] = kind
            todo.insert(0, condition.part)
        elif condition.kind == "and":
            todo[:0] = condition.parts
        else:
            waiting.append(condition)
    bound: set[str] = set()
    for literal in current.literals:
        if literal.positive and literal.atom.predicate != "=":
            bound |= literal.atom.variables()
    for index, junction in enumerate(waiting):
        used = set().union(*(literal.atom.variables() for literal in literals_of(junction)))
        if used <= bound and not _has_quantifier(junction):
            current.disjunctions.append(junction)
        else:
            todo.extend(other for i, other in enumerate(waiting) if i > index)
            return junction
    return None


def _has_quantifier(condition: Condition) -> bool:
    if isinstance(condition, Junction):
        return any(_has_quantifier(part) for part in condition.parts)
    return isinstance(condition, Exists)


# -- loops ---------------------------------------------------------------------------------------


class Loops:
    """Writes one Python function: nested loops over slots, tests, and the innermost lines.

    Args:
        index: the slots; requesting a new one adds it.
        domain: declared types and predicates.
        names: source text of each constant that is not spelled out (goal parameters).
    """

    def __init__(
        self, index: FactIndex, domain: Domain, names: Mapping[str, str] | None = None
    ) -> None:
        self._index = index
        self._domain = domain
        self._names = names or {}
        self.lines: list[str] = []
        self.used: set[int] = set()
        self.indent = 1

    def write(self, line: str) -> None:
        """Add a line at the current depth."""
        self.lines.append("    " * self.indent + line)

    def function(self, head: str, last: str) -> str:
        """Return the whole function; `last` is written after the loops."""
        slots = [f"    s{number} = S[{number}]" for number in sorted(self.used)]
        return "\n".join([f"def {head}:", *slots, *self.lines, f"    {last}"]) + "\n"

    def slot(self, predicate: str, bound: tuple[int, ...]) -> str:
        """Return name of the local variable that holds a slot."""
        number = self._index.slot(predicate, bound)
        self.used.add(number)
        return f"s{number}"

    def term(self, term: str, scope: Mapping[str, str]) -> str:
        """Return source of a term: a bound variable or a constant."""
        return scope[term] if term in scope else self._names.get(term, repr(term))

    def test(self, literal: Literal, scope: Mapping[str, str]) -> str:
        """Return source of the truth value of a literal whose variables are all bound."""
        terms = [self.term(term, scope) for term in literal.atom.terms]
        if literal.atom.predicate == "=":
            return f"{terms[0]} {'==' if literal.positive else '!='} {terms[1]}"
        slot = self.slot(literal.atom.predicate, tuple(range(len(terms))))
        return f"{tuple_source(terms)} {'in' if literal.positive else 'not in'} {slot}"

    def condition(self, condition: Condition, scope: Mapping[str, str]) -> str:
        """Return source of the truth value of a quantifier-free condition with bound variables."""
        if isinstance(condition, Literal):
            return self.test(condition, scope)
        assert isinstance(condition, Junction)
        if not condition.parts:
            return str(condition.kind == "and")
        parts = (self.condition(part, scope) for part in condition.parts)
        return "(" + f" {condition.kind} ".join(parts) + ")"

    def solve(
        self,
        conjunction: Conjunction,
        scope: Mapping[str, str],
        *,
        in_order: bool = False,
        distinct: bool = False,
    ) -> dict[str, str] | None:
        """Write loops and tests for all solutions; the caller then writes the innermost lines.

        Args:
            conjunction: the literals that must hold.
            scope: variables bound already, to their source.
            in_order: keep the literals' order, so that solutions come in the official order.
            distinct: variables of the same type never have the same value (grammar queries).

        Returns:
            The scope inside the loops, or None if there can be no solution.
        """
        scope = dict(scope)
        literals = list(conjunction.literals)
        disjunctions = list(conjunction.disjunctions)
        kinds = conjunction.variables
        if any(kind not in self._domain.types for kind in kinds.values()):
            return None  # nothing has this type
        while True:
            self._write_tests(literals, disjunctions, scope)
            free = [v for v in kinds if v not in scope]
            if not free and not literals:
                return scope
            literal = self._next(literals, scope, in_order)
            if literal is None:
                if not free:
                    raise unsupported("a condition with an undeclared variable")
                if not free[0].startswith("?"):
                    raise unsupported(f"the variable {free[0]}, which has no question mark")
                atom = Atom(TYPE_PREDICATE + kinds[free[0]], (free[0],))
                self._index.arity[atom.predicate] = 1
            else:
                literals.remove(literal)
                atom = literal.atom
            if not self._loop(atom, kinds, scope, distinct):
                self.write("pass")  # the body of the tests so far
                return None

    def _write_tests(
        self, literals: list[Literal], disjunctions: list[Junction], scope: Mapping[str, str]
    ) -> None:
        tests = []
        for literal in list(literals):
            if literal.atom.variables() <= set(scope):
                tests.append(self.test(literal, scope))
                literals.remove(literal)
        for junction in list(disjunctions):
            if all(literal.atom.variables() <= set(scope) for literal in literals_of(junction)):
                tests.append(self.condition(junction, scope))
                disjunctions.remove(junction)
        if tests:
            self.write(f"if {' and '.join(tests)}:")
            self.indent += 1

    def _next(
        self, literals: list[Literal], scope: Mapping[str, str], in_order: bool
    ) -> Literal | None:
        candidates = [x for x in literals if x.positive and x.atom.predicate != "="]
        if not candidates or in_order:
            return candidates[0] if candidates else None

        def cost(literal: Literal) -> float:
            bound = tuple(
                i
                for i, term in enumerate(literal.atom.terms)
                if term in scope or not term.startswith("?")
            )
            return self._index.fan_out(literal.atom.predicate, bound)

        return min(candidates, key=cost)

    def _loop(
        self, atom: Atom, kinds: Mapping[str, str], scope: dict[str, str], distinct: bool
    ) -> bool:
        """Write one loop over the free variables of an atom; return False if types rule it out."""
        free = [t for t in atom.terms if t.startswith("?") and t not in scope]
        if len(set(free)) != len(free):
            raise unsupported(f"a repeated variable in ({atom.predicate} ..)")
        bound = tuple(i for i, term in enumerate(atom.terms) if term not in free)
        declared = self._domain.predicates.get(atom.predicate.removeprefix("not_"))
        for variable in free:
            if variable not in kinds:
                raise unsupported(f"the undeclared variable {variable}")
            kind = kinds[variable]
            found = declared[atom.terms.index(variable)] if declared else kind
            if found != kind and kind != "object":
                if found != "object":
                    return False
                raise unsupported(f"a variable of type {kind} where any object may stand")
        known = dict(scope)
        for variable in free:
            scope[variable] = local_name(variable[1:])
        key = tuple_source([self.term(atom.terms[i], known) for i in bound]) if bound else "()"
        names = ", ".join(scope[variable] for variable in free)
        self.write(f"for {names} in {self.slot(atom.predicate, bound)}.get({key}, ()):")
        self.indent += 1
        if distinct:
            tests = [
                f"{scope[variable]} != {other}"
                for i, variable in enumerate(free)
                for name, other in [*known.items(), *((v, scope[v]) for v in free[:i])]
                if kinds.get(name, kinds[variable]) == kinds[variable]
            ]
            if tests:
                self.write(f"if {' and '.join(tests)}:")
                self.indent += 1
        return True
