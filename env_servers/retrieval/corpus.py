r"""Hold passages ready to be sent, and define the interface of retrievers.

A passage is sent as `contents` = `"Title"\ntext`: clients take the first line as the title. A
passage without a title starts with `""`, because clients that strip the text would take the first
line of the text as its title.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from env_servers.search.storage import StringTable


class CorpusError(Exception):
    """A corpus that cannot be used; the message is one line with the remedy."""


class Passage(NamedTuple):
    """A row of a corpus."""

    id: str
    contents: str
    """The title in quotation marks, a line break, and the text."""


class Found(NamedTuple):
    """A passage in a result."""

    row: int
    """Its row in the corpus."""
    score: float
    """Larger is better."""


class Retriever(Protocol):
    """Finds passages; thread-safe."""

    name: str
    """`bm25`, `dense` or `hybrid`."""
    efficient_queries: int
    """Below this number of queries, searching them together costs less for each."""
    settings: Mapping[str, object]
    """The settings that results depend on, as JSON values."""

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """Return the best `topk` passages for each query, best first.

        Queries are any strings with a character other than spaces. The result for a query is
        independent of the others.
        """
        ...


class Corpus:
    """Passages by row; thread-safe.

    Args:
        ids: the passages' ids.
        encoded: their contents as JSON strings in UTF-8, so that answers need not encode them.
        content_hash: 64 hexadecimal digits that identify ids and contents, in order.
    """

    def __init__(self, ids: StringTable, encoded: StringTable, content_hash: str) -> None:
        self._ids = ids
        self._encoded = encoded
        self.hash = content_hash

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Return the ids of some rows."""
        return self._ids.texts(rows)

    def contents(self, rows: Sequence[int]) -> list[str]:
        """Return the contents of some rows."""
        return [json.loads(self._encoded[row]) for row in rows]

    def encoded_contents(self, row: int) -> bytes:
        """Return the contents of a row as a JSON string."""
        return self._encoded[row]


def encoded_string(text: str) -> bytes:
    """Encode a text as JSON in UTF-8; in ASCII if it has lone surrogates."""
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(text).encode()
