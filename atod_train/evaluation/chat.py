"""An agent that plays with a model behind an endpoint of chat completions.

`ChatEndpoint.complete` makes one request after another: `_failure` sorts what goes wrong into
transient failures, which are retried with backoff, prompts that are refused, which end an episode,
and fatal ones, which end the run.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from atod_gym.dialogue import AgentDialogue
from atod_gym.errors import InvalidSettingError, MissingExtraError, ServerError
from atod_gym.parsing import CompletionFormat
from atod_gym.types import TurnObservation
from atod_train.evaluation.agents import Completion, EpisodeStopped
from atod_train.evaluation.rate_limiter import RateLimiter

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key, unless another is named."""

_NO_KEY = "none"
"""For servers that want no key; the client library wants one."""

_CHARACTERS_PER_TOKEN = 4
_USUAL_COMPLETION = 256
"""Estimated tokens of a completion where no limit is set."""

_NO_END = CompletionFormat("plain")
"""Replies are not cut."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_LONGEST_REQUESTED = 600.0
"""Seconds; an endpoint that requests a longer wait ends the run, which can be resumed."""

_FIRST_ATTEMPTS = 3
"""Attempts to reach an endpoint that has never answered."""

_CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT = re.compile(
    r"context (length|window|size)|maximum context|max_model_len|prompt is too long"
    r"|too many (input |prompt )?tokens|max_new_tokens\W+must be <="
    r"|(input|prompt)\b.{0,60}\b(too long|longer than|exceeds)",
    re.IGNORECASE,
)
_FILTER_CODES = ("content_filter", "content_policy_violation")
_SPENT_CODES = ("insufficient_quota", "billing_hard_limit_reached")
_TRANSIENT = (408, 409, 425, 429)
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed.

    Attributes:
        kind: `retry`: transient; `context_limit`: the prompt is too long; `refused`: these messages
            get no answer; `fatal`: every request would fail.
        message: what happened, in one line, with what to change if it is fatal.
        wait: seconds that the endpoint requests; None: not given.
        is_limit: a rate limit was reached, so that all other requests wait too.
        is_unreachable: no connection was made.
    """

    kind: Literal["retry", "context_limit", "refused", "fatal"]
    message: str
    wait: float | None = None
    is_limit: bool = False
    is_unreachable: bool = False


@dataclass(frozen=True)
class ChatSettings:
    """Which model answers, and how; None: as the endpoint has it."""

    model: str
    base_url: str | None = None
    """None: that of the variable OPENAI_BASE_URL, else OpenAI's own."""
    key_variable: str | None = None
    """Environment variable with the key; None: `KEY_VARIABLE`, which need not be set for a server
    named by `base_url`."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Longest completion."""
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a request."""
    keep_reasoning: bool = False
    """Thoughts that come beside the text are put before it, between <think> and </think>."""
    stop_at_action: bool = True
    """Replies end with their first action where the parse profile marks its end: the endpoint gets
    stop strings, and text after the action is cut off."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 8
    """Further attempts of a request that failed."""

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidSettingError("Name the model with --model.")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise InvalidSettingError(
                f"--base-url must be a URL such as http://127.0.0.1:8000/v1, not {self.base_url!r}."
            )
        for name, value, lowest in (
            ("temperature", self.temperature, 0),
            ("top-p", self.top_p, 0),
            ("max-tokens", self.max_tokens, 1),
            ("retries", self.retries, 0),
        ):
            if value is not None and not (value >= lowest and math.isfinite(value)):
                raise InvalidSettingError(f"--{name} must be >= {lowest}, not {value}.")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise InvalidSettingError(f"--timeout must be > 0, not {self.timeout}.")

    def of_results(self) -> dict[str, Any]:
        """What results depend on, as JSON values; where the model is served is not of these."""
        apart = ("base_url", "key_variable", "timeout", "retries")
        return {name: value for name, value in asdict(self).items() if name not in apart}


