"""The chat agent against a real HTTP server that also misbehaves, and its rate limiter."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_env import ENV_ID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_chat import FakeChat, first_action

from atod_gym.errors import InvalidSettingError, MissingExtraError, ServerError
from atod_train.evaluation import chat as chat_agent
from atod_train.evaluation import rate_limiter
from atod_train.evaluation.agents import Completion, EpisodeStopped
from atod_train.evaluation.chat import ChatEndpoint
from atod_train.evaluation.eval_cli import main
from atod_train.evaluation.eval_options import ChatSettings, Sampling
from atod_train.evaluation.eval_records import EPISODES_FILE, read_evaluated
from atod_train.evaluation.rate_limiter import RateLimiter
from atod_train.files import read_json
from atod_train.reports.run_folder import MANIFEST_FILE, write_manifest

MESSAGES = [{"role": "user", "content": "You can do one of these now:\nlook\ngo"}]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any waiting between attempts."""
    monkeypatch.setattr(chat_agent, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(chat_agent, "_LONGEST_WAIT", 0.02)


def ask(chat: FakeChat, **changes: Any) -> Completion:
    names = ("temperature", "max_tokens", "seed")
    sampling = Sampling(**{name: changes.pop(name) for name in names if name in changes})
    chosen = ChatSettings(**{"model": "toy", "base_url": chat.url, **changes})

    async def run() -> Completion:
        endpoint = ChatEndpoint(chosen, sampling)
        try:
            return await endpoint.complete(MESSAGES)
        finally:
            await endpoint.close()

    return asyncio.run(run())


@pytest.mark.slow
def test_the_request_and_the_reply(chat: FakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    completion = ask(
        chat, api_key_env="MY_KEY", temperature=0.5, top_p=0.9, max_tokens=7, seed=3,
        extra_body='{"top_k": 4}',
    )  # fmt: skip
    assert completion == Completion("<think>the first</think><action>look</action>", 36, 2, 0)
    assert chat.posts == [
        {
            "model": "toy", "messages": MESSAGES, "temperature": 0.5, "top_p": 0.9,
            "max_tokens": 7, "seed": 3, "top_k": 4,
        }
    ]  # fmt: skip
    assert chat.headers[0]["authorization"] == "Bearer secret"
    ask(chat)
    assert chat.posts[1] == {"model": "toy", "messages": MESSAGES, "max_tokens": 2048}
    ask(chat, extra_body='{"max_completion_tokens": 9}')
    assert chat.posts[2] == {"model": "toy", "messages": MESSAGES, "max_completion_tokens": 9}


@pytest.mark.parametrize("limit", [None, 7])
def test_an_endpoint_that_takes_another_field_for_the_limit(
    chat: FakeChat, limit: int | None
) -> None:
    said = "Unsupported parameter: 'max_tokens' .. Use 'max_completion_tokens' instead."
    chat.mishaps.append((400, {"error": {"message": said, "param": "max_tokens"}}))
    assert ask(chat, max_tokens=limit, retries=0).text == first_action(MESSAGES)
    first, second = chat.posts
    assert (first.pop("max_tokens"), second.pop("max_completion_tokens")) == (limit or 2048,) * 2
    assert first == second


def test_a_default_limit_takes_no_room_from_prompts(chat: FakeChat) -> None:
    # As TGI says it; others refuse such prompts, too.
    said = "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 3000 and 2048"
    chat.mishaps.append((422, {"error": {"message": said}}))
    assert ask(chat).text == first_action(MESSAGES)
    assert ["max_tokens" in post for post in chat.posts] == [True, False]
    for sampling, posts in (({}, 4), ({"max_tokens": 2048}, 5)):
        chat.healthy, chat.always = 2, (422, {"error": {"message": said}})
        with pytest.raises(EpisodeStopped):
            ask(chat, **sampling)
        assert len(chat.posts) == posts


def test_reasoning_is_kept_apart_unless_wanted(chat: FakeChat) -> None:
    for name in ("reasoning_content", "reasoning"):
        chat.message = {name: "hm"}
        apart, together = ask(chat), ask(chat, keep_reasoning=True)
        assert (apart.reasoning, apart.reasoning_tokens) == ("hm", None)
        assert together.text == f"<think>hm</think>{apart.text}"


def test_no_text_and_a_cut_text(chat: FakeChat) -> None:
    chat.mishaps.append("cut")
    assert ask(chat).is_cut
    chat.message = {"content": None}
    completion = ask(chat)
    assert (completion.text, completion.instead) == ("", "")
    chat.mishaps.append("cut")
    assert ask(chat).instead == "cut at the limit of tokens"
    chat.message["reasoning"] = "I say hello. <action>look</action>"
    assert ask(chat).instead == "reasoning alone"


def test_replies_without_a_text_are_reported(chat: FakeChat) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "act", "arguments": "{}"}}
    chat.message = {"content": None, "tool_calls": [call]}
    assert ask(chat).instead == "tool calls"
    chat.message = {"content": "look", "tool_calls": [call]}
    assert ask(chat) == replace(ask(chat), text="look", instead="")
    chat.message = {"content": "", "refusal": "I cannot help with that."}
    assert ask(chat).instead == "refusal"
    # Reasoning next to the text is not part of it.
    chat.message |= {"reasoning_content": "hm"}
    assert ask(chat, keep_reasoning=True).instead == "refusal"


