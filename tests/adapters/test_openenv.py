"""Episodes through an OpenEnv server and its client are those of the gym environments."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import runpy
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from chat_server import completion
from direct_play import SMALL, expert_actions, play_completions, some_task_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.errors import InvalidSettingError
from atod_gym.prompts import shown_text

pytest.importorskip(
    "openenv.core", reason="OpenEnv is not installed: pip install 'atod-gym[openenv]'"
)

from atod_gym.adapters.openenv import (
    AtodAction,
    AtodClient,
    AtodState,
    load_types,
    main,
    make_app,
)

EXAMPLE = (
    Path(__file__).resolve().parents[2] / "atod_gym" / "adapters" / "examples" / "openenv_client.py"
)
ALFWORLD = "atod/ALFWorld-v0"
GUIDE = Path(__file__).resolve().parents[2] / "atod_gym/README.md"


@contextlib.contextmanager
def served(env_id: str, *arguments: str) -> Iterator[str]:
    """The server in a process of its own; gives its URL."""
    command = [sys.executable, "-W", "error", "-m", "atod_gym.adapters.openenv", "--port", "0"]
    command += ["--env-id", env_id, "--options", json.dumps(SMALL[env_id]), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@contextlib.contextmanager
def served_here(app: Any) -> Iterator[str]:
    """An application in a thread of this process; gives its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=SMALL)
def small_server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A server for each environment, one of them as users start it; gives the env id and a URL."""
    env_id = request.param
    if env_id == "atod/WebShop-v0":
        with served(env_id) as url:
            yield env_id, url
    else:
        with served_here(make_app(env_id, **SMALL[env_id])) as url:
            yield env_id, url


@pytest.fixture(scope="module")
def house() -> Iterator[str]:
    """A server of ALFWorld in this process."""
    with served_here(make_app(ALFWORLD, **SMALL[ALFWORLD])) as url:
        yield url


@pytest.fixture(scope="module")
def chatting_house() -> Iterator[str]:
    """The same for completions."""
    app = make_app(
        ALFWORLD, completions=True, prompt_options={"style": "window"}, **SMALL[ALFWORLD]
    )
    with served_here(app) as url:
        yield url


def call(url: str, body: Any = None) -> tuple[int, Any]:
    """A plain HTTP request; its status and what it answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_an_episode_is_that_of_the_gym_environment(small_server: tuple[str, str]) -> None:
    env_id, url = small_server
    env = gymnasium.make(env_id, **SMALL[env_id])
    with AtodClient(base_url=url).sync() as client:
        for task_id in some_task_ids(env_id, 3):
            _, actions, earned = expert_actions(env_id, task_id)
            nonsense = ["", "fly to the moon", "search[", "\U0001f600 [] \u0000"]
            observation, info = env.reset(options={"task_id": task_id})
            result = client.reset(task_id=task_id)
            assert_same(result, observation, info)
            assert (result.reward, result.done) == (None, False)
            total = 0.0
            for action in [*nonsense[: len(nonsense) if earned == 0 else 1], *actions]:
                observation, reward, terminated, truncated, info = env.step(action)
                result = client.step(action)
                assert_same(result, observation, info)
                assert (result.reward, result.done) == (reward, terminated or truncated)
                assert result.observation.terminated == terminated
                assert result.observation.truncated == truncated
                total += reward
                if result.done:
                    break
            state = client.state()
            assert (state.task_id, state.total_reward) == (task_id, total)
            assert (state.step_count, state.split) == (info["turn_index"], "train")
    env.close()


def assert_same(result: Any, observation: dict[str, Any], info: dict[str, Any]) -> None:
    # Agents read why an action did nothing behind the text.
    shown = {**observation, "text": shown_text(observation, info)}
    for name, value in shown.items():
        served_value = getattr(result.observation, name)
        assert served_value == (list(value) if isinstance(value, tuple) else value), name
    same = json.loads(json.dumps(info))
    assert result.metadata == same
    assert result.observation.metadata == result.metadata


def test_completions_are_parsed_and_prompts_come_back(chatting_house: str) -> None:
    model = functools.partial(completion, "any")
    task_id = some_task_ids(ALFWORLD, 1)[0]
    direct = play_completions(ALFWORLD, task_id, model, style="window")
    with AtodClient(base_url=chatting_house).sync() as client:
        result = client.reset(task_id=task_id)
        prompts, rewards = [], []
        while not result.done:
            prompts.append(result.observation.messages[-1]["content"])
            result = client.step(AtodAction(text=model(result.observation.messages)))
            rewards.append(result.reward)
        assert result.observation.instruction
        assert result.observation.text
    assert (prompts, rewards) == (direct["prompts"], direct["rewards"])