class ChatEndpoint:
    """Send prompts below rate limits, and retry those that fail for a while.

    Args:
        settings: the model and how it is asked.
        limiter: shared by all agents of the endpoint.

    Raises:
        MissingExtraError: the client library is not installed.
        InvalidSettingError: there is no key for an endpoint that wants one.
    """

    def __init__(self, settings: ChatSettings, limiter: RateLimiter | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError(
                "The chat agent needs the package openai: pip install 'atod-gym[eval]'"
            ) from error
        self.settings = settings
        self._limiter = limiter or RateLimiter()
        self._key_variable = settings.key_variable or KEY_VARIABLE
        key = os.environ.get(self._key_variable)
        if key and not key.isascii():
            raise InvalidSettingError(
                f"The environment variable {self._key_variable} holds characters that no key has "
                "(not ASCII); set it again."
            )
        is_local = bool(settings.base_url or os.environ.get("OPENAI_BASE_URL"))
        if not key and (settings.key_variable or not is_local):
            raise InvalidSettingError(
                f"The environment variable {self._key_variable} holds no key; set it, or name "
                "another one with --api-key-env or a server that wants none with --base-url."
            )
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=key or _NO_KEY, timeout=settings.timeout,
            max_retries=0,
        )  # fmt: skip
        self._errors = (openai.OpenAIError, TimeoutError, asyncio.TimeoutError, _NoCompletion)
        """Failures of a request; any other exception is a mistake in the program."""
        self.url = str(self._client.base_url.copy_with(userinfo=None)).rstrip("/")
        self._has_answered = False
        self._takes_stop = settings.stop_at_action and "stop" not in settings.extra_body
        # Jitter of the waits; no result depends on it.
        self._random = random.Random()

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        form: CompletionFormat = _NO_END,
    ) -> Completion:
        """The model's answer to a prompt.

        If the endpoint refuses stop strings, or one of them ended a reply inside its thought, this
        and later requests are sent without them; replies are still cut after their action.

        Args:
            messages: the prompt.
            form: where a reply's action ends.

        Raises:
            EpisodeStopped: the prompt is too long, or the endpoint refuses these messages.
            ServerError: the endpoint fails after some attempts, or would for any prompt.
        """
        failed = 0
        while True:
            stop = form.stop_strings if self._takes_stop else ()
            try:
                completion = await self._ask(messages, form, stop)
            except _StoppedInThought:
                self._takes_stop = False
            except self._errors as error:
                if stop and _refuses_stop(error):
                    self._takes_stop = False
                    continue
                failed += 1
                await asyncio.sleep(self._wait(self._failure(error), failed))
            else:
                self._has_answered = True
                return completion

    def _failure(self, error: Exception) -> Failure:
        """Classify an exception of the client library, or of an answer that is no completion."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return _status_failure(error, self.url, self.settings.model, self._key_variable)
        if isinstance(error, openai.APITimeoutError | TimeoutError | asyncio.TimeoutError):
            return Failure("retry", f"{self.url} gave no answer in time (--timeout)")
        if isinstance(error, openai.APIConnectionError):
            message = f"{self.url} cannot be reached ({_line(error.__cause__ or error)})"
            return Failure("retry", message, is_unreachable=True)
        message = f"{self.url} gave an answer that is no chat completion ({_line(error)})"
        return Failure("retry", message)

    def _wait(self, failure: Failure, failed: int) -> float:
        """Return the seconds until the next attempt.

        Raises:
            EpisodeStopped: the endpoint refuses this prompt.
            ServerError: every request would fail, or `failed` attempts are all there are.
        """
        if failure.kind == "context_limit" or failure.kind == "refused":
            self._has_answered = True
            raise EpisodeStopped(failure.kind, failure.message)
        if failure.kind == "fatal":
            raise ServerError(failure.message)
        never_answered = failure.is_unreachable and not self._has_answered
        tries = 1 + self.settings.retries
        if failed >= (min(tries, _FIRST_ATTEMPTS) if never_answered else tries):
            advice = " Is the server running, and --base-url right?" if never_answered else ""
            raise ServerError(f"{failure.message} That was attempt {failed}.{advice}")
        requested = failure.wait or 0.0
        if requested > _LONGEST_REQUESTED:
            raise ServerError(f"{failure.message} It asks to wait for {requested:.0f} s.")
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (failed - 1))
        wait = max(requested, wait * (0.75 + self._random.random() / 2))
        if failure.is_limit:
            self._limiter.hold(wait)
        return wait

    async def _ask(
        self, messages: Sequence[Mapping[str, str]], form: CompletionFormat, stop: Sequence[str]
    ) -> Completion:
        """Make one attempt; raises one of `self._errors`."""
        settings = self.settings
        chosen = {
            name: value
            for name in ("temperature", "top_p", "max_tokens", "seed")
            if (value := getattr(settings, name)) is not None
        }
        if stop:
            chosen["stop"] = list(stop)
        characters = sum(len(message["content"]) for message in messages)
        estimate = characters // _CHARACTERS_PER_TOKEN + (settings.max_tokens or _USUAL_COMPLETION)
        admission = await self._limiter.admit(estimate)
        create: Any = self._client.chat.completions.create
        request = create(
            model=settings.model,
            messages=list(messages),
            extra_body=dict(settings.extra_body) or None,
            **chosen,
        )
        try:
            answer = await asyncio.wait_for(request, settings.timeout)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _NoCompletion(str(error)) from error
        completion = _completion(answer, settings.keep_reasoning)
        if completion.prompt_tokens is not None and completion.completion_tokens is not None:
            self._limiter.settle(admission, completion.prompt_tokens + completion.completion_tokens)
        if not settings.stop_at_action:
            return completion
        return _ended(completion, answer.choices[0], form, stop)


class ChatAgent:
    """An agent that asks an endpoint, which many share."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self._endpoint = endpoint

    def reset(self, env: Any, observation: TurnObservation, info: Mapping[str, Any]) -> None:
        """Starts an episode."""
        del observation, info
        self._dialogue: AgentDialogue = env.get_wrapper_attr("dialogue")

    async def act(
        self,
        messages: Sequence[dict[str, str]],
        observation: TurnObservation,
        info: Mapping[str, Any],
    ) -> Completion:
        """Return the completion; the oldest turns of a window prompt that is too long are left out.

        Raises:
            EpisodeStopped: the prompt is too long all the same, or refused.
            ServerError: the endpoint fails.
        """
        del observation, info
        left_out = 0
        while True:
            try:
                completion = await self._endpoint.complete(
                    messages, self._dialogue.completion_format
                )
            except EpisodeStopped as stop:
                can_shorten = left_out < self._dialogue.past_turns
                if stop.reason != "context_limit" or not can_shorten:
                    raise
                left_out += 1
                messages = self._dialogue.shortened(left_out)
            else:
                return replace(completion, turns_left_out=left_out)


