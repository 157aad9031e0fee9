"""Handle requests, errors, bodies and metrics for the applications of all servers.

`endpoints.build_application` makes a Starlette application, `process.serve` runs it. Nothing here
depends on the content of a server.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import metadata
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

counter, gauge = CounterMetricFamily, GaugeMetricFamily
"""Make a metric without labels from a name, a text and a value."""
_encode = msgspec.json.Encoder().encode
_LONGEST_REASON = 300
_ESCAPE = re.compile(
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}|(\\.)",
    re.DOTALL,
)
"""A pair of surrogates, a lone one, or another escape."""

ErrorPage = Callable[[Request, "ServiceError"], "Response | None"]


class ServiceError(Exception):
    """An error as answer to a request: HTTP status, snake_case code, what to do."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def answer(self, *, with_status: bool = False) -> ErrorAnswer:
        """Return the JSON of this error; as an entry of a batch it carries its status."""
        status = self.status if with_status else msgspec.UNSET
        return ErrorAnswer(ErrorBody(self.code, self.message, status))


class ErrorBody(msgspec.Struct):
    """An error: a code for programs, and a message that says what to change."""

    code: str
    message: str
    status: int | msgspec.UnsetType = msgspec.UNSET


class ErrorAnswer(msgspec.Struct):
    """The answer to a failed request or entry of a batch."""

    error: ErrorBody


class JsonResponse(Response):
    """JSON in UTF-8 of any value that msgspec encodes; texts must not contain lone surrogates."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return _encode(content)


class ErrorResponder:
    """Converts errors to answers and counts them by code."""

    def __init__(self, page: ErrorPage | None = None) -> None:
        """Answer in JSON where `page`, which may draw a page for people, returns None."""
        self._page = page
        self._counts: Counter[str] = Counter()

    def count(self, error: ServiceError) -> None:
        """Count an error that is part of another answer."""
        self._counts[error.code] += 1

    def metric(self, name: str) -> Metric:
        """Return the number of errors so far by code."""
        family = CounterMetricFamily(name, "Errors answered, by code.", labels=["code"])
        for code, count in sorted(self._counts.items()):
            family.add_metric([code], count)
        return family

    def response(self, request: Request, error: ServiceError) -> Response:
        """Return the answer to a request that failed."""
        self.count(error)
        page = self._page(request, error) if self._page is not None else None
        return page or JsonResponse(error.answer(), error.status)

    async def on_error(self, request: Request, error: Exception) -> Response:
        """Answer an error of a handler or of the router (404, 405), or an unexpected exception.

        uvicorn logs the traceback of an unexpected exception.
        """
        if isinstance(error, ServiceError):
            return self.response(request, error)
        if not isinstance(error, HTTPException):
            message = "Internal error of the server; its log has the details."
            return self.response(request, ServiceError(500, "internal_error", message))
        code, message = {
            404: ("not_found", "There is nothing at this address; GET / lists the addresses."),
            405: ("method_not_allowed", f"{request.method} is not allowed; see the header Allow."),
        }.get(error.status_code, ("bad_request", "The request cannot be handled."))
        answer = self.response(request, ServiceError(error.status_code, code, message))
        answer.headers.update(error.headers or {})
        return answer


async def read_body(request: Request, limit: int) -> bytes:
    """Read the whole body of at most `limit` bytes, with or without an announced length.

    Raises:
        ServiceError: 413 if it is longer; 400 if the client disconnected.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                message = f"Send at most {limit} bytes in one request."
                raise ServiceError(413, "body_too_large", message)
    except ClientDisconnect:
        raise ServiceError(400, "disconnected", "The client closed the connection.") from None
    return bytes(body)


def message_decoder(kind: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes and validates JSON of one type with msgspec.

    A type may also be a union of structs without a tag: an object is decoded as the first one of
    which it has a field that the others lack. Lone surrogates, which JSON can escape and no
    encoding can represent, become U+FFFD. The function raises `ServiceError` 422 with the field.
    """
    members = union_members(kind)
    choices = [msgspec.json.Decoder(member).decode for member in members]
    if len(choices) == 1:
        return lambda body: _repaired(choices[0], body)
    everywhere = Counter(name for member in members for name in member.__struct_fields__)
    choice_of = {
        name: choice
        for member, choice in zip(members, choices, strict=True)
        for name in member.__struct_fields__
        if everywhere[name] == 1
    }
    known = " or ".join(
        " and ".join(repr(field.name) for field in msgspec.structs.fields(member) if field.required)
        for member in members
    )
    keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

    def decode(body: bytes) -> Any:
        given = _repaired(keys, body)
        for name, choice in choice_of.items():
            if name in given:
                return _repaired(choice, body)
        raise _invalid(f"Send an object with {known}")

    return decode


def union_members(kind: Any) -> tuple[Any, ...]:
    """Return the structs of a union of structs, else the type itself."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    is_structs = bool(members) and all(isinstance(m, type(msgspec.Struct)) for m in members)
    return members if is_structs else (kind,)


def _repaired(decode: Callable[[bytes], Any], body: bytes) -> Any:
    """Decode; bodies with lone surrogates, which are rare, are decoded twice."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        repaired = _ESCAPE.sub(lambda found: found[1] or found[2] or rb"\ufffd", bytes(body))
        if repaired == body:
            raise _invalid(f"The body must be JSON in UTF-8: {error}") from None
        return _repaired(decode, repaired)


def _invalid(reason: str) -> ServiceError:
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}.."
    return ServiceError(422, "invalid_body", f"{reason}. GET /openapi.json has the types.")


class Metrics(Collector):
    """The metrics of one application and its process, in a separate registry."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Take a function that returns the current metrics."""
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        return self._read()

    def response(self) -> Response:
        """Return all metrics in the text format of Prometheus."""
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")


def program_version() -> str:
    """Return the version of this package, or `unknown` if it is not installed."""
    try:
        return metadata.version("atod-gym")
    except metadata.PackageNotFoundError:
        return "unknown"
