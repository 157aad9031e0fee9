"""Define the JSON of the retrieval server: requests in common dialects, and answers.

An unknown field could change the result, so a request with one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from env_servers.retrieval.corpus import Corpus, Found, encoded_string
from env_servers.retrieval.settings import Limits


def request_type(limits: Limits) -> Any:
    """Return the type of requests within some limits: a union of two messages."""
    query: Any = Annotated[str, msgspec.Meta(max_length=limits.max_query)]
    queries: Any = Annotated[list[query], msgspec.Meta(max_length=limits.max_queries)]
    topk: Any = Annotated[int, msgspec.Meta(ge=0, le=limits.max_topk)]

    def message(name: str, text: str, field: str, kind: Any) -> Any:
        return msgspec.defstruct(
            name,
            [(field, kind), ("topk", topk | None, None), ("return_scores", bool | None, None)],
            namespace={"__doc__": f"Find passages for {text}."},
            forbid_unknown_fields=True,
        )

    one = message("RetrieveOne", "a query, or for a list of queries", "query", query | queries)
    return one | message("RetrieveMany", "a list of queries", "queries", queries)


def queries_of(request: Any) -> list[str]:
    """Return the queries of a request of either type."""
    found = request.queries if hasattr(request, "queries") else request.query
    return [found] if isinstance(found, str) else found


class Document(msgspec.Struct):
    """A passage."""

    id: str
    contents: str
    """The title in quotation marks, a line break, and the text."""


class ScoredDocument(msgspec.Struct):
    """A passage with its score: larger is better."""

    document: Document
    score: float


class Documents(msgspec.Struct):
    """For each query its passages, best first, without scores."""

    result: list[list[Document]]


class ScoredDocuments(msgspec.Struct):
    """For each query its passages, best first, with scores."""

    result: list[list[ScoredDocument]]


class Health(msgspec.Struct):
    """The content and the settings of the server."""

    status: str
    service: str
    version: str
    pid: int
    data: str
    """`generated`, or the path of the corpus."""
    corpus_hash: str
    passages: int
    left_out: dict[str, int]
    """Rows of the corpus file that are not used, by reason."""
    retriever: str
    max_topk: int
    settings: dict[str, Any]
    """The settings that the retriever's results depend on."""
    world_seed: int | None
    """Seed of the generated world; the next two fields also belong to it."""
    entities: int | None
    splits: tuple[str, ...]


class QuestionEntry(msgspec.Struct):
    """A question of the generated world."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    data_source: str
    """`one_hop`, `bridge` or `comparison`."""


class QuestionList(msgspec.Struct):
    """The questions of a split, sorted by id."""

    split: str
    questions: list[QuestionEntry]


def encode_found(corpus: Corpus, found: Sequence[Found], *, with_scores: bool) -> bytes:
    """Encode the passages for one query, with or without scores."""
    entries = [
        b'{"id":%s,"contents":%s}' % (encoded_string(passage_id), corpus.encoded_contents(row))
        for (row, _), passage_id in zip(found, corpus.ids([row for row, _ in found]), strict=True)
    ]
    if with_scores:
        entries = [
            b'{"document":%s,"score":%s}' % (entry, repr(float(score)).encode())
            for entry, (_, score) in zip(entries, found, strict=True)
        ]
    return b"[%s]" % b",".join(entries)
