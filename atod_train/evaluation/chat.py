"""A chat model behind an endpoint as an agent; it is asked in the form of chat completions."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from atod_gym.dialogue import AgentDialogue
from atod_gym.errors import InvalidSettingError, MissingExtraError, ServerError
from atod_gym.parsing import CompletionFormat
from atod_gym.types import TurnObservation
from atod_train.evaluation.agents import Completion, EpisodeStopped
from atod_train.evaluation.chat_errors import Failure, refuses_stop, understood
from atod_train.evaluation.rate_limiter import RateLimiter

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key, unless another is named."""

_NO_KEY = "none"
"""For servers that want no key; the client library wants one."""

_CHARACTERS_PER_TOKEN = 4
_USUAL_COMPLETION = 256
"""Tokens that a completion is reckoned to have where no limit is set."""

_NO_END = CompletionFormat("plain")
"""Replies are not cut."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_LONGEST_TOLD = 600.0
"""Seconds: an endpoint that asks for more ends the run, which can go on later."""

_TRIES_AT_A_STRANGER = 3
"""Attempts to reach an endpoint that has never answered."""


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
    """Sends prompts, at most as fast as allowed, and again where an endpoint is busy or stumbles.

    Args:
        settings: the model and how it is asked.
        limiter: shared by all who use the endpoint.

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
        self.url = str(self._client.base_url.copy_with(userinfo=None)).rstrip("/")
        self._has_answered = False
        self._takes_stop = settings.stop_at_action and "stop" not in settings.extra_body
        # Spreads the attempts of many in time; no result depends on it.
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
            except Exception as error:
                if stop and refuses_stop(error):
                    self._takes_stop = False
                    continue
                failed += 1
                await asyncio.sleep(self._wait(self._understood(error), failed))
            else:
                self._has_answered = True
                return completion

    def _understood(self, error: Exception) -> Failure:
        return understood(
            error, url=self.url, model=self.settings.model, key_variable=self._key_variable
        )

    def _wait(self, failure: Failure, failed: int) -> float:
        """Seconds until the next attempt after so many failed ones, if there is to be one."""
        if failure.kind in ("context_limit", "refused"):
            self._has_answered = True
            reason: Any = failure.kind
            raise EpisodeStopped(reason, failure.message)
        if failure.kind == "fatal":
            raise ServerError(failure.message)
        is_stranger = failure.is_unreachable and not self._has_answered
        tries = 1 + self.settings.retries
        if failed >= (min(tries, _TRIES_AT_A_STRANGER) if is_stranger else tries):
            advice = " Is the server running, and --base-url right?" if is_stranger else ""
            raise ServerError(f"{failure.message} That was attempt {failed}.{advice}")
        told = failure.wait or 0.0
        if told > _LONGEST_TOLD:
            raise ServerError(f"{failure.message} It asks to wait for {told:.0f} s.")
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (failed - 1))
        wait = max(told, wait * (0.75 + self._random.random() / 2))
        if failure.is_limit:
            self._limiter.hold(wait)
        return wait

    async def _ask(
        self, messages: Sequence[Mapping[str, str]], form: CompletionFormat, stop: Sequence[str]
    ) -> Completion:
        """One attempt; any exception of the client library, or of a malformed answer."""
        settings = self.settings
        chosen = {
            name: value
            for name in ("temperature", "top_p", "max_tokens", "seed")
            if (value := getattr(settings, name)) is not None
        }
        if stop:
            chosen["stop"] = list(stop)
        characters = sum(len(message["content"]) for message in messages)
        reckoned = characters // _CHARACTERS_PER_TOKEN + (settings.max_tokens or _USUAL_COMPLETION)
        admission = await self._limiter.admit(reckoned)
        create: Any = self._client.chat.completions.create
        answer = await asyncio.wait_for(
            create(
                model=settings.model,
                messages=list(messages),
                extra_body=dict(settings.extra_body) or None,
                **chosen,
            ),
            settings.timeout,
        )
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
        """Says what to do now; where a window prompt is too long, its oldest turns are left out.

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
    """Reads an answer; raises what reading a malformed one raises."""
    choice = answer.choices[0]
    message = choice.message
    text = message.content or ""
    if not isinstance(text, str):
        raise TypeError("the content is no text")
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
        is_cut=choice.finish_reason == "length",
        instead=instead,
    )


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
