"""Download a data set: a file gets its final name when it is complete and checked.

Per missing file: `_fetch` (pooch repeats `_resume`), `check_file`, rename or `_unpack`, record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import filelock
import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from atod_gym.datasets import RECORD_FILE, DataFile, DataSet, verify
from atod_gym.errors import DownloadError
from atod_gym.tasks import expanded

DOWNLOADS = ".atod-downloads"
"""Folder of incomplete downloads, next to the data; a hyphen and the data set's name follow."""

# urllib3 retries requests without an answer, pooch those whose answer is cut off.
_RETRY = Retry(5, connect=2, backoff_factor=1, status_forcelist=(408, 429, 500, 502, 503, 504),
               raise_on_status=False, respect_retry_after_header=False)  # fmt: skip
_BROKEN_CONNECTIONS = 10
_TIMEOUT = (30.0, 60.0)  # Seconds for a connection, and between two parts of an answer.
_CHUNK = 1 << 16
_HUB = "https://huggingface.co"


def get(data: DataSet, folder: Path, *, mirror: str | None = None, force: bool = False,
        accept_other: bool = False) -> list[verify.Finding]:  # fmt: skip
    """Download missing files (`force`: all files) into a folder; return the findings of `verify`.

    Raises:
        DownloadError: if a file cannot be downloaded, or is not as published (see `accept_other`).
        OSError: if the folder cannot be written, or another process downloads into it.
    """
    downloads = folder / f"{DOWNLOADS}-{data.name}"
    found = [] if force else verify.verify(data, folder)
    for name, kind, text in found:
        if kind == "wrong" and not accept_other:
            raise DownloadError(f"{folder / name} is damaged or differs ({text}). Delete it, or "
                                "replace it with --force.")  # fmt: skip
    if found and all(kind != "missing" for _, kind, _ in found) and not downloads.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".atod-data.lock", timeout=0):
        for file, name in zip(data.files, data.places, strict=True):
            if force or not verify.find(folder, name):
                _get_file(data, file, folder, source_url(data, file, mirror), accept_other)
        shutil.rmtree(downloads, ignore_errors=True)
    return verify.verify(data, folder)


def source_url(data: DataSet, file: DataFile, mirror: str | None) -> str:
    """Return the URL or path of a file, which is `<data set>/<name>` in a mirror."""
    if not mirror:
        return file.url.replace(_HUB, os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB, 1)
    root = mirror.rstrip("/") if "://" in mirror else expanded(mirror).absolute()
    return f"{root}/{data.name}/{file.name}"


def _get_file(data: DataSet, file: DataFile, folder: Path, url: str, accept_other: bool) -> None:
    record = verify.read_record(folder)
    known = record.setdefault(data.name, {})
    # Where no hash is published, later downloads must equal the first one.
    sha256 = file.sha256 or known.get(file.name, {}).get("sha256")
    expected = DataFile(file.name) if accept_other else dataclasses.replace(file, sha256=sha256)
    path = folder / f"{DOWNLOADS}-{data.name}" / file.name
    target = folder / (data.unpacks_to or file.name)
    for one in (path, target):
        one.parent.mkdir(parents=True, exist_ok=True)
    _fetch(url, expected, path, (file.size or 0) + data.unpacked_size)
    try:
        content = verify.check_file(expected, path)
        found = expected.sha256 or pooch.file_hash(str(path))
        if data.unpacks_to:
            _unpack(data, path, target, accept_other)
        else:
            os.replace(path, target)
    except (DownloadError, *verify.BROKEN) as error:
        path.unlink()
        hint = "The download was deleted. --accept-other accepts any file that can be read."
        raise DownloadError(
            f"{url} is not the expected file: {str(error) or 'no JSON lines'}. {hint}"
        ) from error
    known[file.name] = {"sha256": found, "url": url}
    if target.is_file() and data.unpacks_to:
        known[target.name] = {"sha256": pooch.file_hash(str(target))}
    part = folder / f"{RECORD_FILE}.part"
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(part, folder / RECORD_FILE)
    how = "as expected" if found == sha256 else f"recorded; expected: {sha256 or 'unknown'}"
    print(f"  {file.name}: {content}, from {url}, SHA-256 {found} ({how})", flush=True)


