"""Check for any input: no status 500, no session lost or leaked, no other session changed."""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import pytest
from asgi_calls import Answer, AppCaller
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served_shop import HOSTILE_ASIN, StartServer

from env_servers.webshop.app import create_app
from env_servers.webshop.sessions import SessionStore
from env_servers.webshop.shop import Shop

OPERATIONS = 25
IN_PROCESS = 420
OVER_HTTP = 120
CAPACITY = 40
STATUSES = {200, 201, 303, 404, 405, 409, 413, 422, 503}
MINE = "{mine}"
"""Stands for a session of the fuzzer, in paths and bodies."""


@dataclass(frozen=True)
class Operation:
    """One request."""

    method: str
    path: str
    body: Any = None
    """JSON, or bytes as they are, or None."""
    cuts: tuple[int, ...] = ()
    """The positions at which the body is cut into chunks."""


ANY_TEXT = st.text(st.characters(), max_size=12)
NUMBERS = st.one_of(
    st.integers(-2, 6),
    st.sampled_from([2**31, 2**63, -(2**63), 10**4000, 1.0, 1e308, float("nan"), float("inf")]),
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT, st.just(MINE)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)
    ),
    max_leaves=4,
)
INSIDE = st.one_of(
    ANY_TEXT,
    st.sampled_from([
        "back to search", "next >", "< prev", "Buy Now", "description", "features", "reviews",
        "attributes", "search", HOSTILE_ASIN.lower(), "shoes", "red chair", "<r>", "<r> x", "<c>",
        "<c> fashion", "<q> shoes", "<q>", "<a>", "<a> x", "a][b", "item_page done", "\ud800",
    ]),
)  # fmt: skip
ACTIONS = st.one_of(
    ANY_TEXT,
    st.builds("search[{}]".format, INSIDE),
    st.builds("click[{}]".format, INSIDE),
    st.builds("{}[{}]{}".format, ANY_TEXT, INSIDE, ANY_TEXT),
)
TURNS = st.one_of(st.integers(0, 4), st.just("turn"), JSON_VALUES)
STEPS = st.fixed_dictionaries({"turn_index": TURNS, "action": st.one_of(ACTIONS, JSON_VALUES)})
WANTED = st.one_of(
    st.just({"task_id": "{task}"}),
    st.fixed_dictionaries({"split": st.sampled_from(["train", "test", ""]), "seed": NUMBERS}),
    JSON_VALUES,
)
BATCH_STEPS = st.fixed_dictionaries(
    {"session_id": st.just(MINE), "turn_index": TURNS, "action": ACTIONS}
)
SESSION = st.one_of(
    st.just(MINE), st.just(MINE), ANY_TEXT.map(lambda text: quote(text, "", errors="surrogatepass"))
)
CUTS = st.lists(st.integers(0, 80), max_size=3).map(lambda cuts: tuple(sorted(cuts)))
FORMS = st.fixed_dictionaries(
    {},
    optional={
        "action": ACTIONS, "query": ANY_TEXT, "turn_index": st.one_of(st.just("turn"), ANY_TEXT),
        "task_id": ANY_TEXT, "split": st.sampled_from(["train", "x"]),
    },
).map(lambda form: urlencode(form, errors="surrogatepass").encode())  # fmt: skip


def posts(path: str | st.SearchStrategy[str], body: st.SearchStrategy[Any]) -> Any:
    """Requests of one kind."""
    paths = st.just(path) if isinstance(path, str) else path
    return st.builds(Operation, st.just("POST"), paths, body, CUTS)


