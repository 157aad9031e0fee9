from __future__ import annotations

import os
import pickle
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer

from atod_gym.errors import InvalidSettingError, ServerError
from atod_gym.serving import http as http_client
from atod_gym.serving.http import ATTEMPTS, TIMEOUT_CODE, JsonClient, check_server_url

# Every address misbehaves in its own way, the first `times` times that it is asked.
SERVER = """
import json, socket, struct, sys, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

seen = Counter()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        url = urlsplit(self.path)
        options = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen[self.path] += 1
        if url.path != "/" and seen[self.path] <= int(options.get("times", 1000)):
            return getattr(self, "do_" + url.path.strip("/"))(options)
        self.say(200, json.dumps({
            "method": self.command, "body": json.loads(body or b"null"), "seen": seen[self.path],
            "type": self.headers.get("Content-Type"), "token": self.headers.get("Authorization"),
            "port": self.client_address[1],
        }).encode())

    do_GET = do_POST = do_DELETE = answer

    def say(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_drop(self, options):
        self.close_connection = True

    def do_reset(self, options):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def do_cut(self, options):
        self.say(200, b"{", **{"Content-Length": 9})
        time.sleep(0.1)
        self.do_reset(options)

    def do_raw(self, options):
        self.wfile.write(options["reply"].encode())
        self.close_connection = True

    def do_idle(self, options):
        # Answers, then closes a connection that it had promised to keep.
        self.say(200, b"{}")
        self.close_connection = True

    def do_slow(self, options):
        time.sleep(float(options["seconds"]))
        self.say(200, b"{}")

    def do_stall(self, options):
        self.say(200, b"{", **{"Content-Length": 2})
        time.sleep(float(options["seconds"]))
        self.wfile.write(b"}")

    def do_status(self, options):
        body = options.get("body", "{}") * int(options.get("repeat", 1))
        headers = {"Retry-After": options["after"]} if "after" in options else {}
        self.say(int(options["status"]), body.encode(), Location="/", **headers)

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except (OSError, ValueError):
            pass

class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


SHORT = "raw?reply=HTTP/1.1%20200%20OK%0aContent-Length:%209%0a%0a{}"
DEEP, HUGE = (f"/status?status=200&body={part}&repeat=1000000" for part in ("[", "xxx"))


class Running:
    """The misbehaving server in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.end()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "BACKOFF_SECONDS", 0.005)


def client(server: Running, **settings: Any) -> JsonClient:
    return JsonClient(server.url, advice="Run: the command", **settings)


def test_json_goes_there_and_back_on_one_connection(server: Running) -> None:
    connected = client(server, token="secret")
    first = connected.post("/", {"text": "é🙂\ud800\x00", "number": 1.5})
    assert first["body"] == {"text": "é🙂?\x00", "number": 1.5}
    assert (first["method"], first["type"]) == ("POST", "application/json")
    assert first["token"] == "Bearer secret"
    second, third = connected.get("/"), connected.request("DELETE", "/")
    assert (second["method"], third["method"]) == ("GET", "DELETE")
    assert first["port"] == second["port"] == third["port"]
    assert client(server).get("/")["token"] is None


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["drop", "reset", "status"])
def test_a_failure_that_passes_is_not_noticed(server: Running, failure: str) -> None:
    for status in (502, 503) if failure == "status" else (0,):
        for attempts in (2, ATTEMPTS):
            path = f"/{failure}?times={attempts - 1}&status={status}&attempts={attempts}"
            answer = client(server, attempts=attempts).post(path, {"turn": 3})
            assert (answer["body"], answer["seen"]) == ({"turn": 3}, attempts)


@pytest.mark.parametrize(
    ("failure", "times", "reason"),
    [
        ("drop", f"{ATTEMPTS} times", "without response"),
        ("reset", f"{ATTEMPTS} times", "reset by peer"),
        ("cut", "once", "reset by peer"),
        (
            "raw?reply=HTTP/1.1%20200%20OK%0aContent-Length:%209%0a%0a{}",
            "once",
            "IncompleteRead|Connection broken",
        ),
        ("raw?reply=nonsense%0a%0a", "once", "BadStatusLine|nonsense"),
    ],
)
def test_a_failure_that_stays_is_an_error_with_url_and_command(
    server: Running, failure: str, times: str, reason: str
) -> None:
    path = f"/{failure}"
    with pytest.raises(ServerError, match=reason) as caught:
        client(server).get(path)
    message = str(caught.value)
    assert message.startswith(f"GET {server.url}{path} failed (tried {times})")
    assert message.endswith("Run: the command")
    assert (caught.value.status, caught.value.code) == (0, "")


