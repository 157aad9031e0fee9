"""Serve retrieval over HTTP.

A search above a few milliseconds runs in a thread, in slices. Other requests are answered between
two slices of a long request.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection as Names
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from env_servers.endpoints import About, Endpoint, build_application
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.messages import (
    Documents,
    Health,
    QuestionEntry,
    QuestionList,
    ScoredDocuments,
    encode_found,
    queries_of,
    request_type,
)
from env_servers.retrieval.settings import Limits
from env_servers.retrieval.world import World
from env_servers.service import (
    ErrorResponder,
    JsonResponse,
    ServiceError,
    counter,
    program_version,
)
from env_servers.text import well_formed

QUICK_SECONDS = 0.002
"""Searches with a shorter expected time are not worth a thread."""
SLICE_SECONDS = 0.02
"""Expected time of a slice of a longer search."""
_MOST_THREADS = 4
_NEWEST_SHARE = 0.1

_ABOUT = About("retrieval", "Passages for the queries of search agents.")


def create_app(
    collection: Collection,
    limits: Limits,
    *,
    max_body: int = 1_000_000,
    token: str | None = None,
    allowed_hosts: Names[str] = (),
) -> Starlette:
    """Make the application over a collection; other arguments as in `build_application`."""
    api = RetrievalApi(collection, limits)
    return build_application(
        _ABOUT,
        api.endpoints(),
        health=api.health,
        errors=ErrorResponder(),
        metrics=api.metrics,
        max_body=max_body,
        token=token,
        allowed_hosts=allowed_hosts,
    )


class RetrievalApi:
    """The handlers. Quick searches run at once, others in threads."""

    def __init__(self, collection: Collection, limits: Limits) -> None:
        self._collection = collection
        self._limits = limits
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        self._requests = self._queries = 0
        self._search_seconds = 0.0
        # Unknown before the first search, which therefore runs in a thread.
        self._seconds_per_character = float("inf")

    def endpoints(self) -> list[Endpoint]:
        """Return the table of the API."""
        return [
            Endpoint(
                "POST", "/retrieve", self.retrieve, "Find passages for queries.",
                ScoredDocuments | Documents, request_type(self._limits),
            ),
            Endpoint(
                "GET", "/questions/{split}", self.questions,
                "List the questions of the generated world.", QuestionList, errors=(404,),
            ),
        ]  # fmt: skip

    async def retrieve(self, request: Request, body: Any) -> Response:
        """Answer POST /retrieve."""
        queries = queries_of(body)
        topk, with_scores = body.topk or self._limits.topk, bool(body.return_scores)
        lists: list[bytes] = []
        loop = asyncio.get_running_loop()
        while len(lists) < len(queries):
            if lists and await request.is_disconnected():
                raise ServiceError(400, "disconnected", "The client closed the connection.")
            part, is_quick = self._slice(queries, len(lists))
            if is_quick:
                found, seconds = self._found(part, topk, with_scores)
            else:
                found, seconds = await loop.run_in_executor(
                    self._threads, self._found, part, topk, with_scores
                )
            lists += found
            self._note(sum(map(len, part)), seconds)
        self._requests += 1
        self._queries += len(queries)
        answer = b'{"result":[%s]}' % b",".join(lists)
        return Response(answer, media_type=JsonResponse.media_type)

    def _slice(self, queries: Sequence[str], begin: int) -> tuple[Sequence[str], bool]:
        """Return the queries of the slice that begins here, and whether they are all and quick."""
        most = SLICE_SECONDS / self._seconds_per_character
        least = begin + self._collection.retriever.efficient_queries
        end, characters = begin, 0
        while end < len(queries) and (end < least or characters + len(queries[end]) <= most):
            characters += len(queries[end])
            end += 1
        expected = characters and characters * self._seconds_per_character
        return queries[begin:end], end - begin == len(queries) and expected <= QUICK_SECONDS

    def _found(
        self, queries: Sequence[str], topk: int, with_scores: bool
    ) -> tuple[list[bytes], float]:
        """Return the encoded passages for each query, and the seconds of the search."""
        begun = time.perf_counter()
        # BM25 finds nothing for a query without a word; encoders would.
        searched = [query for query in queries if query.strip()]
        answers = iter(self._collection.retriever.search_many(searched, topk) if searched else [])
        corpus = self._collection.corpus
        lists = [
            encode_found(corpus, next(answers) if query.strip() else (), with_scores=with_scores)
            for query in queries
        ]
        return lists, time.perf_counter() - begun

    def _note(self, characters: int, seconds: float) -> None:
        self._search_seconds += seconds
        if characters:
            pace = seconds / characters
            if self._seconds_per_character < float("inf"):
                pace = _NEWEST_SHARE * pace + (1 - _NEWEST_SHARE) * self._seconds_per_character
            self._seconds_per_character = max(pace, 1e-12)

    def health(self) -> Health:
        """Return the answer of `/health`."""
        collection = self._collection
        world = collection.world
        return Health(
            status="ok",
            service="retrieval",
            version=program_version(),
            pid=os.getpid(),
            data=well_formed(collection.label),
            corpus_hash=collection.corpus.hash,
            passages=len(collection.corpus),
            left_out=dict(collection.left_out.counts),
            retriever=collection.retriever.name,
            max_topk=self._limits.max_topk,
            settings=dict(collection.retriever.settings),
            world_seed=None if world is None else collection.settings.world_seed,
            entities=None if world is None else collection.settings.entities,
            splits=collection.splits,
        )

    async def questions(self, request: Request) -> Response:
        """Answer GET /questions/{split}."""
        split = request.path_params["split"]
        world = self._collection.world
        if world is None or split not in self._collection.splits:
            raise ServiceError(
                404,
                "no_questions",
                "Only the generated world has questions, in the splits that /health lists.",
            )
        # In a large world this takes seconds.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _question_list, world, split)

    def metrics(self) -> list[Metric]:
        """Return the current metrics of the searches."""
        return [
            counter("retrieval_requests_total", "Answered searches.", self._requests),
            counter("retrieval_queries_total", "Queries of answered searches.", self._queries),
            counter("retrieval_search_seconds_total", "Seconds of searches.", self._search_seconds),
        ]


def _question_list(world: World, split: str) -> Response:
    questions = [
        QuestionEntry(question.id, question.question, question.golden_answers, question.kind)
        for question in world.questions(split)
    ]
    return JsonResponse(QuestionList(split, questions))
