"""The shop's server: sessions and the JSON API."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import tracemalloc
from pathlib import Path

import pytest
from asgi_calls import Answer, AppCaller
from served_shop import HOSTILE_ASIN, HOSTILE_WORD, Clock, a_task, write_small_shop

from env_servers.service import ServiceError
from env_servers.webshop import app
from env_servers.webshop.app import MOST_IN_BATCH, create_app
from env_servers.webshop.sessions import SessionStore
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

STATE_FIELDS = {
    "session_id", "task_id", "task_type", "turn_index", "instruction", "text", "page_kind",
    "clickables", "has_search_bar", "over", "score",
}  # fmt: skip
STEP_FIELDS = {
    "session_id", "turn_index", "text", "page_kind", "clickables", "has_search_bar",
    "is_action_valid", "message", "over", "score", "details",
}  # fmt: skip


def bought(call: AppCaller, task_id: str) -> tuple[str, Answer]:
    """A session that bought the first product of a search."""
    state = call.post("/sessions", {"task_id": task_id}).json()
    path = f"/sessions/{state['session_id']}/step"
    found = call.post(path, {"turn_index": 0, "action": f"search[{state['instruction'][:40]}]"})
    product = found.json()["clickables"][2]
    call.post(path, {"turn_index": 1, "action": f"click[{product}]"})
    return state["session_id"], call.post(path, {"turn_index": 2, "action": "click[Buy Now]"})


# The store


def test_a_session_ends_when_idle_and_not_before(store: SessionStore, clock: Clock) -> None:
    task = a_task(store.shop)
    used = store.create(task).session_id
    left = store.create(task).session_id
    clock.now += 40
    store.step(used, 0, "search[chair]")
    clock.now += 40
    assert store.expire() == pytest.approx(20)
    assert store.find(used).turn_index == 1
    with pytest.raises(ServiceError) as error:
        store.find(left)
    assert (error.value.status, error.value.code) == (404, "unknown_session")
    clock.now += 60
    assert store.expire() == 60
    assert store.live() == 0
    assert (store.created, store.expired) == (2, 2)


def test_capacity_is_freed_by_closing_and_by_expiry(store: SessionStore, clock: Clock) -> None:
    task = a_task(store.shop)
    ids = [store.create(task).session_id for _ in range(8)]
    assert len(set(ids)) == 8
    with pytest.raises(ServiceError, match="--capacity") as error:
        store.create(task)
    assert (error.value.status, error.value.code) == (503, "at_capacity")
    store.close(ids[3])
    store.create(task)
    clock.now += 61
    for _ in range(8):
        store.create(task)
    assert store.live() == 8


def test_a_repeated_step_is_not_played_twice(store: SessionStore) -> None:
    session = store.create(a_task(store.shop)).session_id
    first = store.step(session, 0, "search[chair]")
    second = store.step(session, 1, "click[next >]")
    assert store.step(session, 1, "click[next >]") == second
    assert store.find(session).turn_index == 2
    assert store.steps == 2
    assert first.page.page_number + 1 == second.page.page_number
    for turn, action in ((1, "click[back to search]"), (0, "search[chair]"), (3, "x"), (9, "x")):
        with pytest.raises(ServiceError) as error:
            store.step(session, turn, action)
        assert (error.value.status, error.value.code) == (409, "wrong_turn_index")
    assert store.find(session).page == second.page


@pytest.mark.slow
def test_idle_sessions_are_closed_without_requests(small_shop: Shop, clock: Clock) -> None:
    calls = 0

    class Watched(SessionStore):
        def expire(self) -> float:
            nonlocal calls
            calls += 1
            return super().expire()

    store = Watched(small_shop, capacity=4, idle_seconds=0.2, clock=clock)
    app = create_app(store, max_body=1000)
    calls = 0  # an application is made with one look at the figures

    async def live() -> None:
        async with app.router.lifespan_context(app):
            store.create(a_task(small_shop))
            await asyncio.sleep(0.05)
            clock.now += 10
            await asyncio.sleep(0.6)

    asyncio.run(live())
    # With the clock set back, looking at the figures drops nothing.
    clock.now -= 10
    assert store.expired == 1
    assert calls <= 5


# The JSON API


def test_an_episode_over_the_api(call: AppCaller, store: SessionStore) -> None:
    task = a_task(store.shop)
    created = call.post("/sessions", {"task_id": task})
    state = created.json()
    assert created.status == 201
    assert state.keys() == STATE_FIELDS
    assert state["task_id"] == task
    assert state["turn_index"] == 0
    assert state["has_search_bar"] is True
    assert state["over"] is False
    assert state["score"] == 0.0
    assert state["clickables"] == ["search"]
    assert state["instruction"] in state["text"]

    session, last = bought(call, task)
    answer = last.json()
    assert answer.keys() == STEP_FIELDS
    assert (answer["session_id"], answer["turn_index"]) == (session, 3)
    assert answer["over"] is True
    assert answer["page_kind"] == "done"
    assert answer["clickables"] == []
    assert answer["details"]["noun_tagger"] == "words"
    assert answer["details"]["reward"] == answer["score"]
    assert {"r_type", "r_att", "w_att", "r_price", "w_price"} <= answer["details"].keys()
    path = f"/sessions/{session}/step"
    assert call.post(path, {"turn_index": 2, "action": "click[Buy Now]"}).body == last.body
    over = call.post(path, {"turn_index": 3, "action": "search[x]"})
    assert (over.status, over.code) == (409, "episode_over")
    assert call.request("DELETE", f"/sessions/{session}").json() == {"closed": True}
    again = call.request("DELETE", f"/sessions/{session}")
    assert (again.status, again.code) == (404, "unknown_session")


def test_an_invalid_action_costs_the_turn_and_changes_nothing(
    call: AppCaller, store: SessionStore
) -> None:
    state = call.post("/sessions", {"task_id": a_task(store.shop)}).json()
    path = f"/sessions/{state['session_id']}/step"
    for turn, action in enumerate(["", "dance", "click[buy now]", "search[]", "\0", "x" * 9999]):
        answer = call.post(path, {"turn_index": turn, "action": action}).json()
        assert answer["is_action_valid"] is False, action
        assert answer["text"] == state["text"]
        assert answer["turn_index"] == turn + 1
        assert answer["details"] is None


def test_a_long_action_is_an_invalid_one(call: AppCaller, store: SessionStore) -> None:
    state = call.post("/sessions", {"task_id": a_task(store.shop)}).json()
    path = f"/sessions/{state['session_id']}/step"
    action = f"search[{'shoes ' * 1665}x]"
    assert len(action) == 9999
    turns = ((action, True), (action + "  ", False), ("search[" + "x" * 90_000 + "]", False))
    for turn, (sent, is_valid) in enumerate(turns):
        answer = call.post(path, {"turn_index": turn, "action": sent}).json()
        assert answer["is_action_valid"] is is_valid
        assert answer["turn_index"] == turn + 1
        assert ("first 1,000" if is_valid else "10,000 characters") in answer["message"]
        assert call.post(path, {"turn_index": turn, "action": sent}).json() == answer
    # A repetition must be one also where nothing is kept of the text.
    other = call.post(path, {"turn_index": 2, "action": "search[" + "y" * 90_000 + "]"})
    assert (other.status, other.code) == (409, "wrong_turn_index")


@pytest.mark.slow
def test_a_hostile_client_costs_little_time_and_memory(
    call: AppCaller, store: SessionStore
) -> None:
    shop = store.shop
    state = call.post("/sessions", {"task_id": a_task(shop)}).json()
    words = sorted({word for product in shop.catalogue for word in product.title.split()})
    draws = random.Random(0)
    tracemalloc.start()
    begun = time.process_time()
    for turn in range(200):
        query = " ".join(draws.choices(words, k=2000))
        for action in (f"search[{query[:9000]}]", f"search[<q> {query[:9000]}]"):
            call.post("/batch/step", {"steps": [
                {"session_id": state["session_id"], "turn_index": turn, "action": action}
            ]})  # fmt: skip
    seconds = time.process_time() - begun
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10
    # 3.6 million characters were sent.
    assert kept < 1_500_000


def test_a_seed_always_picks_the_same_task(call: AppCaller, store: SessionStore) -> None:
    picked = [
        call.post("/sessions", {"split": "train", "seed": seed}).json()["task_id"]
        for seed in (0, 1, 0, 1, 2**63 - 1)
    ]
    assert picked[0] == picked[2] != picked[1] == picked[3]
    assert set(picked) <= set(store.shop.task_ids("train"))


def test_tasks_health_and_metrics(call: AppCaller, store: SessionStore) -> None:
    shop = store.shop
    for split in shop.splits:
        tasks = call.get(f"/tasks/{split}").json()
        assert tasks.keys() == {"name", "split", "task_ids", "task_types", "content_hash"}
        assert tasks["task_ids"] == sorted(tasks["task_ids"]) == list(shop.task_ids(split))
        assert tasks["task_types"] == [shop.goal(task).category for task in tasks["task_ids"]]
        assert tasks["content_hash"] == shop.manifest(split).content_hash
    assert call.get("/tasks/nothing").code == "unknown_split"
    bought(call, a_task(shop))
    health = call.get("/health").json()
    assert health.keys() == {
        "status", "service", "version", "data", "content_hash", "folder", "products", "goals",
        "splits", "split_rule", "goal_seed", "text_style", "human_goals", "noun_tagger",
        "sessions", "capacity", "pid",
    }  # fmt: skip
    assert (health["status"], health["service"]) == ("ok", "webshop")
    assert (health["products"], health["sessions"], health["capacity"]) == (61, 1, 8)
    assert health["data"] == health["folder"] == shop.settings.data
    assert health["content_hash"] == shop.content_hash
    assert sum(health["splits"].values()) == health["goals"] == len(shop.goals)
    answer = call.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    assert "webshop_sessions 1.0" in lines
    assert "webshop_steps_total 3.0" in lines
    assert 'webshop_errors_total{code="unknown_split"} 1.0' in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["process_resident_memory_bytes"]) > 1e6
    assert 0 < float(values["webshop_step_seconds_total"]) < 10


@pytest.mark.slow
def test_a_long_batch_stops_no_other_request(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After each step instead, however fast the machine is.
    assert app._BATCH_SECONDS <= 0.01
    monkeypatch.setattr(app, "_BATCH_SECONDS", 0.0)
    call = AppCaller(create_app(store, max_body=1_000_000))
    words = sorted({word for product in store.shop.catalogue for word in product.title.split()})
    draws = random.Random(1)
    session = store.create(a_task(store.shop)).session_id
    steps = [
        {"session_id": session, "turn_index": turn,
         "action": f"search[{' '.join(draws.choices(words, k=150))[:800]}]"}
        for turn in range(1000)
    ]  # fmt: skip
    answered = 0

    async def others(batch: asyncio.Task[Answer]) -> None:
        nonlocal answered
        while not batch.done():
            assert (await call.exchange("GET", "/health")).status == 200
            answered += 1
            await asyncio.sleep(0)

    async def both() -> Answer:
        body = json.dumps({"steps": steps}).encode()
        batch = asyncio.ensure_future(call.exchange("POST", "/batch/step", [body]))
        await others(batch)
        return await batch

    results = call.run(both()).json()["results"]
    assert [answer["turn_index"] for answer in results] == list(range(1, 1001))
    assert answered > 20
    call.close()


@pytest.mark.slow
def test_a_long_list_of_tasks_stops_no_other_request(
    call: AppCaller, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    manifest = type(store.shop).manifest

    def slow(shop: Shop, split: str) -> object:
        nonlocal made
        made += 1
        time.sleep(0.5)
        return manifest(shop, split)

    monkeypatch.setattr(type(store.shop), "manifest", slow)
    order: list[str] = []

    async def ask(path: str) -> Answer:
        answer = await call.exchange("GET", path)
        order.append(path)
        return answer

    async def ask_all() -> list[Answer]:
        return await asyncio.gather(ask("/tasks/train"), ask("/tasks/train"), ask("/health"))

    first, second, _ = call.run(ask_all())
    assert order == ["/health", "/tasks/train", "/tasks/train"]
    assert first.body == second.body == call.get("/tasks/train").body
    assert made == 1


def test_a_folder_whose_name_is_no_utf8_is_served(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"shop-\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    write_small_shop(folder)
    shop = Shop.open(ShopSettings(data=str(folder), noun_tagger="words"))
    call = AppCaller(create_app(SessionStore(shop, capacity=1, idle_seconds=9.0), max_body=1000))
    health = call.get("/health").json()
    assert health["data"] == health["folder"] == f"{tmp_path}/shop-\ufffd"
    assert call.get("/shop").status == 200
    call.close()


def test_batches_answer_in_order_and_continue_after_errors(
    call: AppCaller, store: SessionStore
) -> None:
    task = a_task(store.shop)
    wanted = [{"task_id": task}, {"task_id": "webshop/none/0"}, {"split": "train", "seed": 5}, 7]
    created = call.post("/batch/create", {"sessions": wanted}).json()["results"]
    assert created[0].keys() == created[2].keys() == STATE_FIELDS
    assert [created[i]["error"]["code"] for i in (1, 3)] == ["unknown_task", "invalid_body"]
    assert [created[i]["error"]["status"] for i in (1, 3)] == [404, 422]
    a, b = created[0]["session_id"], created[2]["session_id"]
    steps = [
        {"session_id": b, "turn_index": 0, "action": "search[shoes]"},
        {"session_id": a, "turn_index": 0, "action": "search[chair]"},
        {"session_id": a, "turn_index": 1, "action": "click[next >]"},
        {"session_id": "none", "turn_index": 0, "action": "search[chair]"},
        {"session_id": a, "turn_index": 0, "action": "search[chair]"},
        {"session_id": a, "turn_index": True, "action": "search[chair]"},
    ]
    stepped = call.post("/batch/step", {"steps": steps}).json()["results"]
    assert [answer.get("session_id") for answer in stepped] == [b, a, a, None, None, None]
    assert [answer.get("turn_index") for answer in stepped[:3]] == [1, 1, 2]
    assert [answer["error"]["status"] for answer in stepped[3:]] == [404, 409, 422]
    closed = call.post("/batch/close", {"session_ids": [b, b, a, 3]}).json()["results"]
    assert [answer.get("closed") for answer in closed] == [True, None, True, None]
    assert [closed[i]["error"]["status"] for i in (1, 3)] == [404, 422]
    too_many = {"session_ids": ["x"] * (MOST_IN_BATCH + 1)}
    assert call.post("/batch/close", too_many).code == "invalid_body"
    assert store.live() == 0


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b'{"task_id": 3}', b'{"task_id": null}', b'{"task_id": "x", "seed": 1}',
        b'{"split": "train"}',
        b'{"split": "train", "seed": "1"}', b'{"split": "train", "seed": 1.0}',
        b'{"split": "train", "seed": true}', b'{"split": "train", "seed": -1}',
        b'{"split": "train", "seed": NaN}', b'{"split": "train", "seed": 1e999}',
        b'{"split": "train", "seed": ' + b"9" * 5000 + b"}",
        b'{"split": "train", "seed": 9223372036854775808}',
        b'{"a":' * 15_000, b'{"split": ["train"], "seed": 1}',
    ],
)  # fmt: skip
def test_bodies_without_meaning_are_422(call: AppCaller, body: bytes) -> None:
    answer = call.request("POST", "/sessions", [body])
    assert (answer.status, answer.code) == (422, "invalid_body")


@pytest.mark.slow
def test_a_long_body_is_413_also_in_chunks(call: AppCaller, store: SessionStore) -> None:
    padded = b'{"task_id": "' + a_task(store.shop).encode() + b'"' + b" " * 99_000
    assert call.request("POST", "/sessions", [padded, b"}"]).status == 201
    for chunks in ([padded, b" " * 2000, b"}"], [b" " * 100_001], [b" "] * 100_001 + [b"{}"]):
        answer = call.request("POST", "/sessions", chunks)
        assert (answer.status, answer.code) == (413, "body_too_large")
    assert call.request("POST", "/shop/new", [b"a" * 100_001]).status == 413


def test_lone_surrogates_are_answered_in_valid_utf8(call: AppCaller, store: SessionStore) -> None:
    state = call.post("/sessions", {"task_id": a_task(store.shop)}).json()
    path = f"/sessions/{state['session_id']}/step"
    for turn, action in enumerate(["search[\ud800]", "\udfff", "click[\ud83d\ude00\ud83d]"]):
        answer = call.post(path, {"turn_index": turn, "action": action})
        assert answer.status == 200
        assert answer.json()["turn_index"] == turn + 1
    assert call.post("/sessions", {"task_id": "\ud800"}).code == "unknown_task"
    # The hostile product has a lone surrogate in an option's value.
    opened = call.post(path, {"turn_index": 3, "action": f"search[{HOSTILE_WORD}]"})
    assert HOSTILE_ASIN.lower() in opened.json()["clickables"]
    item = call.post(path, {"turn_index": 4, "action": f"click[{HOSTILE_ASIN.lower()}]"})
    item.body.decode("utf-8")
    assert item.json()["page_kind"] == "item"


def test_unknown_addresses_and_methods(call: AppCaller) -> None:
    for path in ("/nothing", "/sessions/x/y/z", "/health/", "//", "/%ff%00", "/shopping"):
        answer = call.get(path)
        assert (answer.status, answer.code) == (404, "not_found"), path
    for method, path in (("GET", "/sessions"), ("PUT", "/health"), ("POST", "/tasks/train")):
        answer = call.request(method, path)
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"]