def test_a_late_answer_is_not_requested_again(server: Running) -> None:
    path = "/slow?once&seconds=0.4&times=1"
    with pytest.raises(ServerError, match=r"no answer within 0.1 s; raise timeout=") as caught:
        client(server, timeout=0.1).post(path, {})
    assert (caught.value.status, caught.value.code) == (0, TIMEOUT_CODE)
    assert client(server).post(path, {})["seen"] == 2
    path = "/status?status=504&body=<html>&times=1"
    with pytest.raises(ServerError, match="time limit of a proxy; raise it") as caught:
        client(server).post(path, {})
    assert (caught.value.status, caught.value.code) == (504, TIMEOUT_CODE)
    assert client(server).post(path, {})["seen"] == 2


def test_an_answer_that_stops_half_way_is_late(server: Running) -> None:
    with pytest.raises(ServerError, match=r"no answer within 0.1 s") as caught:
        client(server, timeout=0.1).get("/stall?seconds=0.4")
    assert caught.value.code == TIMEOUT_CODE


@pytest.mark.slow
def test_a_hundred_threads_share_a_client_whose_connections_stay_open(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    connected = client(server)

    def work(number: int) -> bool:
        connected.get("/slow?many&seconds=0.2")
        return all(connected.post("/", [number, n])["body"] == [number, n] for n in range(5))

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(work, range(100)))
    assert "pool is full" not in caplog.text


def test_settings_of_the_environment_are_ignored(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client(server).get("/")["token"] is None


@pytest.mark.slow
def test_a_late_answer_is_not_taken_for_the_next_one(server: Running) -> None:
    connected = client(server, timeout=0.2, attempts=1)
    with pytest.raises(ServerError, match="no answer"):
        connected.get("/slow?late&seconds=0.4")
    time.sleep(0.3)
    assert connected.post("/", "next")["body"] == "next"


def test_errors_of_the_server_are_passed_on_at_once(server: Running) -> None:
    body = '{"error": {"code": "episode_over", "message": "Create a new session."}}'
    for status in (401, 404, 409, 413, 422, 500):
        path = f"/status?status={status}&body={body.replace(' ', '%20')}"
        with pytest.raises(ServerError, match=f"Create a new session.*{status}") as caught:
            client(server).get(path)
        assert (caught.value.status, caught.value.code) == (status, "episode_over")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.status, copy.code) == (str(caught.value), status, "episode_over")
    path = f"/status?status=503&body={body.replace(' ', '%20')}"
    with pytest.raises(ServerError, match="Create a new session") as caught:
        client(server).get(path)
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("after", "seconds"),
    [("7", 7), (" 0 ", 0), ("soon", 0), ("-1", 0), ("9" * 5000, 0),
     ("Wed,%2021%20Oct%202015%2007:28:00%20GMT", 0)],
)  # fmt: skip
@pytest.mark.parametrize("body", ["no", '{"error":{"code":"busy"}}'])
def test_the_pause_that_a_server_asks_for_is_passed_on(
    server: Running, after: str, seconds: float, body: str
) -> None:
    after = after.replace(" ", "%20")
    with pytest.raises(ServerError) as caught:
        client(server).get(f"/status?status=429&body={body}&after={after}")
    assert (caught.value.status, caught.value.retry_after) == (429, seconds)
    assert pickle.loads(pickle.dumps(caught.value)).retry_after == seconds


@pytest.mark.parametrize(
    "path",
    ["/status?status=200&body=no", "/status?status=200&body=[1]", "/status?status=302", DEEP,
     "/status?status=404&body=<html>", "/status?status=500&body=%FF", HUGE],
)  # fmt: skip
def test_answers_that_make_no_sense_are_shown(server: Running, path: str) -> None:
    with pytest.raises(ServerError, match=r"expected JSON object.*right URL") as caught:
        client(server).get(path)
    assert server.url in str(caught.value)
    assert len(str(caught.value)) < 600


