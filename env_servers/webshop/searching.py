"""Search products: Lucene's ranking, and the original's special searches.

Source: `get_top_n_product_from_keywords` of the original's `web_agent_site/engine/engine.py`.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from env_servers.search.bm25 import BM25Index
from env_servers.webshop.catalogue import Catalogue

MOST_RESULTS = 50
LONGEST_SEARCH = 1000
"""Number of characters of a search that count. The time grows with the words: 10,000 characters
took up to 70 ms, during which no other session is served."""
_CACHED_SEARCHES = 4096


class SearchError(Exception):
    """An invalid special search; the message shows the right form."""


class Searcher:
    """Finds products; thread-safe. No cache stores texts longer than `LONGEST_SEARCH`."""

    def __init__(self, catalogue: Catalogue, index: BM25Index) -> None:
        """Take a catalogue and the index of its texts."""
        self._catalogue = catalogue
        self._index = index
        self._ranked = lru_cache(_CACHED_SEARCHES)(self._rank)
        self._in_category = lru_cache(16)(catalogue.rows_in_category)
        self._with_query = lru_cache(64)(catalogue.rows_with_query)

    def rows(self, keywords: str, name: str) -> tuple[int, ...]:
        """Return the products of a search, best first, as rows of the catalogue.

        Args:
            keywords: at most 50 products match them best; `LONGEST_SEARCH` characters count. `<c>
                name` finds all products of a coarse category, `<q> words` all with exactly this
                search query, `<r>` any 50.
            name: determines these 50.

        Raises:
            SearchError: for `<c>` alone and for `<a>`.
        """
        if len(keywords) > LONGEST_SEARCH:
            # Without the word that would be cut.
            keywords = (
                keywords[: LONGEST_SEARCH + 1].rpartition(" ")[0] or keywords[:LONGEST_SEARCH]
            )
        words = keywords.split(" ")
        if words[0] == "<r>":
            count = min(MOST_RESULTS, len(self._catalogue))
            seed = f"{name} {keywords}".encode("utf-8", "surrogatepass")
            return tuple(Random(seed).sample(range(len(self._catalogue)), count))
        if words[0] == "<c>":
            if len(words) == 1:
                raise SearchError("write search[<c> category].")
            return self._in_category(words[1].strip())
        if words[0] == "<q>":
            return self._with_query(" ".join(words[1:]).strip())
        if words[0] == "<a>":
            raise SearchError(
                "this shop cannot search for attributes with <a>; write search[keywords]."
            )
        return self._ranked(keywords)

    def _rank(self, keywords: str) -> tuple[int, ...]:
        return tuple([hit.row for hit in self._index.search(keywords, MOST_RESULTS)])
