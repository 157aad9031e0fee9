from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atod_gym.errors import MissingExtraError, ServerError
from atod_gym.serving import connection as serving
from atod_gym.serving import process as server_process
from atod_gym.serving.connection import ServerSettings, connect
from atod_gym.serving.process import RunningServer, shared_server

REPOSITORY = Path(server_process.__file__).resolve().parents[2]

# Keeps what a server promises, unless its first argument names something else.
TINY_SERVER = """
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

service, mode = sys.argv[1:3]
assert sys.argv[-4:-1] == ["--port", "0", "--parent"] and int(sys.argv[-1]) == os.getppid()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    asked = 0

    def do_GET(self):
        Handler.asked += 1
        if mode == "hangs" and Handler.asked == 2:
            time.sleep(1)
        if self.path == "/slow":
            time.sleep(0.3)
        body = json.dumps({"service": service, "pid": os.getpid()}).encode()
        self.send_response(500 if self.path == "/defect" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/defect":
            time.sleep(0.05)
            print("RuntimeError: the reason", file=sys.stderr, flush=True)

    def log_message(self, *arguments):
        pass

print("a warning before the start", file=sys.stderr, flush=True)
if mode == "broken":
    sys.exit("atod-serve: error: no products in this folder")
if mode == "missing":
    import no_such_package
if mode == "advice":
    sys.exit("atod-serve: error: something is missing; pip install 'atod-gym[servers]'")
if mode == "chatty":
    print("Welcome!", flush=True)
if mode == "silent":
    time.sleep(100)
if mode == "busy":
    for number in range(5):
        time.sleep(0.3)
        print(number, "passages indexed", file=sys.stderr, flush=True)
if mode == "late":
    time.sleep(1.5)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = HTTPServer(("127.0.0.1", 0), Handler)
if mode == "slow-end":
    def stop(number, frame):
        server.socket.close()
        time.sleep(0.3)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
url = f"http://127.0.0.1:{server.server_address[1]}"
print(json.dumps({"ready": True, "url": url, "service": service}), flush=True)
server.serve_forever()
"""


