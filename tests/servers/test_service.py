"""Check the common parts of servers and their process: start, errors, token, end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from asgi_calls import AppCaller
from hypothesis import given
from hypothesis import strategies as st
from served_shop import StartServer
from starlette.requests import Request

from env_servers import cli, guard
from env_servers.endpoints import About, Batch, Endpoint, build_application
from env_servers.process import StartError, open_socket, read_token
from env_servers.service import ErrorResponder, ServiceError, gauge, message_decoder
from env_servers.text import well_formed


class Echo(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    deep: Any = None


class Other(msgspec.Struct, forbid_unknown_fields=True):
    number: Annotated[int, msgspec.Meta(ge=0)]


async def echo(request: Request, body: Echo) -> Echo:
    return body


async def either(request: Request, body: Echo | Other) -> dict[str, str]:
    return {"kind": type(body).__name__}


async def each(request: Request, body: list[Any]) -> list[str]:
    return [entry.message if isinstance(entry, ServiceError) else entry.text for entry in body]


async def defect(request: Request) -> None:
    raise RuntimeError("secret detail")


def application(
    token: str | None = None, allowed_hosts: Sequence[str] = (), max_body: int = 1000
) -> AppCaller:
    endpoints = [
        Endpoint("POST", "/echo", echo, "Return the body.", Echo, Echo),
        Endpoint("POST", "/either", either, "Name the kind.", dict[str, str], Echo | Other),
        Endpoint("POST", "/each", each, "List them.", list[str], Batch("entries", Echo, 3)),
        Endpoint("GET", "/defect", defect, "Fail.", Echo),
    ]
    app = build_application(
        About("test", "A <test>.", links=(("/echo", "Echo & more"),)), endpoints,
        health=lambda: Other(1), errors=ErrorResponder(),
        metrics=lambda: [gauge("test_live", "Live.", 3)],
        max_body=max_body, token=token, allowed_hosts=allowed_hosts,
    )  # fmt: skip
    return AppCaller(app)


def test_json_is_read_and_written_for_any_text() -> None:
    call = application()
    value = {"text": "\U0001f600 \0 \u2028 \\ud800", "deep": [[[[{}]]], 1.5, None]}
    assert call.post("/echo", value).json() == value
    call.close()


def test_lone_surrogates_are_replaced() -> None:
    call = application()
    for sent, found in (
        ("a\ud800b\udc00", "a\ufffdb\ufffd"), ("\ud83d\ude00", "\U0001f600"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"), ("\\ud800 \\\\\ud800", "\\ud800 \\\\\ufffd"),
    ):  # fmt: skip
        assert call.post("/echo", {"text": sent}).json()["text"] == found
        assert call.post("/each", {"entries": [{"text": sent}]}).json() == [found]
    # As bytes they are no UTF-8.
    assert call.request("POST", "/echo", [b'{"text":"\xed\xa0\x80"}']).code == "invalid_body"
    call.close()


@given(
    st.lists(st.text(st.characters() | st.sampled_from('\ud800\udbff\udc00\udfff\\u"')), max_size=3)
)
def test_any_text_is_read_as_it_was_sent(texts: list[str]) -> None:
    decode = message_decoder(list[str])
    assert decode(json.dumps(texts).encode()) == [well_formed(text) for text in texts]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/echo", b"", "JSON"), ("/echo", b"{", "JSON"), ("/echo", b"[]", "`object`"),
        ("/echo", b"\xef\xbb\xbf{}", "JSON"), ("/echo", b"{}", "`text`"),
        ("/echo", b'{"text": 3}', "$.text"), ("/echo", b'{"text": "", "more": 1}', "`more`"),
        ("/echo", b'{"text": "", "deep": NaN}', "JSON"),
        ("/echo", b'{"text": "", "deep": ' + b"[" * 100_000, "JSON"),
        ("/echo", b'{"text": "", "' + b"x" * 5000 + b'": 1}', "unknown field"),
        ("/either", b"{}", "'text'"), ("/either", b'{"number": -1}', "$.number"),
        ("/either", b'{"number": 1, "text": "x"}', "unknown field"),
        ("/either", b'{"number": 1' + b"0" * 5000 + b"}", "number"),
        ("/each", b'{"entries": [1, 2, 3, 4]}', "<= 3"), ("/each", b'{"entries": 1}', "$.entries"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_as_described_is_explained(path: str, body: bytes, said: str) -> None:
    call = application(max_body=200_000)
    answer = call.request("POST", path, [body])
    assert (answer.status, answer.code) == (422, "invalid_body")
    assert said in answer.json()["error"]["message"]
    assert len(answer.body) < 600
    call.close()


def test_fields_decide_entries_of_a_batch_and_kinds_of_a_message() -> None:
    call = application()
    first, second = call.post("/each", {"entries": [{"text": "a"}, {"text": 1}]}).json()
    assert first == "a"
    assert "$.text" in second
    assert call.post("/either", {"text": "x"}).json() == {"kind": "Echo"}
    assert call.post("/either", {"number": 2}).json() == {"kind": "Other"}
    call.close()


def test_a_disconnected_client_is_not_an_internal_error() -> None:
    call = application()
    assert call.request("POST", "/echo", []).code == "disconnected"
    call.close()


def test_a_defect_is_answered_without_its_details() -> None:
    call = application()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/defect", "root_path": "",
             "query_string": b"", "headers": []}  # fmt: skip
    with pytest.raises(RuntimeError, match="secret"):
        # Raised again, so that the server logs it.
        asyncio.run(call.app(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
    assert b"secret" not in sent[1]["body"]
    call.close()


@pytest.mark.parametrize("path", ["/echo", "/nothing"])
def test_the_token_is_required_everywhere(path: str) -> None:
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


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True), ("LOCALHOST:3000", True), ("localhost.:1", True),
        ("shop.localhost:80", True), ("127.0.0.1:3000", True), ("10.1.2.3:1", True),
        ("[::1]:3000", True), ("[fe80::1]", True), (socket.gethostname(), True), ("", True),
        ("gpu-box:3000", True), ("evil.example", False), ("evil.example:3000", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False), ("[evil.example]", False), ("gpu-box.evil", False),
    ],
)  # fmt: skip
def test_a_server_answers_to_its_own_names_only(host: str, is_known: bool) -> None:
    call = application(allowed_hosts=["GPU-box"])
    assert (call.get("/", host=host).status == 200) is is_known
    if not is_known:
        answer = call.request("POST", "/echo", [b'{"text": ""}'], {"host": host})
        assert (answer.status, answer.code) == (403, "unknown_host")
        assert "--allowed-host" in answer.json()["error"]["message"]
    # A token cannot be known to the page of another name; `*` allows all.
    for open_call in (application(token="s3cret"), application(allowed_hosts=["*"])):
        assert open_call.get("/", host=host, authorization="Bearer s3cret").status == 200
        open_call.close()
    call.close()


def test_a_server_accepts_its_machines_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU7")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu7.lab.example")
    guard._full_name.cache_clear()
    call = application()
    for host, status in (
        ("gpu7:3000", 200), ("gpu7.lab.example:3000", 200), ("gpu7.evil.example", 403),
        ("gpu77.lab.example", 403), ("lab.example", 403),
    ):  # fmt: skip
        assert call.get("/", host=host).status == status
    call.close()
    guard._full_name.cache_clear()


@pytest.mark.parametrize(
    ("host", "headers", "is_allowed"),
    [
        ("127.0.0.1:3000", {}, True),
        ("127.0.0.1:3000", {"origin": "http://127.0.0.1:3000"}, True),
        ("localhost:9", {"origin": "http://LOCALHOST:9", "sec-fetch-site": "same-origin"}, True),
        ("[::1]:3000", {"origin": "http://[::1]:3000"}, True),
        ("10.0.0.7", {"origin": "https://10.0.0.7"}, True),
        ("10.0.0.7:80", {"origin": "https://gpu-box"}, True),
        ("localhost:9", {"origin": "http://localhost:8888"}, False),
        ("127.0.0.1:3000", {"origin": "http://evil.example"}, False),
        ("127.0.0.1:3000", {"origin": "null"}, False),
        ("127.0.0.1:3000", {"origin": ""}, False),
        ("127.0.0.1:3000", {"sec-fetch-site": "cross-site"}, False),
        ("127.0.0.1:3000", {"sec-fetch-site": "same-site"}, False),
        ("127.0.0.1:3000", {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "cross-site"},
         False),
    ],
)  # fmt: skip
def test_pages_of_other_sites_cannot_change_anything(
    host: str, headers: dict[str, str], is_allowed: bool
) -> None:
    for token in (None, "s3cret"):
        call = application(token=token, allowed_hosts=["gpu-box"])
        sent = {"host": host, "authorization": "Bearer s3cret", **headers}
        answer = call.request("POST", "/echo", [b'{"text": ""}'], sent)
        assert (answer.status == 200) is is_allowed
        assert is_allowed or (answer.status, answer.code) == (403, "cross_site")
        assert is_allowed or "--allowed-host" in answer.json()["error"]["message"]
        # Reading changes nothing, and what it gives stays hidden from the page.
        assert call.request("GET", "/", headers=sent).status == 200
        call.close()


def test_a_server_explains_itself() -> None:
    call = application()
    home = call.get("/").json()
    assert (home["service"], home["openapi"]) == ("test", "/openapi.json")
    listed = {(line["method"], line["path"]) for line in home["endpoints"]}
    document = call.get("/openapi.json").json()
    assert document["info"]["description"] == "A <test>."
    assert listed == {
        (method.upper(), path) for path, row in document["paths"].items() for method in row
    }
    page = call.get("/", accept="text/html,*/*;q=0.8")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = page.body.decode()
    assert "A &lt;test&gt;." in text
    assert '<a href="/echo">Echo &amp; more</a>' in text
    assert all(f"<code>{path}</code>" in text for _, path in listed)
    echoed = document["paths"]["/echo"]["post"]
    assert echoed["responses"].keys() == {"200", "400", "403", "413", "422"}
    assert echoed["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Echo"
    }
    assert "security" not in document
    call.close()
    call = application(token="s3cret")
    document = call.get("/openapi.json", authorization="Bearer s3cret").json()
    assert document["security"] == [{"token": []}]
    assert "401" in document["paths"]["/echo"]["post"]["responses"]
    call.close()


def test_metrics_are_those_of_the_application_and_its_process() -> None:
    call = application()
    for _ in range(2):
        assert call.get("/nothing").status == 404
    answer = call.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    assert {"# TYPE test_live gauge", "test_live 3.0", "# TYPE test_errors_total counter",
            'test_errors_total{code="not_found"} 2.0'} <= set(lines)  # fmt: skip
    if Path("/proc/self/stat").exists():
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert 1e6 < float(values["process_resident_memory_bytes"]) < 1e12
    call.close()
    # Another application counts by itself.
    call = application()
    assert b"not_found" not in call.get("/metrics").body
    call.close()


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
        ["webshop", "--max-body", "999999"], ["retrieval", "--max-query", "9999"],
        ["retrieval", "--max-queries", "1023"], ["webshop", "--nothing"],
        ["webshop", "--parent", "0"],
        ["retrieval", "--corpus", "~no-such-user/x"],
        *(["retrieval", f"--max-{name}", "1" + 20 * "0"]
          for name in ("topk", "queries", "query", "length")),
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


@pytest.mark.slow
def test_a_failed_start_is_one_line_and_status_2(start_server: StartServer, tmp_path: Path) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["webshop", "--products", "20"], ["retrieval", "--entities", "60"]], ids=str
)
def test_it_serves_where_modules_of_unix_are_missing(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "from pathlib import Path; from env_servers.new_folder import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'made')!r})) as partial:\n"
        "    (partial / 'file').write_text('whole')\n"
        "from env_servers import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    # Where there are no locks of the system, filelock warns and marks files instead.
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore:only soft file lock", "-c", code, *arguments,
         "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, server.communicate()[1]
    url = json.loads(line)["url"]
    assert get(url, "/health")[1]["service"] == arguments[0]
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/metrics")
    assert b"errors_total" in connection.getresponse().read()
    connection.close()
    server.terminate()
    assert server.communicate(timeout=30) == ("", "")
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_serves_after_the_reader_of_its_output_has_left(shop_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "env_servers.cli", "webshop", "--data", str(shop_folder), "--port",
         str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    server.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            assert get(f"http://127.0.0.1:{port}", "/health")[0] == 200
            break
        time.sleep(0.1)
    server.terminate()
    assert server.wait(30) == 0
    assert server.stderr is not None
    assert server.stderr.read() == ""
    server.stderr.close()
