"""Check that the servers of tests print nothing between the lines of a tested program."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from quiet_server import QuietServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        json.loads(self.rfile.read(int(self.headers["Content-Length"])))


class Server(QuietServer):
    """Says when a connection has been dealt with, errors included."""

    def __init__(self, handler: type) -> None:
        super().__init__(handler)
        self.is_done = threading.Event()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.is_done.set()


@pytest.mark.parametrize(
    ("sent", "hangs_up", "is_printed"),
    [
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n[1", True, False),
        (b"POST / HTTP/1.1\r\nHost: x\r\n", True, False),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n[1", False, True),
    ],
)
def test_only_faults_of_clients_who_stay_are_printed(
    sent: bytes, hangs_up: bool, is_printed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(sent)
        if not hangs_up:
            assert client.recv(1) == b""  # the server closes after a fault
    assert server.is_done.wait(10)
    server.shutdown()
    thread.join()
    server.server_close()
    assert ("Traceback" in capsys.readouterr().err) == is_printed
