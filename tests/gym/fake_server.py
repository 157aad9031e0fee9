"""An HTTP server in a thread of this process, whose answers a test decides."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, object] | None
"""Status, and JSON or bytes; None: the connection is closed without an answer."""


class FakeServer:
    """Answers with a function; it closes each connection, so that `end` ends all of them."""

    def __init__(self, answer: Callable[[str, str, Any], Answer], port: int = 0) -> None:
        """Start to listen.

        Args:
            answer: Called with method, path and body, one request after another.
            port: 0: any.
        """
        self.requests: list[tuple[str, str]] = []
        """Method and path of all requests."""
        self.bodies: list[Any] = []
        self.headers: dict[str, str] = {}
        """Sent with each answer."""
        self.tokens: list[str | None] = []
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length) or b"null")
                with lock:
                    fake.requests.append((self.command, self.path))
                    fake.bodies.append(body)
                    fake.tokens.append(self.headers.get("Authorization"))
                    answered = answer(self.command, self.path, body)
                if answered is not None:
                    status, content = answered
                    if not isinstance(content, bytes):
                        content = json.dumps(content).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    for item in fake.headers.items():
                        self.send_header(*item)
                    self.end_headers()
                    self.wfile.write(content)

            do_POST = do_DELETE = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak https from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def take_requests(self) -> list[tuple[str, str]]:
        """Return method and path of the requests since the last call."""
        taken, self.requests = self.requests, []
        return taken

    def end(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
