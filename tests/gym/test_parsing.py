"""The four parse profiles: what is executed, what is wrong, where an action ends."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import (
    ACTION_TAGS,
    PARSE_PROFILES,
    CompletionFormat,
    ParseProfile,
)
from atod_gym.types import ParsedAction

SEARCH = ("search", "answer")


def parse_completion(text: str, **settings: Any) -> ParsedAction:
    return CompletionFormat(**settings).parse(text)


def format_action(action: str, profile: ParseProfile, tags: tuple[str, ...] = ACTION_TAGS) -> str:
    return CompletionFormat(profile, tags).format(action)


BLOCKS = "<search>..</search> or <answer>..</answer> block"

any_text = st.text(st.characters(exclude_categories=()), max_size=200)
tag_pieces = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<action>",
         "</action>", "<SEARCH>", "<information>", "</information>", "<b>", "x", " ", "A", "中",
         "search[a]"]
    ),
    max_size=12,
).map("".join)  # fmt: skip
line_pieces = st.lists(
    st.sampled_from(
        ["Thought:", "Action:", "Observation:", "Act 2: ", "\n", "x", "<think>", "</think>", " "]
    ),
    max_size=14,
).map("".join)
profiles = st.sampled_from(PARSE_PROFILES)
tag_sets = st.sampled_from([ACTION_TAGS, SEARCH])


@pytest.mark.parametrize(
    ("text", "action", "is_valid"),
    [
        ("go to desk 1", "go to desk 1", True),
        ("  Go to Desk 1\n", "Go to Desk 1", True),
        (" \n", "", False),
        ("<action>look</action>", "<action>look</action>", True),
    ],
)
def test_plain(text: str, action: str, is_valid: bool) -> None:
    parsed = parse_completion(text, profile="plain")
    assert (parsed.action, parsed.is_valid, parsed.thought) == (action, is_valid, "")


@pytest.mark.parametrize(
    ("text", "action", "thought", "error"),
    [
        ("<think>hm</think><action> Look </action>", "Look", "hm", ""),
        ("hm</think>\n<action>look</action>", "look", "hm", ""),
        ("<think>hm", "", "hm", "no </think>"),
        ("<think>hm <action>a</action>", "", "hm <action>a</action>", "no </think>"),
        ("<think>hm</think> look", "", "hm", "no <action>..</action> block"),
        ("<action>a</action><action>b</action>", "", "", "more than one <action>..</action> block"),
        ("</action>a<action>", "", "", "</action> stands before <action>"),
        ("<think>hm</think><action> </action>", "", "hm", "the action is empty"),
        ("", "", "", "empty reply"),
    ],
)  # fmt: skip
def test_one_tag(text: str, action: str, thought: str, error: str) -> None:
    parsed = parse_completion(text, profile="tags")
    assert (parsed.action, parsed.thought, parsed.error) == (action, thought, error)
    assert parsed.is_valid == (error == "")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "<think>I search.</think><search>Brenn</search>"
            "<information>Doc 1: Brenn lies on Lake Orla.</information>"
            "<think>So it is Lake Orla.</think><answer>Lake Orla</answer>",
            "<information> after the <search> block, which only the environment writes",
        ),
        ("<search>a</search><think>b</think><answer>c</answer>",
         "<think> after the <search> block"),
        ("<search>a</search><think>", "<think> after the <search> block"),
        ("<think>a</think><search>b</search></think>", "</think> after the <search> block"),
        ("<search>a</search> So: <answer>b</answer>", f"more than one {BLOCKS}"),
        ("<think>a</think><think>b</think><answer>c</answer>", "a second thought"),
        ("<think>a</think>b</think><answer>c</answer>", "a second thought"),
        ("a</think><think>b</think><answer>c</answer>", "a second thought"),
        ("a</think><answer>b</answer><think>", "<think> after the <answer> block"),
        ("<think>a</think><think>b</think>", f"no {BLOCKS}"),
        (
            "<information>a</information><answer>b</answer>",
            "<information> before the <answer> block, which only the environment writes",
        ),
        ("<observation>a<think>b</think><answer>c</answer>",
         "<observation> before the <answer> block, which only the environment writes"),
        ("</search><answer>a</answer>", "</search> before the <answer> block"),
        ("<answer>a<think>b</think></answer>", "<think> inside the <answer> block"),
        ("<answer>a</search>b</answer>", "</search> inside the <answer> block"),
        ("<answer>a<search>b</search></answer>", f"more than one {BLOCKS}"),
        ("<search>a</search><answer>", f"more than one {BLOCKS}"),
        ("<search>a</answer>", f"no {BLOCKS}"),
        ("<SEARCH>a</SEARCH>", f"no {BLOCKS}"),
        ("<action>search[a]</action>", f"no {BLOCKS}"),
        ("<search> </search>", "the search is empty"),
        ("<answer>a</answer></think>", "<answer> stands in the thought"),
        ("<think>a <answer>b</answer></think>", "<answer> stands in the thought"),
    ],
)  # fmt: skip
def test_tags_name_the_first_thing_that_is_wrong(text: str, error: str) -> None:
    parsed = parse_completion(text, profile="tags", tags=SEARCH)
    assert (parsed.action, parsed.is_valid, parsed.error) == ("", False, error)


@pytest.mark.parametrize(
    ("text", "action", "thought"),
    [
        # A tag inside the thought is a thought, also where the prompt opened the thought.
        ("<think>Not <search>a</search>!</think><answer>b</answer>", "answer[b]",
         "Not <search>a</search>!"),
        ("Not <search>a</search>!</think><answer>b</answer>", "answer[b]",
         "Not <search>a</search>!"),
        ("<think>a <think> b</think><answer>c</answer>", "answer[c]", "a <think> b"),
        ("<think>hm</think><search> Who [b]? </search>", "search[Who [b]?]", "hm"),
        # Plain text is ignored.
        ("Well. <think>a</think> So I do:\n<answer>b</answer>\n\nThat is it. ", "answer[b]", "a"),
        # What looks like a tag and is none of ours is text.
        ("<b>So</b> <think>a<br></think><answer>x < y > z</answer><i>!</i>",
         "answer[x < y > z]", "a<br>"),
        ("<think></think><answer>what does <information> mean?</answer>",
         "answer[what does <information> mean?]", ""),
    ],
)  # fmt: skip
def test_tags_take_one_thought_and_one_block(text: str, action: str, thought: str) -> None:
    parsed = parse_completion(text, profile="tags", tags=SEARCH)
    assert (parsed.action, parsed.thought, parsed.error) == (action, thought, "")


@pytest.mark.parametrize(
    ("text", "action", "thought"),
    [
        ("Thought: I go.\nAction: go to desk 1", "go to desk 1", "I go."),
        ("Thought:\nI go.\n\nAction:\ngo to desk 1\n", "go to desk 1", "I go."),
        ("Action: look", "look", ""),
        ("THOUGHT: a\naction : look ", "look", "a"),
        ("Thought 1: a\nAction 1: Search[Red Shoes]", "search[Red Shoes]", "a"),
        ("Act 3: click[buy now]", "click[buy now]", ""),
        ("Action: look\nThat is it.", "look", ""),
        ("I begin.\nAction: look", "look", ""),
        ("Thought: a\nAction: look\nObservation:", "look", "a"),
        ("Action: look\nObs 1: \n", "look", ""),
        # A label counts at the beginning of a line only.
        ("Thought: The last Action: look was bad.\nAction: answer[Action: x]",
         "answer[Action: x]", "The last Action: look was bad."),
        # A reasoning model's thought stands before all of it.
        ("<think>Action: a\nAction: b</think>Thought: c\nAction: look", "look", "c"),
        ("Action: a</think>\nAction: look", "look", "Action: a"),
    ],
)  # fmt: skip
def test_react(text: str, action: str, thought: str) -> None:
    parsed = parse_completion(text, profile="react", tags=SEARCH)
    assert (parsed.action, parsed.thought, parsed.error) == (action, thought, "")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty reply"),
        ("go to desk 1", "no Action line"),
        ("Thought: I go to desk 1.", "no Action line"),
        ("Thought: a Action: look", "no Action line"),
        ("<think></think><action>look</action>", "no Action line"),
        ("Thought: a\nAction:\n", "the action is empty"),
        ("Action: look\nObservation: You see a desk.",
         "an observation, which only the environment writes"),
        ("Thought: a\nAction: look\nObservation: You see.\nThought: b\nAction: take mug 1",
         "an observation, which only the environment writes"),
        # The Unicode case of `s`, which patterns that ignore case match.
        ("Action: look\nOb\u017fervation: You see.",
         "an observation, which only the environment writes"),
        ("Action: look\nAction: inventory", "more than one action"),
        ("Action: look\nObservation:\nAction: inventory", "more than one action"),
        ("Action: look\nThought: b", "a thought after the action"),
        ("Thought: a\nThought: b\nAction: look", "a second thought"),
        ("Observation: You see a desk.\nAction: look",
         "an observation, which only the environment writes"),
        ("Observation:\nThought: b\nAction: look", "a second thought"),
        ("<think>Action: look", "no </think>"),
    ],
)  # fmt: skip
def test_react_names_the_first_thing_that_is_wrong(text: str, error: str) -> None:
    parsed = parse_completion(text, profile="react")
    assert (parsed.action, parsed.is_valid, parsed.error) == ("", False, error)


@pytest.mark.parametrize(
    ("tags", "text", "action", "is_valid"),
    [
        (ACTION_TAGS, "<think>x</think><action> Go To Desk 1 </action>", "go to desk 1", True),
        (ACTION_TAGS, "<think>x</think><ACTION>Look</Action>", "look", True),
        (ACTION_TAGS, "<think>x</think><action>a</action><action>b</action>", "a", True),
        (ACTION_TAGS, "<think><action>a</action></think><action>b</action>", "a", True),
        (ACTION_TAGS, "<action>look</action>", "look", False),
        (ACTION_TAGS, "<think><action>look</action>", "look", False),
        (ACTION_TAGS, "<THINK>x</THINK><action>look</action>", "look", False),
        (ACTION_TAGS, "<think>中</think><action>look</action>", "look", False),
        (ACTION_TAGS, "<think>x</think> I will now Go To Desk 1",
         "think> i will now go to desk 1", False),
        (ACTION_TAGS, "short", "short", False),
        (ACTION_TAGS, "<think>x</think></action><action>b", "", True),
        (SEARCH, "<search> Red Shoes </search>", "search[Red Shoes]", True),
        (SEARCH, "<think>x</think><Answer>Paris</ANSWER>", "answer[Paris]", True),
        (SEARCH, "no thinking needed <answer>a\nb</answer>", "answer[a\nb]", True),
        # Both, or one of them twice: the first search is executed all the same.
        (SEARCH, "<answer>a</answer><search>b</search>", "search[b]", False),
        (SEARCH, "<search>a</search><SEARCH>b</SEARCH>", "search[a]", False),
        (SEARCH, "<think>I <search>a</search></think><answer>b</answer>", "search[a]", False),
        (SEARCH, "<answer>a</answer><answer>b</answer>", "answer[a]", False),
        (SEARCH, "<search><answer>a</answer>", "answer[a]", False),
        (SEARCH, "<answer>a</answer></search>", "answer[a]", True),
        (SEARCH, "<search></search>", "search[]", True),
        (SEARCH, "<search>a", "", False),
        (SEARCH, "search[a]", "", False),
        (SEARCH, "", "", False),
    ],
)  # fmt: skip
def test_compat_follows_published_rules(
    tags: tuple[str, ...], text: str, action: str, is_valid: bool
) -> None:
    parsed = parse_completion(text, profile="compat", tags=tags)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)
    assert bool(parsed.error) == (not is_valid)


def test_compat_takes_the_end_of_a_completion_without_tags() -> None:
    text = "x" * 50 + "ABCDE"
    assert parse_completion(text, profile="compat").action == "x" * 25 + "abcde"
    assert parse_completion(text, profile="compat", last_characters=20).action == "x" * 15 + "abcde"
    assert parse_completion(text, profile="compat", last_characters=0).action == ""


def test_compat_reads_the_completions_of_published_webshop_runs(webshop_data: Path) -> None:
    path = webshop_data / "golden" / "va_projection.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) == 13
    for record in records:
        parsed = parse_completion(record["in"], profile="compat", last_characters=20)
        assert (parsed.action, int(parsed.is_valid)) == (record["action"], record["valid"])


@given(any_text | tag_pieces | line_pieces, profiles, tag_sets)
def test_every_text_parses_to_something_consistent(
    text: str, profile: ParseProfile, tags: tuple[str, ...]
) -> None:
    parsed = parse_completion(text, profile=profile, tags=tags)
    assert parsed.is_valid == (parsed.error == "")
    assert parsed == parse_completion(text, profile=profile, tags=tags)
    if profile != "compat":
        assert (parsed.error == "empty reply") == (not text.strip())
        assert parsed.action == parsed.action.strip()
        assert bool(parsed.action) == parsed.is_valid
    if parsed.action and profile in ("tags", "compat") and tags == SEARCH:
        assert parsed.action.startswith(("search[", "answer["))
        assert parsed.action.endswith("]")


@given(st.text("abcdefgh 123", min_size=1, max_size=30).filter(str.strip), st.text("xyz .\n"))
def test_requested_completions_parse_alike_in_both_tag_profiles(action: str, thought: str) -> None:
    text = f"<think>{thought}</think>\n<action>{action}</action>"
    tags = parse_completion(text, profile="tags")
    assert tags.is_valid
    assert tags == parse_completion(text, profile="compat")
    assert (tags.action, tags.thought) == (action.strip(), thought.strip())


contents = st.text("abc [](){}?\n.é中", max_size=30) | tag_pieces | line_pieces
searches = st.builds("{}[{}]".format, st.sampled_from(SEARCH), contents)
plain_actions = st.text("abcdefgh 123[]", max_size=30) | tag_pieces | line_pieces


@given(
    st.tuples(searches, st.just(SEARCH)) | st.tuples(plain_actions, st.just(ACTION_TAGS)),
    profiles.filter("plain".__ne__),
)
def test_a_formatted_action_parses_to_itself_or_is_refused(
    case: tuple[str, tuple[str, ...]], profile: ParseProfile
) -> None:
    action, tags = case
    try:
        completion = format_action(action, profile, tags)
    except InvalidSettingError:
        assert set("<:\n") & set(action) or (tags == SEARCH and not action[7:-1].strip())
        return
    parsed = parse_completion(completion, profile=profile, tags=tags)
    assert parsed.is_valid or not action.strip() or profile == "compat"
    assert "".join(parsed.action.split()).lower() == "".join(action.split()).lower()


@pytest.mark.parametrize(
    ("action", "profile", "message"),
    [
        ("answer[x </answer> y]", "tags", "</answer> after the <answer> block"),
        ("answer[x </answer> y]", "compat", r"it is read as 'answer\[x\]'"),
        ("search[]", "tags", "the search is empty"),
        ("search[look\nnow]", "react", r"it is read as 'search\[look'"),
    ],
)
def test_an_action_that_no_completion_has_is_refused(
    action: str, profile: ParseProfile, message: str
) -> None:
    with pytest.raises(InvalidSettingError, match=f"{profile} cannot write .*{message}"):
        format_action(action, profile, SEARCH)


def test_formats() -> None:
    assert format_action(" Search [ a ] ", "tags", SEARCH) == "<think></think><search> a </search>"
    assert format_action("search[a]", "tags") == "<think></think><action>search[a]</action>"
    # The tag action is allowed together with other tags.
    assert format_action("look", "tags", ("search", "action")).endswith("<action>look</action>")
    with pytest.raises(InvalidSettingError, match=r"'look' is neither search\[..\] nor answer"):
        format_action("look", "tags", SEARCH)


def without_thought(text: str) -> str:
    """By other means than the parser: cut at the first </think>, if it closes a first thought."""
    found = re.match(r"(?s)((?:(?!<(?:search|answer)>).)*?)<think>.*?</think>(.*)", text)
    if found:
        return found[1] + found[2]
    before, closed, after = text.partition("</think>")
    return after if closed and "<think>" not in before else text


@given(tag_pieces)
@example("<think>a</think><search>x</search>")
def test_a_valid_completion_has_one_block_outside_the_thought(text: str) -> None:
    parsed = parse_completion(text, profile="tags", tags=SEARCH)
    if parsed.is_valid:
        rest = without_thought(text)
        assert len(re.findall("<(?:search|answer)>", rest)) == 1
        assert len(re.findall("</(?:search|answer)>", rest)) == 1
        tag, _, content = parsed.action[:-1].partition("[")
        assert re.search(rf"<{tag}>\s*{re.escape(content)}\s*</{tag}>", rest)
        assert "<think>" not in rest.partition("<search>")[2]


@given(
    tag_pieces,
    st.sampled_from(
        ["<search>y</search>", "<answer>y</answer>", "<think>y</think>", "<think>y</think><answer>z"
         "</answer>", "<information>y</information>", "<search>", "<think>"]
    ),
    st.sampled_from(["", "\n", " and then "]),
)  # fmt: skip
@example("<think>a</think><search>x</search>", "<think>y</think>", "")
def test_nothing_can_follow_a_valid_completion_of_tags(text: str, more: str, gap: str) -> None:
    if parse_completion(text, profile="tags", tags=SEARCH).is_valid:
        assert not parse_completion(text + gap + more, profile="tags", tags=SEARCH).is_valid


@given(
    line_pieces,
    st.sampled_from(["Thought: y", "Action: y", "Observation: y", "Observation:\nAct 2: y"]),
)
@example("Thought: a\nAction: x", "Observation: y")
@example("Action: x\nObservation:", "Thought: y")
def test_nothing_can_follow_a_valid_react_completion(text: str, more: str) -> None:
    if parse_completion(text, profile="react").is_valid:
        assert not parse_completion(f"{text}\n{more}", profile="react").is_valid


@given(tag_pieces | line_pieces, st.sampled_from(["tags", "react"]))
def test_reading_ends_where_the_action_ends(text: str, profile: ParseProfile) -> None:
    form = CompletionFormat(profile, SEARCH)
    end = form.end_of_action(text)
    if end is None:
        return
    # What is sampled up to there ends there, and nothing ends earlier.
    assert form.end_of_action(text[:end]) == (end if profile == "tags" else None)
    if form.parse(text).is_valid:
        assert form.parse(text[:end]) == form.parse(text)


@pytest.mark.parametrize(
    ("profile", "text", "kept"),
    [
        ("tags", "<think>a</think><search>b</search><information>",
         "<think>a</think><search>b</search>"),
        ("tags", "<search>b</search>", "<search>b</search>"),
        ("tags", "<think>not <search>a</search> yet", None),
        ("tags", "not <search>a</search></think><answer>b</answer>c",
         "not <search>a</search></think><answer>b</answer>"),
        ("tags", "<search>a", None),
        ("react", "Thought: a\nAction: b\nObservation: c", "Thought: a\nAction: b"),
        ("react", "Action: b\n Obs 2 : c", "Action: b"),
        ("react", "Action: b\nObservation", None),
        ("react", "Observation: a", None),
        ("react", "<think>Action: a\nObservation: b", None),
        ("plain", "</action>", None),
        ("compat", "<think></think><search>a</search>", None),
    ],
)  # fmt: skip
def test_where_an_action_ends(profile: ParseProfile, text: str, kept: str | None) -> None:
    end = CompletionFormat(profile, SEARCH).end_of_action(text)
    assert kept == (None if end is None else text[:end])


def test_an_action_tag_in_a_thought_of_the_prompt_ends_nothing() -> None:
    form = CompletionFormat("tags")
    assert form.end_of_action("not <action>a</action>", in_thought=True) is None
    text = "not <action>a</action></think><action>b</action>"
    assert form.end_of_action(text, in_thought=True) == len(text)


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("<think>a</think><search>b", "</search>"),
        ("not <search>a</search></think><answer>b", "</answer>"),
        ("<search>a</search><answer>b", "</answer>"),
        ("</answer><answer>b", "</answer>"),
        ("<answer>b</answer>", ""),
        ("<think><search>a", ""),
        ("I look.", ""),
    ],
)
def test_the_closing_tag_that_a_server_leaves_out_is_added(text: str, added: str) -> None:
    form = CompletionFormat("tags", SEARCH)
    assert form.closed(text) == text + added
    assert form.is_in_thought(text) == text.startswith("<think><search>")
    assert CompletionFormat("react", SEARCH).closed(text) == text


def test_stop_strings() -> None:
    assert CompletionFormat("tags", SEARCH).stop_strings == ("</search>", "</answer>")
    assert CompletionFormat("react").stop_strings == ("\nObservation:",)
    assert CompletionFormat("plain").stop_strings == CompletionFormat("compat").stop_strings == ()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InvalidSettingError, match="plain, tags, react, compat"):
        parse_completion("look", profile="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="last_characters"):
        parse_completion("look", last_characters=-1)
