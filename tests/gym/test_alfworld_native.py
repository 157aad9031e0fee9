"""The native engine against the official one, its own rules, and what it must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alfworld_parity import compare_game
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_gym.envs.alfworld.engine.grammar import enumerate_items, parse_grammar, parse_symbols
from atod_gym.envs.alfworld.engine.native import NativeEngine, compile_game, entity_names
from atod_gym.envs.alfworld.engine.pddl import parse_expression, parse_problem, typed_list
from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.houses import generated_task_ids
from atod_gym.envs.alfworld.official import OfficialEngine
from atod_gym.errors import InvalidGameError, UnsupportedGameError

TASK_TYPES = (
    "look_at_obj_in_light",
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
)


@pytest.fixture(scope="module")
def game() -> dict[str, Any]:
    return dict(generate_game(generated_task_ids("train", "tiny")[0]))


@pytest.mark.slow
def test_every_official_walkthrough_wins_on_its_last_step(alfworld_data: Path) -> None:
    games = sorted(alfworld_data.glob("*/*/*/game.tw-pddl"))
    assert len(games) == 3827
    for path in games:
        engine = NativeEngine(path)
        wins = []
        for command in engine.walkthrough:
            assert command in engine.last.admissible_commands
            wins.append(engine.step(command).won)
        assert wins == [False] * (len(wins) - 1) + [True], path


@pytest.mark.slow
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_official_engine_answers_the_same(alfworld_data: Path, task_type: str) -> None:
    pytest.importorskip("alfworld")
    games = sorted(alfworld_data.glob(f"valid_unseen/{task_type}*/*/game.tw-pddl"))
    for mode, lines in compare_game(games[len(games) // 2], ("random", "expert"), 20).items():
        assert len(lines) > 3
        assert not any(lines), mode


@pytest.mark.slow
def test_official_engine_plays_generated_games_the_same() -> None:
    pytest.importorskip("alfworld")
    for house_size in ("tiny", "medium"):
        path_or_game = dict(generate_game(generated_task_ids("valid_unseen", house_size)[7]))
        for lines in compare_game(path_or_game, ("walkthrough", "random"), 20).values():
            assert len(lines) > 3
            assert not any(lines)


def _changed(game: dict[str, Any], key: str, old: str, new: str) -> dict[str, Any]:
    assert old in game[key]
    return {**game, key: game[key].replace(old, new)}


def _both(game: dict[str, Any]) -> None:
    for lines in compare_game(game, ("walkthrough", "random"), 15).values():
        assert not any(lines)


@pytest.mark.slow
def test_a_changed_action_schema_changes_the_engine(alfworld_data: Path) -> None:
    path = sorted(alfworld_data.glob("valid_seen/pick_and_place*/*/game.tw-pddl"))[0]
    game = json.loads(path.read_text())
    pick_up = "(not (holdsAny ?a))  ; agent's hands are empty."
    several = _changed(game, "pddl_domain", pick_up, "")
    engine = NativeEngine(several)
    for command in engine.walkthrough[:-1]:
        state = engine.step(command)
        if command.startswith("take"):
            break
    more = [c for c in state.admissible_commands if c.startswith("take")]
    state = engine.step(more[0]) if more else state
    assert more, "with the precondition gone, a second object can be taken"
    assert engine.step("inventory").feedback.count(" a ") == 2
    pytest.importorskip("alfworld")
    _both(several)


@pytest.mark.slow
def test_a_changed_grammar_changes_the_engine(alfworld_data: Path) -> None:
    path = sorted(alfworld_data.glob("valid_seen/pick_heat*/*/game.tw-pddl"))[0]
    game = json.loads(path.read_text())
    told = _changed(game, "grammar", "You arrive at {r.name}.", "Here is the {r.name}!")
    told = _changed(told, "grammar", '"take {o} from {r}"', '"grab {o} off {r}"')
    told = _changed(told, "grammar", '"rhs": ", and "', '"rhs": ", plus "')
    engine = NativeEngine(told)
    go = next(c for c in engine.walkthrough if c.startswith("go to"))
    assert engine.step(go).feedback.startswith("Here is the ")
    assert ", plus " in engine.reset().feedback
    pytest.importorskip("alfworld")
    _both(told)


def test_old_data_says_put(alfworld_data: Path) -> None:
    path = sorted(alfworld_data.glob("valid_seen/pick_and_place*/*/game.tw-pddl"))[0]
    game = _changed(
        json.loads(path.read_text()), "grammar", '"move {o} to {r}"', '"put {o} in/on {r}"'
    )
    engine = NativeEngine(game)
    for command in engine.walkthrough[:-1]:
        state = engine.step(command)
    assert any(c.startswith("put ") and " in/on " in c for c in state.admissible_commands)
    assert not any(c.startswith("move ") for c in state.admissible_commands)


def test_reset_starts_the_same_game_again(game: dict[str, Any]) -> None:
    engine = NativeEngine(game)
    first = engine.reset()
    for command in engine.walkthrough:
        engine.step(command)
    assert engine.reset() == first
    other = NativeEngine(game)
    engine.step(engine.walkthrough[0])
    assert other.reset() == first


@pytest.mark.parametrize("walkthrough", [None, 5, "look", {"look": 1}])
def test_a_walkthrough_that_is_no_list_counts_as_none(
    game: dict[str, Any], walkthrough: object
) -> None:
    assert NativeEngine({**game, "walkthrough": walkthrough}).walkthrough == ()


@given(st.text())
def test_any_text_is_answered(command: str) -> None:
    engine = NativeEngine(_ANY_GAME)
    state = engine.step(command)
    assert state.feedback == "Nothing happens." or command.strip() in state.admissible_commands
    assert state.admissible_commands == engine.reset().admissible_commands


_ANY_GAME = generate_game(generated_task_ids("train", "tiny")[1])


@pytest.mark.parametrize(
    ("key", "old", "new", "error"),
    [
        ("pddl_domain", "(:action ", "(:derived (x) ())\n(:action ", UnsupportedGameError),
        ("pddl_domain", ":effect (and", ":effect (forall (?x - object) (and", InvalidGameError),
        ("pddl_domain", "(:predicates", "(:predicates (", InvalidGameError),
        ("pddl_problem", "(:init", "(:innit", InvalidGameError),
        ("pddl_problem", "(:goal", "(:goal (", UnsupportedGameError),
        ("pddl_problem", "(:init", "(:init (flies dog)", InvalidGameError),
        ("grammar", "action ", "acton ", InvalidGameError),
        ("grammar", "{r.name}", "{r.desc}", UnsupportedGameError),
        ("grammar", "{r.name}", "{__import__('os').getcwd()}", UnsupportedGameError),
    ],
)
def test_unsupported_constructs_are_refused(
    game: dict[str, Any], key: str, old: str, new: str, error: type[Exception]
) -> None:
    changed = {**game, key: game[key].replace(old, new, 1)}
    if changed[key] == game[key]:
        changed[key] = game[key].replace(old.replace("r.name", "o.name"), new, 1)
    with pytest.raises(error) as caught:
        compile_game(changed)
    if error is UnsupportedGameError:
        assert 'backend="alfworld"' in str(caught.value)


_LOOK = "(and (checked ?l))"
_GOAL = "(:goal (and (holdsAny agent1)))"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_GOAL, "(:goal)"),
        (_GOAL, "(:goal ())"),
        (_GOAL, "(:goal (holdsAny agent1) (holdsAny agent1))"),
        (_GOAL, "(:goal (not (holdsAny agent1) (holdsAny agent1)))"),
        (_GOAL, "(:goal (imply (holdsAny agent1) (holdsAny agent1) (holdsAny agent1)))"),
        (_GOAL, "(:goal (exists (?a - agent) (holdsAny ?a) (holdsAny ?a)))"),
        (f":effect {_LOOK}", ""),
        (f":effect {_LOOK}", f":effect {_LOOK} (checked ?a)"),
        (f":effect {_LOOK}", f":effect {_LOOK} :effect (checked ?a)"),
        (_LOOK, "(when (holdsAny ?a) (checked ?l) (checked ?a))"),
        ("(and (atLocation ?a ?l))", "(and (atLocation ?a ?l) ())"),
    ],
)
def test_no_part_of_the_rules_is_ignored(game: dict[str, Any], old: str, new: str) -> None:
    problem = game["pddl_problem"]
    game = {**game, "pddl_problem": problem[: problem.index("(:goal")] + _GOAL + ")"}
    key = "pddl_problem" if old == _GOAL else "pddl_domain"
    assert old in game[key]
    changed = {**game, key: game[key].replace(old, new, 1)}
    with pytest.raises(InvalidGameError):
        NativeEngine(changed)
    pytest.importorskip("alfworld")
    with pytest.raises(InvalidGameError, match="official engine"):
        OfficialEngine(changed).reset()


def test_words_of_the_grammar_are_never_taken_for_placeholders(game: dict[str, Any]) -> None:
    odd = _changed(game, "grammar", '"look";', '"look ph_oops ph_l v0_l S N";')
    assert "look ph_oops ph_l v0_l S N" in NativeEngine(odd).last.admissible_commands
    odd = _changed(odd, "grammar", '"inventory";', '"carry {a.id} ph_a";')
    assert "carry agent1 ph_a" in NativeEngine(odd).last.admissible_commands


def test_the_condition_of_an_effect_sees_what_earlier_actions_changed() -> None:
    game: dict[str, Any] = dict(generate_game("small-train-0003-pick_heat_then_place_in_recep"))
    game = _changed(game, "pddl_domain", "(checked ?x)", "(checked ?x) (was ?o - object)")
    game = _changed(game, "pddl_domain", "(was ?o", "(burnt ?o - object) (was ?o")
    game = _changed(game, "pddl_domain", "(holds ?a ?o) (holdsAny ?a)\n", "(was ?o) (holdsAny ?a)"
                    " (holds ?a ?o)\n")  # fmt: skip
    game = _changed(game, "pddl_domain", "(isHot ?o) (not (isCool ?o))",
                    "(isHot ?o) (not (isCool ?o)) (when (was ?o) (burnt ?o))")  # fmt: skip
    game = _changed(game, "pddl_domain", "(holds ?a ?o) (heatable ?o)",
                    "(holds ?a ?o) (heatable ?o) (not (burnt ?o))")  # fmt: skip
    engine = NativeEngine(game)
    for command in engine.walkthrough:
        if command.startswith("heat"):
            break
        engine.step(command)
    assert command in engine.last.admissible_commands
    assert command not in engine.step(command).admissible_commands


def test_a_rule_without_an_applicable_alternative_is_named(game: dict[str, Any]) -> None:
    empty = '"rhs": "You are not carrying anything."'
    odd = _changed(game, "grammar", empty, f'{empty}, "condition": "holdsany(a:agent)"')
    engine = NativeEngine(odd)
    with pytest.raises(InvalidGameError, match="'hands'"):
        engine.step("inventory")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_game_is_refused_or_played(data: st.DataObject) -> None:
    game: dict[str, Any] = dict(generate_game("tiny-train-0000-pick_and_place_simple"))
    key = data.draw(st.sampled_from(["pddl_domain", "grammar", "pddl_problem"]))
    text = game[key]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    words = st.sampled_from(["(", ")", "not", "?x", "ph_x", "{r}", "#room#", '"', "[", "|", ";"])
    new = data.draw(words | st.text(max_size=5))
    game[key] = text[:start] + new + text[end:]
    try:
        engine = NativeEngine(game)
        for command in (*engine.walkthrough, *engine.last.admissible_commands):
            engine.step(command)
    except (InvalidGameError, UnsupportedGameError):
        pass


def test_broken_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.tw-pddl"
    with pytest.raises(InvalidGameError, match=r"none\.tw-pddl"):
        NativeEngine(missing)
    for content in ('{"pddl_domain": ', "[]", "{}", '{"pddl_domain": 3}'):
        path = tmp_path / "game.tw-pddl"
        path.write_text(content)
        with pytest.raises(InvalidGameError, match=r"game\.tw-pddl"):
            NativeEngine(path)


@pytest.mark.parametrize("engine", [NativeEngine, OfficialEngine])
def test_content_without_a_text_is_named(
    game: dict[str, Any], engine: type[NativeEngine | OfficialEngine]
) -> None:
    if engine is OfficialEngine:
        pytest.importorskip("alfworld")
    with pytest.raises(InvalidGameError, match="has no text under grammar, pddl_problem"):
        engine({**game, "pddl_problem": None, "grammar": 3})


def test_names_count_down_along_sorted_ids() -> None:
    ids = {"mug_bar_b", "mug_bar_a", "sink_bar_1_bar_sinkbasin", "agent1"}
    assert entity_names(ids) == {
        "mug_bar_a": "mug 2",
        "mug_bar_b": "mug 1",
        "sink_bar_1_bar_sinkbasin": "sinkbasin 1",
        "agent1": "agent1 ",
    }


def test_lists_are_written_as_the_grammar_defines() -> None:
    told = [enumerate_items(list("abc")[:n], "nothing", ", ", ", and ") for n in range(4)]
    assert told == ["nothing", "a", "a, and b", "a, b, and c"]


def test_small_parsers() -> None:
    assert typed_list(["a", "b", "-", "t", "c"]) == (("a", "t"), ("b", "t"), ("c", "object"))
    assert parse_expression("(a (b c) d)") == ["a", ["b", "c"], "d"]
    with pytest.raises(InvalidGameError):
        parse_expression("(a (b)")
    kinds = [symbol.kind for symbol in parse_symbols("A {r.name}: [{o.name | p(o:object)}] #x#")]
    assert kinds == ["literal", "value", "literal", "list", "literal", "rule"]
    problem = parse_problem(
        "(define (problem p) (:objects A - T)"
        " (:init (P A) ; no\n (= (total-cost) 0)) (:goal (P A)))"
    )
    assert problem.facts == {"p": [["p", "a"]]}
    assert problem.goal == "(:goal (p a))"
    grammar = parse_grammar('# note\naction Go { template :: "go"; feedback :: "#x#"; }')
    assert grammar.actions["go"].template == "go"
