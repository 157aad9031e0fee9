"""Define a server's endpoints as one table, from which routes, OpenAPI and the home page are made.

A row names the types of the request's body and of the answer. The same types validate bodies and
define the schemas of `GET /openapi.json`, so that the description matches the service.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Annotated, Any

import msgspec
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan

from env_servers.guard import Guard
from env_servers.service import (
    ErrorAnswer,
    ErrorResponder,
    JsonResponse,
    Metrics,
    ServiceError,
    message_decoder,
    program_version,
    read_body,
    union_members,
)

SERVED_HEADER = "atod-served"
"""Header of answers: a hash of what is served, see `build_application`."""
_INCIDENTAL = {"version", "pid", "sessions", "capacity", "max_topk"}
"""Fields of `/health` that may change while the answers to all requests stay the same."""

JSON, TEXT, HTML = "application/json", "text/plain", "text/html"
_REASONS = {
    400: "The client closed the connection.",
    401: "The token is missing or wrong.",
    403: "Sent to an unknown host name, or from a page of another web site.",
    404: "Not found.",
    409: "The request conflicts with the current state.",
    413: "The body is too large.",
    422: "The body does not match its schema.",
    500: "The server could not compute the answer.",
    503: "The server is full.",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ATOD {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 16px; }}
td {{ padding: .3rem 1rem .3rem 0; vertical-align: top; }}
@media (max-width: 640px) {{ td {{ display: inline; padding: 0 .5rem 0 0; }}
  tr {{ display: block; padding: .4rem 0; }} td:last-child {{ display: block; opacity: .75; }} }}
</style></head>
<body><h1>ATOD {name} <small>{version}</small></h1><p>{description}</p>{links}
<table>{rows}</table>
<p>Fields of all requests and answers: <a href="/openapi.json">/openapi.json</a></p></body></html>
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """A JSON object with one list whose entries are validated one by one.

    A request is decoded to a list in which a `ServiceError` replaces an invalid entry.
    """

    field: str
    entry: Any
    """Type of an entry; may be a union of structs."""
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row of the table."""

    method: str
    path: str
    """In Starlette's format: `/sessions/{session_id}`."""
    handler: Callable[..., Awaitable[object]]
    """Takes the request, and the decoded body if `request` is a type. Returns the answer's value or
    a response."""
    summary: str
    """One line that starts with a verb."""
    answer: Any = None
    """Type of the answer; None if `media` is not JSON."""
    request: Any = None
    """Type of the body; None: the body is not read."""
    status: int = 200
    errors: tuple[int, ...] = ()
    """Statuses of errors besides those that every endpoint of this shape has."""
    media: str = JSON
    """Media type of the answer."""


@dataclass(frozen=True, slots=True)
class About:
    """Name and description of a server."""

    name: str
    """Name of the service, such as `webshop`; prefix of its metrics."""
    description: str
    links: tuple[tuple[str, str], ...] = ()
    """(address, text) of pages for people."""


class EndpointLine(msgspec.Struct):
    """One endpoint in one line."""

    method: str
    path: str
    summary: str


class Home(msgspec.Struct):
    """Name, version and description of this server, and its endpoints."""

    service: str
    version: str
    description: str
    openapi: str
    endpoints: list[EndpointLine]


