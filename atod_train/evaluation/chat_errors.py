"""What goes wrong at a chat endpoint, and what to do about it: wait, give up an episode, or end."""

from __future__ import annotations

import email.utils
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

_CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT = re.compile(
    r"context (length|window|size)|maximum context|max_model_len|prompt is too long"
    r"|too many (input |prompt )?tokens|max_new_tokens\W+must be <="
    r"|(input|prompt)\b.{0,60}\b(too long|longer than|exceeds)",
    re.IGNORECASE,
)
_FILTER_CODES = ("content_filter", "content_policy_violation")
_SPENT_CODES = ("insufficient_quota", "billing_hard_limit_reached")
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed.

    Attributes:
        kind: `retry`: it may do well later; `context_limit`: the prompt is too long; `refused`:
            these messages get no answer; `fatal`: no request will do well.
        message: what happened, in one line, with what to do if it is fatal.
        wait: seconds that the endpoint asks for; None: it does not say.
        is_limit: it was one request too many, so all others had better wait, too.
        is_unreachable: no connection came about.
    """

    kind: Literal["retry", "context_limit", "refused", "fatal"]
    message: str
    wait: float | None = None
    is_limit: bool = False
    is_unreachable: bool = False


def understood(error: Exception, *, url: str, model: str, key_variable: str) -> Failure:
    """What an exception of the client library, or of reading its answer, means.

    Args:
        error: the exception.
        url: of the endpoint, for messages.
        model: its name, for messages.
        key_variable: environment variable with the key, for messages.
    """
    import openai

    if isinstance(error, openai.APIStatusError):
        return _status(error, url, model, key_variable)
    if isinstance(error, (openai.APITimeoutError, TimeoutError)) or _is_timeout(error):
        return Failure("retry", f"{url} gave no answer in time (--timeout)")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        return Failure("retry", f"{url} cannot be reached ({_line(cause)})", is_unreachable=True)
    return Failure("retry", f"{url} gave an answer that is no chat completion ({_line(error)})")


def refuses_stop(error: Exception) -> bool:
    """Whether an endpoint refuses a request because it takes no stop strings."""
    status = getattr(error, "status_code", None)
    body = getattr(error, "body", None)
    body = body if isinstance(body, dict) else {}
    body = body.get("error", body) if isinstance(body.get("error"), dict) else body
    names_it = body.get("param") == "stop" or re.search(r"\bstop\b", str(body.get("message", "")))
    return status in (400, 422) and bool(names_it)


def _is_timeout(error: Exception) -> bool:
    # Before Python 3.11 that of asyncio is another class.
    return type(error).__name__ == "TimeoutError"


def _status(error: Any, url: str, model: str, key_variable: str) -> Failure:
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    body = body.get("error", body) if isinstance(body.get("error"), dict) else body
    codes = {str(body.get("code")), str(body.get("type"))}
    said = _line(body.get("message") or body.get("detail") or error)
    where = f"{url} answers {status}: {said}"
    if codes & set(_SPENT_CODES) or status == 402:
        return Failure("fatal", f"{where} Add credit, or use another key.")
    if status in _WORTH_ANOTHER_TRY or status >= 500:
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