@pytest.fixture(autouse=True)
def tiny_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[int]]]:
    """Puts the tiny server in place of the real ones; ends those that a test has started."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "tiny_server.py").write_text(TINY_SERVER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{REPOSITORY}")
    monkeypatch.setattr(server_process, "_NOTES", f"servers of {tmp_path}")
    monkeypatch.setattr(server_process, "_servers", {})
    monkeypatch.setattr(serving, "_connections", {})
    monkeypatch.setattr(server_process, "SERVER_MODULE", "tiny_server")
    started: list[RunningServer] = []
    start = RunningServer.start

    def noted(server: RunningServer) -> str | None:
        started.append(server)
        return start(server)

    monkeypatch.setattr(RunningServer, "start", noted)
    yield lambda: [server.pid for server in started]
    for server in started:
        server.end()


def is_gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_one_server_for_each_service_and_settings(tiny_server: Callable[[], list[int]]) -> None:
    first = shared_server("shop", ["fine", "--size", "3"])
    assert first.is_alive()
    assert first.pid in tiny_server()
    assert first.command == ["atod-serve", "shop", "fine", "--size", "3"]
    assert shared_server("shop", ("fine", "--size", "3")) is first
    others = [shared_server("shop", ["fine"]), shared_server("library", ["fine", "--size", "3"])]
    assert len({first.url, *(other.url for other in others)}) == 3
    assert len(tiny_server()) == 3
    # Ctrl-C in a terminal goes to the group of processes that was started from it.
    assert os.getsid(first.pid) == first.pid


def test_a_server_whose_files_have_changed_is_not_used_again(
    tiny_server: Callable[[], list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "data"
    servers = []
    for content in (None, "a", "a", "bb"):
        if content:
            file.write_text(content, encoding="utf-8")
            os.utime(file, (1, 1))
        servers.append(shared_server("shop", ["fine"], [str(file)]))
        assert servers[-1].command[1:] == ["shop", "fine"]
    assert servers[1] is servers[2]
    assert len({server.url for server in servers}) == len(tiny_server()) == 3
    assert all(server.is_alive() for server in servers)


def test_threads_that_ask_at_once_get_one_server(tiny_server: Callable[[], list[int]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        urls = {
            server.url for server in pool.map(lambda _: shared_server("shop", ["fine"]), "12345678")
        }
    assert (len(urls), len(tiny_server())) == (1, 1)


def test_a_dead_server_is_replaced_and_its_error_output_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = shared_server("shop", ["fine"])
    os.kill(first.pid, signal.SIGKILL)
    first._process.wait(10)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        second = shared_server("shop", ["fine"])
    assert second.is_alive()
    assert second.url != first.url
    assert f"{first.url} has ended" in caplog.text
    assert first.end() == "a warning before the start"


def test_a_server_that_is_just_ending_gets_a_moment_to_be_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = shared_server("shop", ["slow-end"])
    monkeypatch.setattr(server_process, "_ENDING_SECONDS", 0.01)
    assert server.output_if_ended() is None
    os.kill(server.pid, signal.SIGTERM)
    monkeypatch.setattr(server_process, "_ENDING_SECONDS", 30.0)
    assert server.output_if_ended() == "a warning before the start"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("broken", ServerError, "it ended at once.*no products in this folder.*atod-serve shop"),
        ("missing", MissingExtraError, r"pip install 'atod-gym\[servers\]'.*no_such_package"),
        ("advice", MissingExtraError, r"pip install 'atod-gym\[servers\]'.*something is missing"),
        ("chatty", ServerError, "instead of its start-up line it printed 'Welcome!"),
        ("silent", ServerError, r"nothing for 1 seconds.*server_url.*a warning before the start"),
    ],
)
def test_a_server_that_does_not_start_reports_why_and_is_gone(
    mode: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_server: Callable[[], list[int]],
) -> None:
    if mode == "silent":
        monkeypatch.setattr(server_process, "START_SECONDS", 1.0)
    with pytest.raises(error, match=f"(?s){message}"):
        shared_server("shop", [mode])
    assert len(tiny_server()) == 1
    assert is_gone(tiny_server()[0])


def test_a_long_start_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_process, "_ANNOUNCE_SECONDS", 0.02)
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        shared_server("shop", ["fine"])
    assert caplog.text.count("Waiting for the server") == 1
    assert "atod-serve shop fine" in caplog.text


@pytest.mark.slow
def test_a_start_may_take_long_while_the_server_reports_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_process, "START_SECONDS", 0.5)
    assert shared_server("shop", ["busy"]).is_alive()


def test_modules_of_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("queue", "http", "json", "runpy", "tiny_server", "env_servers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user')")
    monkeypatch.chdir(tmp_path)
    assert shared_server("shop", ["fine"]).is_alive()


def test_an_internal_error_is_reported_with_the_end_of_the_log() -> None:
    connection = connect(ServerSettings("shop", ("fine",)))
    with pytest.raises(ServerError, match=r"HTTP 500(?s:.*)start\nRuntimeError: the reason$"):
        connection.get("/defect")
    assert not connection.is_lost


@pytest.mark.slow
def test_lists_may_take_as_long_as_a_start() -> None:
    connection = connect(ServerSettings("shop", ("fine",), timeout=0.15))
    assert connection.read_list("/slow")["service"] == "shop"
    with pytest.raises(ServerError, match=r"no answer within 0\.15 s"):
        connection.get("/slow")


@pytest.mark.slow
def test_an_interrupt_while_starting_leaves_nothing_behind(
    tiny_server: Callable[[], list[int]], usual_sigint: None
) -> None:
    main = threading.get_ident()
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        shared_server("shop", ["silent"])
    timer.join()
    assert is_gone(tiny_server()[0])


SCRIPT = """
import os, sys
from atod_gym.serving import process as server_process
server_process.SERVER_MODULE = "tiny_server"
server_process._STOP_SECONDS = 0.5
server = server_process.shared_server("shop", [sys.argv[1]])
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        assert server.is_alive() and server_process.shared_server("shop", [sys.argv[1]]) is server
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.is_alive()
print(server.pid, server.url)
if sys.argv[2] == "raise":
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "end"),
    [("fine", "return"), ("fine", "raise"), ("fine", "fork"), ("stubborn", "return")],
)
def test_it_ends_with_the_process_and_without_a_warning(mode: str, end: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT, mode, end],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (3 if end == "raise" else 0, "")
    assert is_gone(int(finished.stdout.split()[0]))


