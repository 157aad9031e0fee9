"""The catalogue: all products of a shop, in memory or in a file that is read on demand.

The fields of every product that prices, goals and category searches need are stored in columns.
They take about 100 bytes per product and can be mapped from files, so that a million products need
not be read to draw a million prices.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.products import Instruction, Product, Record

_CACHED_RECORDS = 2048
_MOST_COMBINATIONS = 2**62
_decode = msgspec.json.Decoder(Record).decode
_Arrays = TypeVar("_Arrays")


@dataclass(frozen=True, slots=True)
class Columns:
    """One row for each product, in file order."""

    asins: NDArray[np.str_]
    """[products]"""
    by_asin: NDArray[np.int32]
    """[products]: the rows sorted by asin."""
    low: NDArray[np.float64]
    """[products]: the price, or the lower end of its range, in dollars."""
    high: NDArray[np.float64]
    """[products]: the upper end; NaN where there is one price."""
    categories: NDArray[np.int32]
    """[products]: index into `category_names`."""
    queries: NDArray[np.int32]
    """[products]: index into `query_names`."""
    category_names: NDArray[np.str_]
    query_names: NDArray[np.str_]
    goal_rows: NDArray[np.int32]
    """[instructions]: the rows that have an instruction, ascending."""
    combinations: NDArray[np.int64]
    """[instructions]: number of ways to choose all options."""

    def find(self, asin: str) -> int | None:
        """Return the row of a product; None if the shop does not have it."""
        place = int(np.searchsorted(self.asins, asin, sorter=self.by_asin))
        if place == len(self.by_asin) or str(self.asins[self.by_asin[place]]) != asin:
            return None
        return int(self.by_asin[place])


def save_arrays(arrays: Any, folder: Path) -> None:
    """Write one file for each array of a dataclass into an existing folder."""
    for field in fields(arrays):
        np.save(folder / f"{field.name}.npy", getattr(arrays, field.name))


def open_arrays(kind: type[_Arrays], folder: Path) -> _Arrays:
    """Map the files of `save_arrays`; pages are read on use."""
    return kind(
        **{
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r")
            for field in fields(kind)  # type: ignore[arg-type]
        }
    )


class ColumnsBuilder:
    """Collects the columns product by product."""

    def __init__(self) -> None:
        self._asins: dict[str, None] = {}
        # Low and high price, category and query of each product; row and ways of each instruction.
        self._facts, self._goals = array("d"), array("q")
        # Texts are numbered in the order of their first use.
        self._categories: dict[str, int] = {}
        self._queries: dict[str, int] = {}

    def __contains__(self, asin: str) -> bool:
        return asin in self._asins

    def add(self, record: Record) -> None:
        """Add the next product, whose asin is new.

        Raises:
            ValueError: if its options have too many combinations to count.
        """
        product = record.product
        if record.instruction is not None:
            combinations = math.prod(len(values) for _, values in product.options)
            if combinations > _MOST_COMBINATIONS:
                raise ValueError("'customization_options' has too many combinations")
            self._goals.extend((len(self._asins), combinations))
        self._asins[product.asin] = None
        low, high = (*product.pricing, math.nan)[:2]
        category = self._categories.setdefault(product.category, len(self._categories))
        query = self._queries.setdefault(product.query, len(self._queries))
        self._facts.extend((low, high, category, query))

    def columns(self) -> Columns:
        """Return the columns of all products so far; the builder cannot be used afterwards."""
        asins = np.array(list(self._asins), dtype=np.str_)
        self._asins.clear()
        low, high, categories, queries = np.array(self._facts).reshape(-1, 4).T.copy()
        goal_rows, combinations = np.array(self._goals).reshape(-1, 2).T.copy()
        return Columns(
            asins=asins,
            by_asin=np.argsort(asins, kind="stable").astype(np.int32),
            low=low,
            high=high,
            categories=categories.astype(np.int32),
            queries=queries.astype(np.int32),
            category_names=np.array(list(self._categories), dtype=np.str_),
            query_names=np.array(list(self._queries), dtype=np.str_),
            goal_rows=goal_rows.astype(np.int32),
            combinations=combinations,
        )


class Catalogue:
    """The products in file order; thread-safe."""

    def __init__(self, records: Sequence[Record], columns: Columns) -> None:
        self._records = records
        self.columns = columns

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Product:
        return self._records[row].product

    def instruction(self, row: int) -> Instruction | None:
        """Return the customer's request for this product; None for most products."""
        return self._records[row].instruction

    def rows_in_category(self, category: str) -> tuple[int, ...]:
        """Return the products of a coarse category."""
        return _rows_with(category, self.columns.category_names, self.columns.categories)

    def rows_with_query(self, query: str) -> tuple[int, ...]:
        """Return the products with exactly this search query."""
        return _rows_with(query, self.columns.query_names, self.columns.queries)


class StoredRecords(Sequence[Record]):
    """Records in a mapped file of JSON lines; the last used ones are cached."""

    def __init__(self, path: Path, starts: NDArray[np.int64]) -> None:
        """Open a file of `stored_line`; `starts` are the offsets of its lines and its end."""
        with path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = memoryview(starts)  # type: ignore[arg-type]
        self._read = lru_cache(_CACHED_RECORDS)(self._parse)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Record:  # type: ignore[override]
        return self._read(row)

    def _parse(self, row: int) -> Record:
        return _decode(self._lines[self._starts[row] : self._starts[row + 1]])


def stored_line(value: Any) -> bytes:
    """Return a value as one line of JSON; content hashes are computed from such lines."""
    return msgspec.json.encode(value) + b"\n"


def _rows_with(name: str, names: NDArray[np.str_], column: NDArray[np.int32]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.isin(column, np.flatnonzero(names == name))).tolist())
