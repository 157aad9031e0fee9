"""Read the PDDL of a game file: the domain as action schemas, the problem as grouped facts.

Only the part of PDDL that ALFWorld games use is understood (typing without sub-types, `and`, `or`,
`not`, `exists` and `=` in conditions, `and`, `not` and `when` in effects); everything else raises
`UnsupportedGameError`. Names are lower-cased, as Fast Downward's parser does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atod_gym.errors import InvalidGameError, UnsupportedGameError

_PARTS = {"not": 1, "imply": 2, "exists": 2, "when": 2}
"""Number of parts of forms that have a fixed one; Fast Downward refuses others, too."""


def unsupported(what: str) -> UnsupportedGameError:
    """Return the error for an unsupported construct; it names the other backend."""
    return UnsupportedGameError(
        f'{what}: the native engine does not play this game; use backend="alfworld".'
    )


@dataclass(frozen=True, slots=True)
class Atom:
    """A predicate applied to terms; a term with a leading `?` is a variable."""

    predicate: str
    terms: tuple[str, ...]

    def variables(self) -> set[str]:
        """Return the terms that are variables."""
        return {term for term in self.terms if term.startswith("?")}


@dataclass(frozen=True, slots=True)
class Literal:
    """An atom or its negation; the predicate `=` compares its two terms."""

    atom: Atom
    positive: bool


@dataclass(frozen=True, slots=True)
class Junction:
    """`and` or `or` over parts."""

    kind: str
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Exists:
    """An existential condition; `variables` are (name, type) pairs."""

    variables: tuple[tuple[str, str], ...]
    part: Condition


Condition = Literal | Junction | Exists


@dataclass(frozen=True, slots=True)
class Effect:
    """An added (or deleted) atom, possibly under conditions that are read before the change."""

    literal: Literal
    conditions: tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class ActionSchema:
    """One PDDL action."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    precondition: Condition
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """A PDDL domain: its types, predicates (name to argument types) and actions."""

    types: frozenset[str]
    predicates: dict[str, tuple[str, ...]]
    actions: tuple[ActionSchema, ...]

    def fluents(self) -> set[str]:
        """Return predicates that some action changes."""
        return {effect.literal.atom.predicate for a in self.actions for effect in a.effects}


@dataclass(frozen=True, slots=True)
class Problem:
    """A PDDL problem: facts by predicate, declared objects by type, and the goal's text."""

    facts: dict[str, list[list[str]]]
    """Predicate to facts, each `[predicate, argument, ..]`."""
    objects: str
    """The text of the objects section; parsed on demand by `objects_of_type`."""
    goal: str


# -- expressions ---------------------------------------------------------------------------------


def strip_comments(text: str) -> str:
    """Return the text in lower case without `;` comments."""
    return re.sub(r";[^\n]*", "", text.lower())


def parse_expression(text: str) -> list[Any]:
    """Return a parenthesised expression as nested lists of tokens.

    Raises:
        InvalidGameError: on unbalanced parentheses.
    """
    stack: list[list[Any]] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise InvalidGameError("a PDDL text has a ')' too many.")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise InvalidGameError("a PDDL text has unbalanced parentheses or is empty.")
    expression: list[Any] = stack[0][0]
    return expression


