"""JSON over HTTP: connections that stay open, time limits, and retries that end.

It uses urllib3, which `requests` is built on, without `requests` around it: a small POST on an open
connection took 0.2 ms of processor time instead of 0.6 ms, which counts at a thousand a second.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Timeout, parse_url

from atod_gym.errors import InvalidSettingError, ServerError

ATTEMPTS = 5
"""How often a request is sent at most."""

RETRY_DELAYS = (0.0, 0.2, 0.4, 0.8)
"""Seconds before each repetition; the first may only replace a connection that had gone stale."""

RETRY_STATUSES = frozenset({502, 503, 504})
"""Answers that say: not now."""

TOKEN_VARIABLE = "ATOD_SERVER_TOKEN"
"""Environment variable with the token of servers that want one."""

CONNECT_TIMEOUT = 5.0
MAX_ANSWER_BYTES = 1_000_000_000
_POOL_SIZE = 64
_SHOWN = 200
_BATCH_BYTES = 900_000
_T = TypeVar("_T")


class JsonClient:
    """Sends JSON to one server; threads may share it, and it may be used on both sides of a fork.

    A request is repeated, at most `ATTEMPTS` times in all, when the connection fails, the answer
    does not come in time, or its status is 502, 503 or 504. The server may thus get a request
    twice, so it is for requests that can be repeated: those that only read, a step that carries its
    number, the deletion of something, or the opening of a session that ends by itself if the
    answer was lost.
    """

    def __init__(
        self,
        url: str,
        *,
        advice: str,
        token: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = CONNECT_TIMEOUT,
        attempts: int = ATTEMPTS,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """Connects at the first request.

        Args:
            url: where the server listens, such as `http://127.0.0.1:3000`; a path in it is kept.
            advice: what errors tell the user to do, such as the command that starts the server.
            token: sent as bearer token.
            timeout: seconds to wait for an answer, and between the parts of one.
            connect_timeout: seconds to wait for a connection.
            attempts: how often a request is sent at most, 1 to `ATTEMPTS`.
            max_answer_bytes: longer answers are refused.

        Raises:
            InvalidSettingError: if the URL is not one of http or https, the token is not printable
                ASCII, or a number has no meaning.
        """
        self.url = check_server_url(url)
        self.advice = advice
        parsed = parse_url(self.url)
        self._prefix = parsed.path or ""
        for name, seconds in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float):
                raise InvalidSettingError(f"{name} must be a number of seconds, not {seconds!r}.")
            if not 0 < seconds < math.inf:
                raise InvalidSettingError(f"{name} must be > 0 seconds and finite, not {seconds}.")
        if not 1 <= attempts <= ATTEMPTS:
            raise InvalidSettingError(f"attempts must be 1 to {ATTEMPTS}, not {attempts}.")
        self._timeout = Timeout(connect=connect_timeout, read=timeout)
        self._attempts = attempts
        self._max_answer_bytes = max_answer_bytes
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token:
            if not (token.isascii() and token.isprintable()):
                raise InvalidSettingError("A token must be printable ASCII.")
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = self._new_pool()
        self._pid = os.getpid()

    def get(self, path: str) -> dict[str, Any]:
        """GET; see `request`."""
        return self.request("GET", path)

    def post(self, path: str, body: object) -> dict[str, Any]:
        """POST; see `request`."""
        return self.request("POST", path, body)

    def delete(self, path: str) -> dict[str, Any]:
        """DELETE; see `request`."""
        return self.request("DELETE", path)

    def request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Sends a request and reads the answer.

        Args:
            method: HTTP method.
            path: begins with `/`; what is not safe in a URL must be quoted.
            body: anything that `json.dumps` takes; None: no body.

        Returns:
            The JSON object of an answer with a status from 200 to 299.

        Raises:
            ServerError: if all attempts fail, if the server answers with an error (`status` and
                `code` say which), or if the answer is no JSON object.
        """
        # Lone surrogates, which no UTF-8 can hold, survive as JSON escapes.
        content = None if body is None else json.dumps(body).encode("ascii")
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                status, answer = self._send(method, path, content)
            except HTTPError as error:
                if last:
                    raise self._unreachable(method, path, error) from error
            else:
                if last or status not in RETRY_STATUSES:
                    return self._read(method, path, status, answer)
            time.sleep(RETRY_DELAYS[attempt - 1])
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Closes the open connections; a later request opens new ones."""
        if self._pid == os.getpid():
            self._pool.close()
            self._pool = self._new_pool()

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        return urllib3.connection_from_url(self.url, maxsize=_POOL_SIZE, timeout=self._timeout)

    def _send(self, method: str, path: str, content: bytes | None) -> tuple[int, bytes]:
        if self._pid != os.getpid():
            # After a fork the open connections belong to the parent: two processes that write on
            # one connection would get each other's answers.
            self._pool = self._new_pool()
            self._pid = os.getpid()
        response = self._pool.urlopen(
            method,
            self._prefix + path,
            body=content,
            headers=self._headers,
            retries=False,
            redirect=False,
            preload_content=False,
        )
        try:
            answer = response.read(self._max_answer_bytes + 1)
        except BaseException:
            response.close()
            raise
        if len(answer) > self._max_answer_bytes:
            response.close()
            raise ServerError(
                f"{method} {self.url}{path}: the answer has more than {self._max_answer_bytes} "
                f"bytes. {self.advice}"
            )
        response.release_conn()
        return response.status, answer

    def _read(self, method: str, path: str, status: int, answer: bytes) -> dict[str, Any]:
        where = f"{method} {self.url}{path}"
        try:
            data = json.loads(answer)
        except (ValueError, RecursionError):
            data = None
        if 200 <= status < 300 and isinstance(data, dict):
            return data
        error = data.get("error") if isinstance(data, dict) else None
        if isinstance(error, dict):
            code, message = str(error.get("code", "")), str(error.get("message", ""))
            raise ServerError(
                f"{where}: {message or code} (HTTP {status})", status=status, code=code
            )
        shown = answer[:_SHOWN].decode("utf-8", "replace")
        raise ServerError(
            f"{where}: HTTP {status} without the expected JSON object: {shown!r}. Is this the "
            f"right URL? {self.advice}",
            status=status,
        )

    def _unreachable(self, method: str, path: str, error: HTTPError) -> ServerError:
        times = "once" if self._attempts == 1 else f"{self._attempts} times"
        # urllib3 puts the connection object in front of what went wrong.
        reason = str(error).partition("): ")[2] or str(error) or type(error).__name__
        return ServerError(
            f"{method} {self.url}{path} failed (tried {times}): {reason}. {self.advice}"
        )


def check_server_url(url: object) -> str:
    """The URL without a slash at its end.

    Raises:
        InvalidSettingError: if it is no URL of http or https, or has a query or user name.
    """
    advice = f"A server URL looks like http://127.0.0.1:3000, not {url!r}."
    if not isinstance(url, str):
        raise InvalidSettingError(advice)
    try:
        parsed = parse_url(url)
    except LocationParseError as error:
        raise InvalidSettingError(advice) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidSettingError(advice)
    if parsed.query or parsed.fragment or parsed.auth:
        raise InvalidSettingError(
            f"{advice} A token goes into the setting `token`, nothing behind the path."
        )
    return str(parsed.url).rstrip("/")


def in_batches(items: Sequence[_T], most: int) -> Iterator[list[_T]]:
    """Cuts a list into parts that a server takes in one request.

    Args:
        items: anything that `json.dumps` takes.
        most: most items of a part; the size in bytes is limited as well.
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