def test_programs_started_from_here_get_servers_of_their_own() -> None:
    server = shared_server("shop", ["fine"])
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, "fine", "return"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert server.url not in finished.stdout
    assert server.is_alive()


WORKERS = """
import multiprocessing, sys
from atod_gym.serving import process as server_process
server_process.SERVER_MODULE = "tiny_server"

def url(number=0):
    return server_process.shared_server("shop", ["fine"]).url

def url_from_a_worker_of_a_worker(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.map(url, [0])[0]

if __name__ == "__main__":
    method = sys.argv[1]
    context = multiprocessing.get_context(method)
    # A fork server keeps the environment that it was started with.
    context.Process(target=print).start()
    server = server_process.shared_server("shop", ["fine"])
    with context.Pool(2) as pool:
        assert pool.map(url, range(4)) == [server.url] * 4
    with __import__("concurrent.futures").futures.ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(url_from_a_worker_of_a_worker, method).result() == server.url
    assert server.is_alive()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_worker_processes_share_the_server(method: str, tmp_path: Path) -> None:
    # In a program of its own: a process has one fork server.
    program = tmp_path / "program.py"
    program.write_text(WORKERS, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(program), method],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_starts_a_server_does_not_hang() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(shared_server, "shop", ["late"])
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os.kill(shared_server("shop", ["late"]).pid, signal.SIGKILL)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_a_server_starts_while_another_one_is_starting() -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(shared_server, "shop", ["late"])
        assert shared_server("shop", ["fine"]).is_alive()
        assert not slow.done()


def test_a_slow_server_is_alive_and_a_dead_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_server("shop", ["hangs"])
    seen = pickle.loads(pickle.dumps(server))
    assert not RunningServer(server.key, server.url, server.pid + 1).is_alive()
    monkeypatch.setattr(server_process, "_HEALTH_SECONDS", 0.2)
    assert seen.is_alive()
    os.kill(server.pid, signal.SIGKILL)
    server._process.wait(10)  # type: ignore[union-attr]
    assert not seen.is_alive()


def test_a_server_of_another_process_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_server("shop", ["fine"])
    right = (server.key, server.url, server.pid)
    wrong = [
        (server.key, server.url, server.pid + 1),
        (server.key, "http://127.0.0.1:9", server.pid),
        ("other", server.url, server.pid),
    ]
    for number, known in enumerate([*wrong, right]):
        monkeypatch.setattr(server_process, "_NOTES", f"servers_{number}")
        monkeypatch.setattr(server_process, "_servers", {})
        server_process.remember(RunningServer(*known))
        found = shared_server("shop", ["fine"])
        assert (found.url == server.url) == (known == right)


def test_a_server_of_this_process_stays_its_own() -> None:
    server = shared_server("shop", ["fine"])
    server_process.remember(pickle.loads(pickle.dumps(server)))
    assert shared_server("shop", ["fine"]) is server


@pytest.mark.slow
def test_threads_that_register_at_once_lose_no_server() -> None:
    servers = [RunningServer(str(number)) for number in range(3000)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(server_process.remember, servers))
    finally:
        sys.setswitchinterval(interval)
    assert server_process._notes().keys() == {server.key for server in servers}
    # A worker of another program need not import this package.
    assert b"atod_gym" not in pickle.dumps(server_process._notes())
