"""A model behind an endpoint of chat completions: its settings, requests, retries and agent.

`ChatEndpoint.complete` retries transient failures with backoff. A prompt that is too long or
refused ends its episode (`EpisodeStopped`); a request that can never succeed, or a transient
failure that stays, ends the evaluation (`ServerError`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from atod_gym.dialogue import Prompt
from atod_gym.errors import InvalidSettingError, MissingExtraError, ServerError
from atod_gym.parsing import CompletionFormat
from atod_gym.serving.http import retry_after
from atod_gym.types import TurnObservation
from atod_train.evaluation.agents import Completion, EpisodeStopped, Info
from atod_train.evaluation.rate_limiter import RateLimiter
from atod_train.rollout.episode import Episode

if TYPE_CHECKING:
    from atod_train.evaluation.eval_options import ChatSettings, Sampling

_NO_KEY = "none"
"""For servers that need no key; the client library needs one."""

_CHARACTERS_PER_TOKEN = 4
_USUAL_COMPLETION = 256
"""Estimated tokens of a completion where the user sets no limit."""

_MOST_TOKENS = 2048
"""Limit of a completion where the user sets none; some models never stop by themselves."""
_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")

_NO_END = CompletionFormat("plain")
"""Replies are not cut."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_LONG_WAIT = 5.0
"""Seconds; longer ones are reported, once until the endpoint answers again."""
_LONGEST_REQUESTED = 600.0
"""Seconds; an endpoint that requests a longer wait ends the evaluation, which can be resumed."""

_FIRST_ATTEMPTS = 3
"""Attempts to reach an endpoint that has never answered."""

_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error"}
_CONTEXT = re.compile(
    r"context (length|window|size)|maximum context|max_model_len|prompt is too long"
    r"|too many (input |prompt )?tokens|max_new_tokens\W+must be <="
    r"|(input|prompt)\b.{0,60}\b(too long|longer than|exceeds)",
    re.IGNORECASE,
)
_FILTER_CODES = {"content_filter", "content_policy_violation"}
_SPENT_CODES = {"insufficient_quota", "billing_hard_limit_reached"}
_TRANSIENT = (408, 409, 425, 429)
_SHOWN = 300


