"""Connections to a server in a thread of this process, or to a process of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import FakeServer

from atod_gym.errors import InvalidSettingError, ServerError
from atod_gym.serving import connection as serving
from atod_gym.serving import http
from atod_gym.serving.connection import (
    ENDED_CODE,
    SERVED_HEADER,
    ServedConnection,
    ServerSettings,
    connect,
    read_field,
)


class Fake(FakeServer):
    """A server whose answers are set by path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, Any]]] = {
            "/health": (200, {"status": "ok", "service": "shop"})
        }
        super().__init__(lambda method, path, body: self.answers.get(path, (404, {})))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.002)
    monkeypatch.setattr(serving, "_connections", {})
    server = Fake()
    yield server
    server.end()


def to(fake: Fake, **settings: Any) -> ServedConnection:
    return connect(
        ServerSettings("shop", server_url=fake.url, advice="Run: atod-serve shop", **settings)
    )


def test_equal_settings_share_a_connection(fake: Fake) -> None:
    first = to(fake)
    assert to(fake) is first
    assert connect(first.settings) is first
    assert (first.url, first.health["service"]) == (fake.url, "shop")
    assert to(fake, timeout=5.0) is not first


@pytest.mark.parametrize("was", ["other", None])
@pytest.mark.parametrize("now", ["other", "same", None])
def test_a_server_that_serves_something_else_is_noticed(
    fake: Fake, was: str | None, now: str | None
) -> None:
    fake.headers = {SERVED_HEADER: "same"} if was else {}
    fake.answers["/health"][1]["seed"] = 1
    fake.answers["/x"] = (200, {})
    old = to(fake)
    old.get("/x")
    fake.headers = {SERVED_HEADER: now} if now else {}
    fake.answers["/health"][1]["seed"] = 2
    if fake.headers.get(SERVED_HEADER) == (was and "same"):
        assert old.get("/x") == {}
        assert old.replacement() is to(fake) is old
        return
    with pytest.raises(ServerError, match="/x: the server has been restarted with other") as caught:
        old.get("/x")
    assert (caught.value.code, old.is_lost) == (ENDED_CODE, True)
    with pytest.raises(ServerError, match=r"restarted with seed=2 instead of 1\. Make a new"):
        old.replacement()
    assert to(fake).health["seed"] == 2


def test_a_connection_that_failed_is_renewed(fake: Fake) -> None:
    first = to(fake)
    fake.end()
    with pytest.raises(ServerError, match=f"{fake.url}/x.*Run: atod-serve shop"):
        first.request("GET", "/x")
    assert first.is_lost
    with pytest.raises(ServerError, match="/health"):
        connect(first.settings)


def test_an_answered_error_loses_nothing(fake: Fake) -> None:
    connection = to(fake)
    with pytest.raises(ServerError, match="404"):
        connection.request("POST", "/x", {})
    assert not connection.is_lost


@pytest.mark.parametrize(
    ("status", "answer", "is_foreign_fine"),
    [
        (200, {"service": "webshop"}, False),
        (200, {"status": "healthy", "service": "wiki18-retriever"}, True),
        (200, {"status": "fine"}, True),
        (404, {}, True),
        (405, {"detail": "Method Not Allowed"}, True),
        (401, {}, False),
        (500, {}, True),
        (501, {}, True),
        (503, {}, True),
    ],
)
def test_other_servers(
    fake: Fake, status: int, answer: dict[str, Any], is_foreign_fine: bool
) -> None:
    fake.answers["/health"] = (status, answer)
    with pytest.raises(ServerError, match=fake.url):
        to(fake)
    if is_foreign_fine:
        assert to(fake, is_health_required=False).health == {}
    else:
        with pytest.raises(ServerError, match=fake.url):
            to(fake, is_health_required=False)


def test_tokens(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOD_SERVER_TOKEN", "of the variable")
    connection = to(fake, token="secret")
    to(fake)
    assert fake.tokens == ["Bearer secret", "Bearer of the variable"]
    assert "secret" not in repr(connection.settings)
    fake.answers["/x"] = (401, {"error": {"code": "unauthorized", "message": "No."}})
    with pytest.raises(ServerError, match=r"No\..*token=.*ATOD_SERVER_TOKEN"):
        connection.request("GET", "/x")
    with pytest.raises(InvalidSettingError, match="ASCII"):
        to(fake, token="schlüssel")


def test_a_malformed_answer_is_named(fake: Fake) -> None:
    for name, message in (("page", "KeyError: 'page'"), ("text", "TypeError: text 5")):
        expected = pytest.raises(ServerError, match=f"/x: unexpected answer .{message}")
        with expected as caught, to(fake).reading("/x"):
            read_field({"text": 5}, name, str)
        assert caught.value.status == 200
