from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from atod_gym.dialogue import AgentDialogue
from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import PARSE_PROFILES, ParseProfile
from atod_gym.prompts import reply_format
from atod_gym.wrappers import (
    ChatPrompt,
    History,
    InvalidActionPenalty,
    ParseAction,
    agent_env,
)

Env = gymnasium.Env[Any, str]


def make(**changes: Any) -> Env:
    settings = {"data": "generated", "house_size": "tiny", "max_turns": 6, **changes}
    return gymnasium.make("atod/ALFWorld-v0", **settings)


def full_stack(env: Env) -> Env:
    env = History(env, window=3)
    return ChatPrompt(InvalidActionPenalty(ParseAction(env, "compat"), 0.1, "either"), "chat")


STACKS: list[Callable[[Env], Env]] = [
    History,
    ParseAction,
    lambda env: InvalidActionPenalty(env, 0.5),
    lambda env: ChatPrompt(ParseAction(env), style="chat"),
    agent_env,
    lambda env: agent_env(env, profile="plain", style="window", history_window=4),
    full_stack,
]


@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_passes_every_check(stack: Callable[[Env], Env]) -> None:
    with warnings.catch_warnings():
        # The checker prefers bare environments; here the wrappers are what is checked.
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version")
        check_env(stack(make()))


@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_can_be_made_again_from_its_spec(stack: Callable[[Env], Env]) -> None:
    env = stack(make())
    assert env.spec is not None
    copy = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert str(copy) == str(env)
    assert copy.observation_space == env.observation_space
    assert copy.reset(seed=4) == env.reset(seed=4)
    assert copy.step("<think>x</think><action>look</action>") == env.step(
        "<think>x</think><action>look</action>"
    )


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_stacks_work_in_vector_environments(mode: str) -> None:
    more = {"shared_memory": False} if mode == "async" else {}
    envs = gymnasium.make_vec(
        "atod/ALFWorld-v0", num_envs=2, vectorization_mode=mode, wrappers=(agent_env,),
        vector_kwargs=more, data="generated", house_size="tiny",
    )  # fmt: skip
    try:
        prompts, _ = envs.reset(seed=0)
        assert [prompt[0]["role"] for prompt in prompts] == ["user", "user"]
        prompts, *_, infos = envs.step(("<action>look</action>", "look"))
        assert [len(prompt) for prompt in prompts] == [3, 3]
        assert list(infos["action"]) == ["look", ""]
    finally:
        envs.close()


def test_parse_action_executes_the_action_and_reports_the_format() -> None:
    env = ParseAction(make(), profile="tags")
    env.reset(seed=0)
    *_, info = env.step("<think>hm</think><action>look</action>")
    assert (info["action"], info["parse_error"], info["is_action_valid"]) == ("look", "", True)
    observation, *_, info = env.step("look")
    assert observation["text"] == "Nothing happens."
    assert (info["action"], info["is_action_valid"]) == ("", False)
    assert "no <action>" in info["parse_error"]
    with pytest.raises(TypeError, match="str, not NoneType"):
        env.step(None)  # type: ignore[arg-type]


def test_compat_executes_the_end_of_a_completion() -> None:
    env = ParseAction(make(), profile="compat", last_characters=4)
    env.reset(seed=0)
    *_, info = env.step("I will LOOK")
    assert (info["action"], info["is_action_valid"]) == ("look", True)
    assert info["parse_error"]


def test_history_keeps_the_last_turns() -> None:
    env = History(make(), window=2)
    texts = [env.reset(seed=0)[0]["text"]]
    assert env.reset(seed=0)[0]["history"] == ()
    for action in ("look", "inventory", "nonsense"):
        observation = env.step(action)[0]
        texts.append(observation["text"])
    assert observation["history"] == (
        {"text": texts[1], "action": "inventory"},
        {"text": texts[2], "action": "nonsense"},
    )
    assert observation in env.observation_space
    assert env.reset(seed=0)[0]["history"] == ()
    none = History(make(), window=0)
    none.reset(seed=0)
    assert none.step("look")[0]["history"] == ()


def test_chat_prompts_extend_each_other_and_keep_raw_completions() -> None:
    env = agent_env(make(), profile="tags", style="chat")
    prompt, _ = env.reset(seed=0)
    assert [message["role"] for message in prompt] == ["user"]
    assert "Your task: " in prompt[0]["content"]
    completions = ["<think>hm</think><action>look</action>", "no tags {at} all"]
    for completion in completions:
        longer, *_, info = env.step(completion)
        assert longer[: len(prompt)] == prompt
        assert longer[len(prompt)] == {"role": "assistant", "content": completion}
        assert longer[-1]["role"] == "user"
        assert len(longer) == len(prompt) + 2
        prompt = longer
    assert (info["action"], bool(info["parse_error"])) == ("", True)
    assert len(env.reset()[0]) == 1