class ChatEndpoint:
    """Send prompts below the rate limits, and retry those that fail.

    Attributes:
        url: of the endpoint, without a password.

    Raises:
        MissingExtraError: the client library is not installed.
        InvalidSettingError: no model is named, the URL or `extra_body` is malformed, or there is no
            valid key.
    """

    def __init__(self, settings: ChatSettings, sampling: Sampling) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError(
                "The chat agent needs the package openai: pip install 'atod-gym[eval]'"
            ) from error
        if not settings.model:
            raise InvalidSettingError("Name the model with --model.")
        if settings.base_url and not settings.base_url.startswith(("http://", "https://")):
            raise InvalidSettingError(
                "--base-url must be a URL such as http://127.0.0.1:8000/v1, not "
                f"{settings.base_url!r}."
            )
        self.settings = settings
        self._extra_fields = settings.extra_fields()
        self._key_variable = settings.api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(self._key_variable, "")
        if not key.isascii():
            raise InvalidSettingError(
                f"The environment variable {self._key_variable} holds characters that no key has "
                "(not ASCII); set it again."
            )
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and (settings.api_key_env or not base_url):
            raise InvalidSettingError(
                f"The environment variable {self._key_variable} holds no key; set it, or name "
                "another one with --api-key-env or a server that needs none with --base-url."
            )
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=key or _NO_KEY, timeout=settings.timeout, max_retries=0
        )
        self.url = str(self._client.base_url.copy_with(userinfo=None)).rstrip("/")
        self._limiter = RateLimiter(
            settings.requests_per_minute or math.inf, settings.tokens_per_minute or math.inf
        )
        given = sampling.max_tokens, *map(self._extra_fields.get, _LIMIT_FIELDS)
        self._has_default_limit = not any(given)
        self._limit = _MOST_TOKENS if self._has_default_limit else sampling.max_tokens
        self._limit_field = _LIMIT_FIELDS[0]
        self._estimate = sampling.max_tokens or _USUAL_COMPLETION
        chosen = {
            "model": settings.model,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "top_p": settings.top_p,
        }
        self._fields = {name: value for name, value in chosen.items() if value is not None}
        self.of_results = {
            **chosen,
            "max_tokens": self._limit,
            "extra_body": self._extra_fields,
            "keep_reasoning": settings.keep_reasoning,
            "stop_at_action": settings.stop_at_action,
        }
        """Settings that results depend on, as JSON values; not the server's address."""
        self._has_answered = self._has_reported = False
        self._takes_stop = "stop" not in self._extra_fields
        # Jitter of the waits; no result depends on it.
        self._random = random.Random()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def complete(
        self, messages: Sequence[Mapping[str, str]], form: CompletionFormat = _NO_END
    ) -> Completion:
        """Return the model's answer to a prompt.

        If the endpoint refuses stop strings, or one of them ended a reply inside its thought, this
        and later requests are sent without them; replies are still cut after their action. If it
        refuses the field `max_tokens`, they have `max_completion_tokens` instead.

        Args:
            messages: the prompt.
            form: where a reply's action ends.

        Raises:
            EpisodeStopped: the prompt is too long, or the endpoint refuses these messages.
            ServerError: the endpoint keeps failing, or would fail for any prompt.
        """
        if not self.settings.stop_at_action:
            form = _NO_END
        failed, limit = 0, self._limit
        while True:
            try:
                return await self._ask(messages, form, limit)
            except _AskAgain:
                pass
            except EpisodeStopped as stop:
                # Some endpoints refuse prompts that leave less than the limit, and name it; without
                # a limit they sample what is left of the context.
                can_grow = stop.reason == "context_limit" and self._has_default_limit
                if not can_grow or limit is None or str(limit) not in str(stop):
                    raise
                limit = None
            except _Transient as error:
                failed += 1
                wait = self._backoff(error, failed)
                if wait > _LONG_WAIT and error.status != 429 and not self._has_reported:
                    self._has_reported = True
                    again = f"It is asked again, {self.settings.retries} times at most (--retries)."
                    tqdm.write(f"atod-eval: {error} {again}", file=sys.stderr)
                await asyncio.sleep(wait)

    async def _ask(
        self, messages: Sequence[Mapping[str, str]], form: CompletionFormat, limit: int | None
    ) -> Completion:
        """Make one attempt; a completion has at most `limit` tokens (None: no limit is sent).

        Raises:
            EpisodeStopped: the endpoint refuses this prompt.
            ServerError: every request would fail.
            _AskAgain: the request must be sent with other fields.
            _Transient: the request may succeed later.
        """
        import openai

        stop = list(form.stop_strings) if self._takes_stop else []
        characters = sum(len(message["content"]) for message in messages)
        admission = await self._limiter.admit(characters // _CHARACTERS_PER_TOKEN + self._estimate)
        more = {self._limit_field: limit, "stop": stop}
        sent = {**self._fields, **{name: value for name, value in more.items() if value}}
        request = self._client.chat.completions.with_raw_response.create(
            messages=list(messages), extra_body=self._extra_fields or None, **sent
        )
        try:
            answer = json.loads((await asyncio.wait_for(request, self.settings.timeout)).content)
        except openai.APIStatusError as error:
            self._has_answered = True
            raise self._refusal(error, sent) from error
        except (openai.APITimeoutError, asyncio.TimeoutError) as error:
            raise _Transient(
                f"{self.url} gave no answer within {self.settings.timeout:g} s: raise --timeout, "
                "or lower --max-tokens or --concurrency."
            ) from error
        except openai.APIConnectionError as error:
            message = f"{self.url} cannot be reached ({_line(error.__cause__ or error)})"
            raise _Transient(message) from error
        except ValueError as error:
            raise self._no_completion(str(error)) from error
        self._has_answered, self._has_reported = True, False
        completion = self._read(answer, form, stop)
        if completion.prompt_tokens is not None and completion.completion_tokens is not None:
            admission.tokens = completion.prompt_tokens + completion.completion_tokens
        return completion

    def _backoff(self, error: _Transient, failed: int) -> float:
        """Return the seconds until the next attempt.

        Raises:
            ServerError: `failed` attempts are all there are, or the requested wait is too long.
        """
        tries = 1 + self.settings.retries
        if failed >= (tries if self._has_answered else min(tries, _FIRST_ATTEMPTS)):
            advice = "" if self._has_answered else " Is the server running, and --base-url right?"
            raise ServerError(f"{error} That was attempt {failed}.{advice}")
        if error.retry_after > _LONGEST_REQUESTED:
            raise ServerError(f"{error} It asks to wait for {error.retry_after:.0f} s.")
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (failed - 1))
        wait = max(error.retry_after, wait * self._random.uniform(0.75, 1.25))
        if error.status == 429:
            self._limiter.hold(wait)
        return wait

    def _refusal(self, error: Any, sent: Mapping[str, Any]) -> Exception:
        """Return the exception for an answer with an HTTP status of 400 and above."""
        status, body = error.status_code, error.body
        body = body if isinstance(body, dict) else {}
        body = body["error"] if isinstance(body.get("error"), dict) else body
        codes = {str(body.get("code")), str(body.get("type"))}
        said = _line(body.get("message") or body.get("detail") or error)
        where = f"{self.url} answers {status}: {said}"
        if codes & _SPENT_CODES or status == 402:
            return ServerError(f"{where} Add credit, or use another key.")
        if status in _TRANSIENT or status >= 500:
            wait = retry_after(error.response)
            return _Transient(where, status=status, retry_after=wait)
        advice = ""
        if status in (400, 413, 422):
            if "stop" in sent and (body.get("param") == "stop" or re.search(r"\bstop\b", said)):
                self._takes_stop = False
                return _AskAgain()
            if "max_tokens" in sent and "max_completion_tokens" in said:
                self._limit_field = "max_completion_tokens"
                return _AskAgain()
            if status == 413 or codes & _CONTEXT_CODES or _CONTEXT.search(said):
                return EpisodeStopped("context_limit", where)
            if codes & _FILTER_CODES:
                return EpisodeStopped("refused", where)
            advice = "Change what it does not take (--model, --max-tokens, --extra-body ..)."
        elif status in (401, 403):
            advice = f"Put a valid key into {self._key_variable}, or name another variable with "
            advice += "--api-key-env."
        elif status in (404, 405):
            advice = (
                f"Check --model {self.settings.model} and --base-url, which mostly ends in /v1."
            )
        return ServerError(f"{where} {advice}".rstrip())

    def _read(self, answer: Any, form: CompletionFormat, stop: Sequence[str]) -> Completion:
        """Return the completion of an answer, cut after its action.

        Raises:
            _AskAgain: a stop string ended the reply before its thoughts had ended.
            _Transient: the answer holds no message of text.
        """
        try:
            choice = answer["choices"][0]
            message, usage = choice["message"], answer.get("usage") or {}
            thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
            text = message.get("content") or ""
            thoughts = (message.get("reasoning_content"), message.get("reasoning"))
            if not isinstance(text, str):
                raise TypeError("no text")
        except (LookupError, TypeError, AttributeError) as error:
            raise self._no_completion("it has no choice with a message of text") from error
        reasoning = next((part for part in thoughts if part and isinstance(part, str)), "")
        finish = choice.get("finish_reason")
        is_in_thought = bool(reasoning or thought) and not text
        instead = "" if text.strip() else _instead_of_text(message, finish)
        if is_in_thought and not instead:
            # Parsers of servers take a text without the end of a thought for reasoning.
            instead = "reasoning alone"
        if self.settings.keep_reasoning and reasoning:
            text = f"<think>{reasoning}</think>{text}"
        # vLLM (stop_reason) and SGLang (matched_stop) name the stop string that ended the reply, or
        # null for the end of the turn. Servers leave it out of the text.
        stopped_at = choice.get("stop_reason", choice.get("matched_stop", "unknown"))
        if stop and finish == "stop" and isinstance(stopped_at, str):
            if is_in_thought or form.is_in_thought(text):
                self._takes_stop = False
                raise _AskAgain
            text = form.closed(text)
        end = form.end_of_action(text)
        return Completion(
            text=text[:end],
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            reasoning_tokens=0 if thought is None and not reasoning else thought,
            reasoning=reasoning,
            is_cut=finish == "length" and end is None,
            instead=instead,
        )

    def _no_completion(self, reason: str) -> _Transient:
        return _Transient(f"{self.url} gave an answer that is no chat completion ({_line(reason)})")