def typed_list(tokens: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return `a b - t c` as ((a, t), (b, t), (c, object)).

    A type is the token after `-` taken whole: in `?l - location, ?r - receptacle` the first
    type is `location,`, which no object has. Fast Downward reads it so, and official games
    contain it (`examine` of an object then works for the held object only).
    """
    result: list[tuple[str, str]] = []
    waiting: list[str] = []
    items = iter(tokens)
    for token in items:
        if not isinstance(token, str):
            raise InvalidGameError(f"a list of typed names holds {token!r}.")
        if token == "-":
            kind = next(items, None)
            if not isinstance(kind, str):
                raise unsupported("a typed list with a compound type")
            result += [(name, kind) for name in waiting]
            waiting = []
        else:
            waiting.append(token)
    return (*result, *((name, "object") for name in waiting))


def _head(expression: Sequence[Any]) -> Any:
    """Return the first token of a form; raise InvalidGameError for a wrong number of parts."""
    head, found = expression[0], len(expression) - 1
    wanted = _PARTS.get(head, found) if isinstance(head, str) else found
    if found != wanted:
        raise InvalidGameError(f"({head} ..) in PDDL has {found} parts, not {wanted}.")
    return head


def _parse_literal(expression: Sequence[Any], positive: bool) -> Literal:
    predicate, *terms = expression
    if not all(isinstance(term, str) for term in expression):
        raise unsupported(f"the condition {expression!r}")
    return Literal(Atom(predicate, tuple(terms)), positive)


def parse_condition(expression: Sequence[Any], positive: bool = True) -> Condition:
    """Return a condition in negation normal form.

    Raises:
        InvalidGameError: on a form with a wrong number of parts.
        UnsupportedGameError: on `forall`, a negated `exists`, or an unknown form.
        IndexError: on an empty form.
    """
    head = _head(expression)
    if head == "not":
        return parse_condition(expression[1], not positive)
    if head in ("and", "or"):
        parts = tuple(parse_condition(part, positive) for part in expression[1:])
        return Junction(head if positive else {"and": "or", "or": "and"}[head], parts)
    if head == "imply":
        return parse_condition(["or", ["not", expression[1]], expression[2]], positive)
    if head == "exists" and positive:
        return Exists(typed_list(expression[1]), parse_condition(expression[2]))
    if head in ("exists", "forall"):
        raise unsupported(f"a {'universal' if positive else 'negated'} quantifier in a condition")
    return _parse_literal(expression, positive)


def literals_of(condition: Condition) -> Iterator[Literal]:
    """Yield all literals inside a condition."""
    if isinstance(condition, Literal):
        yield condition
    elif isinstance(condition, Exists):
        yield from literals_of(condition.part)
    else:
        for part in condition.parts:
            yield from literals_of(part)


def _parse_effects(
    expression: Sequence[Any], conditions: tuple[Literal, ...] = ()
) -> Iterator[Effect]:
    head = _head(expression)
    if head == "and":
        for part in expression[1:]:
            yield from _parse_effects(part, conditions)
    elif head == "when":
        condition = parse_condition(expression[1])
        parts: tuple[Condition, ...] = (condition,)
        if isinstance(condition, Junction) and condition.kind == "and":
            parts = condition.parts
        literals = tuple(part for part in parts if isinstance(part, Literal))
        if len(literals) != len(parts):
            raise unsupported("an effect under a condition that is not a list of literals")
        yield from _parse_effects(expression[2], (*conditions, *literals))
    elif head == "increase":
        return  # action costs do not change what a player sees
    elif head == "forall":
        raise unsupported("a universal effect")
    elif head == "not":
        yield Effect(_parse_literal(expression[1], False), conditions)
    else:
        yield Effect(_parse_literal(expression, True), conditions)


# -- domain --------------------------------------------------------------------------------------


def _parse_action(items: Sequence[Any]) -> ActionSchema:
    name = items[1]
    fields = dict(zip(items[2::2], items[3::2], strict=False))
    if len(items) != 2 * len(fields) + 2 or ":effect" not in fields:
        raise InvalidGameError(
            f"action {name} must have :effect, each field at most once, and one form after each."
        )
    unknown = set(fields) - {":parameters", ":precondition", ":effect"}
    if unknown:
        raise unsupported(f"the field {min(unknown)} of action {name}")
    return ActionSchema(
        name,
        typed_list(fields.get(":parameters", [])),
        parse_condition(fields.get(":precondition") or ["and"]),
        tuple(_parse_effects(fields[":effect"] or ["and"])),
    )


def parse_domain(text: str) -> Domain:
    """Return a domain's types, predicates and actions.

    Raises:
        InvalidGameError: the text is not a PDDL domain.
        UnsupportedGameError: it uses what the native engine does not understand.
    """
    try:
        expression = parse_expression(strip_comments(text))
        types = {"object"}
        predicates: dict[str, tuple[str, ...]] = {}
        actions: list[ActionSchema] = []
        for section in expression[2:]:
            head = section[0]
            if head == ":types":
                for name, parent in typed_list(section[1:]):
                    if parent != "object":
                        raise unsupported(f"the sub-type {name} of {parent}")
                    types.add(name)
            elif head == ":predicates":
                for predicate in section[1:]:
                    kinds = tuple(kind for _, kind in typed_list(predicate[1:]))
                    predicates[predicate[0]] = kinds
            elif head == ":action":
                actions.append(_parse_action(section))
            elif head not in (":requirements", ":functions"):
                raise unsupported(f"the section {head} of the PDDL domain")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InvalidGameError(f"the PDDL domain cannot be read ({error!r}).") from error
    domain = Domain(frozenset(types), predicates, tuple(a for a in actions if a.effects))
    for action in domain.actions:
        changes = [x for e in action.effects for x in (e.literal, *e.conditions)]
        for literal in (*literals_of(action.precondition), *changes):
            check_atom(domain, literal.atom, f"action {action.name}")
        used = {name for literal in changes for name in literal.atom.variables()}
        if unknown := used.difference(name for name, _ in action.parameters):
            raise InvalidGameError(f"action {action.name} does not declare {min(unknown)}.")
    return domain


def check_atom(domain: Domain, atom: Atom, where: str) -> None:
    """Raise InvalidGameError if the atom's predicate is not declared with this many terms."""
    declared = ("",) * 2 if atom.predicate == "=" else domain.predicates.get(atom.predicate)
    if declared is None or len(declared) != len(atom.terms):
        raise InvalidGameError(
            f"{where} uses ({atom.predicate} {' '.join(atom.terms)}), which the domain's "
            "predicates do not declare in this form."
        )


def check_facts(domain: Domain, facts: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Raise InvalidGameError if facts differ from what the domain declares."""
    for predicate, listed in facts.items():
        declared = domain.predicates.get(predicate)
        if declared is None or set(map(len, listed)) != {len(declared) + 1}:
            raise InvalidGameError(
                f"the :init section uses ({predicate} ..) otherwise than the domain declares it."
            )


# -- problem -------------------------------------------------------------------------------------

_FACT = re.compile(r"\(([^()]*)\)")
_ASSIGNMENT = re.compile(r"\(\s*=\s*\([^()]*\)[^()]*\)")


def parse_problem(text: str) -> Problem:
    """Return a problem's facts, objects and goal; written for speed, since each game has its own.

    Raises:
        InvalidGameError: a section is missing or its parentheses do not match.
    """
    text = strip_comments(text) if ";" in text else text.lower()
    starts = [text.find(f"(:{name}") for name in ("objects", "init", "goal")]
    if -1 in starts:
        raise InvalidGameError("the PDDL problem lacks its :objects, :init or :goal section.")
    objects_at, init_at, goal_at = starts
    ends = sorted([*starts, len(text)])
    end = {start: ends[ends.index(start) + 1] for start in starts}
    init = text[init_at + len("(:init") : end[init_at]].rstrip()
    if "(=" in init or "( =" in init:
        init = _ASSIGNMENT.sub("", init)
    found = _FACT.findall(init)
    if init.count("(") != len(found) or init.count(")") != len(found) + 1:
        raise InvalidGameError("the :init section of the PDDL problem is damaged.")
    facts: dict[str, list[list[str]]] = defaultdict(list)
    for fact in found:
        parts = fact.split()
        if not parts:
            raise InvalidGameError("the :init section of the PDDL problem has an empty fact.")
        facts[parts[0]].append(parts)
    goal = _balanced(text, goal_at)
    return Problem(facts, text[objects_at + len("(:objects") : end[objects_at]], goal)


def _balanced(text: str, start: int) -> str:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return text[start : start + match.end()]
    raise InvalidGameError("the :goal section of the PDDL problem is not closed.")


def objects_of_type(objects: str, kind: str) -> list[str]:
    """Return the objects declared with a type, from the text of an objects section."""
    tokens = objects.rstrip().removesuffix(")").split()
    found: list[str] = []
    start = 0
    while "-" in tokens[start:]:
        end = tokens.index("-", start)
        if tokens[end + 1 : end + 2] == [kind]:
            found += tokens[start:end]
        start = end + 2
    return found + (tokens[start:] if kind == "object" else [])
