"""Open a catalogue with its search index: small ones in memory, large ones from a cache folder.

The full official catalogue is one JSON array of about 5 GB. It is read once, entry by entry, and
written to `webshop/<key>` in the cache folder (see `caches`) as lines, columns and an index, which
later starts map. The folder gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_servers.caches import cache_folder
from env_servers.new_folder import new_folder
from env_servers.search.bm25 import BM25Index
from env_servers.search.storage import SearchIndexError
from env_servers.text import well_formed
from env_servers.webshop.catalogue import (
    Catalogue,
    Columns,
    ColumnsBuilder,
    StoredRecords,
    open_arrays,
    save_arrays,
    stored_line,
)
from env_servers.webshop.files import DataFiles
from env_servers.webshop.products import Record, ShopDataError, indexed_text, parse_record

STORED_FROM = 16 << 20
"""Product files of more bytes than this are stored in the cache folder; the size of compressed
files counts sixfold."""
_COMPRESSION = 6
_LONGEST_ASIN = 10
_REPORT_EVERY = 100_000
_RECORDS, _STARTS, _INDEX, _HASHES = "records.jsonl", "starts.npy", "index", "hashes.json"

# `content_hash` of the shop of the published small set, of which 1,000 prices and 6,910 goals equal
# those recorded from the original.
_SMALL_SET = "f6ce098e227b4e02d48515bab23ee9a6b98bdcd81a00ce507239c7d8ae78f58b"
# SHA-256 of the published product and attribute files, as in atod_gym/datasets/catalogue.toml.
_PUBLISHED_FILES = {
    (  # items_shuffle_1000.json, items_ins_v2_1000.json
        "30a4765c3a327af72d9a9a95a6b2486d516f0fa1d3ecd83681901ce82a21b269",
        "f88a36314a397b53b3d9c3fa5878e5f7b26d35019a51ec83fbedeca61a948f6f",
    ),
    (  # items_shuffle.json, items_ins_v2.json
        "2ef591d65df3af89e972ab72468eb82cbf124d876552d9f3678667edd620a6c8",
        "1d36af476bdb8f82a5da62bd8acdabe54cd8de2fa84010d37da5c4890feb447e",
    ),
}

_LOG = logging.getLogger("env_servers")

Entry = Mapping[str, Any]
Find = Callable[[str], Entry | None]


@dataclass(frozen=True, slots=True)
class Stock:
    """A catalogue, its search index, and its location."""

    catalogue: Catalogue
    index: BM25Index
    content_hash: str
    """SHA-256 over all products with their attributes and instructions, as played."""
    file_hashes: tuple[str, ...]
    """SHA-256 of the product and the attribute file; empty for a generated shop."""
    folder: Path | None
    """Folder in the cache; None: in memory."""

    @property
    def is_published(self) -> bool:
        """Whether the catalogue is one that the authors of WebShop published."""
        return self.content_hash == _SMALL_SET or self.file_hashes in _PUBLISHED_FILES


def stock_in_memory(
    items: Iterable[Entry], find_entry: Find, source: str, files: tuple[str, ...] = ()
) -> Stock:
    """Make a small catalogue from entries of the product and the attribute file.

    Messages name the source. `files` are the hashes of the files.

    Raises:
        ShopDataError: if an entry differs from the official format or there is no product.
    """
    records: list[Record] = []
    index, columns, content_hash = _take_in(
        items, find_entry, source, lambda record, line: records.append(record)
    )
    return Stock(Catalogue(records, columns), index, content_hash, files, None)


def stock_from_files(files: DataFiles) -> Stock:
    """Open the catalogue of a folder; a large one is stored in the cache folder on first use.

    Raises:
        ShopDataError: if a file is damaged, or the cache folder cannot be written.
    """
    expansion = 1 if files.items.suffix == ".json" else _COMPRESSION
    if files.items.stat().st_size * expansion <= STORED_FROM:
        find_entry = dict(files.read_attributes()).get
        return stock_in_memory(files.read_items(), find_entry, str(files.items), files.hashes())
    folder = cache_folder() / "webshop" / files.cache_key()
    with stored_in(folder):
        with new_folder(folder) as partial:
            if partial is not None:
                _LOG.warning("First use of %s: storing its catalogue in %s.", files.items, folder)
                _store(files, partial)
        return _open_stored(folder)


@contextmanager
def stored_in(folder: Path) -> Iterator[None]:
    """Convert errors of stored files.

    Raises:
        ShopDataError: in place of errors from opening and reading files.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SearchIndexError) as error:
        raise ShopDataError(
            f"Cannot use {folder}, the folder of the stored catalogue: {error}. Delete this folder "
            "if it exists (it is made again). It needs about the size of the product file; "
            "$ATOD_CACHE sets another folder."
        ) from error