class _Transient(ServerError):
    """A request failed and may succeed later."""


class _AskAgain(Exception):
    """The request must be sent once more, as this endpoint takes it."""


class ChatAgent:
    """An agent of an endpoint, which many agents share."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self._endpoint = endpoint

    def reset(self, episode: Episode, observation: TurnObservation, info: Info) -> None:
        """Start an episode."""
        self._dialogue = episode.dialogue

    async def act(self, messages: Prompt, observation: TurnObservation, info: Info) -> Completion:
        """Return the completion; the oldest turns of a window prompt that is too long are left out.

        Raises:
            EpisodeStopped: the prompt is too long without past turns too, or it is refused.
            ServerError: the endpoint fails.
        """
        left_out = 0
        while True:
            try:
                form = self._dialogue.completion_format
                completion = await self._endpoint.complete(messages, form)
                return replace(completion, turns_left_out=left_out)
            except EpisodeStopped as stop:
                if stop.reason != "context_limit" or left_out >= self._dialogue.past_turns:
                    raise
            left_out += 1
            messages = self._dialogue.shortened(left_out)


def _instead_of_text(message: Mapping[str, Any], finish_reason: Any) -> str:
    """Name what an answer without text holds; empty if nothing."""
    if message.get("tool_calls") or message.get("function_call"):
        return "tool calls"
    if message.get("refusal"):
        return "refusal"
    reasons = {"content_filter": "content filter", "length": "cut at the limit of tokens"}
    return reasons.get(finish_reason, "")


def _line(value: object) -> str:
    """Return a text in one line that ends as a sentence does."""
    text = " ".join(str(value).split())[:_SHOWN] or type(value).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