def extra_body(text: str) -> dict[str, Any]:
    """Further fields of a request, from JSON.

    Raises:
        InvalidSettingError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidSettingError(f"--extra-body is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidSettingError('--extra-body must be a JSON object, such as {"top_k": 20}.')
    return value


def _completion(answer: Any, keep_reasoning: bool) -> Completion:
    """Read an answer; raises `_NoCompletion` for one that holds no message of text."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _NoCompletion("it has no choices")
    choice = choices[0]
    message = getattr(choice, "message", None)
    if message is None:
        raise _NoCompletion("its first choice has no message")
    text = getattr(message, "content", None) or ""
    if not isinstance(text, str):
        raise _NoCompletion("the content is no text")
    reasoning = ""
    for name in ("reasoning_content", "reasoning"):
        value = getattr(message, name, None)
        if isinstance(value, str) and value:
            reasoning = value
            break
    usage = getattr(answer, "usage", None)
    details = getattr(usage, "completion_tokens_details", None)
    thought = _count(details, "reasoning_tokens")
    if thought is None and not reasoning:
        thought = 0
    instead = "" if text.strip() else _instead_of_text(choice)
    if keep_reasoning and reasoning:
        text = f"<think>{reasoning}</think>{text}"
    return Completion(
        text=text,
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        reasoning_tokens=thought,
        reasoning=reasoning,
        is_cut=getattr(choice, "finish_reason", None) == "length",
        instead=instead,
    )


