"""Replies of an endpoint that end with their action, whatever the endpoint knows of stopping."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from echo_env import ENV_ID
from served_chat import FakeChat

from atod_gym.parsing import CompletionFormat
from atod_train.evaluation.agents import Completion
from atod_train.evaluation.chat import ChatEndpoint
from atod_train.evaluation.eval_cli import main
from atod_train.evaluation.eval_options import ChatSettings, Sampling

MESSAGES = [{"role": "user", "content": "hm"}]
TAGS = CompletionFormat("tags")
SEARCH = CompletionFormat("tags", ("search", "answer"))
REACT = CompletionFormat("react")


def ask(
    chat: FakeChat, text: Any, form: CompletionFormat, *, times: int = 1, **settings: Any
) -> Completion:
    """The last completion; `text` is that of the reply, or a function of the messages."""
    chat.answer = text if callable(text) else lambda _: text

    async def run() -> Completion:
        endpoint = ChatEndpoint(ChatSettings("toy", chat.url, **settings), Sampling())
        try:
            for _ in range(times):
                completion = await endpoint.complete(MESSAGES, form)
            return completion
        finally:
            await endpoint.close()

    return asyncio.run(run())


@pytest.mark.parametrize(("stops", "says_why"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("form", "text", "kept"),
    [
        (TAGS, "<think>a</think><action>look</action>\nYou see.<think>b</think><action>go</action>",
         "<think>a</think><action>look</action>"),
        (SEARCH, "<search>a</search><information>b</information><answer>c</answer>",
         "<search>a</search>"),
        (TAGS, "<action>look</action>", "<action>look</action>"),
        (TAGS, "I look around.", "I look around."),
        (REACT, "Thought: a\nAction: look\nObservation: You see.\nThought: b\nAction: go",
         "Thought: a\nAction: look"),
        (REACT, "Action: look", "Action: look"),
        (CompletionFormat("compat"), "<action>a</action><action>b</action>",
         "<action>a</action><action>b</action>"),
    ],
)  # fmt: skip
def test_a_reply_ends_with_its_action(
    chat: FakeChat, form: CompletionFormat, text: str, kept: str, stops: bool, says_why: bool
) -> None:
    chat.stops, chat.says_why = stops, says_why
    assert ask(chat, text, form).text == kept
    assert chat.posts[-1].get("stop", []) == list(form.stop_strings)


def test_an_open_tag_stays_open_if_the_server_reports_the_stop(chat: FakeChat) -> None:
    chat.stops = chat.says_why = True
    assert ask(chat, "<action>look", TAGS).text == "<action>look"


def test_it_can_be_switched_off(chat: FakeChat) -> None:
    chat.stops = True
    text = "<action>a</action><action>b</action>"
    assert ask(chat, text, TAGS, stop_at_action=False).text == text
    assert "stop" not in chat.posts[-1]
    # The user's own stop strings are left alone.
    assert ask(chat, text, TAGS, extra_body='{"stop": ["</act"]}').text == "<action>a"
    assert chat.posts[-1]["stop"] == ["</act"]


def test_a_reply_that_was_long_enough_is_not_cut(chat: FakeChat) -> None:
    chat.mishaps.append("cut")
    assert not ask(chat, "<action>a</action> and so on", TAGS).is_cut
    chat.mishaps.append("cut")
    assert ask(chat, "<think>and so on", TAGS).is_cut


@pytest.mark.parametrize("says_why", [False, True])
@pytest.mark.parametrize("field", [None, "reasoning_content", "hidden"])
def test_a_stop_inside_a_thought_is_taken_back(
    chat: FakeChat, says_why: bool, field: str | None
) -> None:
    chat.stops, chat.says_why = True, says_why
    text = "<think>not <action>a</action></think><action>b</action><action>c</action>"
    if field is not None:

        def answer(_: Any) -> str:
            stopped = "stop" in chat.posts[-1]
            chat.message = {field: "not <action>a"}
            chat.thoughts = 7 if field == "hidden" else 0
            return "</action>" if stopped else "<action>b</action><action>c</action>"

        assert ask(chat, answer, TAGS).text == "<action>b</action>"
    else:
        assert ask(chat, text, TAGS, times=2).text == text[: -len("<action>c</action>")]
        assert len(chat.posts) == 3
    # From then on it is asked without stop strings.
    assert ["stop" in post for post in chat.posts][:2] == [True, False]


def test_an_endpoint_that_takes_no_stop_strings(chat: FakeChat) -> None:
    refusal = {
        "error": {
            "message": "Unsupported parameter: 'stop' is not supported with this model.",
            "type": "invalid_request_error", "param": "stop", "code": "unsupported_parameter",
        }
    }  # fmt: skip
    chat.mishaps.append((400, refusal))
    text = "<action>a</action><action>b</action>"
    assert ask(chat, text, TAGS, times=2, retries=0).text == "<action>a</action>"
    assert ["stop" in post for post in chat.posts] == [True, False, False]


def evaluate(chat: FakeChat, out: Path, *options: str) -> Any:
    command = [
        ENV_ID, "--agent", "chat", "--model", "toy", "--base-url", chat.url, "--split", "test",
        "--out", str(out), "--tasks", "2", *options,
    ]  # fmt: skip
    assert main(command) == 0
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_a_model_that_plays_the_whole_episode_plays_one_turn(
    chat: FakeChat, tmp_path: Path
) -> None:
    def whole(messages: Any) -> str:
        words = messages[0]["content"].partition("say ")[2].split()[:2]
        turn = sum(message["role"] == "assistant" for message in messages)
        said = [f"<think></think><action>say {word}</action>\nsecond\n" for word in words]
        return "".join(said[turn:])

    chat.answer, chat.stops = whole, True
    value = evaluate(chat, tmp_path / "stops")
    assert (value["success_rate"], value["totals"]["invalid_reasons"]) == (1.0, {})
    value = evaluate(chat, tmp_path / "continues", "--no-stop-at-action")
    assert value["totals"]["invalid_reasons"] == {"<think> after the <action> block": 2}
    assert value["settings"]["agent"]["stop_at_action"] is False


def test_react_replies(chat: FakeChat, tmp_path: Path) -> None:
    def react(messages: Any) -> str:
        words = messages[0]["content"].partition("say ")[2].split()[:2]
        turn = sum(message["role"] == "assistant" for message in messages)
        return f"Thought: I speak.\nAction: say {words[turn]}\nObservation: second"

    chat.answer = react
    for number, stops in enumerate((True, False)):
        chat.stops = stops
        value = evaluate(chat, tmp_path / str(number), "--parse-profile", "react")
        assert (value["success_rate"], value["totals"]["invalid_reasons"]) == (1.0, {})
