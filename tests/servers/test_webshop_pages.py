"""The shop's web pages, as far as they need no browser."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from asgi_calls import Answer, AppCaller
from served_shop import HOSTILE, HOSTILE_ASIN, HOSTILE_OPTION, HOSTILE_WORD, a_task, hostile_task

from env_servers.webshop import pictures
from env_servers.webshop.app import create_app
from env_servers.webshop.sessions import SessionStore
from env_servers.webshop.web import dollars


class Elements(HTMLParser):
    """Return the parts of a page that a browser would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def turn_shown(page: Answer) -> int:
    found = re.search(r'name="turn_index" value="(\d+)"', page.body.decode())
    assert found is not None
    return int(found[1])


def test_shopping_with_forms_and_never_twice(call: AppCaller, store: SessionStore) -> None:
    shop = call.get("/shop")
    assert shop.headers["content-type"] == "text/html; charset=utf-8"
    started = call.form("/shop/new", split="train", task_id="")
    address = started.headers["location"]
    assert started.status == 303
    session = address.rpartition("/")[2]

    def act(**fields: object) -> Answer:
        answer = call.form(f"{address}/act", **fields)
        assert (answer.status, answer.headers["location"]) == (303, address)
        return call.get(address)

    brand = store.shop.catalogue[5].title.split()[0]
    page = act(query=f"  {brand} [x]\n ", turn_index=0)
    assert turn_shown(page) == 1
    assert f"{brand} x".lower() in page.body.decode().lower()
    # A double click, a stale button, a button that means nothing, an empty search.
    assert turn_shown(act(query=f"{brand} x", turn_index=0)) == 1
    assert turn_shown(act(action="click[back to search]", turn_index=0)) == 1
    assert turn_shown(act(action="click[back to search]", turn_index=7)) == 1
    assert turn_shown(act(query=" [] ", turn_index=1)) == 1
    product = store.find(session).page.products[0]
    page = act(action=f"click[{product.asin.lower()}]", turn_index=1)
    assert product.title in Elements(page.body.decode()).text
    turn = 2
    for name in ("description", "features", "reviews"):
        assert act(action=f"click[{name}]", turn_index=turn).status == 200
        assert act(action="click[< prev]", turn_index=turn + 1).status == 200
        turn += 2
    page = act(action="click[buy now]", turn_index=turn)
    assert "Thank you for shopping with us!" in page.body.decode()
    assert f'id="score">{store.find(session).score}<' in page.body.decode()
    # The back button and a search after the end lead to the same page.
    assert act(action="click[buy now]", turn_index=turn).body == page.body
    assert act(query=brand, turn_index=turn + 1).body == page.body
    assert store.steps == turn + 1


def test_a_person_reads_why_nothing_happened(call: AppCaller, store: SessionStore) -> None:
    session = store.create(a_task(store.shop)).session_id
    assert 'class="notice"' not in call.get(f"/shop/{session}").body.decode()
    call.form(f"/shop/{session}/act", query="<a> x", turn_index=0)
    outcome = store.find(session).last_outcome
    assert outcome is not None
    message = outcome.message
    assert message
    assert message in Elements(call.get(f"/shop/{session}").body.decode()).text


def test_option_buttons_show_the_choice(call: AppCaller, store: SessionStore) -> None:
    shop = store.shop
    product = next(p for p in shop.catalogue if p.options and p.asin != HOSTILE_ASIN)
    session = store.create(a_task(shop)).session_id
    store.step(session, 0, f"search[{product.title}]")
    store.step(session, 1, f"click[{product.asin.lower()}]")
    value = product.options[0][1][-1]
    before = call.get(f"/shop/{session}").body.decode()
    assert before.count('aria-pressed="true"') == 0
    call.form(f"/shop/{session}/act", action=f"click[{value}]", turn_index=2)
    after = call.get(f"/shop/{session}").body.decode()
    chosen = re.findall(r'aria-pressed="true">([^<]*)<', after)
    assert [html.unescape(text) for text in chosen] == [value]