def test_endless_answers_are_cut(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_ANSWER_BYTES", 1_000_000)
    connected = client(server)
    with pytest.raises(ServerError, match="more than 1000000 bytes"):
        connected.get(HUGE)
    assert connected.get("/")["method"] == "GET"


def test_a_connection_closed_meanwhile_is_replaced(server: Running) -> None:
    connected = client(server, attempts=1)
    for number in range(20):
        assert connected.get(f"/idle?{number}") == {}
        time.sleep(0.02)
        assert connected.get("/")["method"] == "GET"


def test_a_restarted_server_is_found_again() -> None:
    running = Running()
    connected = client(running)
    assert connected.get("/")["seen"] == 1
    running.end()
    with pytest.raises(ServerError, match=r"[Cc]onnection refused.*Run: the command"):
        connected.get("/")
    again = Running(running.port)
    assert connected.get("/")["seen"] == 1
    again.end()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_both_sides_of_a_fork_use_connections_of_their_own(server: Running) -> None:
    connected = client(server)
    port = connected.get("/")["port"]
    child = os.fork()
    if child == 0:
        fine = all(connected.post("/", n)["body"] == n for n in range(50))
        other = connected.get("/")["port"] != port
        os._exit(0 if fine and other else 1)
    assert all(connected.post("/", -n)["body"] == -n for n in range(50))
    assert connected.get("/")["port"] == port
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_interrupt_leaves_a_client_that_works(server: Running, usual_sigint: None) -> None:
    connected = client(server)
    main = threading.get_ident()
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        connected.get("/slow?interrupted&seconds=5")
    timer.join()
    assert connected.post("/", "next")["body"] == "next"


@pytest.mark.parametrize("url", ["https://shop.example/path", "http://[::1]:3000"])
def test_urls(url: str) -> None:
    assert check_server_url(url) == check_server_url(f"{url}/") == url


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_authorities_of_the_machine_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: str(tmp_path / name) for name in ("key", "certificate")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", files["key"],
         "-out", files["certificate"], "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    fake = FakeServer(lambda method, path, body: (200, {"path": path}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["certificate"], files["key"])
    fake.wrap(context)
    with pytest.raises(ServerError, match="CERTIFICATE_VERIFY_FAILED"):
        JsonClient(fake.url, advice="").get("/x")
    monkeypatch.setenv("SSL_CERT_FILE", files["certificate"])
    assert JsonClient(fake.url, advice="").get("/x") == {"path": "/x"}
    fake.end()


def test_a_path_in_the_url_is_kept(server: Running) -> None:
    below = JsonClient(f"{server.url}/status", advice="")
    with pytest.raises(ServerError, match="/status\\?status=404"):
        below.get("?status=404")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:3000"}, "looks like"),
        ({"url": "ftp://host"}, "looks like"),
        ({"url": "http://"}, "looks like"),
        ({"url": "http://host:99999"}, "looks like"),
        ({"url": ""}, "looks like"),
        ({"url": 3000}, "looks like"),
        ({"url": "http://user:word@host"}, "`token`"),
        ({"url": "http://host/?a=b"}, "not into the URL"),
        ({"timeout": 0}, "timeout must be a number of seconds, > 0"),
        ({"timeout": float("nan")}, "timeout must be a number of seconds, > 0"),
        ({"timeout": 1e12}, "<= 1,000,000, not 1000000000000.0"),
        ({"timeout": "long"}, "timeout must be a number"),
        ({"token": "line\nbreak"}, "ASCII"),
        ({"token": "schlüssel"}, "ASCII"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        JsonClient(**{"url": "http://127.0.0.1:3000", "advice": "", **settings})


def test_nothing_listens_and_no_host_exists() -> None:
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid:80"):
        with pytest.raises(ServerError, match=f"{url}.*Run: it") as caught:
            JsonClient(url, advice="Run: it", attempts=2).get("/health")
        assert "0x" not in str(caught.value)
