"""A real teacher's server in a process of its own, and small servers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from quiet_server import QuietServer


@contextmanager
def served(
    folder: Path, *options: str, port: int = 0, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of a server for the model in a folder, and its process."""
    command = [sys.executable, "-m", "atod_train.cli", "serve-teacher", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--threads", "1", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process
    finally:
        process.kill()
        process.communicate()


class FakeTeacher:
    """Answers POST with what `answer` makes of (path, body), or with the next of `mishaps`."""

    def __init__(self, answer: Callable[[str, Any], Any], models: Any = None) -> None:
        self.answer = answer
        self.models = models
        self.mishaps: deque[int] = deque()
        """Statuses of the next answers; 200 for one without mishap."""
        self.retry_after = ""
        """Sent with a mishap."""
        self.posts: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = QuietServer(handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeTeacher
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.fake.models is None:
            self._send(404, {"detail": "Not Found"})
        else:
            self._send(200, {"object": "list", "data": self.fake.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.posts.append((self.path, body))
        self.fake.headers.append(dict(self.headers))
        mishap = self.fake.mishaps.popleft() if self.fake.mishaps else 200
        if mishap != 200:
            self._send(mishap, {"detail": "oh"})
        else:
            answer = self.fake.answer(self.path, body)
            status, content = answer if isinstance(answer, tuple) else (200, answer)
            self._send(status, content)

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200 and self.fake.retry_after:
            self.send_header("Retry-After", self.fake.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
