"""Read the TWL2 text of a game file and write Python that derives its sentences.

A TWL2 text holds actions (command template, feedback) and a context-sensitive grammar whose rules
query the facts. The semantics followed here are those of textworld's PddlEnv: the first rule whose
condition has a solution is taken, solutions come in sorted order, distinct placeholders never share
a value, and white space before a text's first symbol is dropped (so `help` has no leading newline).
Rules are compiled only where a sentence can reach them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from atod_gym.envs.alfworld.engine.joins import Conjunction, FactIndex, Loops, local_name
from atod_gym.envs.alfworld.engine.pddl import Atom, Domain, Literal, unsupported
from atod_gym.errors import InvalidGameError

# -- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActionText:
    """The command template and the feedback of an action, as grammar texts."""

    template: str
    feedback: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One production: its text, and the query that must have a solution (empty: none)."""

    text: str
    condition: str


@dataclass(frozen=True, slots=True)
class TextGrammar:
    """A whole TWL2 text."""

    actions: dict[str, ActionText]
    rules: dict[str, tuple[Rule, ...]]


_COMMENT = re.compile(r"(?:\s|#[^\n]*(?:\n|$))+")
_NAME = re.compile(r"[\w/-]+")
_STRING = re.compile(r'"""((?:.|\n)*?)"""|"([^"]*)"')


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> None:
        match = _COMMENT.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def finished(self) -> bool:
        self.skip()
        return self.at >= len(self.text)

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.at)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            line = self.text.count("\n", 0, self.at) + 1
            raise InvalidGameError(f"the grammar cannot be read at its line {line}.")
        self.at = match.end()
        return match

    def token(self, token: str) -> None:
        self.take(re.compile(re.escape(token)))

    def field(self) -> tuple[str, str]:
        name = self.take(_NAME).group()
        self.token("::")
        match = self.take(_STRING)
        self.token(";")
        block, line = match.groups()
        return name, block if block is not None else line


