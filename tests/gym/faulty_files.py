"""A server of files in a thread that can be told to misbehave in the ways real ones do."""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler
from typing import Any

from quiet_server import QuietServer

PAGE = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>"


class FaultyFiles:
    """Serves `files` by path; each request takes the next of `faults`, or is answered well.

    | fault | what the server does |
    |---|---|
    | `("drop", n)` | ends the connection after n bytes of the body |
    | `("reset", n)` | the same, with a TCP reset |
    | `("stall", n)` | sends n bytes and then nothing until the test ends |
    | `("longer", n)` | announces n bytes more than it has |
    | `("shorter", n)` | announces n bytes less than it sends |
    | `("status", code, seconds)` | an error, with Retry-After unless it is None |
    | `("moved", path)` | redirects |
    | `("part from", n)` | answers a range request with another part |
    | `hang up`, `no range`, `page`, `gzip`, `chunked`, `cut chunk`, `no length`, `416` | so |
    | `new version` | from now on the file is another one |
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.version = 1
        self.has_etag = True
        self.has_date = True
        self.faults: deque[Any] = deque()
        self.requests: list[tuple[str, str | None]] = []
        self.pages: dict[str, bytes] = {}
        self.sent = 0
        self.pace: threading.Event | None = None
        """If set: half of each body is held back until it happens."""
        self.is_over = threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = QuietServer(handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Forgets what was asked of it and how to misbehave."""
        self.files, self.pages, self.version, self.sent = {}, {}, 1, 0
        self.has_etag = self.has_date = True
        self.faults.clear()
        self.requests.clear()
        self.pace = None

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def content(self, path: str) -> bytes | None:
        content = self.files.get(path)
        if content is None or self.version == 1:
            return content
        return bytes(byte ^ self.version for byte in content)


class _Handler(BaseHTTPRequestHandler):
    fake: FaultyFiles
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake, path = self.fake, self.path.lstrip("/")
        asked = self.headers.get("Range")
        fake.requests.append((path, asked))
        self.close_connection = True
        fault = fake.faults.popleft() if fake.faults else "good"
        kind, number = fault[:2] if isinstance(fault, tuple) else (fault, 0)
        if kind == "new version":
            fake.version += 1
        if kind == "hang up":
            return
        if path in fake.pages or kind == "page":
            self._head(200, fake.pages.get(path, PAGE), {"Content-Type": "text/html; charset=x"})
        elif kind == "status":
            wait = {} if fault[2] is None else {"Retry-After": str(fault[2])}
            self._head(number, b"oh", wait)
        elif kind == "moved":
            self._head(302, b"", {"Location": number})
        elif fake.content(path) is None:
            self._head(404, b"no such file", {})
        else:
            self._file(fake.content(path) or b"", asked, kind, number)

    def _file(self, whole: bytes, asked: str | None, kind: str, number: int) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        if self.fake.has_etag:
            headers["ETag"] = f'"v{self.fake.version}"'
        if self.fake.has_date:
            headers["Last-Modified"] = f"Mon, 0{self.fake.version % 10} Jan 2024 00:00:00 GMT"
        status, body = 200, whole
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        wanted = self.headers.get("If-Range")
        is_same = wanted in (None, headers.get("ETag"), headers.get("Last-Modified"))
        if match and is_same and kind != "no range":
            start = int(match[1]) if kind != "part from" else min(number, len(whole))
            if start >= len(whole) or kind == "416":
                self._head(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
                return
            status, body = 206, whole[start:]
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        length = len(body) + {"longer": number, "shorter": -number}.get(kind, 0)
        if kind == "gzip":
            headers["Content-Encoding"] = "gzip"
        if kind in ("chunked", "cut chunk"):
            headers["Transfer-Encoding"] = "chunked"
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
            body = body[:-9] if kind == "cut chunk" else body
        elif kind != "no length":
            headers["Content-Length"] = str(max(0, length))
        self._send_head(status, headers)
        self._send_body(body if kind not in ("drop", "reset", "stall") else body[:number])
        if kind == "stall":
            self.fake.is_over.wait(30)
        if kind == "reset":
            linger = b"\x01\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _send_body(self, body: bytes) -> None:
        pieces = [body]
        if self.fake.pace is not None:
            pieces = [body[: len(body) // 2], body[len(body) // 2 :]]
        for place, piece in enumerate(pieces):
            if place and self.fake.pace is not None:
                self.fake.pace.wait(30)
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:
                return
            self.fake.sent += len(piece)

    def _head(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._send_head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
