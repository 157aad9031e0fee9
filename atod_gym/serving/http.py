"""JSON over HTTP: connections that stay open, time limits, and retries of failed connections.

Requests use an `HTTPAdapter` of requests without a `Session`, which would add cookies, redirects,
and the user's proxies and `.netrc`; `tests/benchmarks/http_client.py` measures the cost.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    LocationParseError,
    MaxRetryError,
    ProtocolError,
    ReadTimeoutError,
)
from urllib3.util import Retry, parse_url

from atod_gym.errors import InvalidSettingError, ServerError

ATTEMPTS = 5
"""Maximum number of times that a request is sent."""

BACKOFF_SECONDS = 0.1
"""Backoff before retries: none before the first, then 2, 4 and 8 times this."""

RETRY_STATUSES = frozenset({502, 503})
"""Statuses of a server, or of a proxy in front of it, that is temporarily unavailable."""

TIMEOUT_CODE = "timeout"
"""`ServerError.code` of a server that accepts connections but does not answer in time; with status
504 a proxy in front of it did not wait longer."""

TOKEN_VARIABLE = "ATOD_SERVER_TOKEN"
"""Environment variable with the token of servers that require one."""

CONNECT_TIMEOUT = 5.0
MAX_TIMEOUT = 1_000_000
MAX_ANSWER_BYTES = 1_000_000_000

# More threads than this per process open a new connection for each request.
_POOL_SIZE = 1024
_SHOWN = 200
_BATCH_BYTES = 900_000
_T = TypeVar("_T")


class JsonClient:
    """Sends JSON to one server; threads may share it, and it may be used on both sides of a fork.

    A request is retried when the connection fails or is closed before an answer begins, and when
    the status is 502 or 503. It is not retried when the answer is late: a slow server would
    get the same work again. The server may receive a request twice, so requests must be safe to
    retry: reading, a step with its number, or opening a session that expires by itself.
    """

    def __init__(
        self,
        url: str,
        *,
        advice: str,
        token: str | None = None,
        timeout: float = 60.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Prepare a client; it connects at the first request.

        Args:
            url: Where the server listens, such as `http://127.0.0.1:3000`; a path in it is kept.
            advice: What to do about an error, such as a command to run.
            token: Sent as bearer token.
            timeout: Seconds to wait for an answer, and between the parts of one.
            attempts: Maximum number of times that a request is sent.

        Raises:
            InvalidSettingError: The URL is not one of http or https, the token is not printable
                ASCII, or the timeout is out of range.
        """
        self.url = check_server_url(url)
        self.advice = advice
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout <= MAX_TIMEOUT:
            raise InvalidSettingError(
                f"timeout must be a number of seconds, > 0 and <= {MAX_TIMEOUT:,}, not {timeout!r}."
            )
        if token and not (token.isascii() and token.isprintable()):
            raise InvalidSettingError("A token must be printable ASCII.")
        self._timeout = timeout
        self._attempts = attempts
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._adapter = _adapter(self.url, attempts)
        self._pid = os.getpid()

    def get(self, path: str) -> dict[str, Any]:
        """Send a GET request; see `request`."""
        return self.request("GET", path)

    def post(self, path: str, body: object) -> dict[str, Any]:
        """Send a POST request; see `request`."""
        return self.request("POST", path, body)

    def request(
        self, method: str, path: str, body: object = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send a request and read the answer.

        Args:
            method: HTTP method.
            path: Begins with `/`; characters that are not safe in a URL must be quoted.
            body: Any value that `json.dumps` accepts; None: no body. A lone surrogate, which UTF-8
                cannot encode, is sent as `?`.
            timeout: Replaces that of the client.

        Returns:
            The JSON object of an answer with a status from 200 to 299.

        Raises:
            ServerError: All attempts fail; the answer is late (`code` is `TIMEOUT_CODE`); the
                    server answers with an error (see `status` and `code`); or the answer is not
                a JSON object.
        """
        where = f"{method} {self.url}{path}"
        request = requests.PreparedRequest()
        request.method, request.url = method, self.url + path
        request.prepare_headers(self._headers)
        if body is not None:
            text = json.dumps(body, ensure_ascii=False)
            request.prepare_body(text.encode("utf-8", "replace"), None)
        if self._pid != os.getpid():
            # After a fork the open connections belong to the parent: two processes that write to
            # one connection would receive each other's answers.
            self._adapter, self._pid = _adapter(self.url, self._attempts), os.getpid()
        seconds = self._timeout if timeout is None else timeout
        try:
            response = self._adapter.send(request, stream=True, timeout=(CONNECT_TIMEOUT, seconds))
            answer = response.raw.read(MAX_ANSWER_BYTES + 1, decode_content=True)
        except (requests.RequestException, HTTPError) as error:
            raise self._failed(where, error, seconds) from error
        if len(answer) > MAX_ANSWER_BYTES:
            response.close()
            raise ServerError(
                f"{where}: the answer has more than {MAX_ANSWER_BYTES} bytes. {self.advice}",
                status=response.status_code,
            )
        return self._read(where, response, answer)

    def _read(self, where: str, response: requests.Response, answer: bytes) -> dict[str, Any]:
        status = response.status_code
        try:
            data = json.loads(answer)
        except (ValueError, RecursionError):
            data = None
        error = None
        if isinstance(data, dict):
            if 200 <= status < 300:
                return data
            error = data.get("error")
        if isinstance(error, dict):
            code, message = str(error.get("code", "")), str(error.get("message", ""))
            raise ServerError(
                f"{where}: {message or code} (HTTP {status})",
                status=status,
                code=code,
                retry_after=retry_after(response),
            )
        if status == 504:
            late = f"{where}: no answer within the time limit of a proxy; raise it (HTTP 504)"
            raise ServerError(late, status=status, code=TIMEOUT_CODE)
        shown = answer[:_SHOWN].decode("utf-8", "replace")
        raise ServerError(
            f"{where}: HTTP {status} without the expected JSON object: {shown!r}. Is this the "
            f"right URL? {self.advice}",
            status=status,
            retry_after=retry_after(response),
        )

    def _failed(self, where: str, error: Exception, seconds: float) -> ServerError:
        """Return the error for a request without an answer; `error` is of requests or urllib3."""
        cause = error.args[0] if error.args and isinstance(error.args[0], HTTPError) else error
        if isinstance(cause, MaxRetryError) and cause.reason is not None:
            cause = cause.reason
        if isinstance(cause, ReadTimeoutError):
            return ServerError(
                f"{where}: no answer within {seconds:g} s; raise timeout=... if the "
                f"server needs longer. {self.advice}",
                code=TIMEOUT_CODE,
            )
        # An error of urllib3 itself comes from reading an answer that has begun: no retry.
        is_repeated = isinstance(error, requests.RequestException) and _is_connection_failure(cause)
        tried = self._attempts if is_repeated else 1
        times = "once" if tried == 1 else f"{tried} times"
        # urllib3 puts the connection in front of the reason.
        reason = str(cause).partition("): ")[2] or str(cause) or type(cause).__name__
        return ServerError(
            f"{where} failed (tried {times}): {reason}. {self.advice}",
            code=TIMEOUT_CODE if isinstance(error, requests.ConnectTimeout) else "",
        )


def retry_after(response: Any) -> float:
    """Return the seconds that an answer of any HTTP client asks to wait, 0 if it does not."""
    try:
        return Retry().get_retry_after(response) or 0.0
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _adapter(url: str, attempts: int) -> HTTPAdapter:
    retry = _Retry(
        total=attempts - 1,
        # False: raised immediately. A late answer is not requested again.
        read=False,
        other=0,
        status_forcelist=RETRY_STATUSES,
        allowed_methods=None,
        backoff_factor=BACKOFF_SECONDS,
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=_POOL_SIZE, max_retries=retry)
    if url.startswith("https:"):
        # requests alone trusts public authorities only, not those of the machine.
        adapter.init_poolmanager(1, _POOL_SIZE, ssl_context=ssl.create_default_context())
    return adapter


class _Retry(Retry):
    """Retries a request whose connection failed before an answer began.

    urllib3 counts a connection that was closed without an answer as a failed read; a server that
    closes idle connections causes it.
    """

    def _is_connection_error(self, err: Exception) -> bool:
        return _is_connection_failure(err)

    def _is_read_error(self, err: Exception) -> bool:
        return isinstance(err, ReadTimeoutError)


def _is_connection_failure(error: Exception) -> bool:
    if isinstance(error, ProtocolError):
        return isinstance(error.args[-1], ConnectionError)
    return isinstance(error, ConnectTimeoutError)


def check_server_url(url: object) -> str:
    """Return the URL of a server without a slash at its end.

    Raises:
        InvalidSettingError: It is not a URL of http or https, or has a query or user name.
    """
    with suppress(LocationParseError):
        parsed = parse_url(url if isinstance(url, str) else "")
        is_server = parsed.scheme in ("http", "https") and parsed.host
        if is_server and not (parsed.query or parsed.fragment or parsed.auth):
            return parsed.url.rstrip("/")
    raise InvalidSettingError(
        f"A server URL looks like http://127.0.0.1:3000, not {url!r}. A token goes into the "
        "setting `token`, not into the URL."
    )


def in_batches(items: Sequence[_T], most: int) -> Iterator[list[_T]]:
    """Split a list into parts that a server accepts in one request.

    Args:
        items: Anything that `json.dumps` takes.
        most: Maximum number of items of a part; the size in bytes is limited as well.
    """
    part: list[_T] = []
    size = 0
    for item in items:
        length = len(json.dumps(item)) + 2
        if part and (len(part) == most or size + length > _BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part
