"""The agents that need no model, in all environments, and what plays many of them at once."""

from __future__ import annotations

import asyncio
import builtins
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from echo_env import ENV_ID, TASK_IDS, EchoEnv

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.config import EnvConfig
from atod_train.evaluation.agents import (
    Agent,
    Completion,
    ExpertAgent,
    HumanAgent,
    RandomAgent,
    load_agent,
)
from atod_train.evaluation.eval_records import EpisodeRecord
from atod_train.evaluation.play import AgentPlayer
from atod_train.rollout.env_pool import EnvPool


def env_of(env_id: str, split: str, **options: Any) -> tuple[EnvConfig, str]:
    """An environment with the prompts of models that reason, and a split."""
    data = "generated" if options else "auto"
    config = EnvConfig(
        env_id, data, options, max_turns=0, parse_profile="tags", show_admissible=True
    )
    return config, split


ECHO = env_of(ENV_ID, "test")
GENERATED = {
    "homes": env_of("atod/ALFWorld-v0", "valid_unseen", house_size="tiny"),
    "shop": env_of("atod/WebShop-v0", "test", products=60),
    "questions": env_of("atod/SearchQA-v0", "test", entities=60),
}


def played(
    env: tuple[EnvConfig, str],
    make_agent: Any,
    *,
    tasks: int | Sequence[str] = 8,
    concurrency: int = 1,
) -> list[EpisodeRecord]:
    """The records of the first tasks, sorted by task."""
    records: list[EpisodeRecord] = []
    with closing(EnvPool(*env)) as first:
        task_ids = first.task_ids[:tasks] if isinstance(tasks, int) else tasks
        player = AgentPlayer("", "sampled", make_agent, {})
        player.play(first, task_ids, records.append, concurrency=concurrency)
    assert sorted(record.task_id for record in records) == sorted(task_ids)
    return sorted(records, key=lambda record: record.task_id)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_random_play_does_not_depend_on_concurrency(name: str) -> None:
    env = GENERATED[name]
    one = played(env, lambda: RandomAgent(3))
    many = played(env, lambda: RandomAgent(3), concurrency=4)
    other = played(env, lambda: RandomAgent(4))
    assert one == many
    assert one != other
    assert all(not turn["parse_error"] for record in one for turn in record.transcript)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_expert_solves_generated_tasks(name: str, style: Any) -> None:
    config, split = GENERATED[name]
    records = played(
        (replace(config, prompt_style=style), split), ExpertAgent, tasks=12, concurrency=3
    )
    assert sum(record.success for record in records) >= 11
    assert sum(record.invalid_turns for record in records) == 0
    assert all(record.stop_reason == "terminated" for record in records if record.success)


def test_random_words_where_there_is_no_list() -> None:
    records = played(GENERATED["questions"], RandomAgent, tasks=20)
    turns = [turn for record in records for turn in record.transcript]
    for turn in turns:
        tag, _, words = turn["action"].rstrip("]").partition("[")
        assert tag in ("search", "answer")
        assert 1 <= len(words.split()) <= 3
    first = records[0].transcript[0]
    words = first["action"].rstrip("]").partition("[")[2]
    assert words in " ".join(re.findall(r"\w+", first["messages"][-1]["content"]))
    assert {turn["action"][0] for turn in turns} == {"s", "a"}


class _Slow:
    """Says what the expert says, some time later."""

    now = most = 0

    def __init__(self) -> None:
        self._expert = ExpertAgent()

    def reset(self, episode: Any, observation: Any, info: Any) -> None:
        self._expert.reset(episode, observation, info)

    async def act(self, messages: Any, observation: Any, info: Any) -> Completion:
        _Slow.now += 1
        _Slow.most = max(_Slow.most, _Slow.now)
        await asyncio.sleep(0.01)
        _Slow.now -= 1
        return await self._expert.act(messages, observation, info)


