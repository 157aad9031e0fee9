"""Check that the servers' answers follow their OpenAPI descriptions."""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from typing import Any

import pytest
from asgi_calls import AppCaller
from curl_lines import curl_lines, listed_paths
from openapi_fuzz import fuzz_api
from starlette.applications import Starlette

from env_servers.retrieval import app as retrieval_app
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.settings import CollectionSettings, Limits
from env_servers.webshop.app import create_app as create_webshop
from env_servers.webshop.sessions import SessionStore
from env_servers.webshop.shop import Shop

EXAMPLES = 15
MANY = 150


def webshop(shop: Shop) -> tuple[Starlette, SessionStore]:
    store = SessionStore(shop, capacity=50, idle_seconds=600.0)
    return create_webshop(store, max_body=5_000_000), store


def retrieval() -> Starlette:
    collection = Collection.open(CollectionSettings(entities=60))
    return retrieval_app.create_app(collection, Limits(), max_body=5_000_000)


def fuzz_webshop(shop: Shop, examples: int) -> Counter[tuple[str, int]]:
    app, store = webshop(shop)
    turns = cycle(range(3))

    def prepare(case: Any) -> None:
        """Aims every third request at what exists."""
        if next(turns):
            return
        task_id = shop.task_ids("train")[0]
        while store.live() >= store.capacity - 3:
            store.close(next(iter(store._sessions)))
        session = store.create(task_id).session_id
        if "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = session
        if "split" in (case.path_parameters or {}):
            case.path_parameters["split"] = "train"
        if case.operation.label == "POST /sessions":
            case.body = {"task_id": task_id}
        if "step" in case.operation.label and "turn_index" in case.body:
            case.body["turn_index"] = 0
        for name, entry in (
            ("steps", {"session_id": session, "turn_index": 0, "action": "search[x]"}),
            ("sessions", {"split": "train", "seed": 3}), ("session_ids", session),
        ):  # fmt: skip
            if name in (case.body if isinstance(case.body, dict) else {}):
                case.body[name].append(entry)

    return fuzz_api(app, examples, prepare)


def check_webshop(seen: Counter[tuple[str, int]]) -> None:
    for label, statuses in {
        "POST /sessions/{session_id}/step": {200, 404, 422}, "POST /sessions": {201, 404, 422},
        "DELETE /sessions/{session_id}": {200, 404}, "GET /tasks/{split}": {200, 404},
        "POST /batch/step": {200, 422}, "POST /batch/create": {200, 422},
        "POST /batch/close": {200, 422}, "GET /health": {200}, "GET /metrics": {200},
        "GET /": {200},
    }.items():  # fmt: skip
        assert {status for found, status in seen if found == label} == statuses, label


def check_retrieval(seen: Counter[tuple[str, int]]) -> None:
    assert {status for _, status in seen} == {200, 404, 422}


@pytest.mark.slow
def test_the_shop_answers_as_it_says(small_shop: Shop) -> None:
    check_webshop(fuzz_webshop(small_shop, EXAMPLES))


def test_retrieval_answers_as_it_says() -> None:
    check_retrieval(fuzz_api(retrieval(), EXAMPLES))


@pytest.mark.slow
def test_the_shop_answers_many_requests_as_it_says(small_shop: Shop) -> None:
    check_webshop(fuzz_webshop(small_shop, MANY))


@pytest.mark.slow
def test_retrieval_answers_many_requests_as_it_says() -> None:
    check_retrieval(fuzz_api(retrieval(), MANY))


@pytest.mark.parametrize("section", ["WebShop", "Retrieval"])
def test_the_guide_names_the_endpoints_and_its_calls_work(section: str, small_shop: Shop) -> None:
    call = AppCaller(webshop(small_shop)[0] if section == "WebShop" else retrieval())
    described = set(call.get("/openapi.json").json()["paths"])
    assert listed_paths(section) == described - {"/", "/health", "/metrics", "/openapi.json"}
    session = ""
    for method, path, body in curl_lines(section):
        sent = body.replace(b"SESSION", session.encode())
        answer = call.request(method, path.replace("SESSION", session), [sent])
        assert answer.status in (200, 201), (path, answer)
        found = answer.json()
        assert not any("error" in entry for entry in found.get("results", []))
        session = found.get("session_id", session)
    call.close()
