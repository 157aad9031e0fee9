"""Episodes through verifiers are those of the gym environments, whatever the model says."""

from __future__ import annotations

import asyncio
import functools
import json
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import chat_server, completion
from direct_play import SMALL, expert_actions, play_completions, some_task_ids

from atod_gym.adapters.verifiers import PLUGIN_ID, REWARD, load_environment, load_plugin
from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.envs.search_qa.env import SearchQAEnv
from atod_gym.envs.webshop.env import WebShopEnv
from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import CompletionFormat, action_tags

vf = pytest.importorskip(
    "verifiers.v1", reason="verifiers is not installed: pip install 'atod-gym[verifiers]'"
)
EXAMPLE = (
    Path(__file__).resolve().parents[2] / "atod_gym" / "adapters" / "examples" / "verifiers_eval.py"
)
ALFWORLD = "atod/ALFWorld-v0"
TAGS = {
    ALFWORLD: action_tags(ALFWorldEnv.metadata),
    "atod/WebShop-v0": action_tags(WebShopEnv.metadata),
    "atod/SearchQA-v0": action_tags(SearchQAEnv.metadata),
}


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with chat_server() as url:
        yield url


def small_environment(env_id: str = ALFWORLD, **settings: Any) -> Any:
    env = load_environment(env_id, **{**SMALL[env_id], **settings})
    env.config.retries.max_retries = 0
    return env


def play(env: Any, base_url: str, model: str, task_ids: tuple[str, ...]) -> list[Any]:
    """The episodes of some tasks, all at once."""
    client = vf.EvalClientConfig(base_url=base_url, api_key_var="NO_SUCH_KEY")
    context = vf.ModelContext(model=model, client=client)

    async def run() -> list[Any]:
        async with env.serving():
            tasks = env.taskset.include(ids=list(task_ids))
            slots = [slot for task in tasks for slot in env.slots(task)]
            return await asyncio.gather(*(env.run_slot(slot, context) for slot in slots))

    return asyncio.run(run())


def said(trace: Any, *, sampled: bool) -> list[str]:
    """Return the model's texts, or the texts that it received, in order."""
    role = "assistant" if sampled else "user"
    contents = [n.message.content for n in trace.nodes if n.message.role == role]
    return ["" if content is None else content for content in contents]


