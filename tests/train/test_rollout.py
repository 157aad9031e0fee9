"""Collecting trajectories on generated games with a small random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atod_gym.errors import AtodError
from atod_gym.serving.connection import ServedConnection
from atod_train.config import EnvConfig, ModelConfig, RunConfig
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Trajectory
from atod_train.reports.evaluations import SAMPLING_TEMPERATURE
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, seed_for, tasks_for_step
from atod_train.training.supervised import (
    demonstrate,
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)

ENV = EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=4)
SHAPE = ModelShape(layers=1, width=32, heads=2, mlp_width=64, max_positions=2048)


@pytest.fixture(scope="module")
def pool() -> EnvPool:
    return EnvPool(ENV, "train")


@pytest.fixture(scope="module")
def policy(pool: EnvPool) -> Policy:
    texts = demonstration_texts(
        demonstrate(
            EnvPool(
                EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=20), "train"
            ),
            20,
            0.0,
            0,
        )
    )
    return build_policy(SHAPE, build_word_tokenizer(texts), seed=0)


def test_every_task_comes_once_per_pass() -> None:
    ids = [str(i) for i in range(10)]
    drawn = [task for step in range(1, 6) for task in tasks_for_step(ids, step, 4, seed=3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == ids
    assert drawn[:10] != drawn[10:20]
    assert drawn[:8] == tasks_for_step(ids, 1, 8, seed=3)
    assert tasks_for_step(ids, 1, 4, seed=4) != drawn[:4]


def test_seeds_depend_on_everything() -> None:
    seeds = {seed_for(s, t, n) for s in (0, 1) for t in (0, 1) for n in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize("style", ["chat", "window"])
def test_groups_hold_what_was_played(policy: Policy, style: str) -> None:
    config = EnvConfig(
        data="generated",
        options={"house_size": "tiny"},
        max_turns=4,
        parse_profile="tags" if style == "chat" else "plain",
        prompt_style=style,
    )
    chosen = EnvPool(config, "train")
    dialogue = DialogueEncoder(policy.tokenizer, config.prompt_style)
    generator = Generator(policy, dialogue, max_completion_tokens=5)
    tasks = chosen.task_ids[:2]
    records = collect(chosen, generator, tasks, group_size=3, turn_limit=3)
    assert [record.group_id for record in records] == [0, 0, 0, 1, 1, 1]
    for number, task_id in enumerate(tasks):
        for record in records[3 * number : 3 * number + 3]:
            assert record.task_id == task_id
            assert record.truncated
            assert record.stop_reason == "turn_limit"
            assert [turn.index for turn in record.turns] == [0, 1, 2]
            for turn in record.turns:
                assert turn.tokens.extends_previous == (style == "chat" and turn.index > 0)
                assert len(turn.tokens.completion_ids) == len(turn.tokens.sampling_logprobs)
                assert dialogue.decode(turn.tokens.completion_ids) == turn.completion
                # Only a completion that does not parse costs; in plain style there is none.
                expected = 0.0 if turn.invalid_reason in ("", "not admissible") else 0.01
                assert not (style == "window" and expected)
                assert turn.penalty == expected
                assert turn.is_action_valid == (turn.invalid_reason == "")
                assert turn.reward == pytest.approx(-expected)
            assert record.episode_return == pytest.approx(sum(t.reward for t in record.turns))
    chosen.close()
    chosen.close()


def test_same_generator_state_same_trajectories(pool: EnvPool, policy: Policy) -> None:
    def play() -> object:
        generator = Generator(
            policy,
            DialogueEncoder(policy.tokenizer),
            max_completion_tokens=5,
            generator=torch.Generator().manual_seed(5),
        )
        return collect(pool, generator, pool.task_ids[:2], group_size=2, turn_limit=4)

    assert play() == play()


@pytest.mark.slow
def test_context_limit_ends_an_episode(pool: EnvPool, policy: Policy) -> None:
    dialogue = DialogueEncoder(policy.tokenizer)
    short = Generator(policy, dialogue, max_completion_tokens=5, max_context=20)
    records = collect(pool, short, pool.task_ids[:1], group_size=1, turn_limit=4)
    assert [(r.stop_reason, r.turns) for r in records] == [("context_limit", ())]
    config = RunConfig(model=ModelConfig(max_context=20))
    with pytest.raises(AtodError, match="No first prompt fits"):
        evaluate(policy, pool, config)


def test_processes_that_share_a_rollout_sample_what_one_would(
    pool: EnvPool, policy: Policy
) -> None:
    def play(tasks: int, processes: Processes) -> list[Trajectory]:
        generator = Generator(
            policy,
            DialogueEncoder(policy.tokenizer),
            max_completion_tokens=5,
            generator=torch.Generator().manual_seed(5),
        )
        found: list[Trajectory] = []
        for _ in range(2):  # the streams of a second rollout follow
            found += collect(
                pool,
                generator,
                pool.task_ids[:tasks],
                group_size=2,
                turn_limit=3,
                processes=processes,
            )
        return found

    whole, parts = play(3, Processes()), [play(3, Processes(index, 2)) for index in (0, 1)]
    assert [len(part) for part in parts] == [4, 8]
    for rollout in (0, 1):
        shared = parts[0][2 * rollout :][:2] + parts[1][4 * rollout :][:4]
        for one, other in zip(shared, whole[6 * rollout :][:6], strict=True):
            assert _without_logprobs(one) == _without_logprobs(other)
    # There may be fewer tasks than processes.
    assert [len(play(1, Processes(index, 2))) for index in (0, 1)] == [0, 4]


def test_waves_of_episodes_sample_what_all_at_once_would(pool: EnvPool, policy: Policy) -> None:
    played: list[int] = []
    tokens: list[int] = []

    def play(at_once: int) -> list[Trajectory]:
        generator = Generator(policy, DialogueEncoder(policy.tokenizer), max_completion_tokens=5)
        start = generator.start

        def counted(episodes: Any) -> None:
            played.append(len(episodes))
            start(episodes)

        generator.start = counted  # type: ignore[method-assign]
        tasks = pool.task_ids[:3]
        return collect(
            pool, generator, tasks, group_size=3, turn_limit=3, at_once=at_once,
            on_turn=tokens.append,
        )  # fmt: skip

    whole, parts = play(0), play(4)
    assert played == [9, 4, 4, 1]
    assert len(tokens) == 3 + 3 * 3  # after each turn of each wave
    turns = [turn.tokens for record in whole for turn in record.turns]
    assert sum(tokens) == 2 * sum(len(turn.completion_ids) for turn in turns)
    assert [_without_logprobs(one) for one in parts] == [_without_logprobs(one) for one in whole]


def _without_logprobs(record: Trajectory) -> object:
    completions = [turn.tokens.completion_ids for turn in record.turns]
    return record.group_id, record.task_id, completions


def test_unknown_environments_and_options_are_named() -> None:
    with pytest.raises(AtodError, match="NoSuchGame"):
        EnvPool(EnvConfig(id="atod/NoSuchGame-v0"), "train")
    with pytest.raises(AtodError, match="house_colour"):
        EnvPool(EnvConfig(data="generated", options={"house_colour": "red"}), "train")


def test_evaluation_plays_every_task_once(pool: EnvPool, policy: Policy) -> None:
    config = RunConfig(
        env=EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=2, eval_tasks=7)
    )
    chosen = EnvPool(config.env, "valid_seen")
    for mode in ("greedy", "sampled"):
        result = evaluate(policy, chosen, config, mode)
        played = [chosen.task_ids.index(task.task_id) for task in result.tasks]
        assert played == [0, 28, 57, 85, 114, 142, 171]  # of 200
        assert (result.split, result.data, result.mode) == ("valid_seen", "generated", mode)
    assert result.mean_turns == 2


def test_a_sampled_evaluation_plays_in_batches_with_the_streams_of_its_seed(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=3, eval_tasks=50)
    config = RunConfig(env=env)
    chosen = EnvPool(env, "valid_seen")
    monkeypatch.setattr(Generator, "episodes_at_once", lambda *_: 42)
    result = evaluate(policy, chosen, config, "sampled")
    assert [task.task_id for task in result.tasks] == list(chosen.task_ids[::4])
    generator = Generator(
        policy,
        DialogueEncoder(policy.tokenizer),
        temperature=SAMPLING_TEMPERATURE,
        max_completion_tokens=config.train.max_completion_tokens,
        generator=torch.Generator().manual_seed(seed_for(0, 0, "evaluation")),
    )
    plays = [
        play
        for part in (chosen.task_ids[:168:4], chosen.task_ids[168::4])
        for play in collect(chosen, generator, part, group_size=1, turn_limit=3)
    ]
    for task, play in zip(result.tasks, plays, strict=True):
        invalid = sum(not turn.is_action_valid for turn in play.turns)
        assert (task.turns, task.invalid_turns) == (3, invalid)
        assert (task.success, task.score) == (play.success, play.score)


@pytest.mark.slow
def test_a_small_model_learns_from_demonstrations() -> None:
    """A model of 60,000 parameters learns to go where the expert goes."""
    pool = EnvPool(
        EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=20), "train"
    )
    episodes = demonstrate(pool, 48, 0.1, seed=1)
    assert any(not turn.is_trained for episode in episodes for turn in episode.turns)
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    dialogue = DialogueEncoder(tokenizer)
    policy = build_policy(SHAPE, tokenizer, seed=0)
    trajectories = [tokenize(episode, dialogue) for episode in episodes]
    losses = train_on_demonstrations(policy, trajectories, epochs=10, lr=(3e-3, 1.8e-2), seed=0)
    assert len(losses) == 120
    assert losses[0] > 4.5
    assert losses[-1] < 0.5 * losses[0]


def test_a_turn_of_all_episodes_in_a_server_is_one_request(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    request = ServedConnection.request

    def count(
        self: ServedConnection, method: str, path: str, body: Any = None, **options: Any
    ) -> dict[str, Any]:
        if path in ("/batch/create", "/batch/step"):
            sizes.extend(len(items) for items in body.values())
        return request(self, method, path, body, **options)

    monkeypatch.setattr(ServedConnection, "request", count)
    config = EnvConfig(
        id="atod/WebShop-v0", data="generated", options={"products": 30}, max_turns=3
    )
    shops = EnvPool(config, "train")
    generator = Generator(policy, DialogueEncoder(policy.tokenizer), max_completion_tokens=5)
    records = collect(shops, generator, shops.task_ids[:2], group_size=2, turn_limit=3)
    shops.close()
    assert [record.task_id for record in records] == [t for t in shops.task_ids[:2] for _ in "ab"]
    assert all(len(record.turns) == 3 and record.score == 0.0 for record in records)
    assert sizes == [4] * 4
