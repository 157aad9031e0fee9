"""What prices, goals and category searches need of every product, as arrays.

They take about 100 bytes for a product and can be mapped from files, so that a million products
need not be read to draw a million prices.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.webshop.products import Record

_MOST_COMBINATIONS = 2**62


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
    attribute_ends: NDArray[np.int64]
    """[instructions]: where the product's part of `attribute_ids` ends."""
    attribute_ids: NDArray[np.int32]
    """Numbers of the instructions' attributes, one product after the other."""

    def __len__(self) -> int:
        return len(self.low)

    def find(self, asin: str) -> int | None:
        """The row of a product; None if the shop does not have it."""
        place = int(np.searchsorted(self.asins, asin, sorter=self.by_asin))
        if place == len(self.by_asin) or str(self.asins[self.by_asin[place]]) != asin:
            return None
        return int(self.by_asin[place])

    def save(self, folder: Path) -> None:
        """Writes one file for each array into a folder that exists."""
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def open(cls, folder: Path) -> Columns:
        """Maps what `save` wrote; pages are read when they are used."""
        arrays: dict[str, Any] = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r")
            for field in fields(cls)
        }
        return cls(**arrays)


class ColumnsBuilder:
    """Collects the columns product by product."""

    def __init__(self) -> None:
        self._asins: dict[str, None] = {}
        self._low = array("d")
        self._high = array("d")
        self._categories, self._category_ids = array("i"), _Numbers()
        self._queries, self._query_ids = array("i"), _Numbers()
        self._goal_rows = array("i")
        self._combinations = array("q")
        self._attribute_ends = array("q")
        self._attributes, self._attribute_ids = array("i"), _Numbers()

    def __contains__(self, asin: str) -> bool:
        return asin in self._asins

    def add(self, record: Record) -> None:
        """Takes the next product, whose asin is new.

        Raises:
            ValueError: if its options can be chosen in more ways than can be counted.
        """
        product = record.product
        if record.instruction is not None:
            combinations = math.prod(len(values) for _, values in product.options)
            if combinations > _MOST_COMBINATIONS:
                raise ValueError("'customization_options' has too many combinations")
            self._goal_rows.append(len(self._asins))
            self._combinations.append(combinations)
            self._attributes.extend(map(self._attribute_ids.of, record.instruction.attributes))
            self._attribute_ends.append(len(self._attributes))
        self._asins[product.asin] = None
        self._low.append(product.pricing[0])
        self._high.append(product.pricing[1] if len(product.pricing) == 2 else math.nan)
        self._categories.append(self._category_ids.of(product.category))
        self._queries.append(self._query_ids.of(product.query))

    def columns(self) -> Columns:
        """The columns of all products so far; the builder is of no use afterwards."""
        asins = np.array(list(self._asins), dtype=np.str_)
        self._asins.clear()
        return Columns(
            asins=asins,
            by_asin=np.argsort(asins, kind="stable").astype(np.int32),
            low=np.array(self._low, np.float64),
            high=np.array(self._high, np.float64),
            categories=np.array(self._categories, np.int32),
            queries=np.array(self._queries, np.int32),
            category_names=self._category_ids.names(),
            query_names=self._query_ids.names(),
            goal_rows=np.array(self._goal_rows, np.int32),
            combinations=np.array(self._combinations, np.int64),
            attribute_ends=np.array(self._attribute_ends, np.int64),
            attribute_ids=np.array(self._attributes, np.int32),
        )


class _Numbers:
    """Numbers texts in the order of their first use."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self._known.setdefault(text, len(self._known))

    def names(self) -> NDArray[np.str_]:
        return np.array(list(self._known), dtype=np.str_)