def _fetch(url: str, file: DataFile, path: Path, size: int) -> None:
    """Download a file to `path`; an incomplete download stays in a .part file."""
    part, free = path.with_name(f"{path.name}.part"), shutil.disk_usage(path.parent).free
    size -= sum(one.stat().st_size for one in (path, part) if one.exists())
    if size > free:
        raise DownloadError(f"No space for {file.name}: {size:,} bytes needed, {free:,} free.")
    pooch.get_logger().setLevel("ERROR")
    store = pooch.Pooch(path.parent, "", {path.name: None}, {path.name: url}, _BROKEN_CONNECTIONS)
    try:
        store.fetch(path.name, downloader=lambda url, tmp, _: _resume(url, tmp, file, part))
    except requests.RequestException as error:
        hint = "The incomplete download is kept; the same command continues it."
        raise DownloadError(f"Cannot fetch {url}: connections broke too often. {hint}") from error


def _resume(url: str, output_file: str, file: DataFile, part: Path) -> None:
    """Download a file to `part`, continuing an earlier download, and rename it to `output_file`.

    It continues if the server reports that the file is unchanged (its entity tag or date, kept in
    `<part>.json`), or if the SHA-256 of the whole file is known.
    """
    if "://" not in url:
        try:
            shutil.copyfile(url, part)
        except FileNotFoundError as error:
            raise DownloadError(f"The mirror has no file {url}. Give another --mirror.") from error
        os.replace(part, output_file)  # The temporary file of pooch can be read by its owner only.
        return
    state, validator = part.with_name(f"{part.name}.json"), ""
    with contextlib.suppress(OSError, ValueError):
        validator = dict(json.loads(state.read_bytes())).get(url, "")
    offset = part.stat().st_size if (validator or file.sha256) and part.exists() else 0
    session, headers = requests.Session(), {"Accept-Encoding": "identity"}
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=_RETRY))
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": validator} if validator else {})
    hint = "Try again later (a quota lasts a day), or give a copy with --mirror."
    try:
        answer = session.get(url, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.RequestException as error:
        reason = str(getattr(error.args[0], "reason", error)).rpartition(": ")[2]
        raise DownloadError(f"Cannot fetch {url}: {reason}. {hint}") from error
    with session, answer:
        status, served = answer.status_code, answer.headers.get("Content-Range", "")
        tag = answer.headers.get("ETag", "W/")  # A weak tag does not identify the bytes.
        tag = answer.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
        is_other = not served.startswith(f"bytes {offset}-") or tag not in ("", validator or tag)
        if (status == 206 and is_other) or status == 416:
            part.unlink(missing_ok=True)
            raise requests.RequestException("the file on the server has changed")
        start = offset if status == 206 else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        chunks = answer.iter_content(_CHUNK)
        chunk = next(chunks, b"")
        wrong = "" if start else verify.web_page(chunk)
        if status not in (200, 206):
            wrong = f"not available: HTTP {status} {answer.reason or ''}"
        elif file.size and total not in (None, file.size):
            wrong = wrong or f"not the expected file: it has {total} bytes, not {file.size}"
        if wrong:
            raise DownloadError(f"{url} is {wrong}. {hint}")
        with part.open("ab" if start else "wb") as raw, tqdm.wrapattr(
            raw, "write", total, initial=start, desc=file.name, leave=False, disable=None
        ) as out:  # fmt: skip
            state.write_text(json.dumps({url: tag or validator}), encoding="utf-8")
            while chunk:
                out.write(chunk)
                chunk = next(chunks, b"")
    if total not in (None, part.stat().st_size):
        end = f"the answer ended after {part.stat().st_size} of {total} bytes"
        raise requests.ConnectionError(end)
    os.replace(part, output_file)


def _unpack(data: DataSet, path: Path, target: Path, accept_other: bool) -> None:
    """Unpack an archive next to itself, check the games, and give the result its final name."""
    aside = path.with_name("unpacked")
    source = aside / target.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(aside)
            if not (accept_other and source.is_dir()):
                verify.check_games(data, source)
        else:  # The published wiki-18.jsonl.gz contains a tar archive.
            with contextlib.ExitStack() as opened:
                lines: Any = opened.enter_context(gzip.open(path))
                if tarfile.is_tarfile(path):
                    tar = opened.enter_context(tarfile.open(path))
                    lines = tar.extractfile(next(one for one in tar if ".jsonl" in one.name))
                shutil.copyfileobj(lines, opened.enter_context(source.open("wb")), _CHUNK)
        if not target.is_dir():
            os.replace(source, target)
            return
        # An existing folder stays: its files are replaced one by one, each as a whole.
        for file in filter(Path.is_file, source.rglob("*")):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(aside)