def build_application(
    about: About,
    endpoints: Sequence[Endpoint],
    *,
    health: Callable[[], msgspec.Struct],
    errors: ErrorResponder,
    metrics: Callable[[], Iterable[Metric]],
    max_body: int,
    token: str | None = None,
    allowed_hosts: Collection[str] = (),
    pages: Sequence[BaseRoute] = (),
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """Make an application; adds `/`, `/health`, `/openapi.json` and `/metrics` to its endpoints.

    Answers have `SERVED_HEADER`: clients notice a server that was restarted with other settings.

    Args:
        about: name and description of the server.
        endpoints: the endpoints for programs.
        health: returns the answer of `/health`.
        errors: answers and counts errors, 404 and 405 included.
        metrics: returns the current metrics of the service.
        max_body: maximum size of a request, in bytes.
        token: if given, every request must carry it.
        allowed_hosts: further host names, see `guard`.
        pages: routes for people, which OpenAPI does not describe.
        lifespan: runs around the life of the application.
    """
    collected = Metrics(lambda: [*metrics(), errors.metric(f"{about.name}_errors_total")])

    async def answer_health(request: Request) -> object:
        return health()

    async def answer_metrics(request: Request) -> Response:
        return collected.response()

    async def answer_home(request: Request) -> object:
        if HTML in request.headers.get("accept", ""):
            return Response(_home_page(about, table), media_type=HTML, headers=_PAGE_HEADERS)
        lines = [EndpointLine(row.method, row.path, row.summary) for row in table]
        return Home(about.name, program_version(), about.description, "/openapi.json", lines)

    @cache
    def document() -> dict[str, Any]:
        return _openapi(about, table, has_token=token is not None)

    async def answer_openapi(request: Request) -> dict[str, Any]:
        return document()

    state = health()
    fields = msgspec.structs.asdict(state)
    lasting = {name: value for name, value in fields.items() if name not in _INCIDENTAL}
    served = hashlib.sha256(msgspec.json.encode(lasting, order="sorted")).hexdigest()
    counters = "Return counters in the text format of Prometheus."
    itself = "Describe this server: JSON, or a page for browsers."
    every = "Describe all endpoints as OpenAPI 3.1."
    table = [
        *endpoints,
        Endpoint("GET", "/health", answer_health, "Describe what is served.", type(state)),
        Endpoint("GET", "/metrics", answer_metrics, counters, media=TEXT),
        Endpoint("GET", "/", answer_home, itself, Home),
        Endpoint("GET", "/openapi.json", answer_openapi, every, dict[str, Any]),
    ]
    app = Starlette(
        routes=[*(_route(row, max_body, served) for row in table), *pages],
        middleware=[Middleware(Guard, token=token, allowed_hosts=allowed_hosts, errors=errors)],
        exception_handlers=dict.fromkeys((ServiceError, HTTPException, Exception), errors.on_error),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _route(row: Endpoint, max_body: int, served: str) -> Route:
    """Make the route of one row: decode the body, call the handler, encode its answer."""
    decode = None if row.request is None else _decoder(row.request)

    async def answer(request: Request) -> Response:
        try:
            body = [decode(await read_body(request, max_body))] if decode else []
            found = await row.handler(request, *body)
        except asyncio.CancelledError:
            # The server is shutting down, and has waited for this request up to its limit.
            raise ServiceError(503, "stopping", "The server is shutting down.") from None
        response = found if isinstance(found, Response) else JsonResponse(found, row.status)
        response.headers[SERVED_HEADER] = served
        return response

    return Route(row.path, answer, methods=[row.method])


def _decoder(kind: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes a body, also one of a `Batch`."""
    if not isinstance(kind, Batch):
        return message_decoder(kind)
    entries = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=kind.most)]
    outer = message_decoder(
        msgspec.defstruct("Batch", [(kind.field, entries)], forbid_unknown_fields=True)
    )
    inner = message_decoder(kind.entry)

    def decode(raw: bytes) -> Any:
        try:
            return inner(raw)
        except ServiceError as error:
            return error

    return lambda body: [decode(raw) for raw in getattr(outer(body), kind.field)]


def _home_page(about: About, endpoints: Iterable[Endpoint]) -> str:
    rows = "\n".join(
        f"<tr><td>{row.method}</td><td><code>{escape(row.path)}</code></td>"
        f"<td>{escape(row.summary)}</td></tr>"
        for row in endpoints
    )
    links = "".join(
        f'<p><a href="{escape(address)}">{escape(text)}</a></p>' for address, text in about.links
    )
    name, version, words = map(escape, (about.name, program_version(), about.description))
    return _PAGE.format(name=name, version=version, description=words, links=links, rows=rows)


def _openapi(about: About, endpoints: Iterable[Endpoint], *, has_token: bool) -> dict[str, Any]:
    """Return the OpenAPI document of the table."""
    kinds: dict[Any, None] = {ErrorAnswer: None}
    for row in endpoints:
        for kind in (row.request, row.answer):
            entry = kind.entry if isinstance(kind, Batch) else kind
            kinds |= dict.fromkeys(() if entry is None else union_members(entry))
    found, components = msgspec.json.schema_components(
        list(kinds), ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(kinds, found, strict=True))
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"ATOD {about.name}", "version": program_version(),
                 "description": about.description},
        "paths": {},
        "components": {"schemas": components},
    }  # fmt: skip
    for row in endpoints:
        methods = document["paths"].setdefault(row.path, {})
        methods[row.method.lower()] = _operation(row, schemas, has_token)
    if has_token:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"token": scheme}
        document["security"] = [{"token": []}]
    return document


def _operation(row: Endpoint, schemas: dict[Any, Any], has_token: bool) -> dict[str, Any]:
    errors = {403, *row.errors, *([401] if has_token else [])}
    operation: dict[str, Any] = {"summary": row.summary}
    if names := re.findall(r"\{(\w+)\}", row.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if row.request is not None:
        errors |= {400, 413, 422}
        content = {JSON: {"schema": _schema(row.request, schemas)}}
        operation["requestBody"] = {"required": True, "content": content}
    text = {"schema": {"type": "string"}}
    answered = {row.media: {"schema": _schema(row.answer, schemas)} if row.answer else text}
    if row.path == "/":
        answered[HTML] = text
    error = {JSON: {"schema": schemas[ErrorAnswer]}}
    operation["responses"] = {
        str(row.status): {"description": "The answer.", "content": answered},
        **{str(n): {"description": _REASONS[n], "content": error} for n in sorted(errors)},
    }
    return operation


def _schema(kind: Any, schemas: dict[Any, Any]) -> dict[str, Any]:
    if isinstance(kind, Batch):
        entries: dict[str, Any] = {"type": "array", "items": _schema(kind.entry, schemas)}
        if kind.most is not None:
            entries["maxItems"] = kind.most
        return {"type": "object", "properties": {kind.field: entries},
                "required": [kind.field], "additionalProperties": False}  # fmt: skip
    members = [schemas[member] for member in union_members(kind)]
    return members[0] if len(members) == 1 else {"anyOf": members}
