"""The shop over HTTP: the JSON API for agents. `web.py` adds the pages for people."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Annotated, Any

import msgspec
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from env_servers.endpoints import About, Batch, Endpoint, build_application
from env_servers.service import (
    ErrorAnswer,
    ErrorResponder,
    JsonResponse,
    ServiceError,
    counter,
    gauge,
    program_version,
)
from env_servers.text import well_formed
from env_servers.webshop.pages import PageKind
from env_servers.webshop.reward import RewardDetails
from env_servers.webshop.sessions import SessionStore
from env_servers.webshop.splits import Manifest
from env_servers.webshop.web import PREFIX, ShopPages, error_page

MOST_IN_BATCH = 1024
_BATCH_SECONDS = 0.01
"""A longer batch lets other requests in between; 1,024 long searches take seconds."""
_ABOUT = About(
    "webshop",
    "The shop of the WebShop benchmark: sessions in which an agent searches, chooses and buys. The"
    " same shop is available as web pages.",
    links=((PREFIX, "Open the shop"),),
)
_WholeNumber = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class CreateForTask(msgspec.Struct, forbid_unknown_fields=True):
    """Start a session for one task."""

    task_id: str


class CreateInSplit(msgspec.Struct, forbid_unknown_fields=True):
    """Start a session for the task of a split that the seed determines."""

    split: str
    seed: _WholeNumber


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """Play one action."""

    turn_index: _WholeNumber
    """Number of steps so far; a repeated step has its old index and gets the same answer."""
    action: str


class SessionStep(Step):
    """Play one action in a session, as an entry of a batch."""

    session_id: str


class _PageAnswer(msgspec.Struct, kw_only=True):
    session_id: str
    turn_index: int
    """Number of steps so far, including this one."""
    text: str
    page_kind: PageKind
    clickables: tuple[str, ...]
    has_search_bar: bool
    over: bool
    score: float


class SessionAnswer(_PageAnswer, kw_only=True):
    """A new session on its first page."""

    task_id: str
    task_type: str
    instruction: str


class StepAnswer(_PageAnswer, kw_only=True):
    """The effect of one action."""

    is_action_valid: bool
    message: str
    """Why the action had no effect, or a hint; else empty."""
    details: RewardDetails | None
    """The parts of the reward if this action was a purchase."""


class Closed(msgspec.Struct):
    """A closed session."""

    closed: bool = True


class Health(msgspec.Struct):
    """The state of the server, and the shop that it serves."""

    status: str
    service: str
    version: str
    data: str
    """`generated`; `official` if the content is the published one; else the path."""
    content_hash: str
    """SHA-256 of everything that is played."""
    folder: str | None
    """Folder of the data, as an absolute path; null for the generated shop."""
    products: int
    goals: int
    splits: dict[str, int]
    split_rule: str
    goal_seed: int
    text_style: str
    human_goals: bool
    noun_tagger: str
    sessions: int
    capacity: int
    pid: int


_Create = CreateForTask | CreateInSplit


def create_app(
    store: SessionStore,
    *,
    max_body: int,
    token: str | None = None,
    allowed_hosts: Collection[str] = (),
    max_turns: int = 15,
) -> Starlette:
    """Make the application: JSON API and web pages over the same sessions.

    `max_turns` is the limit of an agent's episode; the pages for people show it. For the other
    arguments see `build_application`.
    """
    errors = ErrorResponder(error_page)
    api = ShopApi(store, errors)

    async def expire_idle() -> None:
        """Close idle sessions even without requests; sleep until the next one can be due."""
        while True:
            await asyncio.sleep(max(0.05, store.expire()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        expiry = asyncio.create_task(expire_idle())
        yield
        expiry.cancel()

    return build_application(
        _ABOUT,
        api.endpoints(),
        health=api.health,
        errors=errors,
        metrics=api.metrics,
        max_body=max_body,
        token=token,
        allowed_hosts=allowed_hosts,
        pages=ShopPages(store, max_body, max_turns).routes(),
        lifespan=lifespan,
    )


class ShopApi:
    """The handlers of the JSON API. A step takes less time than moving it to a thread would."""

    def __init__(self, store: SessionStore, errors: ErrorResponder) -> None:
        self._store, self._errors = store, errors
        self._task_lists: dict[str, asyncio.Future[bytes]] = {}

    def endpoints(self) -> list[Endpoint]:
        """Return the table of the API."""
        return [
            Endpoint(
                "POST", "/sessions/{session_id}/step", self._answer_step,
                "Play one action in a session.", StepAnswer, Step, errors=(404, 409),
            ),
            Endpoint(
                "POST", "/batch/step", self._for_each(self._step),
                "Play one action in each of many sessions.",
                Batch("results", StepAnswer | ErrorAnswer),
                Batch("steps", SessionStep, MOST_IN_BATCH),
            ),
            Endpoint(
                "POST", "/sessions", self._answer_create, "Start a session for a task.",
                SessionAnswer, _Create, 201, errors=(404, 503),
            ),
            Endpoint(
                "DELETE", "/sessions/{session_id}", self._answer_close, "End a session.",
                Closed, errors=(404,),
            ),
            Endpoint(
                "POST", "/batch/create", self._for_each(self._create), "Start many sessions.",
                Batch("results", SessionAnswer | ErrorAnswer),
                Batch("sessions", _Create, MOST_IN_BATCH),
            ),
            Endpoint(
                "POST", "/batch/close", self._for_each(self._close), "End many sessions.",
                Batch("results", Closed | ErrorAnswer), Batch("session_ids", str, MOST_IN_BATCH),
            ),
            Endpoint(
                "GET", "/tasks/{split}", self._answer_tasks, "List the tasks of a split.",
                Manifest, errors=(404,),
            ),
        ]  # fmt: skip

    def metrics(self) -> list[Metric]:
        """Return the current metrics of the sessions."""
        store = self._store
        return [
            gauge("webshop_sessions", "Live sessions.", store.live()),
            counter("webshop_sessions_created_total", "Sessions created.", store.created),
            counter("webshop_sessions_closed_total", "Sessions closed.", store.closed),
            counter("webshop_sessions_expired_total", "Sessions expired.", store.expired),
            counter("webshop_steps_total", "Steps played.", store.steps),
            counter("webshop_step_seconds_total", "Seconds of steps.", store.step_seconds),
        ]

    def health(self) -> Health:
        """Return the answer of `/health`."""
        shop = self._store.shop
        return Health(
            status="ok",
            service="webshop",
            version=program_version(),
            # Names of folders may not be UTF-8.
            data=well_formed(shop.label),
            content_hash=shop.content_hash,
            folder=None if shop.folder is None else well_formed(str(shop.folder.resolve())),
            products=len(shop.catalogue),
            goals=len(shop.goals),
            splits={split: len(places) for split, places in shop.splits.items()},
            split_rule=shop.settings.splits,
            goal_seed=shop.settings.goal_seed,
            text_style=shop.settings.text_style,
            human_goals=shop.settings.human_goals,
            noun_tagger=shop.tagger.name,
            sessions=self._store.live(),
            capacity=self._store.capacity,
            pid=os.getpid(),
        )

    async def _answer_tasks(self, request: Request) -> Response:
        """Answer with a list that may have millions of entries: encoded once, in a thread."""
        split = request.path_params["split"]
        self._store.split_range(split)
        if split not in self._task_lists:
            self._task_lists[split] = asyncio.ensure_future(
                asyncio.to_thread(
                    lambda: bytes(JsonResponse(self._store.shop.manifest(split)).body)
                )
            )
        encoded = await asyncio.shield(self._task_lists[split])
        return Response(encoded, media_type=JsonResponse.media_type)

    async def _answer_create(self, request: Request, body: _Create) -> SessionAnswer:
        return self._create(body)

    async def _answer_step(self, request: Request, body: Step) -> StepAnswer:
        session_id = request.path_params["session_id"]
        return self._step(SessionStep(body.turn_index, body.action, session_id))

    async def _answer_close(self, request: Request) -> Closed:
        return self._close(request.path_params["session_id"])

    def _for_each(self, answer: Callable[[Any], Any]) -> Callable[..., Awaitable[object]]:
        """Return a handler that answers every entry of a list, in order.

        An error in one entry does not affect the others.
        """

        async def answer_all(request: Request, entries: list[Any]) -> dict[str, list[Any]]:
            results: list[Any] = []
            begun = time.perf_counter()
            for entry in entries:
                if time.perf_counter() - begun > _BATCH_SECONDS:
                    await asyncio.sleep(0)
                    begun = time.perf_counter()
                try:
                    if isinstance(entry, ServiceError):
                        raise entry
                    results.append(answer(entry))
                except ServiceError as error:
                    self._errors.count(error)
                    results.append(error.answer(with_status=True))
            return {"results": results}

        return answer_all

    def _create(self, body: _Create) -> SessionAnswer:
        if isinstance(body, CreateForTask):
            session = self._store.create(body.task_id)
        else:
            session = self._store.create_in_split(body.split, body.seed)
        page = session.page
        return SessionAnswer(
            session_id=session.session_id,
            task_id=session.task_id,
            task_type=session.task_type,
            turn_index=session.turn_index,
            instruction=page.instruction,
            text=page.text,
            page_kind=page.kind,
            clickables=page.clickables,
            has_search_bar=page.has_search_bar,
            over=session.over,
            score=session.score,
        )

    def _step(self, step: SessionStep) -> StepAnswer:
        outcome = self._store.step(step.session_id, step.turn_index, step.action)
        page = outcome.page
        return StepAnswer(
            session_id=step.session_id,
            turn_index=step.turn_index + 1,
            text=page.text,
            page_kind=page.kind,
            clickables=page.clickables,
            has_search_bar=page.has_search_bar,
            is_action_valid=outcome.executed,
            message=outcome.message,
            over=outcome.over,
            score=outcome.score,
            details=outcome.details,
        )

    def _close(self, session_id: str) -> Closed:
        self._store.close(session_id)
        return Closed()