@pytest.mark.parametrize("model", ["malformed", "empty"])
def test_malformed_completions_cost_turns(model: str, chatting_house: str) -> None:
    with AtodClient(base_url=chatting_house).sync() as client:
        result = client.reset(seed=1)
        while not result.done:
            result = client.step(completion(model, []))
            assert result.metadata["parse_error"]
            assert not result.metadata["is_action_valid"]
    assert result.observation.truncated
    assert result.observation.turn_index == SMALL[ALFWORLD]["max_turns"]


@given(texts=st.lists(st.text(st.characters(codec=None)), min_size=1, max_size=5))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_an_action(texts: list[str], house: str) -> None:
    with AtodClient(base_url=house).sync() as client:
        client.reset(seed=0)
        for turn, text in enumerate([*texts, "lone \ud800"], 1):
            assert client.step(text).observation.turn_index == turn


def test_sessions_at_once_have_episodes_of_their_own(
    house: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_ids = some_task_ids(ALFWORLD, 8)
    opened, still_open = [], []
    make, close = ALFWorldEnv.__init__, ALFWorldEnv.close

    def counted_make(env: Any, *args: Any, **kwargs: Any) -> None:
        make(env, *args, **kwargs)
        opened.append(env)
        still_open.append(env)

    def counted_close(env: Any) -> None:
        close(env)
        if env in still_open:
            still_open.remove(env)

    monkeypatch.setattr(ALFWorldEnv, "__init__", counted_make)
    monkeypatch.setattr(ALFWorldEnv, "close", counted_close)

    async def session(task_id: str) -> None:
        async with AtodClient(base_url=house) as client:
            result = await client.reset(task_id=task_id)
            instruction = result.observation.instruction
            while not result.done:
                assert result.metadata["task_id"] == task_id
                assert result.observation.instruction == instruction
                result = await client.step(result.observation.admissible_actions[0])
            state = await client.state()
            assert (state.task_id, state.step_count) == (task_id, 12)

    async def all_sessions() -> None:
        await asyncio.gather(*map(session, task_ids))
        # The server closes an environment when it has seen its client leave.
        while still_open:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(all_sessions(), 60))
    assert len(opened) == 8


def test_a_session_too_many_is_refused() -> None:
    with served_here(make_app(ALFWORLD, max_sessions=1, **SMALL[ALFWORLD])) as url:
        first, second = (AtodClient(base_url=url).sync() for _ in range(2))
        with first, second:
            first.reset()
            with pytest.raises(RuntimeError, match="CAPACITY_REACHED"):
                second.reset()
            first.step("look")


