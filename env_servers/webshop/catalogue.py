"""The catalogue: all products of a shop, in memory or in a file that is read where needed."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.columns import Columns
from env_servers.webshop.products import Instruction, Product, Record, Review, indexed_text

_CACHED_RECORDS = 2048


class Catalogue:
    """The products in file order; thread-safe."""

    def __init__(self, records: Sequence[Record], columns: Columns) -> None:
        self._records = records
        self.columns = columns

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Product:
        return self._records[row].product

    def __iter__(self) -> Iterator[Product]:
        return (record.product for record in self._records)

    def instruction(self, row: int) -> Instruction | None:
        """What a customer asks for who wants this product; None for most products."""
        return self._records[row].instruction

    def find(self, asin: str) -> Product | None:
        """The product with an asin; None if the shop does not have it."""
        row = self.columns.find(asin)
        return None if row is None else self._records[row].product

    def rows_in_category(self, category: str) -> tuple[int, ...]:
        """The products of a coarse category."""
        return _rows_with(category, self.columns.category_names, self.columns.categories)

    def rows_with_query(self, query: str) -> tuple[int, ...]:
        """The products that were found with this search, word for word."""
        return _rows_with(query, self.columns.query_names, self.columns.queries)

    def documents(self) -> Iterator[tuple[str, str]]:
        """(asin, text) of every product, for the search index."""
        return ((product.asin, indexed_text(product)) for product in self)


class StoredRecords(Sequence[Record]):
    """Records in a file of JSON lines that is mapped; the last ones used are kept."""

    def __init__(self, path: Path, starts: NDArray[np.int64]) -> None:
        """Opens the file.

        Args:
            path: lines of `record_line`.
            starts: [records + 1]: where each line starts, and the end of the file.
        """
        with path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = memoryview(starts)  # type: ignore[arg-type]
        self._read = lru_cache(_CACHED_RECORDS)(self._parse)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Record:  # type: ignore[override]
        return self._read(row)

    def __iter__(self) -> Iterator[Record]:
        # Past the cache, which a pass over everything would only empty.
        return map(self._parse, range(len(self)))

    def _parse(self, row: int) -> Record:
        line = self._lines[self._starts[row] : self._starts[row + 1]]
        return _from_values(json.loads(line))


def record_line(record: Record) -> bytes:
    """A record as one line, as `StoredRecords` reads it."""
    return value_line(_to_values(record))


def value_line(value: Any) -> bytes:
    """A JSON value as one line."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _to_values(record: Record) -> list[Any]:
    p, wish = record.product, record.instruction
    reviews = [[r.author, r.title, r.body, r.stars] for r in p.reviews]
    return [
        [p.asin, p.title, p.description, p.bullets, p.pricing, p.price_text, p.options,
         p.category, p.query, p.product_category, p.attributes, reviews, p.rating],
        None if wish is None else [wish.text, wish.attributes],
    ]  # fmt: skip


def _from_values(values: list[Any]) -> Record:
    (asin, title, description, bullets, pricing, price_text, options, category, query,
     product_category, attributes, reviews, rating), wish = values  # fmt: skip
    product = Product(
        asin=asin,
        title=title,
        description=description,
        bullets=tuple(bullets),
        pricing=tuple(pricing),
        price_text=price_text,
        options=tuple((name, tuple(choices)) for name, choices in options),
        category=category,
        query=query,
        product_category=product_category,
        attributes=tuple(attributes),
        reviews=tuple(Review(*review) for review in reviews),
        rating=rating,
    )
    return Record(product, None if wish is None else Instruction(wish[0], tuple(wish[1])))


def _rows_with(name: str, names: NDArray[np.str_], column: NDArray[np.int32]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.isin(column, np.flatnonzero(names == name))).tolist())
