from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atod_gym.envs.alfworld.engine.native import NativeEngine
from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.houses import generated_task_ids
from atod_gym.envs.alfworld.official import OfficialEngine, _check_versions
from atod_gym.errors import InvalidGameError, MissingExtraError, UnsupportedGameError


def old_grammar(game: dict[str, object]) -> dict[str, object]:
    grammar = str(game["grammar"])
    assert "move {o} to {r}" in grammar
    return {**game, "grammar": grammar.replace("move {o} to {r}", "put {o} in/on {r}")}


def test_old_data_is_played_by_its_own_words_and_never_mixed() -> None:
    game = old_grammar(generate_game("tiny-train-0000-pick_and_place_simple"))
    engine = NativeEngine(game)
    state = engine.reset()
    for command in engine.walkthrough:
        words = command.replace("move ", "put ").replace(" to ", " in/on ")
        state = engine.step(words if command.startswith("move ") else command)
    assert state.won
    with pytest.raises(UnsupportedGameError, match=r"<= 0\.3.*native"):
        _check_versions(str(game["grammar"]), "0.4.2")
    _check_versions(str(game["grammar"]), "0.3.3")
    with pytest.raises(UnsupportedGameError, match=r">= 0\.4"):
        _check_versions("move {o} to {r}", "0.3.5")
    pytest.importorskip("alfworld")
    with pytest.raises(UnsupportedGameError, match="put X in/on Y"):
        OfficialEngine(game)


def test_a_missing_official_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    env = ALFWorldEnv(data="generated", house_size="tiny", backend="alfworld")
    with pytest.raises(MissingExtraError, match=r'pip install "atod-gym\[alfworld\]"'):
        env.reset(seed=0)


@pytest.mark.slow
def test_official_engines_in_several_threads() -> None:
    pytest.importorskip("alfworld")
    names = generated_task_ids("train", "tiny")[:4]
    games = [generate_game(name) for name in names]

    def plays(game: dict[str, object]) -> bool:
        engine = OfficialEngine(game)
        engine.reset()
        return [engine.step(command).won for command in engine.walkthrough][-1]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(plays, games))


@pytest.mark.slow
def test_the_official_engine_says_the_same(alfworld_data: Path) -> None:
    pytest.importorskip("alfworld")
    both = [
        ALFWorldEnv(data=str(alfworld_data), split="valid_unseen", backend=backend)
        for backend in ("native", "alfworld")
    ]
    results = [env.reset(seed=2) for env in both]
    assert results[0] == results[1]
    for action in ("inventory", "nonsense", " help ", *both[0].walkthrough):
        steps = [env.step(action) for env in both]
        assert steps[0] == steps[1]
    assert steps[0][2]
    for env in both:
        env.close()
        env.close()


def test_the_official_engine_names_games_that_it_refuses() -> None:
    pytest.importorskip("alfworld")
    game = generate_game("tiny-train-0000-pick_and_place_simple")
    for key in ("pddl_domain", "pddl_problem", "grammar"):
        with pytest.raises(InvalidGameError, match="official engine"):
            OfficialEngine({**game, key: "(define nothing"})
