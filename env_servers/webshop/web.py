"""Serve the shop as web pages for people and browser agents.

The pages use the same sessions and the same engine as the JSON API. They contain no scripts and
request nothing from other machines. Every button posts its action with the session's turn index,
and the answer redirects to the session's address, which always shows the current page.
Pressing a button twice, or a button of an old page, therefore plays no action twice.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from env_servers.service import ServiceError, read_body
from env_servers.text import well_formed
from env_servers.webshop.pictures import picture_of
from env_servers.webshop.reward import missed_parts
from env_servers.webshop.sessions import SessionStore

if TYPE_CHECKING:
    from jinja2 import Environment

PREFIX = "/shop"
_TEMPLATES = Path(__file__).parent / "templates"
_MOST_FIELDS = 16
_EXAMPLES = 6
# They would end the query inside `search[..]`.
_NOT_IN_QUERY = re.compile(r"[\[\]\s]+")


class ShopPages:
    """The handlers of the web pages."""

    def __init__(self, store: SessionStore, max_body: int, max_turns: int) -> None:
        self._store = store
        self._max_body = max_body
        self._max_turns = max_turns

    def routes(self) -> list[Route]:
        """Return the addresses of the pages."""
        return [
            Route(PREFIX, self.choose, methods=["GET"]),
            Route(f"{PREFIX}/new", self.new, methods=["POST"]),
            Route(f"{PREFIX}/{{session_id}}", self.show, methods=["GET"]),
            Route(f"{PREFIX}/{{session_id}}/act", self.act, methods=["POST"]),
        ]

    async def choose(self, request: Request) -> Response:
        """Answer GET /shop: choose a task."""
        shop = self._store.shop
        split = request.query_params.get("split", next(iter(shop.splits)))
        places = self._store.split_range(split)
        examples = places[:: max(1, len(places) // _EXAMPLES)][:_EXAMPLES]
        return _page(
            "choose.html",
            splits=[(name, len(each)) for name, each in shop.splits.items()],
            split=split,
            examples=[(f"{shop.name}/{place}", shop.goals[place]) for place in examples],
            label=shop.label,
            product_count=len(shop.catalogue),
            max_turns=self._max_turns,
        )

    async def new(self, request: Request) -> Response:
        """Answer POST /shop/new: a session for `task_id`, or for a random task of `split`."""
        form = await self._form(request)
        if task_id := form.get("task_id", "").strip():
            state = self._store.create(task_id)
        else:
            split = form.get("split", next(iter(self._store.shop.splits)))
            state = self._store.create_in_split(split, secrets.randbits(32))
        return _see(f"{PREFIX}/{state.session_id}")

    async def show(self, request: Request) -> Response:
        """Answer GET /shop/{session_id}: the current page of the session."""
        state = self._store.find(request.path_params["session_id"])
        purchase = state.page.purchase
        goal = self._store.shop.goal(state.task_id)
        missed = (
            missed_parts(goal, purchase.product, dict(purchase.options).values())
            if purchase is not None
            else ((), ())
        )
        return _page(
            f"{state.page.kind}.html",
            state=state,
            page=state.page,
            max_turns=self._max_turns,
            message=state.last_outcome.message if state.last_outcome else "",
            goal=goal,
            missed=missed,
        )

    async def act(self, request: Request) -> Response:
        """Answer POST /shop/{session_id}/act: play `action`, or a search for `query`."""
        session_id = request.path_params["session_id"]
        form = await self._form(request)
        action = form.get("action", "")
        if "query" in form:
            query = _NOT_IN_QUERY.sub(" ", form["query"]).strip()
            action = f"search[{query}]" if query else ""
        try:
            turn = int(form.get("turn_index", "")) if action else -1
        except ValueError:
            raise ServiceError(422, "invalid_body", "turn_index must be an integer.") from None
        try:
            if action:
                self._store.step(session_id, turn, action)
            else:
                self._store.find(session_id)
        except ServiceError as error:
            # A button of an old page: show the current page instead.
            if error.status != 409:
                raise
        return _see(f"{PREFIX}/{session_id}")

    async def _form(self, request: Request) -> dict[str, str]:
        body = await read_body(request, self._max_body)
        try:
            fields = parse_qs(
                body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS
            )
        except ValueError:
            raise ServiceError(422, "invalid_body", "The body is not a form of the shop.") from None
        return {name: well_formed(values[0]) for name, values in fields.items()}


def error_page(request: Request, error: ServiceError) -> Response | None:
    """Return the error as a page below /shop; None elsewhere."""
    path = request.url.path
    if path != PREFIX and not path.startswith(f"{PREFIX}/"):
        return None
    return _page("error.html", error.status, error=error)


def _see(address: str) -> Response:
    return RedirectResponse(address, 303, headers={"cache-control": "no-store"})


def _page(template: str, status: int = 200, **values: object) -> Response:
    html = _environment().get_template(template).render(values)
    return Response(
        html.encode("utf-8", "replace"),
        status,
        media_type="text/html",
        headers={
            "content-security-policy": _style()[1],
            # The back button requests the page again, and so shows the current one.
            "cache-control": "no-store",
            # With no-referrer, browsers would send forms with the Origin "null".
            "referrer-policy": "same-origin",
            "x-content-type-options": "nosniff",
        },
    )


@cache
def _environment() -> Environment:
    # Imported with the first page: a server for agents alone does not need it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        auto_reload=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(style=Markup(_style()[0]), picture_of=picture_of)
    environment.filters["dollars"] = dollars
    return environment


def dollars(prices: float | tuple[float, ...]) -> str:
    """Return a price, or the ends of a range, in the format of all pages: `$3.78 to $11.38`."""
    ends = prices if isinstance(prices, tuple) else (prices,)
    return " to ".join(f"${price:,.2f}" for price in ends)


@cache
def _style() -> tuple[str, str]:
    """Return the style of all pages, and the policy that allows only this style."""
    style = (_TEMPLATES / "style.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return style, (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    )