class Counter:
    """Counts the gym environments of a kind that are opened, and those still open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: set[int] = set()
        self.open: set[int] = set()
        self.kept: list[Any] = []
        make, close = ALFWorldEnv.__init__, ALFWorldEnv.close

        def counted_make(env: Any, *args: Any, **kwargs: Any) -> None:
            make(env, *args, **kwargs)
            self.kept.append(env)  # else another may get the same id
            self.opened.add(id(env))
            self.open.add(id(env))

        def counted_close(env: Any) -> None:
            close(env)
            self.open.discard(id(env))

        monkeypatch.setattr(ALFWorldEnv, "__init__", counted_make)
        monkeypatch.setattr(ALFWorldEnv, "close", counted_close)


@pytest.mark.parametrize("style", ["chat", "window"])
@pytest.mark.parametrize("env_id", SMALL)
def test_an_episode_is_that_of_the_gym_environment(env_id: str, style: Any, base_url: str) -> None:
    task_ids = some_task_ids(env_id, 2)
    env = small_environment(env_id, prompt_style=style, history_window=3)
    episodes = play(env, base_url, "any", task_ids)
    assert {episode.task.data.id for episode in episodes} == set(task_ids)
    for episode in episodes:
        assert episode.ok, episode.errors
        [trace] = episode.traces
        direct = play_completions(
            env_id,
            episode.task.data.id,
            functools.partial(completion, "any"),
            style=style,
            history_window=3,
        )
        assert said(trace, sampled=False) == direct["prompts"]
        assert said(trace, sampled=True) == direct["completions"]
        assert len(trace.branches) == (1 if style == "chat" else len(direct["prompts"]))
        assert trace.reward == trace.rewards[REWARD].score == sum(direct["rewards"])
        assert trace.stop_condition == direct["end"]
        info = direct["infos"][-1]
        valid = [info["is_action_valid"] for info in direct["infos"]]
        assert trace.metrics == {
            "success": float(info["success"]),
            "score": info["score"],
            "turns": len(valid),
            "invalid_share": pytest.approx(valid.count(False) / len(valid)),
            "malformed_share": 0.0,
        }
        assert trace.info["atod"] == {
            name: info[name] for name in ("task_id", "task_type", "split", "data")
        }


@pytest.mark.parametrize("style", ["chat", "window"])
@pytest.mark.parametrize("env_id", SMALL)
def test_right_actions_have_the_rewards_of_gymnasium(
    env_id: str, style: Any, base_url: str, tmp_path: Path
) -> None:
    task_ids = some_task_ids(env_id, 3)
    env = small_environment(env_id, prompt_style=style, max_turns=50)
    tags = TAGS[env_id]
    script, earned = {}, {}
    for task_id in task_ids:
        instruction, actions, earned[task_id] = expert_actions(env_id, task_id)
        script[instruction] = [CompletionFormat("tags", tags).format(action) for action in actions]
    (tmp_path / "script.json").write_text(json.dumps(script))
    episodes = play(env, base_url, f"replay:{tmp_path / 'script.json'}", task_ids)
    assert {e.task.data.id: e.traces[0].reward for e in episodes} == earned
    assert max(earned.values()) == 1.0


@pytest.mark.parametrize("model", ["malformed", "empty"])
def test_malformed_completions_cost_turns(model: str, base_url: str) -> None:
    [episode] = play(small_environment(), base_url, model, some_task_ids(ALFWORLD, 1))
    assert episode.ok, episode.errors
    [trace] = episode.traces
    turns = SMALL[ALFWORLD]["max_turns"]
    assert (trace.metrics["turns"], trace.stop_condition) == (turns, "truncated")
    assert trace.metrics["malformed_share"] == trace.metrics["invalid_share"] == 1.0
    assert trace.reward == 0.0


def test_a_limit_of_the_agent_ends_the_episode(base_url: str) -> None:
    env = small_environment()
    env.config.agent.max_turns = 3
    [episode] = play(env, base_url, "any", env.taskset.task_ids[:1])
    assert episode.ok, episode.errors
    [trace] = episode.traces
    assert (trace.metrics["turns"], trace.stop_condition) == (3, "max_turns")


def test_a_system_prompt_comes_first(base_url: str, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be quick.")
    plugin = load_plugin()
    taskset = plugin.taskset_config(
        id=PLUGIN_ID, system_prompt=tmp_path / "system.txt", max_turns=4, data="generated"
    )
    env = plugin.environment(plugin.environment_config(taskset=taskset))
    [episode] = play(env, base_url, "any", env.taskset.task_ids[:1])
    [trace] = episode.traces
    [branch] = trace.branches
    assert [m.role for m in branch.messages] == ["system", *["user", "assistant"] * 4]
    assert branch.messages[0].content == "Be quick."


def test_episodes_at_once_have_environments_of_their_own(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_ids = some_task_ids(ALFWORLD, 8)
    env = small_environment()
    counter = Counter(monkeypatch)
    episodes = play(env, base_url, "any", task_ids)
    assert len(episodes) == len(counter.opened) == 8
    assert counter.open == set()
    played = sorted(episode.traces[0].info["atod"]["task_id"] for episode in episodes)
    assert played == sorted(task_ids)


def test_a_model_that_fails_leaves_no_environment_open(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_environment()
    counter = Counter(monkeypatch)
    [episode] = play(env, base_url, "broken", env.taskset.task_ids[:1])
    assert not episode.ok
    assert "this model is broken" in episode.traces[0].errors[0].message
    assert (len(counter.opened), counter.open) == (1, set())


def test_an_environment_that_fails_is_closed(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_environment()
    counter = Counter(monkeypatch)

    def fail(*_: object) -> None:
        raise RuntimeError("the stove is on fire")

    monkeypatch.setattr(ALFWorldEnv, "_play", fail)
    [episode] = play(env, base_url, "any", env.taskset.task_ids[:1])
    assert not episode.ok
    assert "the stove is on fire" in episode.errors[0].message
    assert (len(counter.opened), counter.open) == (1, set())


def test_an_episode_that_is_cancelled_closes_its_environment(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_environment(max_turns=100_000)
    counter = Counter(monkeypatch)
    client = vf.EvalClientConfig(base_url=base_url, api_key_var="NO_SUCH_KEY")
    context = vf.ModelContext(model="first", client=client)

    async def run() -> None:
        async with env.serving():
            [slot] = env.slots(next(iter(env.taskset)))
            running = asyncio.ensure_future(env.run_slot(slot, context))
            while not counter.open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(run())
    assert (len(counter.opened), counter.open) == (1, set())


def test_a_missing_task_fails_its_episode_only(base_url: str) -> None:
    env = small_environment()
    context = vf.ModelContext(
        model="any", client=vf.EvalClientConfig(base_url=base_url, api_key_var="NO_SUCH_KEY")
    )

    async def run() -> Any:
        async with env.serving():
            [slot] = env.slots(next(iter(env.taskset)).with_data(id="no-such-task"))
            return await env.run_slot(slot, context)

    episode = asyncio.run(run())
    assert not episode.ok
    assert "No task 'no-such-task'" in episode.errors[0].message


def test_tasks_are_the_task_ids_in_manifest_order() -> None:
    env = small_environment(tasks=5)
    assert [task.key for task in env.taskset] == list(env.taskset.task_ids)
    assert len(env.taskset.task_ids) == 5
    assert len(small_environment().taskset.task_ids) > 1000
    assert small_environment(split="valid_seen").taskset.task_ids != env.taskset.task_ids


def test_verifiers_itself_loads_the_plugin_by_its_name() -> None:
    taskset = {"id": PLUGIN_ID, "env_id": ALFWORLD, "options": {"house_size": "tiny"}}
    env = vf.load_environment(vf.resolve_env_config({"taskset": taskset}))
    assert type(env) is load_plugin().environment
    assert vf.default_harness_id(PLUGIN_ID) == PLUGIN_ID


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_style": "dialogue"}, "prompt_style"),
        ({"parse_profile": "xml"}, "parse_profile"),
        ({"tasks": 0}, "tasks"),
        ({"colour": "red"}, "colour"),
        ({"max_turns": 0}, "max_turns"),
        ({"history_window": -1, "prompt_style": "window"}, "window"),
    ],
)
def test_settings_without_a_meaning_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        small_environment(**settings)


def test_window_style_refuses_a_harness_that_keeps_the_dialogue() -> None:
    plugin = load_plugin()
    taskset = plugin.taskset_config(id=PLUGIN_ID, data="generated", prompt_style="window")
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    with pytest.raises(InvalidSettingError, match="window style"):
        plugin.environment(plugin.environment_config(taskset=taskset, agent=agent))


def test_vf_eval_runs_it(base_url: str, tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts")) / "vf-eval"
    options = {"env-id": ALFWORLD, "data": "generated", "options": '{"house_size": "tiny"}'}
    options["max-turns"] = "7"
    result = subprocess.run(
        [
            *(str(command), PLUGIN_ID, "-n", "2", "-r", "2", "-m", "any"),
            *("--no-push", "--no-rich", "-o", str(tmp_path), "--client.base-url", base_url),
            *(part for name, value in options.items() for part in (f"--env.taskset.{name}", value)),
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    [traces] = tmp_path.glob("*/traces.jsonl")
    episodes = [json.loads(line) for line in traces.read_text().splitlines()]
    assert len(episodes) == 4
    for episode in episodes:
        [trace] = episode["traces"]
        assert trace["ok"]
        assert trace["metrics"]["turns"] == 7
        assert trace["info"]["atod"]["data"] == "generated"


@pytest.mark.usefixtures("no_user_data")
def test_the_example_runs(
    base_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    options = ["--base-url", base_url, "--model", "any", "--tasks", "2", "--max-turns", "5"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("after 5 turns" in line for line in lines)
    assert last == "success: 0 of 2"
