"""`AgentDialogue`, which holds no environment, against the wrappers around one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest

import atod_gym  # noqa: F401
from atod_gym.dialogue import AgentDialogue
from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import PARSE_PROFILES, ParseProfile
from atod_gym.prompts import PROMPT_STYLES, PromptStyle, PromptTemplate, reply_format
from atod_gym.types import TurnObservation
from atod_gym.wrappers import History, ParseAction, agent_env

REPLIES = ["<think>I look.</think><action>look</action>", "look", "", "<action>dance</action>"]


def make() -> gymnasium.Env[Any, str]:
    return gymnasium.make("atod/ALFWorld-v0", data="generated", house_size="tiny", max_turns=6)


@pytest.mark.parametrize("profile", PARSE_PROFILES)
@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_its_prompts_equal_those_of_the_wrappers(profile: ParseProfile, style: PromptStyle) -> None:
    wrapped: Any = agent_env(make(), profile=profile, style=style)
    env = make()
    dialogue = AgentDialogue(env.unwrapped.metadata, profile=profile, style=style)
    for seed in (0, 1):
        expected = wrapped.reset(seed=seed)[0]
        observation, info = env.reset(seed=seed)
        assert dialogue.reset(observation, info) == expected
        for reply in REPLIES:
            parsed = dialogue.parse(reply)
            observation, *_, info = env.step(parsed.action)
            expected, *_, expected_info = wrapped.step(reply)
            info = {**info, "parse_error": parsed.error}
            assert dialogue.step(reply, parsed, observation, info) == expected
            assert info["action"] == expected_info["action"] == parsed.action
            assert info["parse_error"] == expected_info["parse_error"]
            same = wrapped.get_wrapper_attr("dialogue")
            assert dialogue.past_turns == same.past_turns
            if style == "window":
                assert dialogue.shortened(same.past_turns) == same.shortened(same.past_turns)


def test_an_existing_history_is_shown() -> None:
    env = ParseAction(History(make(), window=3), profile="plain")
    dialogue = AgentDialogue(
        env.unwrapped.metadata, profile="plain", style="window", history_window=1
    )
    dialogue.reset(*env.reset(seed=0))
    for turns in (1, 2, 3, 3):
        observation, *_, info = env.step("look")
        [message] = dialogue.step("look", dialogue.parse("look"), observation, info)
        assert message["content"].count("you did: look") == dialogue.past_turns == turns


def test_dialogues_of_the_chat_style_cannot_be_shortened() -> None:
    dialogue = AgentDialogue({})
    dialogue.reset(played("A room.", 0), {})
    with pytest.raises(InvalidSettingError, match="window style"):
        dialogue.shortened(0)


def test_a_template_may_be_a_file_or_a_template(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{instruction}\n---\nNow: {text}", encoding="utf-8")
    env = make()
    observation, info = env.reset(seed=0)
    template = PromptTemplate("{instruction}", "Now: {text}")
    for given in (tmp_path / "prompt.txt", template):
        dialogue = AgentDialogue({}, template=given)
        assert dialogue.reset(observation, info)[0]["content"] == observation["instruction"]
        assert dialogue.template == template


def test_actions_are_written_and_read() -> None:
    dialogue = AgentDialogue({"action_tags": ("search", "answer")})
    completion = dialogue.format("search[Brenn]")
    assert completion == "<think></think><search>Brenn</search>"
    assert dialogue.parse(completion).action == "search[Brenn]"
    with pytest.raises(TypeError, match="not int"):
        dialogue.parse(3)  # type: ignore[arg-type]


def played(text: str, turn_index: int) -> TurnObservation:
    return {
        "instruction": "find a mug", "text": text, "admissible_actions": (),
        "turn_index": turn_index,
    }  # fmt: skip


def last_prompt(profile: ParseProfile, style: PromptStyle, reply: str, message: str) -> str:
    dialogue = AgentDialogue({}, profile=profile, style=style)
    dialogue.reset(played("A room.", 0), {"message": ""})
    info = {"message": message}
    prompt = dialogue.step(reply, dialogue.parse(reply), played("Nothing happens.", 1), info)
    return prompt[-1]["content"]


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_a_reply_that_does_not_parse_is_explained(style: PromptStyle) -> None:
    for profile, error in (("tags", "no <action>..</action> block"), ("react", "no Action line")):
        prompt = last_prompt(profile, style, "I look around", "An empty action.")
        assert f"Nothing happens.\n\nYour reply was not used: {error}." in prompt
        assert "An empty action." not in prompt
        # How to reply stands in it once, be it in the template or with the hint.
        assert prompt.count(reply_format(profile)) == 1


@pytest.mark.parametrize("style", PROMPT_STYLES)
@pytest.mark.parametrize("profile", PARSE_PROFILES)
def test_messages_of_the_environment_are_shown(profile: ParseProfile, style: PromptStyle) -> None:
    reply = AgentDialogue({}, profile=profile).format("take mug 1")
    prompt = last_prompt(profile, style, reply, "There is no mug 1 here.")
    # Prompts of published runs stay as they were, as do those of models trained from scratch.
    is_shown = profile in ("tags", "react")
    assert ("Nothing happens.\n\nThere is no mug 1 here." in prompt) == is_shown
    assert ("There is no mug 1" in prompt) == is_shown


def test_a_template_of_ones_own_shows_hints_with_every_profile() -> None:
    template = PromptTemplate("{text}", "{text} | {hint}")
    message = {"message": "No such mug."}
    for profile, reply, hint in (
        ("plain", "take mug 1", "No such mug."),
        ("plain", " ", "Your reply was not used: empty reply. Reply with the next action alone."),
        # Published rules execute what does not parse.
        ("compat", "take mug 1", "No such mug."),
    ):
        dialogue = AgentDialogue({}, profile=profile, style="window", template=template)  # type: ignore[arg-type]
        dialogue.reset(played("A room.", 0), {})
        [prompt] = dialogue.step(reply, dialogue.parse(reply), played("Nothing.", 1), message)
        assert prompt["content"] == f"Nothing. | {hint}"


def test_a_hint_is_shown_once() -> None:
    dialogue = AgentDialogue({}, profile="react", style="window", history_window=3)
    dialogue.reset(played("A room.", 0), {})
    parsed = dialogue.parse("Action: take mug 1")
    [first] = dialogue.step("take mug 1", parsed, played("Nothing.", 1), {"message": "No mug."})
    [second] = dialogue.step("look", parsed, played("A room.", 2), {})
    assert first["content"].count("No mug.") == 1
    assert "No mug." not in second["content"]
    [third] = dialogue.step("x", parsed, played("N.", 3), {"message": "No mug."})
    assert "No mug." in third["content"]
    assert "No mug." not in dialogue.reset(played("A room.", 0), {})[0]["content"]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InvalidSettingError, match="Unknown prompt style 'mail'"):
        AgentDialogue({}, style="mail")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="Unknown parse profile 'xml'"):
        AgentDialogue({}, profile="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="history window"):
        AgentDialogue({}, style="window", history_window=-1)