def test_the_last_page_lists_the_missed_parts(store: SessionStore) -> None:
    shop = store.shop
    goal = next(g for g in shop.goals if len(g.options) == 2 and len(g.attributes) == 2)
    other = next(
        row for row, p in enumerate(shop.catalogue)
        if p.asin != HOSTILE_ASIN and not set(goal.attributes) & set(p.attributes)
        and shop.price(row) > goal.price_upper and p.query != goal.query
    )  # fmt: skip
    session = store.create(f"{shop.name}/{goal.index}").session_id
    product = shop.catalogue[other]
    call = AppCaller(create_app(store, max_body=100_000, max_turns=3))
    for turn, action in enumerate((f"search[{product.title}]", f"click[{product.asin}]")):
        assert store.step(session, turn, action).executed
        page = Elements(call.get(f"/shop/{session}").body.decode())
        assert f"Turn {turn + 1} of 3" in page.text
        assert dollars(product.pricing) in page.text
    store.step(session, 2, "click[buy now]")
    text = Elements(call.get(f"/shop/{session}").body.decode()).text
    for attribute in goal.attributes:
        assert f"missed: {attribute}" in text
    for name, value in goal.options:
        assert f"missed: {name}: {value}" in text
    price, limit = dollars(shop.price(other)), dollars(goal.price_upper)
    assert f"missed: {price}, at most {limit}" in text
    assert "missed: another kind" in text
    assert "Turn 3 of 3" in text
    # The goal's own product with its options misses nothing.
    session = store.create(f"{shop.name}/{goal.index}").session_id
    actions = [f"search[{goal.name}]", f"click[{goal.asin}]"]
    actions += [f"click[{value}]" for _, value in goal.options]
    for turn, action in enumerate([*actions, "click[buy now]"]):
        store.step(session, turn, action)
    assert store.find(session).score == 1.0
    assert "missed:" not in Elements(call.get(f"/shop/{session}").body.decode()).text
    call.close()


def test_prices_are_written_alike() -> None:
    assert dollars(100.0) == "$100.00"
    assert dollars((3.78, 11.4)) == "$3.78 to $11.40"
    assert dollars(1_000_000.0) == "$1,000,000.00"


def test_markup_in_products_and_queries_is_only_text(call: AppCaller, store: SessionStore) -> None:
    session = store.create(hostile_task(store.shop)).session_id
    asin = HOSTILE_ASIN.lower()
    actions = [
        f"search[{HOSTILE_WORD} {HOSTILE}]", f"click[{asin}]", "click[description]",
        "click[< prev]", "click[features]", "click[< prev]", f"click[{HOSTILE_OPTION}]",
        "click[\ud800 lone]", "click[buy now]",
    ]  # fmt: skip
    texts = [call.get(f"/shop/{session}").body.decode()]
    for turn, action in enumerate(actions):
        call.form(f"/shop/{session}/act", action=action, turn_index=turn)
        texts.append(call.get(f"/shop/{session}").body.decode())
    state = store.find(session)
    assert (state.page.kind, state.turn_index) == ("done", 9)
    assert state.page.purchase is not None
    assert dict(state.page.purchase.options) == {"color": HOSTILE_OPTION}
    texts.append(call.get("/shop?split=" + "train").body.decode())
    texts.append(call.get(f"/shop?split={HOSTILE}").body.decode())
    for text in texts:
        elements = Elements(text)
        assert not elements.names & {"script", "img", "iframe"}
        assert not [name for name in elements.attributes if name.startswith("on") or name == "src"]
        assert text.count("<style>") == text.count("</style>") == 1
    assert HOSTILE in Elements(texts[2]).text


def test_every_product_has_a_picture_in_its_colour(call: AppCaller, store: SessionStore) -> None:
    drawn = set(re.findall(r'id="shape-(\w+)"', call.get("/shop").body.decode()))
    shapes = {*pictures._DATA["shapes"], *pictures._DATA["category_shapes"].values(), "parcel"}
    assert shapes == drawn
    product = next(p for p in store.shop.catalogue if p.asin != HOSTILE_ASIN)
    green = pictures.picture_of(product, [("color", "forest green")])
    blue = pictures.picture_of(product, [("size", "9"), ("color", "blue")])
    assert (green.colour, blue.colour) == (pictures._COLOURS["green"], pictures._COLOURS["blue"])
    assert green.shape == blue.shape == pictures.picture_of(product).shape


def test_pages_forbid_scripts_and_outside_resources(call: AppCaller, store: SessionStore) -> None:
    session = store.create(a_task(store.shop)).session_id
    for path, status in (("/shop", 200), (f"/shop/{session}", 200), ("/shop/none", 404)):
        answer = call.get(path)
        assert answer.status == status
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "script-src" not in policy
        assert answer.headers["cache-control"] == "no-store"
        text = answer.body.decode()
        assert not re.search(r'(src|href)="?(https?:)?//', text)


def test_people_get_errors_as_pages(call: AppCaller, store: SessionStore) -> None:
    answers = [
        (404, call.get("/shop/none")),
        (404, call.get("/shop/none/act/more")),
        (404, call.form("/shop/none/act", action="click[x]", turn_index=0)),
        (404, call.form("/shop/new", task_id="webshop/none/1")),
        (404, call.get("/shop?split=none")),
        (405, call.request("POST", "/shop")),
        (422, call.request("POST", "/shop/new", [b"\xff"])),
        (422, call.request("POST", "/shop/new", [b"a=1&" * 100])),
    ]
    session = store.create(a_task(store.shop)).session_id
    answers.append((422, call.form(f"/shop/{session}/act", action="x", turn_index="x")))
    for _ in range(7):
        store.create(a_task(store.shop))
    answers.append((503, call.form("/shop/new", split="train")))
    for status, answer in answers:
        assert answer.status == status
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert 'href="/shop"' in answer.body.decode()