def test_window_prompts_can_be_shortened(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("{instruction}\n\nBefore:\n{history}\n\nNow: {text}", encoding="utf-8")
    for template in (None, path):
        env: Any = agent_env(
            make(), profile="plain", style="window", history_window=2, template=template
        )
        (message,), _ = env.reset(seed=0)
        for past_turns in (0, 1, 2, 2):
            dialogue: AgentDialogue = env.get_wrapper_attr("dialogue")
            assert dialogue.past_turns == past_turns
            for left_out in range(1, past_turns + 1):
                [shorter] = dialogue.shortened(left_out)
                assert f"[{left_out} earlier turn" in shorter["content"]
                assert shorter["content"].count("you did: look") == past_turns - left_out
                assert (
                    shorter["content"].split("Now: ")[1:] == message["content"].split("Now: ")[1:]
                )
            for left_out in (-1, past_turns + 1):
                with pytest.raises(InvalidSettingError, match=f"{left_out} turns cannot be left"):
                    dialogue.shortened(left_out)
            # Nothing of this changes the prompt.
            assert dialogue.shortened(0) == (message,)
            (message,), *_ = env.step("look")


def test_window_prompts_are_one_message_with_the_last_turns() -> None:
    env = agent_env(make(), profile="plain", style="window", history_window=1)
    env.reset(seed=0)
    env.step("look")
    prompt, *_ = env.step(" inventory\n")
    assert [message["role"] for message in prompt] == ["user"]
    content = prompt[0]["content"]
    assert "This is turn 3." in content
    assert "[turn 2] you did: inventory" in content
    assert "[turn 1]" not in content
    assert "Reply with the next action alone." in content
    hidden = agent_env(make(), style="window", show_admissible=False).reset(seed=0)[0]
    assert "go to " not in hidden[0]["content"]


def test_a_template_file_replaces_the_default(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("First: {instruction}\n---\nThen: {text}", encoding="utf-8")
    env = agent_env(make(), template=path)
    prompt, _ = env.reset(seed=0)
    assert prompt[0]["content"].startswith("First: ")
    assert env.step("x")[0][-1]["content"] == "Then: Nothing happens."
    assert env.spec is not None
    assert str(path) in env.spec.to_json()


@pytest.mark.parametrize(
    ("validity", "rewards"),
    [("strict", [0.0, -0.5, -0.5, 0.0]), ("format", [0.0, 0.0, -0.5, -0.5]),
     ("either", [0.0, -0.5, -0.5, -0.5])],
)  # fmt: skip
def test_penalties_follow_the_notion_of_validity(validity: Any, rewards: list[float]) -> None:
    env = InvalidActionPenalty(ParseAction(make(), profile="compat"), 0.5, validity)
    env.reset(seed=0)
    completions = [
        "<think></think><action>look</action>",
        "<think></think><action>nonsense</action>",
        "nonsense",
        "<action>look</action>",
    ]
    assert [env.step(completion)[1] for completion in completions] == rewards


@pytest.mark.parametrize("profile", PARSE_PROFILES)
def test_prompts_describe_the_profile_that_parses(profile: ParseProfile) -> None:
    env = ChatPrompt(ParseAction(make(), profile))
    [message] = env.reset(seed=0)[0]
    assert reply_format(profile) in message["content"]
    assert env.dialogue.completion_format.profile == profile
    penalized = InvalidActionPenalty(agent_env(make(), profile=profile), 0.5, "format")
    penalized.reset(seed=0)
    assert penalized.step("")[1] == -0.5


def test_wrong_settings_are_named() -> None:
    env = make()
    parsing = ParseAction(env)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ParseAction(env, profile="xml"), "plain, tags, react, compat"),  # type: ignore[arg-type]
        (lambda: ParseAction(env, last_characters=-1), "last_characters"),
        (lambda: History(env, window=-1), "window"),
        (lambda: InvalidActionPenalty(env, -0.1), "penalty"),
        (lambda: InvalidActionPenalty(env, float("nan")), "penalty"),
        (lambda: InvalidActionPenalty(env, 0.1, "loose"), "strict, format, either"),  # type: ignore[arg-type]
        (lambda: ChatPrompt(parsing, style="mail"), "window, chat"),  # type: ignore[arg-type]
        (lambda: ChatPrompt(parsing, template="nowhere.txt"), "nowhere.txt"),
        (lambda: ChatPrompt(env), "needs ParseAction inside"),
        (lambda: ParseAction(parsing), "inside already"),
        (lambda: agent_env(parsing), "inside already"),
        (lambda: History(ChatPrompt(parsing)), "inside ChatPrompt"),
        (lambda: ChatPrompt(ChatPrompt(parsing)), "inside ChatPrompt"),
        (lambda: InvalidActionPenalty(env, 0.1, "format"), "'format' needs ParseAction inside"),
        (lambda: InvalidActionPenalty(env, 0.1, "either"), "'either' needs ParseAction inside"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidSettingError, match=message):
            call()
