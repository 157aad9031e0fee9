"""Requests to an ASGI application in this process, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlencode

from starlette.types import ASGIApp, Message


@dataclass(frozen=True)
class Answer:
    """The answer to a call."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which must be JSON in UTF-8 without constants that JSON does not have."""
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.body.decode("utf-8"), parse_constant=_refuse)

    @property
    def code(self) -> str:
        """The code of an error; it has a message too, and nothing else."""
        error = self.json()["error"]
        assert error.keys() == {"code", "message"}, error
        assert error["message"]
        return str(error["code"])


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


class AppCaller:
    """Calls one application, one request after the other."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """Closes the event loop."""
        self._loop.close()

    def run(self, exchange: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a coroutine, such as an `exchange` or several of them."""
        return self._loop.run_until_complete(exchange)

    def get(self, path: str, **headers: str) -> Answer:
        """GET."""
        return self.request("GET", path, headers=headers)

    def post(self, path: str, data: object) -> Answer:
        """POST of JSON."""
        return self.request("POST", path, [json.dumps(data).encode()])

    def form(self, path: str, **fields: object) -> Answer:
        """POST of a form."""
        return self.request("POST", path, [urlencode(fields, errors="surrogatepass").encode()])

    def request(
        self,
        method: str,
        path: str,
        chunks: Sequence[bytes] = (b"",),
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Any request; the body comes in chunks."""
        return self._loop.run_until_complete(self.exchange(method, path, chunks, headers))

    async def exchange(
        self,
        method: str,
        path: str,
        chunks: Sequence[bytes] = (b"",),
        headers: dict[str, str] | None = None,
        *,
        is_gone: bool = False,
    ) -> Answer:
        """`request` in a loop that runs already; a client that `is_gone` has left after sending."""
        raw_path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode("ascii", "replace"),
            "root_path": "",
            "query_string": query.encode("ascii", "replace"),
            "headers": [
                (name.replace("_", "-").encode(), value.encode("latin-1"))
                for name, value in {"host": "127.0.0.1:3000", **(headers or {})}.items()
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        waiting = list(chunks)
        sent: list[Message] = []

        async def receive() -> Message:
            if not waiting:
                if chunks and not is_gone:
                    # A client that waits for the answer.
                    await asyncio.Event().wait()
                return {"type": "http.disconnect"}
            body = waiting.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(waiting)}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = sent[0]
        return Answer(
            status=start["status"],
            headers={name.decode(): value.decode() for name, value in start["headers"]},
            body=b"".join(message.get("body", b"") for message in sent[1:]),
        )
