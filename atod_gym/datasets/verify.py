"""Check data against published hashes, the record of its download, and its content."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pooch
from tqdm import tqdm

from atod_gym.datasets import RECORD_FILE, DataFile, DataSet
from atod_gym.errors import AtodError, DataNotFoundError, DownloadError

BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error,
          EOFError, ValueError, RuntimeError, StopIteration)  # fmt: skip
"""Errors that a damaged file raises when it is unpacked or parsed."""

_PARSED_UP_TO = 1 << 30  # Bytes; of larger JSON only the first line, if it has lines, is parsed.

Finding = tuple[str, str, str]
"""Path in the folder; `ok`, `note`, `missing` or `wrong`; the details."""


def verify(data: DataSet, folder: Path) -> list[Finding]:
    """Compare a data set with its published hashes and with its first download."""
    record = read_record(folder).get(data.name, {})
    files = zip(data.files, data.places, strict=True)
    return [_verify(data, folder, file, name, record.get(name, {})) for file, name in files]


def _verify(data: DataSet, folder: Path, file: DataFile, name: str, known: Any) -> Finding:
    path = find(folder, name)
    if path is None:
        return name, "missing", "not found"
    # A packed or unpacked file differs from the downloaded one in hash and size.
    is_plain = path == folder / name
    expected = file if is_plain and not data.unpacks_to else DataFile(name, entries=file.entries)
    if is_plain and not expected.sha256:
        expected = dataclasses.replace(expected, sha256=known.get("sha256"))
    how = "SHA-256 as expected" if expected.sha256 else "no SHA-256 is known"
    try:
        if data.manifest_hashes:
            return name, "ok", check_games(data, path)
        return name, "ok", f"{check_file(expected, path)}, {how}"
    except DownloadError as error:
        return path.relative_to(folder).as_posix(), "wrong", str(error)


def verify_questions(data: Path) -> list[Finding]:
    """Report the rows that Search-QA reads from a path; raise DataNotFoundError if it has none."""
    from atod_gym.envs.search_qa.questions import describe_questions, list_files

    described = describe_questions(data)
    findings: list[Finding] = []
    for file in described:
        left_out = ", ".join(f"{count} ({reason})" for reason, count in file.left_out.items())
        read = f"{file.rows - sum(file.left_out.values())} of {file.rows} rows are read"
        kinds = {"questions": ("ok", read), "corpus": ("ok", "a corpus"), "ignored": ("note", "")}
        kind, text = kinds.get(file.kind, ("wrong", ""))
        text += f"; left out: {left_out}" * bool(left_out) + f"; {file.note}" * bool(file.note)
        name = file.path.relative_to(data if data.is_dir() else data.parent).as_posix()
        findings.append((name, kind, text.removeprefix("; ")))
    if all(kind != "ok" for _, kind, _ in findings):
        there = list_files(described, data)
        raise DataNotFoundError(f"No question files and no corpus in {data}. To verify a data set "
                                f"there, name it: atod-data verify NAME --in {data}."
                                f"{f' There: {there}.' if there else ''}")  # fmt: skip
    return findings


def check_file(file: DataFile, path: Path) -> str:
    """Return a description of a file; DownloadError: it is damaged or not the expected file."""
    try:
        size, count, kind = path.stat().st_size, None, "entries"
        with path.open("rb") as raw:
            page = web_page(raw.read(1 << 16))
        if page:
            raise DownloadError(f"it is {page}, not the expected file")
        if file.size not in (None, size):
            raise DownloadError(f"it has {size} bytes, not {file.size}")
        if file.sha256 and (found := pooch.file_hash(str(path))) != file.sha256:
            raise DownloadError(f"its SHA-256 is {found}, not {file.sha256}")
        if file.name.endswith(".zip"):
            count, kind = _check_members(path), "members"
        elif file.name.endswith(".jsonl"):
            count, kind = _count_lines(path), "rows"
        elif file.name.endswith(".json") and size <= _PARSED_UP_TO:
            with _open(path) as stream:
                count = len(json.load(stream))
    except (*BROKEN, OSError, TypeError) as error:
        raise DownloadError(f"it is damaged: {error!r}") from error
    if count is not None and file.entries not in (None, count):
        raise DownloadError(f"it has {count} {kind}, not {file.entries}")
    return f"{count} {kind}" if count is not None else tqdm.format_sizeof(size, "B")


def check_games(data: DataSet, root: Path) -> str:
    """Return the numbers of games; DownloadError: they are not the published ones byte for byte."""
    from atod_gym.envs.alfworld.games import scan_games

    counts, wrong = [], []
    for split, known in data.manifest_hashes.items():
        try:
            manifest = scan_games(root, split)
            counts.append(f"{len(manifest.task_ids)} {split}")
            if manifest.content_hash != known:
                wrong.append(f"{counts[-1]} games that differ from the published ones")
        except (AtodError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        raise DownloadError("; ".join(wrong))
    return f"{', '.join(counts)} games, identical to the published ones"


def web_page(beginning: bytes) -> str:
    """Describe a web page by the first bytes of a file; empty: it is not one."""
    page = re.match(rb"[\xef\xbb\xbf\s]*<(!doctype html|html)", beginning, re.IGNORECASE)
    title = re.search(rb"<title[^>]*>([^<]{1,100})", beginning, re.IGNORECASE)
    text = title[1].decode("utf-8", "replace").strip() if title else "without title"
    return f"a web page ({text})" if page else ""


def find(folder: Path, name: str) -> Path | None:
    """Return a folder or a file, as it is or packed as .gz or .xz; None: not found."""
    paths = [folder / f"{name}{suffix}" for suffix in ("", ".gz", ".xz")]
    return next((path for path in paths if path.exists()), None)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of downloads in a folder, see `RECORD_FILE`; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / RECORD_FILE).read_bytes()))
    return {}


def _check_members(path: Path) -> int:
    """Refuse an archive with a link or a member that would be written outside its folder."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name, is_link = member.filename, stat.S_ISLNK(member.external_attr >> 16)
            if is_link or re.search(r"^(/|\w:|$)|\\|(^|/)\.\.(/|$)", name):
                raise DownloadError(f"it is not safe to unpack: {name!r} is a link or leaves it")
        return len(archive.infolist())


def _count_lines(path: Path) -> int:
    count, is_large = 0, path.stat().st_size > _PARSED_UP_TO
    with _open(path) as stream:
        lines = tqdm(filter(bytes.strip, stream), path.name, leave=False, disable=None)
        for count, line in enumerate(lines, 1):
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                is_counted = is_large and count > 1
                if is_counted or json.loads(line).keys() & {"question", "contents", "text"}:
                    continue
            raise DownloadError(f"it is damaged: row {count} is not a question or passage in JSON")
    return count


def _open(path: Path) -> Any:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")