@pytest.mark.parametrize("mishap", [500, 503, 529, 408, 409, "garbage", "page", "no choices"])
def test_transient_errors_are_retried(chat: FakeChat, quick: None, mishap: Any) -> None:
    chat.mishaps += [mishap, mishap]
    assert ask(chat).text == first_action(MESSAGES)
    assert len(chat.posts) == 3


@pytest.mark.slow
def test_a_hanging_endpoint_is_retried(chat: FakeChat, quick: None) -> None:
    chat.mishaps.append("hang")
    assert ask(chat, timeout=0.3).text == first_action(MESSAGES)
    chat.mishaps.append("hang")
    with pytest.raises(
        ServerError, match=r"no answer within 0\.3 s: raise --timeout, or lower --m"
    ):
        ask(chat, timeout=0.3, retries=0)


@pytest.mark.parametrize("mishap", [500, "garbage", "page", "no choices"])
def test_attempts_are_bounded(chat: FakeChat, quick: None, mishap: Any) -> None:
    chat.healthy, chat.always = 0, mishap
    with pytest.raises(ServerError, match=r"That was attempt 3\."):
        ask(chat, retries=2)
    assert len(chat.posts) == 3


def test_a_long_wait_is_reported_once(
    chat: FakeChat, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.mishaps += [503, 429, 503, 503]
    monkeypatch.setattr(chat_agent, "_LONG_WAIT", 0.0)
    ask(chat, retries=4)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("answers 503: oh, 503. It is asked again, 4 times at most (--retries).")


def test_mistakes_in_the_program_are_not_retried(
    chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mistake in (AttributeError, TypeError, ValueError):

        def broken(*_: Any, mistake: type[Exception] = mistake) -> Completion:
            raise mistake("a mistake")

        monkeypatch.setattr(ChatEndpoint, "_read", broken)
        before = len(chat.posts)
        with pytest.raises(mistake, match="a mistake"):
            ask(chat)
        assert len(chat.posts) == before + 1


def test_a_key_that_no_header_can_hold(chat: FakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2026")
    with pytest.raises(InvalidSettingError, match="OPENAI_API_KEY holds characters that no key"):
        ask(chat)


@pytest.mark.slow
def test_it_waits_for_the_requested_time(chat: FakeChat) -> None:
    chat.mishaps.append(429)
    chat.retry_after = "1"
    ask(chat)
    assert chat.times[1] - chat.times[0] >= 0.99


@pytest.mark.slow
def test_a_date_to_wait_for_and_one_too_far_away(chat: FakeChat) -> None:
    chat.mishaps += [429, 429]
    chat.retry_after = formatdate(time.time() - 5, usegmt=True)
    began = time.monotonic()
    ask(chat)
    assert time.monotonic() - began < 5
    chat.mishaps.append(429)
    chat.retry_after = formatdate(time.time() + 7200, usegmt=True)
    with pytest.raises(ServerError, match=r"oh, 429\. It asks to wait for 7\d\d\d s\."):
        ask(chat)


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (401, "answers 401: oh, 401. Put a valid key into OPENAI_API_KEY"),
        (403, "--api-key-env"),
        (404, "Check --model toy and --base-url, which mostly ends in /v1."),
        (400, "oh, 400. Change what it does not take"),
        (402, "Add credit"),
        ((429, {"error": {"message": "spent", "code": "insufficient_quota"}}), "Add credit"),
        ((418, {"detail": "tea"}), "answers 418: tea."),
    ],
)
def test_fatal_errors_are_reported_without_a_retry(
    chat: FakeChat, mishap: Any, message: str
) -> None:
    chat.mishaps.append(mishap)
    with pytest.raises(ServerError, match=re.escape(message)):
        ask(chat)
    assert len(chat.posts) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((413, {"detail": "large"}), "context_limit"),
        ((400, {"message": "Input is 900 tokens, longer than the model takes"}), "context_limit"),
        ((400, {"error": {"message": "the request exceeds the available context size"}}),
         "context_limit"),
        ((400, {"error": {"message": "no", "code": "content_filter"}}), "refused"),
    ],
)  # fmt: skip
def test_errors_that_end_one_episode_only(chat: FakeChat, answer: Any, reason: str) -> None:
    chat.mishaps.append(answer)
    with pytest.raises(EpisodeStopped) as stop:
        ask(chat)
    assert stop.value.reason == reason