class _NoCompletion(Exception):
    """An answer that is no chat completion."""


class _StoppedInThought(Exception):
    """A stop string inside a thought ended the reply before its action."""


def _ended(
    completion: Completion, choice: Any, form: CompletionFormat, stop: Sequence[str]
) -> Completion:
    """Cuts a reply after its action.

    Args:
        completion: the reply.
        choice: of the answer. vLLM and SGLang name in it the stop string that ended the reply, or
            None for the end of the turn.
        form: finds the end of the action.
        stop: the stop strings that were sent. Servers leave out the one at which they stopped.

    Raises:
        _StoppedInThought: the reply was stopped before its thoughts had ended.
    """
    text = completion.text
    if stop and choice.finish_reason == "stop":
        stopped_at = getattr(choice, "stop_reason", getattr(choice, "matched_stop", "unknown"))
        if isinstance(stopped_at, str):
            if form.is_in_thought(text) or (completion.reasoning and not choice.message.content):
                raise _StoppedInThought
            text = form.closed(text)
    end = form.end_of_action(text)
    if end is None:
        return replace(completion, text=text)
    return replace(completion, text=text[:end], is_cut=False)


def _instead_of_text(choice: Any) -> str:
    """Names what an answer without text holds; empty if nothing."""
    message = choice.message
    if getattr(message, "tool_calls", None) or getattr(message, "function_call", None):
        return "tool calls"
    if getattr(message, "refusal", None):
        return "refusal"
    reasons = {"content_filter": "content filter", "length": "cut at the limit of tokens"}
    return reasons.get(choice.finish_reason, "")


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _refuses_stop(error: Exception) -> bool:
    """Whether an endpoint refuses a request because it takes no stop strings."""
    status = getattr(error, "status_code", None)
    body = _error_body(error)
    names_it = body.get("param") == "stop" or re.search(r"\bstop\b", str(body.get("message", "")))
    return status in (400, 422) and bool(names_it)


def _status_failure(error: Any, url: str, model: str, key_variable: str) -> Failure:
    status = error.status_code
    body = _error_body(error)
    codes = {str(body.get("code")), str(body.get("type"))}
    said = _line(body.get("message") or body.get("detail") or error)
    where = f"{url} answers {status}: {said}"
    if codes & set(_SPENT_CODES) or status == 402:
        return Failure("fatal", f"{where} Add credit, or use another key.")
    if status in _TRANSIENT or status >= 500:
        return Failure("retry", where, _retry_after(error.response.headers), status == 429)
    if status in (400, 413, 422):
        if status == 413 or codes & set(_CONTEXT_CODES) or _CONTEXT.search(said):
            return Failure("context_limit", where)
        if codes & set(_FILTER_CODES):
            return Failure("refused", where)
        advice = "Change what it does not take (--model, --temperature, --extra-body ..)."
        if "max_completion_tokens" in said:
            advice = """Use --extra-body '{"max_completion_tokens": N}' instead of --max-tokens."""
        return Failure("fatal", f"{where} {advice}")
    if status in (401, 403):
        return Failure(
            "fatal",
            f"{where} Put a valid key into {key_variable}, or name another variable with "
            "--api-key-env.",
        )
    if status in (404, 405):
        return Failure(
            "fatal",
            f"{where} Check --model {model} and --base-url, which mostly ends in /v1.",
        )
    return Failure("fatal", where)


def _error_body(error: Any) -> dict[str, Any]:
    body = getattr(error, "body", None)
    body = body if isinstance(body, dict) else {}
    inner = body.get("error")
    return inner if isinstance(inner, dict) else body


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from the headers `retry-after-ms` or `retry-after` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _line(value: object) -> str:
    """In one line that ends as a sentence does."""
    text = " ".join(str(value).split())[:_SHOWN] or type(value).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
