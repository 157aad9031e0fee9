"""The files of a shop in the official format: where they lie and what they hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_servers.webshop.json_stream import read_array, read_object
from env_servers.webshop.products import Instruction, ShopDataError, parse_human_instruction

_ENDING = r"\.json(\.gz|\.xz)?$"
# The small set is preferred, as by the original.
_ITEM_FILES = (r"items_shuffle_1000", r"items_shuffle")
_ATTRIBUTE_FILES = (r"items_ins_v2_1000", r"items_ins_v2")
_HUMAN_FILES = (r"items_human_ins",)
_FORMAT = "1"
"""Raised when the stored catalogue changes, so that old ones are not opened."""


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files of one shop."""

    items: Path
    """The products: a JSON array of objects."""
    attributes: Path
    """asin -> attributes and synthetic instruction: a JSON object."""
    human: Path | None
    """asin -> list of human instructions: a JSON object."""

    @classmethod
    def find(cls, folder: str) -> DataFiles:
        """Looks for the files by their official names, `.json`, `.json.gz` or `.json.xz`.

        Raises:
            ShopDataError: if the folder or a file is not there.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ShopDataError(
                f"There is no folder {folder}. Give a folder with the official files "
                "items_shuffle_1000.json and items_ins_v2_1000.json (or items_shuffle.json and "
                'items_ins_v2.json), or use data="generated".'
            )
        try:
            names = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise ShopDataError(f"Cannot list {path}: {error.strerror or error}.") from error
        items = _first(path, names, _ITEM_FILES)
        small = "items_shuffle_1000" in items.name if items is not None else False
        attributes = _first(path, names, _ATTRIBUTE_FILES if small else _ATTRIBUTE_FILES[1:])
        if items is None or attributes is None:
            missing = "items_shuffle_1000" if items is None else "items_ins_v2"
            if small:
                missing = "items_ins_v2_1000"
            raise ShopDataError(
                f"{folder} has no {missing}.json (.gz and .xz are fine too). The original's "
                'setup.sh downloads it; data="generated" needs no files.'
            )
        return cls(items, attributes, _first(path, names, _HUMAN_FILES))

    def read_items(self) -> Iterator[Mapping[str, Any]]:
        """The entries of the product file.

        Raises:
            ShopDataError: if the file is broken or has another shape.
        """
        for place, item in enumerate(read_array(self.items)):
            if not isinstance(item, dict):
                raise ShopDataError(
                    f"{self.items}: entry {place} is not an object. The file must be a list of "
                    "products as in items_shuffle_1000.json."
                )
            yield item

    def read_attributes(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The entries of the attribute file by asin; errors as in `read_items`."""
        for asin, entry in read_object(self.attributes):
            if not isinstance(entry, dict):
                raise ShopDataError(
                    f"{self.attributes}: the entry of {asin!r} is not an object. The file must be "
                    "as items_ins_v2_1000.json."
                )
            yield asin, entry

    def read_human(self) -> dict[str, tuple[Instruction, ...]]:
        """The human instructions by asin.

        Raises:
            ShopDataError: if there is no such file, or it is broken.
        """
        if self.human is None:
            raise ShopDataError(
                f"{self.items.parent} has no items_human_ins.json, which human_goals=True needs. "
                "The original's setup.sh downloads it."
            )
        found = {}
        for asin, entries in read_object(self.human):
            try:
                found[asin] = tuple(parse_human_instruction(entry) for entry in entries)
            except (TypeError, AttributeError, ValueError) as error:
                raise ShopDataError(
                    f"{self.human}: the entry of {asin!r} is not as in the official file: {error}. "
                    "Download the file again."
                ) from error
        return found

    def cache_key(self) -> str:
        """Changes when a file of the catalogue is another one: by size and time of change."""
        stats = [path.stat() for path in (self.items, self.attributes)]
        text = ":".join([_FORMAT, *(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first(folder: Path, names: list[str], patterns: tuple[str, ...]) -> Path | None:
    for pattern in patterns:
        for name in names:
            if re.match(f"{pattern}.*{_ENDING}", name) and (folder / name).is_file():
                return folder / name
    return None
