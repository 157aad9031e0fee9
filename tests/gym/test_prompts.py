from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atod_gym.errors import InvalidSettingError
from atod_gym.prompts import (
    CHAT_TEMPLATE,
    PLACEHOLDERS,
    WINDOW_TEMPLATE,
    PromptTemplate,
    load_template,
    render_prompt,
    reply_format,
    shown_text,
    turn_hint,
)
from atod_gym.types import HistoryObservation, TurnObservation

any_text = st.text(st.characters(exclude_categories=()), max_size=60)


def observed(text: str = "You see a mug.", turn_index: int = 0) -> TurnObservation:
    return {
        "instruction": "find a mug",
        "text": text,
        "admissible_actions": ("look", "take mug 1"),
        "turn_index": turn_index,
    }


def with_history() -> HistoryObservation:
    return {
        **observed(turn_index=3),
        "history": (
            {"text": "A room.", "action": "look"},
            {"text": "A desk.", "action": "go to desk 1"},
        ),
    }


def test_window_prompt_of_a_later_turn() -> None:
    prompt = render_prompt(with_history(), template=WINDOW_TEMPLATE, profile="plain")
    assert prompt.split("\n\n") == [
        "Your task: find a mug",
        "This is turn 4.",
        "What happened in the turns before it (the last 2):\n"
        "[turn 2] you observed: A room.\n[turn 2] you did: look\n"
        "[turn 3] you observed: A desk.\n[turn 3] you did: go to desk 1",
        "You observe now:\nYou see a mug.",
        "You can do one of these now:\nlook\ntake mug 1",
        "Reply with the next action alone.",
    ]


@pytest.mark.parametrize(
    ("left_out", "lines"),
    [
        (1, ["(the last 1):", "[1 earlier turn left out]", "[turn 3] you observed: A desk."]),
        (2, ["(the last 0):", "[2 earlier turns left out]"]),
    ],
)
def test_past_turns_can_be_left_out(left_out: int, lines: list[str]) -> None:
    observation = with_history()
    prompt = render_prompt(
        observation, template=WINDOW_TEMPLATE, profile="plain", left_out=left_out
    )
    for line in lines:
        assert line in prompt
    assert "A room." not in prompt
    assert ("A desk." in prompt) == (left_out == 1)
    # A template that shows no history has nothing to leave out.
    bare = PromptTemplate("{text}", "{text}")
    assert render_prompt(observation, template=bare, profile="plain", left_out=2) == (
        "You see a mug."
    )


def test_paragraphs_without_content_are_left_out() -> None:
    prompt = render_prompt(
        observed(turn_index=1), template=CHAT_TEMPLATE, profile="tags", show_admissible=False
    )
    assert prompt == "You see a mug."
    later = render_prompt(observed(turn_index=1), template=WINDOW_TEMPLATE, profile="tags")
    assert "What happened" not in later


@given(any_text.filter(bool))
@example("{instruction}")
@example("{text!r:>9}")
@example("{")
@example("%s")
def test_observations_stay_as_they_are(text: str) -> None:
    prompt = render_prompt(observed(text), template=CHAT_TEMPLATE, profile="tags")
    assert prompt == (
        f"Your task: find a mug\n\n{text}\n\n"
        f"You can do one of these now:\nlook\ntake mug 1\n\n{reply_format('tags')}"
    )


def test_a_file_may_hold_one_or_two_templates(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("{text}\n\nWhat now?\n", encoding="utf-8")
    assert load_template(path) == PromptTemplate("{text}\n\nWhat now?", "{text}\n\nWhat now?")
    path.write_text("{instruction}\n---\n{text} {{so}}\n", encoding="utf-8")
    template = load_template(str(path))
    assert template == PromptTemplate("{instruction}", "{text} {{so}}")
    later = render_prompt(observed("Hm.", 1), template=template, profile="plain")
    assert later == "Hm. {so}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{observation}", r"\{observation\}.*known: \{instruction\}"),
        ("{text.upper}", "text.upper"),
        ("{text!r}", "text!r"),
        ("{text:>10}", "text:>10"),
        ("{}", "Unknown placeholder"),
        ("{text", "brace"),
        ("text}", "brace"),
        ("{te\n\nxt}", "brace"),
        ("a\n---\nb\n---\nc", "3 parts"),
        ("", r"needs \{text\}"),
        ("Hello", r"needs \{text\}"),
        ("{instruction}", r"needs \{text\} for later"),
        ("{text}\n---\n", r"needs \{text\} for later"),
        ("---\n{text}", r"\{text\} or \{instruction\} for the first"),
        ("{text}\n---\n{{text}}", r"needs \{text\} for later"),
    ],
)
def test_unusable_templates_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidSettingError, match=message) as caught:
        load_template(path)
    assert str(path) in str(caught.value)


def test_unreadable_template_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("nowhere", "bytes"):
        with pytest.raises(InvalidSettingError, match=name):
            load_template(tmp_path / f"{name}.txt")


def test_replies_are_described() -> None:
    tags = ("search", "answer")
    assert "<search>..</search> or <answer>..</answer>" in reply_format("tags", tags)
    assert "search[..] or answer[..]" in reply_format("plain", tags)
    assert "inside <action> and </action>" in reply_format("compat")
    assert reply_format("react", tags).endswith("\nAction: search[..] or answer[..]")
    assert reply_format("react").endswith("\nThought: your thought\nAction: the action")
    assert reply_format("plain") == "Reply with the next action alone."


def test_every_placeholder_has_a_value() -> None:
    template = "|".join(f"{{{name}}}" for name in PLACEHOLDERS)
    assert render_prompt(
        observed(), template=PromptTemplate(template, template), profile="compat"
    ).startswith("find a mug|You see a mug.|look\ntake mug 1|||1|Think")


@pytest.mark.parametrize(
    ("info", "hint"),
    [
        ({}, ""),
        ({"parse_error": "", "message": ""}, ""),
        ({"message": "There is no apple 1 here."}, "There is no apple 1 here."),
        ({"message": "see a mug"}, ""),  # the text says so already
        ({"parse_error": "empty reply", "message": "x"}, "Your reply was not used: empty reply."),
    ],
)
def test_a_hint_gives_the_reason_why_a_turn_had_no_effect(info: dict[str, str], hint: str) -> None:
    assert turn_hint(observed(), info) == hint
    text = "You see a mug." if not hint else f"You see a mug.\n\n{hint}"
    assert shown_text(observed(), info) == text


def test_hints_are_bounded() -> None:
    hint = turn_hint(observed(), {"message": "x" * 100_000})
    assert hint == "x" * 500 + " .."


def test_the_hint_follows_the_text() -> None:
    for template in (WINDOW_TEMPLATE, CHAT_TEMPLATE):
        prompt = render_prompt(observed(turn_index=1), template=template, profile="plain", hint="H")
        assert "You see a mug.\n\nH\n\nYou can do one of these now:" in prompt
