"""Generated games: reproducible, disjoint, solvable, and playable by the official engine too."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import pytest

from atod_gym.envs.alfworld.engine.native import NativeEngine
from atod_gym.envs.alfworld.games import open_games
from atod_gym.envs.alfworld.generated.draws import Draws
from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.furniture import places
from atod_gym.envs.alfworld.generated.houses import (
    HOUSE_SIZES,
    KINDS,
    SPLIT_SIZES,
    TASK_TYPES,
    Entity,
    build_problem,
    generated_task_ids,
    read_task_id,
)
from atod_gym.errors import DataNotFoundError, TaskNotFoundError

RANGES = {
    "tiny": ((5, 7), (4, 7)),
    "small": ((9, 12), (10, 15)),
    "medium": ((15, 20), (20, 30)),
    "official": ((25, 40), (30, 50)),
}


def _digest(game: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(game, sort_keys=True).encode()).hexdigest()


def _commands(game: dict[str, object]) -> list[str]:
    walkthrough = game["walkthrough"]
    assert isinstance(walkthrough, list)
    return walkthrough


def test_draws_never_change() -> None:
    draws = Draws("key")
    assert [draws.below(100) for _ in range(5)] == [50, 69, 21, 54, 25]
    assert draws.shuffled("abcde") == ["e", "d", "a", "c", "b"]
    weights = Counter(Draws(str(i)).weighted({"a": 1, "b": 3}) for i in range(2000))
    assert 0.70 < weights["b"] / 2000 < 0.80


@pytest.mark.parametrize("size", HOUSE_SIZES)
@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_task_ids_are_sorted_unique_and_balanced(split: str, size: str) -> None:
    ids = generated_task_ids(split, size)
    assert len(set(ids)) == len(ids) == SPLIT_SIZES[split]
    assert list(ids) == sorted(ids)
    counts = Counter(read_task_id(task_id)[2] for task_id in ids)
    assert set(counts) == set(TASK_TYPES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_same_id_is_the_same_game_everywhere() -> None:
    game = generate_game("small-train-0005-pick_two_obj_and_place")
    assert generate_game("small-train-0005-pick_two_obj_and_place") == game
    assert _digest(game) == "979b8b6de3e6e8e138faa566535e10a4c51a9f660830a8bb74d9c207ab3530cd"
    tiny, small = (
        open_games("generated", "train", size).manifest.content_hash for size in ("tiny", "small")
    )
    assert tiny == "bda68281cdadea258a6207f06247b2390fb8831feedea5222ab137e73a8a56c1" != small


def test_sizes_and_placements() -> None:
    for size, (receptacles, things) in RANGES.items():
        for task_id in generated_task_ids("train", size)[:120]:
            problem = build_problem(task_id)
            assert receptacles[0] <= len(problem.house.receptacles) <= receptacles[1]
            assert things[0] <= len(problem.things) <= things[1]
            names = [thing.name for thing, _ in problem.things]
            assert len(set(names)) == len(names)
            for thing, where in problem.things:
                assert where in problem.house.receptacles
                assert where.kind in places(thing.kind)


def test_goals_do_not_hold_at_the_start_and_fit_the_house() -> None:
    for size in HOUSE_SIZES:
        for task_id in generated_task_ids("valid_unseen", size):
            problem = build_problem(task_id)
            kinds = {receptacle.kind for receptacle in problem.house.receptacles}
            there = Counter(
                where
                for thing, where in problem.things
                if (thing.kind, where.kind) == (problem.target, problem.destination)
            )
            if problem.task_type == "look_at_obj_in_light":
                assert any(thing.kind == problem.destination for thing, _ in problem.things)
                continue
            assert problem.destination in kinds
            if KINDS[problem.task_type].appliance:
                assert KINDS[problem.task_type].appliance in kinds - {problem.destination}
            elif problem.task_type == "pick_two_obj_and_place":
                assert sum(there.values()) <= 1
            else:
                assert not there


@pytest.mark.slow
def test_splits_share_no_problem() -> None:
    for size in ("tiny", "small"):
        layouts: dict[str, set[str]] = {}
        problems: dict[str, set[tuple[object, ...]]] = {}
        for split in SPLIT_SIZES:
            built = [build_problem(task_id) for task_id in generated_task_ids(split, size)[:1200]]
            layouts[split] = {problem.house.layout for problem in built}
            problems[split] = {
                (p.house.layout, p.task_type, p.target, p.destination, p.things[0][1])
                for p in built
            }
        assert layouts["valid_seen"] & layouts["train"]
        assert not layouts["valid_unseen"] & (layouts["train"] | layouts["valid_seen"])
        assert not problems["valid_seen"] & problems["train"]


@pytest.mark.slow
def test_walkthroughs_win_exactly_on_their_last_step() -> None:
    for size in HOUSE_SIZES:
        for split in SPLIT_SIZES:
            for task_id in generated_task_ids(split, size)[:60]:
                game = generate_game(task_id)
                engine = NativeEngine(game)
                state = engine.reset()
                won = [state.won]
                for command in _commands(game):
                    assert command in state.admissible_commands, (task_id, command)
                    state = engine.step(command)
                    won.append(state.won)
                assert won == [False] * (len(won) - 1) + [True], task_id


def test_ids_spell_the_names_that_the_walkthrough_uses() -> None:
    assert Entity("mug", 2).id == "mug_bar_97"
    assert Entity("sinkbasin", 1).id == "sink_bar_98_bar_sinkbasin"
    task_id = "medium-train-0002-pick_clean_then_place_in_recep"
    problem, first = build_problem(task_id), NativeEngine(generate_game(task_id)).reset()
    seen = set(re.findall(r"\ba (\w+ \d+)", first.feedback))
    assert seen == {receptacle.name for receptacle in problem.house.receptacles}


@pytest.mark.slow
def test_official_engine_agrees_on_a_small_sample() -> None:
    pytest.importorskip("alfworld")
    from atod_gym.envs.alfworld.official import OfficialEngine

    sample = [f"tiny-train-{i:04d}-{task_type}" for i, task_type in enumerate(TASK_TYPES)]
    sample.append("small-valid_unseen-0001-look_at_obj_in_light")
    sample.append("medium-valid_seen-0000-pick_and_place_simple")
    sample.append("official-train-0001-look_at_obj_in_light")
    for task_id in sample:
        game = generate_game(task_id)
        ours, theirs = NativeEngine(game), OfficialEngine(game)
        assert ours.reset() == theirs.reset()
        for command in ("look", "inventory", "help", *_commands(game)):
            state = theirs.step(command)
            assert ours.step(command) == state, (task_id, command)
        assert state.won
        theirs.close()


def test_unknown_names_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(DataNotFoundError, match="valid_seen"):
        generated_task_ids("test", "tiny")
    for task_id in (
        "",
        "tiny-train-3000-pick_and_place_simple",
        "tiny-train-0001-pick_and_place_simple",
        "tiny-train-+000-pick_and_place_simple",
        "huge-train-0000-pick_and_place_simple",
    ):
        with pytest.raises(TaskNotFoundError, match="generated_task_ids"):
            generate_game(task_id)
