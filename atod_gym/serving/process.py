"""Start the servers of environments: one process for each service and its settings.

A server belongs to the Python process that first requests it and ends with that process, in
any case. Environments made later use the same server. So do those in worker processes of
`multiprocessing` (vector environments), whatever the start method, and environments that were
pickled in this process and are unpickled in another one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from atod_gym.errors import MissingExtraError, ServerError
from atod_gym.serving.http import TIMEOUT_CODE, JsonClient
from atod_gym.tasks import announce_once

SERVER_MODULE = "env_servers.cli"
START_SECONDS = 900.0
"""A server that is starting is stopped if it writes nothing for this time."""

_ANNOUNCE_SECONDS = 10.0
_STOP_SECONDS = 3.0
_HEALTH_SECONDS = 10.0
_ENDING_SECONDS = 1.0
_LOG_SECONDS = 0.2
_SHOWN_LINES = 8
_NOTES = "atod_running_servers"

_locks: dict[str, threading.Lock] = {}
"""By `RunningServer.key`; held while that server starts. The lock of "" guards the notes."""
_servers: dict[str, RunningServer] = {}
"""The servers that this process has started or used, by key."""


class RunningServer:
    """A server on this machine, started by this process or by another one.

    In another process, also after a fork, its pickled or copied form can use but not end it.
    """

    def __init__(self, key: str, url: str = "", pid: int = 0) -> None:
        """Describe a server of another process, or one to be started.

        Args:
            key: See `server_key`.
            url: URL that it listens at.
            pid: Its process id.
        """
        self.key, self.url, self.pid = key, url, pid
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._output = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningServer, (self.key, self.url, self.pid)

    @property
    def command(self) -> list[str]:
        """The command line that starts such a server manually."""
        service, arguments, _ = json.loads(self.key)
        return ["atod-serve", service, *arguments]

    def is_alive(self) -> bool:
        """Return whether the server is running.

        A server of another process is checked over HTTP. It is dead if nothing listens or another
        process answers; a slow one is alive.
        """
        if self._process is not None:
            return self._process.poll() is None
        try:
            client = JsonClient(self.url, advice="", timeout=_HEALTH_SECONDS, attempts=2)
            return client.get("/health").get("pid") == self.pid
        except ServerError as error:
            return error.code == TIMEOUT_CODE

    def output_if_ended(self) -> str | None:
        """Return the end of the server's standard error; None: it is still running.

        Waits a moment: a process stops listening before its parent can detect its end.
        """
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_SECONDS)
        return None if self.is_alive() else self.end()

    def last_errors(self) -> str:
        """Return the end of a running server's standard error; empty where it cannot be read.

        Waits a moment: a server logs an error after it has answered.
        """
        if self._errors is None or not hasattr(os, "pread"):
            return ""
        time.sleep(_LOG_SECONDS)
        # Both processes share the position in the file, which this leaves.
        number = self._errors.fileno()
        return _last_lines(os.pread(number, os.fstat(number).st_size, 0))

    def start(self) -> str | None:
        """Start the server; return its first line, empty if it ended; None if it stays silent."""
        # `python -m` would import a user's files from the working folder, such as `queue.py`. The
        # folder of this package comes last, for a checkout that is not installed.
        folder = str(Path(__file__).resolve().parents[2])
        program = (
            f"import runpy, sys; sys.path[:] = [*filter(None, sys.path), {folder!r}]; "
            f"runpy.run_module({SERVER_MODULE!r}, run_name='__main__')"
        )
        arguments = [*self.command[1:], "--port", "0", "--parent", str(os.getpid())]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process ends
        # An own session, so that Ctrl-C in the terminal reaches the clients and not the server.
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self.pid = self._process.pid
        atexit.register(self.end)
        stdout = self._process.stdout
        assert stdout is not None
        lines: list[bytes] = []
        # The thread ends with the line or the process, so that none is alive at a later fork.
        reader = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
        reader.start()
        reader.join(min(_ANNOUNCE_SECONDS, START_SECONDS))
        if reader.is_alive():
            announce_once(f"Waiting for the server: {shlex.join(self.command)}")
        written, before = 0, -1
        while reader.is_alive() and written > before:
            reader.join(START_SECONDS)
            written, before = os.fstat(self._errors.fileno()).st_size, written
        return lines[0].decode("utf-8", "replace") if lines else None

    def end(self) -> str:
        """Stop the server if this process started it; return the end of its standard error."""
        if self._process is not None and self._errors is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            # Both processes share the position in the file, so it is read after the end.
            self._errors.seek(0)
            self._output = _last_lines(self._errors.read())
            self._close_files()
        return self._output

    def disown(self) -> None:
        """In a forked process, leave the server to the parent, without a warning."""
        if self._process is not None:
            self._process.returncode = 0
            self._close_files()
            self._process = None

    def _close_files(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def _last_lines(output: bytes) -> str:
    return "\n".join(output.decode("utf-8", "replace").strip().splitlines()[-_SHOWN_LINES:])


def server_key(service: str, arguments: Sequence[str], files: Sequence[str] = ()) -> str:
    """Return service, command line, and modification time and size of files, as JSON."""
    states = [os.stat(file) for file in files if os.path.exists(file)]
    return json.dumps([service, [*arguments], [(one.st_mtime_ns, one.st_size) for one in states]])


def shared_server(
    service: str, arguments: Sequence[str], files: Sequence[str] = ()
) -> RunningServer:
    """Return the server for a service and its settings; start it if none is running.

    Args:
        service: Name of the service in `atod-serve`, such as `webshop`.
        arguments: Its settings on the command line; other settings mean another server.
        files: Files that it reads; changed ones mean another server.

    Raises:
        MissingExtraError: The servers' packages are not installed.
        ServerError: The server does not start; the message has its output and the command.
    """
    key = server_key(service, arguments, files)
    with _locks.setdefault(key, threading.Lock()):
        server = _servers.get(key)
        if server is None and (note := _notes().get(key)):
            server = RunningServer(*note)
        if server is None or not server.is_alive():
            if server is not None:
                output = server.end()
                announce_once(f"The server {server.url} has ended; a new one starts. {output}")
            server = _started(key, service)
        _register(server)
        return server


def remember(server: RunningServer) -> None:
    """Reuse a server of another process when its settings are requested."""
    known = _servers.get(server.key)
    if known is None or known._process is None:
        _register(server)


def _register(server: RunningServer) -> None:
    _servers[server.key] = server
    with _locks.setdefault("", threading.Lock()):
        # A new dict, as another thread may be pickling the old one.
        note = (server.key, server.url, server.pid)
        _worker_config()[_NOTES] = {**_notes(), server.key: note}


def _notes() -> dict[str, tuple[str, str, int]]:
    """Return key, URL and process of servers, by key: plain data that any worker can unpickle."""
    notes: dict[str, tuple[str, str, int]] = _worker_config().get(_NOTES, {})
    return notes


def _worker_config() -> dict[str, Any]:
    """Return the part of this process's object that multiprocessing copies into its workers.

    It is private, since no public object reaches workers of every start method: a fork server keeps
    the environment variables from its start.
    """
    return getattr(multiprocessing.current_process(), "_config", {})


def _started(key: str, service: str) -> RunningServer:
    server = RunningServer(key)
    try:
        line = server.start()
        with contextlib.suppress(ValueError, KeyError, TypeError):
            ready = json.loads(line or "")
            if ready["service"] == service:
                server.url = str(ready["url"])
                return server
    except BaseException:
        # Also on Ctrl-C: no process may remain.
        server.end()
        raise
    output = server.end()
    if "No module named" in output.rpartition("\n")[2] or "atod-gym[servers]" in output:
        raise MissingExtraError(
            f"The {service} server needs packages that are not installed: "
            f"pip install 'atod-gym[servers]'. Its message: {output}"
        )
    if line is None:
        what = (
            f"it wrote nothing for {START_SECONDS:.0f} seconds; start it yourself (server_url=..)"
        )
    elif line:
        what = f"instead of its start-up line it printed {line[:200]!r}"
    else:
        what = "it ended at once"
    message = f" Its message:\n{output}\n" if output else " "
    raise ServerError(
        f"The {service} server did not start: {what}.{message}The command was: "
        f"{shlex.join(server.command)}"
    )


def _after_fork() -> None:
    """In a forked process, keep the parent's servers for use, without ending them."""
    # Another thread may have held a lock.
    _locks.clear()
    for server in _servers.values():
        server.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