def test_as_many_episodes_at_once_as_wanted() -> None:
    records = played(ECHO, _Slow, tasks=20, concurrency=7)
    assert all(record.success for record in records)
    assert _Slow.most == 7


class _Failing(_Slow):
    """Fails at one task."""

    async def act(self, messages: Any, observation: Any, info: Any) -> Completion:
        if info["task_id"] == TASK_IDS[5]:
            raise AtodError("broken")
        return await super().act(messages, observation, info)


def test_an_error_ends_all_and_closes_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(EchoEnv, "close", lambda self: closed.append(id(self)))
    with pytest.raises(AtodError, match="broken"):
        played(ECHO, _Failing, tasks=20, concurrency=3)
    assert len(closed) == len(set(closed)) == 3


def test_a_step_is_waited_for_where_an_agent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    step = EchoEnv.step

    def slow(self: EchoEnv, action: str) -> Any:
        events.append("begin")
        time.sleep(0.2)
        events.append("end")
        return step(self, action)

    monkeypatch.setattr(EchoEnv, "step", slow)
    monkeypatch.setattr(EchoEnv, "close", lambda self: events.append("close"))
    turns: list[Any] = []

    class Second(ExpertAgent):
        async def act(self, messages: Any, observation: Any, info: Any) -> Completion:
            turns.append(info)
            if len(turns) == 1:
                return await super().act(messages, observation, info)
            await asyncio.sleep(0.1)
            raise AtodError("broken")

    with pytest.raises(AtodError, match="broken"):
        played(ECHO, Second, tasks=2, concurrency=2)
    assert events == ["begin", "end", "close", "close"]


async def _text(*_: Any) -> str:
    return "look"


def test_an_agent_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_agent.py").write_text(
        "from atod_train.evaluation.agents import Completion\n"
        "class Mine:\n"
        "    def reset(self, episode, observation, info): pass\n"
        "    async def act(self, messages, observation, info):\n"
        "        return Completion('<action>say amber</action>', 5, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    make = load_agent("my_own_agent:Mine")
    [record] = played(ECHO, make, tasks=1)
    assert (record.prompt_tokens, record.completion_tokens, record.turns) == (10, 4, 2)
    assert record.actions == (("say", 2),)
    for name in ("my_own_agent:Missing", "no_such_module:Mine", "my_own_agent:", ":Mine"):
        with pytest.raises(InvalidSettingError, match="There is no agent"):
            load_agent(name)
    words = r"must return an atod_train\.evaluation\.agents\.Completion, not str"
    monkeypatch.setattr(make, "act", _text)
    with pytest.raises(AtodError, match=words):
        played(ECHO, make, tasks=1)


def test_a_person_plays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["99", "1", "say birch"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(answers))
    [record] = played(ECHO, HumanAgent, tasks=["amber birch"])
    shown = capsys.readouterr().out
    assert record.success
    assert "Goal: say amber birch ." in shown
    assert "  1  say amber" in shown
    assert "There is no action 99" in shown


@pytest.mark.parametrize("answer", ["q", EOFError, KeyboardInterrupt])
def test_a_person_leaves(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def say(prompt: str) -> str:
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr(builtins, "input", say)
    with pytest.raises(KeyboardInterrupt):
        played(ECHO, HumanAgent, tasks=1)


def test_an_environment_without_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EchoEnv, "expert")
    with pytest.raises(InvalidSettingError, match="EchoEnv has no scripted expert"):
        played(ECHO, ExpertAgent, tasks=1)


def test_agents_satisfy_the_protocol() -> None:
    agents: list[Agent] = [RandomAgent(), ExpertAgent(), HumanAgent(), _Slow()]
    assert agents


@pytest.mark.slow
def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from atod_train.evaluation.eval_cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "status = main(['--agent', 'random', '--split', 'train', '--data', 'generated',"
        " '--option', 'house_size=tiny', '--tasks', '2', '--out', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'matplotlib', 'openai'}\n"
        "print(status, sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "usage: atod-eval" in result.stdout
    value = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(value["tasks"]) == 2