def test_an_endpoint_that_does_not_exist(chat: FakeChat, quick: None) -> None:
    with FakeChat() as gone:
        pass
    with pytest.raises(ServerError, match=r"cannot be reached .* attempt 3\. Is the server runn"):
        ask(gone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url must be a URL"),
        ({"api_key_env": "NOT_SET"}, "The environment variable NOT_SET holds no key"),
        ({"base_url": None}, "The environment variable OPENAI_API_KEY holds no key"),
    ],
)
def test_settings_without_meaning(chat: FakeChat, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        ask(chat, **changes)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'atod-gym\[eval\]'"):
        ChatEndpoint(ChatSettings("toy", "http://127.0.0.1:1/v1"), Sampling())


# -- whole evaluations -----------------------------------------------------------------------------


def evaluate(chat: FakeChat, out: Path, *options: str) -> int:
    return main(
        [
            ENV_ID, "--agent", "chat", "--model", "toy", "--base-url", chat.url, "--split", "test",
            "--out", str(out), *options,
        ]
    )  # fmt: skip


def solved(messages: Any) -> str:
    """Says the words of the instruction in order."""
    words = messages[0]["content"].partition("say ")[2].split()
    turn = sum(message["role"] == "assistant" for message in messages)
    return f"<think></think><action>say {words[turn]}</action>"


def read(out: Path, name: str = "result.json") -> Any:
    return json.loads((out / name).read_text(encoding="utf-8"))


def test_no_file_has_the_password_of_a_url(
    chat: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.answer = solved
    url = chat.url.replace("://", "://me:S3@CRET@")
    for words in (["--base-url", url], [f"--base-url={url}", "--resume"]):
        words += ["--extra-body", '{"u": "http://host", "name": "a@b"}']
        assert evaluate(chat, tmp_path / "e", "--tasks", "1", *words) == 0
        monkeypatch.setattr(sys, "argv", ["atod-train", *words])
        write_manifest(tmp_path, {})
    assert read_json(tmp_path / MANIFEST_FILE)["command"] == [
        "atod-train", "--base-url", chat.url, *words[2:]
    ]  # fmt: skip
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert "CRET" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_all_tasks_at_once_with_tokens_and_cost(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.answer, chat.seconds = solved, 0.02
    chat.mishaps += [500, 429]
    prices = ("--price-in", "2", "--price-out", "10")
    assert evaluate(chat, tmp_path, "--concurrency", "5", "--transcripts", *prices) == 0
    value = read(tmp_path)
    totals = value["totals"]
    assert (value["success_rate"], len(value["tasks"]), value["agent"]) == (1.0, 30, "toy")
    assert len(chat.posts) == 62
    assert chat.most_at_once == 5
    assert totals["completion_tokens"] == 60 * 2
    asked = sum(len(m["content"]) for post in chat.posts[2:] for m in post["messages"])
    assert abs(totals["prompt_tokens"] - asked) < 1000
    cost = (2 * totals["prompt_tokens"] + 10 * 120) / 1e6
    assert totals["cost"] == pytest.approx(cost)
    assert f"120 out; at most 2,048 a completion; cost {cost:.4f}" in capsys.readouterr().out
    episode = json.loads((tmp_path / EPISODES_FILE).read_text().splitlines()[0])
    first, second = episode["transcript"]
    assert [m["role"] for m in second["messages"]] == ["user"]
    assert second["action"].startswith("say ")
    assert first["parse_error"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [("--requests-per-minute", "4"), ("--tokens-per-minute", "1800")])
def test_limits_hold_over_all_episodes(
    chat: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str]
) -> None:
    monkeypatch.setattr(rate_limiter, "_WINDOW", 0.5)
    # About 330 tokens are reckoned with for a prompt and a completion that may be long.
    chat.seconds = 0.1
    assert evaluate(chat, tmp_path, "--tasks", "6", "--concurrency", "6", *limit) == 0
    assert len(chat.times) == 12
    assert chat.most_at_once < 6
    assert max(chat.times) - min(chat.times) >= 0.49


def test_reasons_of_invalid_turns_are_counted(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = iter(
        ["I say amber.", "<action>dance</action>", "", "<think>no", "say amber", *["say birch"] * 3]
    )
    chat.answer, chat.says_why = lambda _: next(replies), True
    assert evaluate(chat, tmp_path, "--tasks", "4", "--concurrency", "1") == 0
    reasons = {
        "no <action>..</action> block": 5, "not admissible": 1, "empty reply": 1, "no </think>": 1,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "\ninvalid turns: no <action>..</action> block: 5; " in shown
    assert "not admissible: 1" in shown
    assert read(tmp_path)["totals"]["invalid_reasons"] == reasons
    records = [json.loads(line) for line in (tmp_path / EPISODES_FILE).read_text().splitlines()]
    assert records[0]["invalid_reasons"] == {
        "no <action>..</action> block": 1, "not admissible": 1,
    }  # fmt: skip
    assert [record["invalid_turns"] for record in records] == [2] * 4


def test_tool_calls_are_a_reason(chat: FakeChat, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "act", "arguments": "{}"}}
    chat.message = {"content": None, "tool_calls": [call]}
    for profile in ("tags", "compat"):
        out = tmp_path / profile
        assert evaluate(chat, out, "--tasks", "2", "--parse-profile", profile) == 0
        assert read(out)["totals"]["invalid_reasons"] == {"empty reply (tool calls)": 4}


def test_results_without_reasons_are_read(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.answer = lambda _: "hm"
    assert evaluate(chat, tmp_path, "--tasks", "2") == 0
    lines = (tmp_path / EPISODES_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["invalid_reasons"]
    (tmp_path / EPISODES_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    result = read(tmp_path)
    del result["totals"]["invalid_reasons"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_evaluated(tmp_path).invalid_reasons == {}
    assert evaluate(chat, tmp_path, "--tasks", "2", "--resume") == 0
    assert "invalid turns:" not in capsys.readouterr().out.rpartition("tokens")[2]


def test_missing_usage_is_unknown_not_zero(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.mishaps.append("no usage")
    assert evaluate(chat, tmp_path, "--tasks", "3", "--price-in", "1", "--price-out", "1") == 0
    assert "unknown out; at most 2,048 a completion; cost unknown" in capsys.readouterr().out
    assert read(tmp_path)["totals"]["cost"] is None


def test_too_long_in_chat_style_fails_the_episode(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.answer = solved
    # Room for all first prompts and for no second one.
    chat.most_characters = 300
    assert evaluate(chat, tmp_path, "--tasks", "4") == 0
    value = read(tmp_path)
    assert value["totals"]["stop_reasons"] == {"context_limit": 4}
    assert [task["turns"] for task in value["tasks"]] == [1] * 4
    assert "count as failed: context_limit 4" in capsys.readouterr().out


def test_where_no_prompt_fits_there_is_no_result(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.most_characters = 10
    assert evaluate(chat, tmp_path, "--tasks", "4") == 2
    assert "maximum context length is 8 tokens.) Choose a model" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_too_long_in_window_style_leaves_out_the_oldest_turns(
    chat: FakeChat, tmp_path: Path
) -> None:
    too_long = (400, {"error": {"message": "no", "code": "context_length_exceeded"}})
    chat.mishaps += [None, too_long]
    options = ("--tasks", "1", "--prompt-style", "window")
    assert evaluate(chat, tmp_path, *options) == 0
    episode = json.loads((tmp_path / EPISODES_FILE).read_text())
    assert (episode["turns"], episode["stop_reason"]) == (2, "terminated")
    assert episode["turns_left_out"] == 1
    _, whole, shortened = (post["messages"][-1]["content"] for post in chat.posts)
    assert "say amber" in whole.partition("You observe now")[0]
    assert "say amber" not in shortened.partition("You observe now")[0].partition("\n\n")[2]


def test_a_dying_endpoint_loses_nothing(
    chat: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.answer, chat.healthy, chat.always = solved, 21, 500
    options = ("--tasks", "20", "--retries", "0")
    assert evaluate(chat, tmp_path, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    kept = len((tmp_path / EPISODES_FILE).read_text().splitlines())
    assert 5 <= kept < 20
    assert f"{kept} of 20 tasks are kept" in error
    assert error.endswith("--tasks 20 --retries 0 --resume")
    assert not (tmp_path / "result.json").exists()
    chat.healthy = 10**9
    with FakeChat(solved) as moved:
        assert evaluate(moved, tmp_path, *options, "--resume") == 0
        assert len(moved.posts) == 2 * (20 - kept)
    assert read(tmp_path)["success_rate"] == 1.0
    assert len(read(tmp_path, "settings.json")["sessions"]) == 2


# -- the limiter -----------------------------------------------------------------------------------


class Clock:
    """Time that passes only while a request waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    sleep = asyncio.sleep

    async def pass_time(seconds: float) -> None:
        clock.now += seconds
        await sleep(0)

    monkeypatch.setattr(rate_limiter, "_POLL", 1.0)
    monkeypatch.setattr(rate_limiter, "time", clock)
    monkeypatch.setattr(
        rate_limiter, "asyncio", SimpleNamespace(sleep=pass_time, Lock=asyncio.Lock)
    )
    return clock


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 5), st.integers(1, 100), st.lists(st.integers(1, 120), min_size=1, max_size=25)
)
def test_no_minute_has_more_than_allowed(
    clock: Clock, most: int, tokens: int, sizes: list[int]
) -> None:
    limiter = RateLimiter(most, tokens)
    admitted: list[tuple[float, int, int]] = []

    async def one(number: int, size: int) -> None:
        await limiter.admit(size)
        admitted.append((clock.now, size, number))

    async def run() -> None:
        await asyncio.gather(*(one(number, size) for number, size in enumerate(sizes)))

    asyncio.run(run())
    assert [number for _, _, number in admitted] == list(range(len(sizes)))
    for start, _, _ in admitted:
        minute = [size for t, size, _ in admitted if start <= t < start + 59.99]
        assert len(minute) <= most
        assert sum(minute) <= tokens or len(minute) == 1


def test_requests_wait_after_a_hold_only(clock: Clock) -> None:
    limiter = RateLimiter()
    asyncio.run(limiter.admit(10**9))
    assert clock.now == 1000
    limiter.hold(5)
    limiter.hold(2)
    asyncio.run(limiter.admit(1))
    assert clock.now == 1005


def test_tokens_that_an_answer_did_not_take_are_free_at_once(clock: Clock) -> None:
    limiter = RateLimiter(tokens=100)

    async def run() -> None:
        admission = await limiter.admit(90)
        waiting = asyncio.create_task(limiter.admit(80))
        await asyncio.sleep(0)
        admission.tokens = 10
        await waiting

    asyncio.run(run())
    assert clock.now <= 1002


def test_a_cancelled_request_does_not_block_the_others(clock: Clock) -> None:
    limiter = RateLimiter(1)

    async def run() -> None:
        await limiter.admit(1)
        waiting = [asyncio.create_task(limiter.admit(1)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await waiting[1]

    asyncio.run(run())
    assert clock.now == 1060
