"""Run a server process: its token, socket, start-up line, parent and shutdown."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

# Clients keep one connection for a whole run, with pauses as long as a training step.
KEEP_ALIVE_SECONDS = 600
SHUTDOWN_SECONDS = 2
_BACKLOG = 2048
_PARENT_POLL_SECONDS = 0.5


class StartError(Exception):
    """The server cannot start; the message is one line with the remedy."""


def read_token(variable: str | None) -> str | None:
    """Return the token in an environment variable.

    Raises:
        StartError: if the variable is unset, empty, or not an ASCII word.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token.isascii() or token.split() != [token]:
        raise StartError(
            f"--token-env: the environment variable {variable} must hold the token, ASCII without"
            " spaces"
        )
    return token


def open_socket(host: str, port: int, *, has_token: bool) -> socket.socket:
    """Return a listening socket; warn if other machines can reach it without a token.

    Port 0 takes a free one.

    Raises:
        StartError: if the address is unknown or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise StartError(f"--host {host}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --port, or 0"
        ) from error
    bound = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    if not bound.is_loopback and not has_token:
        print(
            f"warning: {host} is reachable from other machines and no token is required: anyone"
            " who can connect can use this server. Use --token-env or --host 127.0.0.1.",
            file=sys.stderr,
            flush=True,
        )
    return listener


def watch_parent(pid: int) -> None:
    """End this process, as SIGTERM would, when another process has ended in any way."""

    def watch() -> None:
        try:
            _wait_for_end(pid)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _wait_for_end(pid: int) -> None:
    is_parent = os.getppid() == pid
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        # A kernel may lack or forbid it.
        with contextlib.suppress(OSError):
            waiting = select.poll()
            # Readable as soon as the process ends, also before it is reaped.
            waiting.register(os.pidfd_open(pid), select.POLLIN)
            waiting.poll()
            return
    while os.getppid() == pid if is_parent else _exists(pid):
        time.sleep(_PARENT_POLL_SECONDS)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def exit_on_signals() -> None:
    """Make SIGTERM and SIGINT end the process with status 0, also before it serves."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def serve(app: ASGIApp, listener: socket.socket, *, service: str) -> None:
    """Serve until SIGTERM or SIGINT; print `{"ready": true, "url", "service"}` when ready."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            line = json.dumps({"ready": True, "url": url, "service": service})
            with contextlib.suppress(BrokenPipeError):  # its reader has left
                os.write(sys.stdout.fileno(), f"{line}\n".encode())

    Server(config).run(sockets=[listener])
