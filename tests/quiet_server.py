"""A server of tests in this process that says nothing about clients who hang up."""

from __future__ import annotations

import socket
import sys
from http.server import ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """On a free port; other faults of its handlers are printed, as ever."""

    daemon_threads = True

    def __init__(self, handler: type) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Who asked may have left, as one does who has waited long enough: in the middle of what is
        # sent, before the answer, or while the next request is awaited.
        if not isinstance(sys.exc_info()[1], ConnectionError) and not _has_left(request):
            super().handle_error(request, client_address)


def _has_left(client: socket.socket) -> bool:
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
