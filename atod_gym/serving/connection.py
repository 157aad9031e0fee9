"""Connect to the server of an environment, given by the user or started by this package.

An environment requests its connection when it is made, and a new one when that is lost:

    settings = ServerSettings("webshop", arguments, advice="..")           # to be started
    settings = ServerSettings("webshop", server_url=url, advice="..")      # a running one
    connection = connect(settings)
    answer = connection.request("POST", "/batch/step", {...})
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import requests
from gymnasium.utils import EzPickle

from atod_gym.errors import InvalidSettingError, ServerError
from atod_gym.serving.http import TOKEN_VARIABLE, JsonClient
from atod_gym.serving.process import (
    START_SECONDS,
    RunningServer,
    remember,
    server_key,
    shared_server,
)

ENDED_CODE = "ended"
"""`ServerError.code` where the server of a connection has ended, or serves something else now."""

SERVED_HEADER = "atod-served"
"""Header of our servers' answers: a hash of what is served."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The server of an environment, and how to use it."""

    service: str
    """Name of the service in `atod-serve`."""
    arguments: tuple[str, ...] = ()
    """Command line of a server to start, without the program."""
    files: tuple[str, ...] = ()
    """Files that the server to start reads."""
    server_url: str | None = None
    """A running server; None: start one if none is running."""
    token: str | None = field(default=None, repr=False)
    """Of the server at `server_url`; None: from the environment variable ATOD_SERVER_TOKEN."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    advice: str = ""
    """Command that starts a server manually, for errors of one at `server_url`."""
    is_health_required: bool = True
    """Whether a server at `server_url` must have our `/health`. If not required, `health` is empty
    for a server that answers with an error or is none of `atod-serve`."""


_connections: dict[tuple[str, str | None], ServedConnection] = {}


def connect(settings: ServerSettings) -> ServedConnection:
    """Return the connection for these settings; all environments of a process share it.

    A connection that is not current is replaced; a server that this package starts is started again
    if its files have changed.

    Raises:
        InvalidSettingError: `server_url`, `token` or `timeout` cannot be used.
        MissingExtraError: A server must be started and its packages are not installed.
        ServerError: The server does not start or answer, or is another kind of server.
    """
    if settings.token is not None and not isinstance(settings.token, str):
        raise InvalidSettingError("token must be a str or None.")
    # As text, since settings of a wrong type need not be hashable.
    key = (repr(settings), settings.token)
    connection = _connections.get(key)
    if connection is None or not connection.is_current():
        left = [] if connection is None else connection.left
        connection = _connections[key] = ServedConnection(settings, left)
    return connection


class ServedConnection(JsonClient):
    """A connection to one server; `connect` makes it."""

    def __init__(self, settings: ServerSettings, left: list[str]) -> None:
        """Start the server unless it is given, and request its health."""
        self.settings = settings
        self.left = left
        """Sessions to close, in a list that a lost connection shares with its replacement."""
        self.running: RunningServer | None = None
        """The server if this package started it."""
        self.is_lost = False
        """Whether the server failed to answer, or serves something else."""
        self.cache: dict[str, Any] = {}
        """Data that users of the connection read once, such as the tasks of a split."""
        url, advice = settings.server_url, settings.advice
        token = settings.token or os.environ.get(TOKEN_VARIABLE)
        if url is None:
            self.running = shared_server(settings.service, settings.arguments, settings.files)
            url, token = self.running.url, None
            advice = f"It was started with: {shlex.join(self.running.command)}"
        super().__init__(url, advice=advice, token=token, timeout=settings.timeout)
        self._served: str | None = ""
        """`SERVED_HEADER` of all answers; None: they have none; empty: before the first."""
        self.health: Mapping[str, Any] = self._health()
        """The answer of `/health`; empty for a server without it."""
        self._served = self._served or None

    def is_current(self) -> bool:
        """Return whether new environments can use the connection.

        Checks the files of a server that this package started; requests `/health` of another.
        """
        if self.running is not None:
            settings = self.settings
            key = server_key(settings.service, settings.arguments, settings.files)
            return not self.is_lost and self.running.key == key
        if not self.is_lost:
            try:
                self.health = self._health()
            except ServerError:
                self.is_lost = True
        return not self.is_lost

    def replacement(self) -> ServedConnection:
        """Return a new connection if this one is lost, else this one.

        Raises:
            ServerError: The server does not start or answer, or serves something else now.
        """
        if not self.is_lost:
            return self
        new = connect(self.settings)
        if new._served != self._served:
            changed = [
                f"{name}={value!r} instead of {self.health.get(name)!r}"
                for name, value in new.health.items()
                if name not in ("pid", "sessions") and self.health.get(name) != value
            ]
            raise ServerError(
                f"The server at {new.url} has been restarted with {', '.join(changed)}. Make a new "
                "environment for it, or restart it with the earlier settings and data."
            )
        return new

    def request(
        self, method: str, path: str, body: object = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send a request; see `JsonClient.request`.

        Raises:
            ServerError: The message says whether the server has ended and what to do.
        """
        try:
            return super().request(method, path, body, timeout)
        except ServerError as error:
            if more := self._explanation(error):
                error.args = (f"{error} {more}",)
            raise

    def read_list(self, path: str) -> dict[str, Any]:
        """Send a GET request for a list that takes as long as a start; see `request`."""
        return self.request("GET", path, timeout=None if self.running is None else START_SECONDS)

    def _explanation(self, error: ServerError) -> str:
        """Return what else is known about an error, and note that the server is lost or ended."""
        if error.status == 401:
            return f"Give the token as token=... or in the variable {TOKEN_VARIABLE}."
        if error.status == 500 and self.running is not None:
            return self.running.last_errors()
        if error.status != 0:
            return ""
        self.is_lost = True
        output = None if self.running is None else self.running.output_if_ended()
        if output is None:
            return ""
        error.code = ENDED_CODE
        return f"That process has ended{output and f': {output}'}. reset() starts a new one."

    def _read(self, where: str, response: requests.Response, answer: bytes) -> dict[str, Any]:
        data = super()._read(where, response, answer)
        served = response.headers.get(SERVED_HEADER)
        if self._served not in ("", served):
            raise ServerError(
                f"{where}: the server has been restarted with other settings or data. Call reset() "
                "to see which.",
                code=ENDED_CODE,
            )
        self._served = served
        return data

    def malformed(self, path: str, what: object) -> ServerError:
        """Return the error for an answer to `path`; `what` is an exception or a description."""
        kind = f"{type(what).__name__}: " if isinstance(what, Exception) else ""
        return ServerError(
            f"{self.url}{path}: unexpected answer ({kind}{what}). Are client and server of the "
            f"same version? {self.advice}",
            status=200,
        )

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Convert exceptions while reading the answer to `path` to `malformed`."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.malformed(path, error) from error

    def _health(self) -> Mapping[str, Any]:
        is_foreign_fine = self.running is None and not self.settings.is_health_required
        try:
            health = self.get("/health")
        except ServerError as error:
            if is_foreign_fine and error.status not in (0, 401):
                return {}
            raise
        found = health.get("service")
        if is_foreign_fine and found not in ("retrieval", "webshop"):
            return {}
        if found != self.settings.service:
            raise ServerError(
                f"{self.url} is not a {self.settings.service} server. Its /health says: "
                f"{str(health)[:200]}. {self.advice}"
            )
        return health


def read_field(answer: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """Return a field of an answer.

    Raises:
        KeyError: There is none.
        TypeError: It has another type.
    """
    value = answer[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} {value!r}")
    return value


class ServedEnv(EzPickle):
    """Pickles an environment as its arguments and the server that this package started for it.

    In another process the unpickled environment uses that server while it runs.
    """

    _connection: ServedConnection

    def _renew(self) -> None:
        """Replace a lost connection, see `ServedConnection.replacement`."""
        self._connection = self._connection.replacement()

    @property
    def server_url(self) -> str:
        """Return the URL of the server."""
        return self._connection.url

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_running_server": self._connection.running}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if running := state.pop("_running_server", None):
            remember(running)
        super().__setstate__(state)