def _load_rules(block: str) -> dict[str, tuple[Rule, ...]]:
    text = "\n".join(line for line in block.split("\n") if not line.lstrip().startswith("#"))
    try:
        return {
            name: tuple(Rule(rule["rhs"], rule.get("condition", "")) for rule in rules)
            for name, rules in json.loads(text).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidGameError(f"a rule block of the grammar cannot be read ({error}).") from error


def parse_grammar(text: str) -> TextGrammar:
    """Return the actions and rules of a TWL2 text; of rules with one name the last counts.

    Raises:
        InvalidGameError: the text is not TWL2.
    """
    reader = _Reader(text)
    actions: dict[str, ActionText] = {}
    rules: dict[str, tuple[Rule, ...]] = {}
    while not reader.finished():
        if not reader.peek("action"):
            name, block = reader.field()
            if name != "grammar":
                raise InvalidGameError(f"the grammar has an unknown part {name!r}.")
            rules.update(_load_rules(block))
            continue
        reader.token("action")
        action = reader.take(_NAME).group().lower()
        reader.token("{")
        fields: dict[str, str] = {}
        while not reader.peek("}"):
            name, value = reader.field()
            fields[name] = value
        reader.token("}")
        rules.update(_load_rules(fields.get("grammar", "{}")))
        if not {"template", "feedback"} <= set(fields):
            raise InvalidGameError(f"action {action} lacks its template or feedback.")
        actions[action] = ActionText(fields["template"], fields["feedback"])
    return TextGrammar(actions, rules)


# -- symbols -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Symbol:
    """One part of a grammar text."""

    kind: str
    """literal, rule (`#..#`), value (`{..}`) or list (`[{..}]`)."""
    text: str
    """The literal, the rule's name or the expression; a rule as expression keeps its `#`."""
    query: str = ""


_LITERAL = re.compile(r'[^;|"<>\[\]#{}]+')
_RULE = re.compile(r"#([\w()/!<>\-\s,.]+)#")
_VALUE = re.compile(r"\{(#[\w()/!<>\-\s,.]+#|[^|\[\]{}\n<>]+)(?:\s*\|\s*([^;|{}\n\[\]#]+))?\}")


def parse_symbols(text: str) -> list[Symbol]:
    """Return the symbols of a grammar text.

    Raises:
        UnsupportedGameError: a character or form outside the understood subset.
    """
    if "\t" in text or text.lstrip().startswith("//"):
        raise unsupported(f"the grammar text {text[:60]!r}")
    text = text.replace("\\n", "\n").lstrip()
    symbols: list[Symbol] = []
    at = 0
    while at < len(text):
        listed = text[at] == "["
        if match := _VALUE.match(text, at + listed):
            at = match.end()
            if listed:
                if not text.startswith("]", at):
                    raise unsupported(f"the grammar text {text[:60]!r}")
                at += 1
            expression, query = match.group(1), match.group(2) or ""
            symbols.append(Symbol("list" if listed else "value", expression.strip(), query))
        elif match := _RULE.match(text, at):
            symbols.append(Symbol("rule", match.group(1)))
            at = match.end()
        elif match := _LITERAL.match(text, at):
            symbols.append(Symbol("literal", match.group()))
            at = match.end()
        else:
            raise unsupported(f"the grammar text {text[:60]!r}")
    return symbols


_QUERY_ATOM = re.compile(r"\s*([\w/-]+)\(([^()]*)\)\s*")


def parse_query(query: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return `p(x:t, y:u) & q(x:t)` as [(p, [(x, t), (y, u)]), (q, [(x, t)])]."""
    atoms = []
    for part in query.split("&"):
        match = _QUERY_ATOM.fullmatch(part)
        if match is None:
            raise unsupported(f"the query {query!r}")
        pairs = [item.split(":") for item in match.group(2).split(",") if item.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise unsupported(f"the query {query!r}")
        atoms.append((match.group(1), [(name.strip(), kind.strip()) for name, kind in pairs]))
    return atoms


# -- writing -------------------------------------------------------------------------------------

Scope = dict[str, str]
"""Placeholder name to type, for the placeholders that have a value."""

_ATTRIBUTES = {"name": "N[{}]", "id": "{}", "indefinite": "'a'", "definite": "'the'"}
_DEPTH = 30


class TextWriter:
    """Writes functions `(S, N, placeholders..) -> str`; `S` is the state, `N` entity names."""

    def __init__(self, grammar: TextGrammar, domain: Domain, index: FactIndex) -> None:
        self._grammar = grammar
        self._domain = domain
        self._index = index
        self._known: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}
        self.functions: list[str] = []
        self.negated: set[str] = set()
        """Predicates whose explicit negation (`not_p`) some query reads."""
        self.read: set[str] = set()
        """Predicates that some query reads, directly or negated."""

    def text(self, text: str, scope: Scope, depth: int = 0) -> str:
        """Return source of the string that a grammar text derives to."""
        if depth > _DEPTH:
            raise unsupported("a grammar rule that refers to itself")
        parts = [self._symbol(symbol, scope, depth) for symbol in parse_symbols(text)]
        return " + ".join(parts) or "''"

    def argument_list(self, scope: Scope) -> str:
        """Return source of the arguments that a text function takes in this scope."""
        return ", ".join(["S", "N", *map(local_name, scope)])

    def holds_always(self, query: str, scope: Scope, facts: set[Atom]) -> bool:
        """Return whether given facts imply that a query has one solution, without placeholders."""
        return all(
            all(scope.get(name) == kind for name, kind in pairs)
            and Atom(predicate, tuple(f"?{name}" for name, _ in pairs)) in facts
            for predicate, pairs in parse_query(query)
        )

    def _symbol(self, symbol: Symbol, scope: Scope, depth: int) -> str:
        if symbol.kind == "literal":
            return repr(symbol.text)
        if symbol.kind == "rule":
            return self._rule(symbol.text, scope, depth)
        if not symbol.query:
            return self._value(symbol.text, scope, depth)
        items = self._items(symbol, scope, depth)
        if symbol.kind == "value":
            return f"''.join({items})"
        empty, comma, last = (
            self._rule(f"list_{name}", scope, depth)
            for name in ("empty", "separator", "last_separator")
        )
        return f"enumerate_items({items}, {empty}, {comma}, {last})"

    def _value(self, expression: str, scope: Scope, depth: int) -> str:
        if expression.startswith("#"):
            return self._rule(expression[1:-1], scope, depth)
        try:
            tree = ast.parse(expression, mode="eval").body
        except SyntaxError:
            raise unsupported(f"the expression {expression!r} in the grammar") from None
        return f"({self._expression(tree, expression, scope)})"

    def _expression(self, node: ast.expr, whole: str, scope: Scope) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return repr(node.value)
        if isinstance(node, ast.Name) and node.id in scope:
            return f"N[{local_name(node.id)}]"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in scope and node.attr in _ATTRIBUTES:
                return _ATTRIBUTES[node.attr].format(local_name(node.value.id))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return " + ".join(self._expression(n, whole, scope) for n in (node.left, node.right))
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            parts = (f"({self._expression(n, whole, scope)})" for n in node.values)
            return f"({' or '.join(parts)})"
        raise unsupported(f"the expression {whole!r} in the grammar")

    def _rule(self, name: str, scope: Scope, depth: int) -> str:
        rules = self._grammar.rules.get(name)
        if not rules:
            raise InvalidGameError(f"the grammar refers to #{name}#, which it does not define.")
        if not rules[0].condition:
            return self.text(rules[0].text, scope, depth + 1)
        key = (name, tuple(scope.items()))
        if self._known.get(key) == "":
            raise unsupported(f"the grammar rule {name!r}, which refers to itself")
        if key not in self._known:
            function = f"t{len(self._known)}"
            self._known[key] = ""  # being written
            lines = [f"def {function}({self.argument_list(scope)}):"]
            for rule in rules:
                text = self.text(rule.text, scope, depth + 1)
                if not rule.condition:
                    lines.append(f"    return {text}")
                    break
                lines.append(f"    if {self._exists(rule.condition, scope)}:")
                lines.append(f"        return {text}")
            else:
                error = f"no alternative of the grammar rule {name!r} applies."
                lines.append(f"    raise InvalidGameError({error!r})")
            self.functions.append("\n".join(lines) + "\n")
            self._known[key] = function
        return f"{self._known[key]}({self.argument_list(scope)})"

    def _conjunction(self, query: str, scope: Scope) -> tuple[Conjunction, Scope]:
        inner = dict(scope)
        literals = []
        for predicate, pairs in parse_query(query):
            base = predicate.removeprefix("not_")
            declared = self._domain.predicates.get(base)
            if declared is None or len(declared) != len(pairs):
                raise unsupported(f"the query {query!r}")
            for name, kind in pairs:
                if not name.isidentifier() or inner.setdefault(name, kind) != kind:
                    raise unsupported(f"the placeholder {name!r} in the query {query!r}")
            self.read.add(base)
            if predicate != base:
                self.negated.add(base)
                self._index.arity[predicate] = len(pairs)
            literals.append(Literal(Atom(predicate, tuple(f"?{name}" for name, _ in pairs)), True))
        new = {f"?{name}": kind for name, kind in inner.items()}
        return Conjunction(new, literals), inner

    def _solve(
        self, query: str, scope: Scope, in_order: bool
    ) -> tuple[Loops, Scope, Mapping[str, str] | None]:
        conjunction, inner = self._conjunction(query, scope)
        loops = Loops(self._index, self._domain)
        bound = {f"?{name}": local_name(name) for name in scope}
        return loops, inner, loops.solve(conjunction, bound, in_order=in_order, distinct=True)

    def _exists(self, query: str, scope: Scope) -> str:
        """Return source of whether a query has a solution."""
        loops, _, found = self._solve(query, scope, in_order=False)
        if found is not None:
            loops.write("return True")
        function = f"q{len(self.functions)}"
        self.functions.append(
            loops.function(f"{function}({self.argument_list(scope)})", "return False")
        )
        return f"{function}({self.argument_list(scope)})"

    def _items(self, symbol: Symbol, scope: Scope, depth: int) -> str:
        """Return source of the list of texts, one per solution of the symbol's query."""
        loops, inner, found = self._solve(symbol.query, scope, in_order=True)
        if found is not None:
            loops.write(f"items.append({self._value(symbol.text, inner, depth + 1)})")
        function = f"q{len(self.functions)}"
        head = f"{function}({self.argument_list(scope)}, items)"
        self.functions.append(loops.function(head, "return items"))
        return f"{function}({self.argument_list(scope)}, [])"


def enumerate_items(items: list[str], empty: str, comma: str, last: str) -> str:
    """Join items as a sentence lists them: `a`, `a<last>b`, `a<comma>b<last>c`."""
    if len(items) < 2:
        return items[0] if items else empty
    return comma.join(items[:-1]) + last + items[-1]
