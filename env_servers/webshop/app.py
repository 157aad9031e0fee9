"""The shop over HTTP: the JSON API for agents. `web.py` adds the pages for people."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from env_servers.service import (
    ErrorResponder,
    JsonResponse,
    Metric,
    ServiceError,
    build_application,
    counter,
    metrics_response,
    program_version,
    read_json,
    well_formed,
)
from env_servers.webshop.sessions import SessionState, SessionStore, StepResult
from env_servers.webshop.web import ShopPages, error_page

MOST_IN_BATCH = 1024
_MOST_SEED = 2**63 - 1

Fields = dict[str, Any]


def create_app(store: SessionStore, *, max_body: int, token: str | None = None) -> Starlette:
    """The application: JSON API and web pages over the same sessions.

    Args:
        store: the sessions, and with them the shop.
        max_body: bytes that a request may have.
        token: if given, every request must carry it.
    """
    errors = ErrorResponder(error_page)
    api = ShopApi(store, errors, max_body)
    pages = ShopPages(store, max_body)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        expiry = asyncio.create_task(_expire_idle(store))
        yield
        expiry.cancel()

    return build_application(
        [*api.routes(), *pages.routes()], errors=errors, token=token, lifespan=lifespan
    )


async def _expire_idle(store: SessionStore) -> None:
    """Frees idle sessions also while nobody calls; sleeps until the next one can be due."""
    while True:
        await asyncio.sleep(max(0.05, store.expire()))


class ShopApi:
    """The handlers of the JSON API. A step takes less time than handing it to a thread would."""

    def __init__(self, store: SessionStore, errors: ErrorResponder, max_body: int) -> None:
        self._store = store
        self._errors = errors
        self._max_body = max_body
        self._task_lists: dict[str, bytes] = {}

    def routes(self) -> list[Route]:
        """The addresses of the API."""
        return [
            Route("/sessions/{session_id}/step", self.step, methods=["POST"]),
            Route("/batch/step", self.batch_step, methods=["POST"]),
            Route("/sessions", self.create, methods=["POST"]),
            Route("/sessions/{session_id}", self.close, methods=["DELETE"]),
            Route("/batch/create", self.batch_create, methods=["POST"]),
            Route("/batch/close", self.batch_close, methods=["POST"]),
            Route("/tasks/{split}", self.tasks, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        """GET /health: that the server is up, and what it serves."""
        shop = self._store.shop
        return JsonResponse(
            {
                "status": "ok",
                "service": "webshop",
                "version": program_version(),
                "data": shop.label,
                "products": len(shop.catalogue),
                "goals": len(shop.goals),
                "splits": {split: len(shop.split_range(split)) for split in shop.splits},
                "split_rule": shop.settings.splits,
                "goal_seed": shop.settings.goal_seed,
                "text_style": shop.settings.text_style,
                "human_goals": shop.settings.human_goals,
                "noun_tagger": shop.noun_tagger,
                "sessions": self._store.figures().live,
                "capacity": self._store.capacity,
                "pid": os.getpid(),
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: counters in the Prometheus text format."""
        figures = self._store.figures()

        return metrics_response(
            [
                Metric("webshop_sessions", "gauge", "Live sessions.", (("", figures.live),)),
                counter("webshop_sessions_created_total", "Sessions created.", figures.created),
                counter("webshop_sessions_closed_total", "Sessions closed.", figures.closed),
                counter("webshop_sessions_expired_total", "Sessions expired.", figures.expired),
                counter("webshop_steps_total", "Steps played.", figures.steps),
                counter("webshop_step_seconds_total", "Seconds of steps.", figures.step_seconds),
                self._errors.metric("webshop_errors_total"),
            ]
        )

    async def tasks(self, request: Request) -> Response:
        """GET /tasks/{split}: the manifest of a split."""
        split = request.path_params["split"]
        if split not in self._task_lists:
            self._store.split_range(split)
            shop = self._store.shop
            manifest = shop.manifest(split)
            answer = JsonResponse(
                {
                    "name": manifest.name,
                    "split": manifest.split,
                    "task_ids": manifest.task_ids,
                    "task_types": [shop.goal(task).task_type for task in manifest.task_ids],
                    "content_hash": manifest.content_hash,
                }
            )
            self._task_lists[split] = bytes(answer.body)
        return Response(self._task_lists[split], media_type=JsonResponse.media_type)

    async def create(self, request: Request) -> Response:
        """POST /sessions."""
        return JsonResponse(self._create(await read_json(request, self._max_body)), 201)

    async def step(self, request: Request) -> Response:
        """POST /sessions/{session_id}/step."""
        body = _fields(await read_json(request, self._max_body), ("turn_index", "action"))
        return JsonResponse(self._step(request.path_params["session_id"], body))

    async def close(self, request: Request) -> Response:
        """DELETE /sessions/{session_id}."""
        self._store.close(request.path_params["session_id"])
        return JsonResponse({"closed": True})

    async def batch_create(self, request: Request) -> Response:
        """POST /batch/create."""
        return await self._batch(request, "sessions", self._create)

    async def batch_step(self, request: Request) -> Response:
        """POST /batch/step."""

        def step(item: object) -> Fields:
            fields = _fields(item, ("session_id", "turn_index", "action"))
            return self._step(_text(fields, "session_id"), fields)

        return await self._batch(request, "steps", step)

    async def batch_close(self, request: Request) -> Response:
        """POST /batch/close."""

        def close(item: object) -> Fields:
            self._store.close(_text({"session_ids": item}, "session_ids"))
            return {"closed": True}

        return await self._batch(request, "session_ids", close)

    async def _batch(
        self, request: Request, name: str, answer: Callable[[object], Fields]
    ) -> Response:
        """Answers every item of a list, in order; an item's error does not stop the others."""
        items = _fields(await read_json(request, self._max_body), (name,))[name]
        if not isinstance(items, list):
            raise _invalid(f"{name!r} must be a list.")
        if len(items) > MOST_IN_BATCH:
            raise _invalid(f"{name!r} may have at most {MOST_IN_BATCH} entries.")
        results: list[Fields] = []
        for item in items:
            try:
                results.append(answer(item))
            except ServiceError as error:
                self._errors.count(error)
                results.append(error.body(with_status=True))
        return JsonResponse({"results": results})

    def _create(self, body: object) -> Fields:
        if isinstance(body, dict) and "task_id" in body:
            task_id = _text(_fields(body, ("task_id",)), "task_id")
            return _state_json(self._store.create(task_id))
        fields = _fields(body, ("split", "seed"))
        seed = _whole_number(fields, "seed")
        return _state_json(self._store.create_in_split(_text(fields, "split"), seed))

    def _step(self, session_id: str, fields: Fields) -> Fields:
        turn_index = _whole_number(fields, "turn_index")
        action = _text(fields, "action")
        return self._result_json(self._store.step(session_id, turn_index, action))

    def _result_json(self, result: StepResult) -> Fields:
        outcome = result.outcome
        details: Fields | None = None
        if outcome.details is not None:
            details = dataclasses.asdict(outcome.details)
            details["noun_tagger"] = self._store.shop.noun_tagger
        return {
            "session_id": result.session_id,
            "turn_index": result.turn_index,
            "text": outcome.page.text,
            "page_kind": outcome.page.kind,
            "clickables": outcome.page.clickables,
            "has_search_bar": outcome.page.has_search_bar,
            "is_action_valid": outcome.executed,
            "message": outcome.message,
            "over": outcome.over,
            "score": outcome.score,
            "details": details,
        }


def _state_json(state: SessionState) -> Fields:
    return {
        "session_id": state.session_id,
        "task_id": state.task_id,
        "task_type": state.task_type,
        "turn_index": state.turn_index,
        "instruction": state.page.instruction,
        "text": state.page.text,
        "page_kind": state.page.kind,
        "clickables": state.page.clickables,
        "has_search_bar": state.page.has_search_bar,
        "over": state.over,
        "score": state.score,
    }


def _fields(body: object, names: tuple[str, ...]) -> Fields:
    """The body as an object that has exactly these fields."""
    if not isinstance(body, dict) or body.keys() != set(names):
        raise _invalid(f"Send a JSON object with exactly: {', '.join(names)}.")
    return body


def _text(fields: Fields, name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _invalid(f"{name!r} must be a string.")
    return well_formed(value)


def _whole_number(fields: Fields, name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_SEED:
        raise _invalid(f"{name!r} must be a whole number from 0 to {_MOST_SEED}.")
    return value


def _invalid(message: str) -> ServiceError:
    return ServiceError(422, "invalid_body", message)