STEP_PATHS = SESSION.map("/sessions/{}/step".format)
OPERATION = st.one_of(
    posts(STEP_PATHS, STEPS),
    posts(STEP_PATHS, STEPS),
    posts("/sessions", WANTED),
    posts("/batch/create", st.fixed_dictionaries({"sessions": st.lists(WANTED, max_size=4)})),
    posts("/batch/step", st.fixed_dictionaries({"steps": st.lists(BATCH_STEPS, max_size=4)})),
    posts(
        "/batch/close", st.fixed_dictionaries({"session_ids": st.lists(JSON_VALUES, max_size=3)})
    ),
    posts(
        st.sampled_from(["/sessions", "/batch/create", "/batch/step", "/batch/close", "/shop/new"]),
        st.one_of(st.binary(max_size=40), JSON_VALUES, st.sampled_from([b"[" * 3000, b" " * 9000])),
    ),
    posts("/shop/new", FORMS),
    posts(SESSION.map("/shop/{}/act".format), FORMS),
    st.builds(Operation, st.just("GET"), SESSION.map("/shop/{}".format)),
    st.builds(Operation, st.just("DELETE"), SESSION.map("/sessions/{}".format)),
    st.builds(
        Operation,
        st.sampled_from(["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]),
        st.one_of(
            st.sampled_from(
                ["/", "/health", "/metrics", "/tasks/train", "/shop", "/shop?split=%ff"]
            ),
            ANY_TEXT.map(lambda text: "/" + quote(text, "/", errors="surrogatepass")),
        ),
    ),
)


class Caller(Protocol):
    """A sender of requests."""

    def request(self, method: str, path: str, chunks: list[bytes]) -> Answer: ...


class HttpCaller:
    """Real HTTP over one connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)

    def request(self, method: str, path: str, chunks: list[bytes]) -> Answer:
        headers = {"Transfer-Encoding": "chunked"} if len(chunks) > 1 else {}
        parts = [chunk for chunk in chunks if chunk]
        body: Any = iter(parts) if headers else chunks[0]
        self._connection.request(method, path, body, headers, encode_chunked=bool(headers))
        response = self._connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


@dataclass
class Fuzzer:
    """Sends operations and keeps account of its sessions."""

    call: Caller
    task: str
    mine: dict[str, int] = field(default_factory=dict)
    """Live sessions and their turn indexes."""
    sent: int = 0
    created: int = 0
    seen: set[int] = field(default_factory=set)

    def post(self, path: str, body: object) -> Any:
        """A well-meant request."""
        return self.call.request("POST", path, [json.dumps(body).encode()]).json()

    def run(self, operation: Operation) -> None:
        """One request and all that must hold for its answer."""
        if not self.mine:
            state = self.post("/sessions", {"task_id": self.task})
            self.mine[state["session_id"]] = 0
            self.created += 1
        session = next(iter(self.mine))
        path = operation.path.replace(MINE, session)
        answer = self.call.request(operation.method, path, self.chunks(operation, session))
        self.sent += 1
        self.seen.add(answer.status)
        assert answer.status in STATUSES, (operation, answer)
        answer.body.decode("utf-8")
        if answer.headers.get("content-type") != "application/json":
            assert path.startswith(("/shop", "/metrics")) or path.partition("?")[0] == "/"
        elif operation.method != "HEAD":
            self.account(path, answer.json())
            assert answer.status < 400 or answer.code
        if path.startswith("/shop/") and answer.status == 303:
            self.mine.setdefault(answer.headers["location"].rpartition("/")[2], -1)
        if operation.method == "DELETE" and answer.status == 200:
            del self.mine[session]

    def chunks(self, operation: Operation, session: str) -> list[bytes]:
        """The body, with the placeholders filled in."""
        body = operation.body
        if body is None:
            return [b""]
        if not isinstance(body, bytes):
            body = json.dumps(body).encode().replace(b"{task}", self.task.encode())
        turn = str(self.mine[session]).encode()
        body = body.replace(MINE.encode(), session.encode()).replace(b'"turn"', turn)
        body = body.replace(b"turn_index=turn", b"turn_index=" + turn)
        edges = [0, *(min(cut, len(body)) for cut in operation.cuts), len(body)]
        return [body[start:end] for start, end in pairwise(edges)]

    def account(self, path: str, data: Any) -> None:
        """Record which sessions began, continued or ended."""
        for answer in data.get("results", [data]):
            if "session_id" in answer:
                self.mine[answer["session_id"]] = answer["turn_index"]
        if path == "/batch/close":
            live = self.post("/batch/step", {"steps": [
                {"session_id": session, "turn_index": 10**9, "action": "x"}
                for session in self.mine
            ]})  # fmt: skip
            for session, answer in zip(list(self.mine), live["results"], strict=True):
                if answer["error"]["code"] == "unknown_session":
                    del self.mine[session]

    def close_all(self) -> None:
        """Ends all its sessions; every one of them must still have been there."""
        answers = self.post("/batch/close", {"session_ids": list(self.mine)})["results"]
        assert answers == [{"closed": True}] * len(self.mine)
        self.mine.clear()


def bystanders(fuzzer: Fuzzer) -> dict[str, Any]:
    """Two sessions that the fuzzer does not know, each after one step, with its answer."""
    answers = {}
    for action in ("search[shoes]", "search[chair]"):
        session = fuzzer.post("/sessions", {"task_id": fuzzer.task})["session_id"]
        path = f"/sessions/{session}/step"
        answers[session] = fuzzer.post(path, {"turn_index": 0, "action": action})
    return answers


def check_bystanders(fuzzer: Fuzzer, answers: dict[str, Any]) -> None:
    """Repeating their last step must give the same answer: nothing else has been played."""
    for (session, answer), action in zip(
        answers.items(), ("search[shoes]", "search[chair]"), strict=True
    ):
        path = f"/sessions/{session}/step"
        assert fuzzer.post(path, {"turn_index": 0, "action": action}) == answer


def fuzz(fuzzer: Fuzzer, examples: int, rare: set[int]) -> None:
    """Sends examples x OPERATIONS requests; `rare` are statuses that need not be answered."""
    answers = bystanders(fuzzer)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
        # Requests depend on those before them: a shortened example is another story.
        phases=[Phase.generate],
    )  # fmt: skip
    @given(st.lists(OPERATION, min_size=OPERATIONS, max_size=OPERATIONS))
    def send(operations: list[Operation]) -> None:
        for operation in operations:
            fuzzer.run(operation)
        fuzzer.close_all()
        check_bystanders(fuzzer, answers)

    send()
    # The fuzzing got somewhere: every kind of answer came.
    assert STATUSES - rare <= fuzzer.seen, STATUSES - fuzzer.seen
    health = json.loads(fuzzer.call.request("GET", "/health", [b""]).body)
    assert health["sessions"] == 2


@pytest.fixture
def caller(small_shop: Shop) -> Iterator[AppCaller]:
    store = SessionStore(small_shop, capacity=CAPACITY, idle_seconds=600.0)
    found = AppCaller(create_app(store, max_body=8000))
    yield found
    found.close()


@pytest.mark.slow
def test_ten_thousand_requests_in_process(caller: AppCaller, small_shop: Shop) -> None:
    fuzzer = Fuzzer(caller, small_shop.task_ids("train")[0])
    fuzz(fuzzer, IN_PROCESS, {503})
    assert fuzzer.sent >= 10_000


@pytest.mark.slow
def test_thousands_of_requests_over_http(
    start_server: StartServer, shop_folder: Any, small_shop: Shop
) -> None:
    server = start_server(
        "webshop", "--port", "0", "--data", str(shop_folder),
        "--capacity", str(CAPACITY), "--noun-tagger", "words",
    )  # fmt: skip
    call = HttpCaller(server.url)
    fuzzer = Fuzzer(call, small_shop.task_ids("train")[0])
    fuzz(fuzzer, OVER_HTTP, {413, 503})
    assert fuzzer.sent >= 3_000
    call.close()
    assert server.stop() == (0, "")


def test_requests_that_are_not_http_are_refused_and_service_continues(
    start_server: StartServer, shop_folder: Any
) -> None:
    server = start_server("webshop", "--port", "0", "--data", str(shop_folder))
    host, port = server.url.removeprefix("http://").split(":")
    draws = random.Random(0)
    starts = [
        b"", b"GET", b"GET / HTTP/9.9\r\n\r\n", b"POST /sessions HTTP/1.1\r\nHost: x\r\n",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n",
    ]  # fmt: skip
    for start in starts * 10:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(start + draws.randbytes(draws.randrange(40)))
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            assert b" 500 " not in answer.partition(b"\r\n")[0], (start, answer)
    check = HttpCaller(server.url)
    assert check.request("GET", "/health", [b""]).json()["sessions"] == 0
    check.close()