def test_errors_come_in_the_form_of_openenv_and_end_no_session(house: str) -> None:
    with AtodClient(base_url=house).sync() as client:
        assert client.state() == AtodState(env_id=ALFWORLD)
        for reset, message in [
            ({"task_id": "no such task"}, "No task 'no such task'"),
            ({"task_id": 7}, "No task '7'"),
            ({"index": 10**6}, "No task 1000000"),
            ({"index": True}, "No task True"),
            ({"index": 0, "task_id": "x"}, "not both"),
            ({"split": "valid_seen"}, "plays split 'train'"),
            ({"seed": "one"}, "Seed"),
            ({"tsk_id": "x"}, "Unknown reset option 'tsk_id'"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                client.reset(**reset)
        with pytest.raises(RuntimeError, match=r"reset\(\) before"):
            client.step("look")
        first = client.reset(seed=5, episode_id="mine")
        assert client.state().episode_id == "mine"
        assert client.reset(seed=5).metadata["task_id"] == first.metadata["task_id"]
        result = client.step("look")
        while not result.done:
            result = client.step("look")
        with pytest.raises(RuntimeError, match="the episode is over"):
            client.step("look")
        assert client.reset(index=3).metadata["task_id"] == some_first_task_ids(4)[3]


def some_first_task_ids(number: int) -> tuple[str, ...]:
    env = gymnasium.make(ALFWORLD, **SMALL[ALFWORLD])
    task_ids: tuple[str, ...] = env.get_wrapper_attr("task_ids")
    env.close()
    return task_ids[:number]


def test_an_environment_that_fails_is_named(house: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the stove is on fire")

    with AtodClient(base_url=house).sync() as client:
        client.reset(seed=0)
        with monkeypatch.context() as patched:
            patched.setattr(ALFWorldEnv, "_play", fail)
            with pytest.raises(RuntimeError, match=r"stove is on fire \(code: EXECUTION_ERROR\)"):
                client.step("look")
        assert client.step("look").observation.turn_index == 1


def test_plain_http_routes(house: str) -> None:
    ids = list(some_first_task_ids(3))
    task = {"id": ids[2], "index": 2}
    name = f"{house}/ALFWorld-v0"
    assert call(f"{house}/health")[1] == {"status": "healthy"}
    assert call(f"{house}/metadata")[1]["name"] == ALFWORLD
    schema = call(f"{house}/schema")[1]
    assert schema["action"]["required"] == ["text"]
    assert "admissible_actions" in schema["observation"]["properties"]
    assert "task_id" in schema["state"]["properties"]
    assert [split["name"] for split in call(f"{name}/splits")[1]] == ["train"]
    number = call(f"{name}/num_tasks", {"split": "train"})[1]["num_tasks"]
    assert len(call(f"{name}/tasks", {"split": "train"})[1]["tasks"]) == number
    assert call(f"{name}/task", {"split": "train", "index": 2})[1] == {"task": task}
    ranged = call(f"{name}/task_range", {"split": "train", "start": 1, "stop": 3})[1]["tasks"]
    assert [task["id"] for task in ranged] == ids[1:]
    assert call(f"{name}/task", {"split": "train", "index": number})[0] == 400
    assert call(f"{name}/num_tasks", {"split": "moon"})[0] == 422
    started = call(f"{house}/reset", {"index": 2})[1]
    assert started["metadata"]["task_id"] == ids[2]
    assert call(f"{house}/reset", {"task_id": "x"})[0] == 404
    assert call(f"{house}/reset", {"index": -1})[0] == 404
    assert call(f"{house}/step", {"action": {"text": "look"}})[0] == 409
    assert call(f"{house}/step", {"action": {"txt": "look"}})[0] == 422


def test_buttons_of_the_web_page_are_actions() -> None:
    environment = load_types().environment
    # A placeholder is no action: playing it would cost a turn.
    [(label, action)] = environment.web_actions(
        WithoutCompletions(), {"admissible_actions": ["look", "search[<query>]"]}
    )
    assert (label, AtodAction(**action).text) == ("look", "look")


class WithoutCompletions:
    """All that the buttons ask of a session."""

    class _served:
        completions = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"split": ""}, "split"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"prompt_options": {"style": "chat"}}, "completions"),
        ({"completions": True, "prompt_options": {"style": "poem"}}, "poem"),
        ({"completions": True, "prompt_options": {"size": 3}}, "size"),
    ],
)
def test_settings_without_a_meaning_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        make_app(ALFWORLD, **{**SMALL[ALFWORLD], **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--options", "{"], "--options is not JSON"),
        (["--options", "[]"], "must be a JSON object"),
        (["--options", '{"completions": true}'], "Give completions as --completions"),
        (["--options", '{"env_id": "x"}'], "Give env_id as --env-id"),
        (["--split", "train", "--options", '{"split": "x"}'], "Give split as --split"),
        (["--env-id", "atod/Moon-v0"], "Moon"),
        (["--data", "generated", "--port", "70000"], "port"),
        (["--data", "generated", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_mistakes_on_the_command_line_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_the_example_runs(
    small_server: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    env_id, url = small_server
    kind = {"ALFWorld-v0": "alfworld", "WebShop-v0": "webshop", "SearchQA-v0": "search_qa"}
    options = ["--url", url, "--expert", kind[env_id.rpartition("/")[2]], "--episodes", "4"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    ends = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert len(ends) == 4
    assert any("reward 1, score 1" in end for end in ends)


def test_the_snippet_of_the_guide_plays() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    [snippet] = [block for block in blocks if "openenv" in block]
    played: dict[str, Any] = {}
    with served("atod/WebShop-v0") as url:
        exec(compile(snippet.replace("http://127.0.0.1:8000", url), "README.md", "exec"), played)
    assert played["result"].observation.text
