"""What all servers share, and the process around them: start, errors, token, end."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from asgi_calls import AppCaller
from served_shop import StartServer
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from env_servers import cli
from env_servers.process import StartError, open_socket, read_token
from env_servers.service import (
    ErrorResponder,
    JsonResponse,
    Metric,
    ServiceError,
    build_application,
    metrics_text,
    read_json,
    resident_bytes,
    well_formed,
)


async def echo(request: Request) -> Response:
    return JsonResponse({"got": await read_json(request, 1000)})


async def defect(request: Request) -> Response:
    raise RuntimeError("secret detail")


def application(token: str | None = None) -> AppCaller:
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/defect", defect, methods=["GET"]),
    ]
    return AppCaller(build_application(routes, errors=ErrorResponder(), token=token))


def test_json_is_read_and_written_whatever_the_text() -> None:
    call = application()
    value = {"text": "\ud800 \U0001f600 \0 \u2028", "deep": [[[[{}]]]], "number": 10**30}
    assert call.post("/echo", value).json() == {"got": value}
    call.close()


def test_a_client_that_goes_away_is_no_defect() -> None:
    call = application()
    assert call.request("POST", "/echo", []).code == "disconnected"
    call.close()


def test_a_defect_is_answered_without_its_details() -> None:
    sent = []

    async def run() -> None:
        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        app = build_application([Route("/defect", defect)], errors=ErrorResponder())
        scope = {
            "type": "http", "method": "GET", "path": "/defect", "root_path": "",
            "query_string": b"", "headers": [],
        }  # fmt: skip
        await app(scope, None, send)  # type: ignore[arg-type]

    import asyncio

    with pytest.raises(RuntimeError, match="secret"):
        # Raised again, so that the server logs it.
        asyncio.run(run())
    assert sent[0]["status"] == 500
    body = bytes(sent[1]["body"])  # type: ignore[call-overload]
    assert json.loads(body)["error"]["code"] == "internal_error"
    assert b"secret" not in body


@pytest.mark.parametrize("path", ["/echo", "/nothing"])
def test_the_token_is_asked_for_everywhere(path: str) -> None:
    call = application(token="s3cret")
    basic = base64.b64encode(b"anybody:s3cret").decode()
    for header in ("Bearer s3cret", "bearer s3cret", f"Basic {basic}"):
        assert call.get(path, authorization=header).status in (404, 405)
    wrong = base64.b64encode(b"s3cret:wrong").decode()
    for header in ("", "Bearer", "Bearer s3cre", "Bearer s3cretx", "s3cret", "Basic s3cret",
                   f"Basic {wrong}", "Basic \xff", "Bearer \xff"):  # fmt: skip
        answer = call.get(path, authorization=header)
        assert (answer.status, answer.code) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Basic")
    assert call.get(path).status == 401
    call.close()


def test_well_formed_replaces_only_lone_surrogates() -> None:
    assert well_formed("plain") == "plain"
    assert well_formed("\u00e9\U0001f600\ufffe") == "\u00e9\U0001f600\ufffe"
    assert well_formed("a\ud800b\udc00") == "a\ufffdb\ufffd"
    assert well_formed("\ud83d\ude00") == "\U0001f600"


def test_metrics_are_prometheus_text() -> None:
    errors = ErrorResponder()
    errors.count(ServiceError(404, "not_found", "x"))
    errors.count(ServiceError(404, "not_found", "x"))
    text = metrics_text([Metric("a", "gauge", "Live.", (("", 3),)), errors.metric("e_total")])
    assert text.splitlines() == [
        "# HELP a Live.", "# TYPE a gauge", "a 3",
        "# HELP e_total Errors answered, by code.", "# TYPE e_total counter",
        'e_total{code="not_found"} 2',
    ]  # fmt: skip
    assert 1e6 < resident_bytes() < 1e12


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token(None) is None
    monkeypatch.setenv("SHOP_TOKEN", "s3cret")
    assert read_token("SHOP_TOKEN") == "s3cret"
    for value in ("", "with space", "\u00e9"):
        monkeypatch.setenv("SHOP_TOKEN", value)
        with pytest.raises(StartError, match="SHOP_TOKEN"):
            read_token("SHOP_TOKEN")


def test_listening_for_others_without_a_token_warns(capfd: pytest.CaptureFixture[str]) -> None:
    for host, has_token, warns in (
        ("127.0.0.1", False, False), ("0.0.0.0", True, False), ("0.0.0.0", False, True),
    ):  # fmt: skip
        open_socket(host, 0, has_token=has_token).close()
        errors = capfd.readouterr().err
        assert ("--token-env" in errors) is warns
        assert errors.count("\n") == int(warns)


def test_a_host_that_is_none_is_refused() -> None:
    for host in ("no-such-host.invalid", "", "a" * 300, "256.0.0.1", "192.0.2.1"):
        if host:
            with pytest.raises(StartError):
                open_socket(host, 0, has_token=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["webshop", "--port", "x"], ["webshop", "--port", "65536"],
        ["webshop", "--port", "-1"], ["webshop", "--capacity", "0"],
        ["webshop", "--idle-minutes", "0"], ["webshop", "--idle-minutes", "nan"],
        ["webshop", "--max-body", "0"], ["webshop", "--nothing"], ["webshop", "--parent", "0"],
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("atod-serve")


def test_what_keeps_it_from_starting_is_one_line_and_status_2(
    start_server: StartServer, tmp_path: Path
) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "items_shuffle_1000.json").write_text("[{]")
    (broken / "items_ins_v2_1000.json").write_text("{}")
    for arguments, word in (
        (["--port", str(taken.getsockname()[1])], "--port"),
        (["--data", str(tmp_path / "nothing")], "nothing"),
        (["--data", str(empty)], "empty"),
        (["--data", str(broken)], "broken"),
        (["--splits", "sideways"], "splits"),
        (["--token-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
    ):
        server = start_server("webshop", "--port", "0", *arguments)
        status, errors = server.stop()
        assert (status, server.line) == (2, "")
        assert errors.count("\n") == 1, errors
        assert word in errors
    taken.close()


def get(url: str, path: str, **headers: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_announces_itself_serves_and_ends_cleanly(
    start_server: StartServer, shop_folder: Path, number: signal.Signals
) -> None:
    environment = {**os.environ, "SHOP_TOKEN": "s3cret"}
    server = start_server(
        "webshop", "--port", "0", "--data", str(shop_folder), "--capacity", "7",
        "--token-env", "SHOP_TOKEN", environment=environment,
    )  # fmt: skip
    line = json.loads(server.line)
    assert line == {"ready": True, "url": server.url, "service": "webshop"}
    assert get(server.url, "/health")[0] == 401
    status, health = get(server.url, "/health", authorization="Bearer s3cret")
    assert (status, health["capacity"], health["pid"]) == (200, 7, server.process.pid)
    # An open connection does not keep it from ending.
    idle = http.client.HTTPConnection(server.url.removeprefix("http://"))
    idle.request("GET", "/health")
    idle.getresponse().read()
    server.process.send_signal(number)
    server.process.wait(30)
    assert server.stop() == (0, "")
    idle.close()


def test_a_body_in_chunks_is_limited_over_http(
    start_server: StartServer, shop_folder: Path
) -> None:
    server = start_server(
        "webshop", "--port", "0", "--data", str(shop_folder), "--max-body", "5000"
    )
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for _ in range(3):
        connection.request("POST", "/sessions", iter([b" " * 1000] * 50), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "body_too_large"
    connection.close()
    assert server.stop() == (0, "")


def test_it_ends_with_the_parent_that_was_killed(shop_folder: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "server = subprocess.Popen([sys.executable, '-m', 'env_servers.cli', 'webshop', '--port',"
        " '0', '--data', sys.argv[1], '--parent', str(os.getpid())], stdout=subprocess.PIPE)\n"
        "print(server.pid, server.stdout.readline().decode(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(shop_folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    pid, _, line = parent.stdout.readline().partition(" ")
    url = json.loads(line)["url"]
    assert get(url, "/health")[1]["pid"] == int(pid)
    parent.kill()
    # Not reaped yet: the watch must see the death itself.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            get(url, "/health")
        except OSError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server outlived its parent")
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()


def test_it_does_not_start_for_a_parent_that_is_gone(
    start_server: StartServer, shop_folder: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    server = start_server(
        "webshop", "--port", "0", "--data", str(shop_folder), "--parent", str(gone.pid)
    )
    server.process.wait(30)
    assert server.stop()[0] == 0