def _take_in(
    items: Iterable[Entry],
    find_entry: Find,
    source: str,
    keep: Callable[[Record, bytes], None],
    folder: Path | None = None,
) -> tuple[BM25Index, Columns, str]:
    """Read products in one pass; `keep` receives each with its line of JSON.

    Products without an asin, or with that of an earlier product, are left out as in the original.

    Returns:
        The index, which is built in `folder` if given; the columns; the content hash.
    """
    builder, content = ColumnsBuilder(), hashlib.sha256()

    def documents() -> Iterator[tuple[str, str]]:
        count = 0
        for place, item in enumerate(items):
            asin = item.get("asin")
            if not isinstance(asin, str) or not asin or "\0" in asin:
                raise ShopDataError(
                    f"{source}: entry {place} has no 'asin'. Download the file again."
                )
            # Two asins may differ in lone surrogates only, which products do not contain.
            if asin == "nan" or len(asin) > _LONGEST_ASIN or well_formed(asin) in builder:
                continue
            try:
                record = parse_record(item, find_entry(asin))
                builder.add(record)
            except (ValueError, AttributeError) as error:
                raise ShopDataError(
                    f"{source}: entry {place} ({asin}): {error}. Correct the entry (in this file "
                    "or the attribute file) or download the files again."
                ) from error
            count += 1
            line = stored_line(record)
            content.update(line)
            keep(record, line)
            yield record.product.asin, indexed_text(record.product)
        if not count:
            raise ShopDataError(f"{source} contains no product. Download the file again.")

    index = BM25Index.build(documents(), folder=folder)
    return index, builder.columns(), content.hexdigest()


def _store(files: DataFiles, folder: Path) -> None:
    """Fill a folder with the catalogue of a large product file: lines, index, columns, hashes."""
    starts = array("q", [0])
    with (
        _stored_entries(files, folder / "attributes.db") as find_entry,
        (folder / _RECORDS).open("wb") as file,
    ):

        def keep(record: Record, line: bytes) -> None:
            starts.append(starts[-1] + file.write(line))
            if len(starts) % _REPORT_EVERY == 1:
                _LOG.warning("%d products stored.", len(starts) - 1)

        _, columns, content_hash = _take_in(
            files.read_items(), find_entry, str(files.items), keep, folder / _INDEX
        )
    np.save(folder / _STARTS, np.array(starts))
    save_arrays(columns, folder)
    hashes = {"content": content_hash, "files": files.hashes()}
    (folder / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")


@contextmanager
def _stored_entries(files: DataFiles, path: Path) -> Iterator[Find]:
    """Store the entries of a large attribute file and return a function that finds them.

    The last of several entries of one asin counts, as in an object read at once.
    """
    # Imported here: shops in memory need no database.
    import sqlite3

    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE entries (asin TEXT PRIMARY KEY, entry) WITHOUT ROWID")
            # In ASCII, since texts may contain lone surrogates.
            rows = ((ascii(asin), json.dumps(entry)) for asin, entry in files.read_attributes())
            database.execute("BEGIN")
            database.executemany("REPLACE INTO entries VALUES (?, ?)", rows)
            database.execute("COMMIT")

            def find(asin: str) -> Entry | None:
                query = "SELECT entry FROM entries WHERE asin = ?"
                row = database.execute(query, (ascii(asin),)).fetchone()
                return None if row is None else json.loads(row[0])

            yield find
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
    path.unlink()


def _open_stored(folder: Path) -> Stock:
    starts = np.load(folder / _STARTS, mmap_mode="r")
    if starts[-1] != (folder / _RECORDS).stat().st_size:
        raise ValueError(f"{_RECORDS} is not complete")
    records = StoredRecords(folder / _RECORDS, starts)
    catalogue = Catalogue(records, open_arrays(Columns, folder))
    hashes = json.loads((folder / _HASHES).read_text(encoding="utf-8"))
    index = BM25Index.open(folder / _INDEX)
    return Stock(catalogue, index, hashes["content"], tuple(hashes["files"]), folder)
