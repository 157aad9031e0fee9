"""The attempts that bring a file over HTTP, each of which goes on where the last one stopped.

A beginning is only gone on with if the server says that the file is still the same (by entity tag
or date), or if the hash of the whole file is known and will tell.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atod_gym.download_pages import confirmed_url, is_page, title_of
from atod_gym.download_progress import Progress, human_bytes
from atod_gym.errors import DownloadError, InvalidSettingError
from atod_gym.part_files import Begun, discard, read_begun, size_of, write_begun

_CHUNK = 1 << 18
_LARGEST_PAGE = 1 << 20
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "atod-data"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Source:
    """A file to fetch, and what is known of it."""

    url: str
    """Of http or https, or the path of a file."""
    size: int | None = None
    """Bytes, exactly; None: not known."""
    sha256: str | None = None
    """In hexadecimal; None: not known."""
    takes_form: bool = False
    """Whether a page that comes instead may hold a form to send, as with Google Drive."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server, in seconds."""

    delays: tuple[float, ...] = (1, 2, 4, 8, 16)
    """Before each attempt after one that brought nothing new; then it is given up."""
    answer: float = 60
    """For a connection, and between two parts of an answer."""
    longest: float = 120
    """At most, if the server says how long to wait."""


PATIENCE = Patience()


class _InterruptedError(Exception):
    """An attempt that ended early; another may bring more."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows 308 as well, which Python 3.10 does not."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class HttpDownload:
    """The attempts that complete one .part file."""

    def __init__(self, source: Source, part: Path, progress: Progress, patience: Patience) -> None:
        if urlsplit(source.url).scheme not in ("http", "https"):
            raise InvalidSettingError(f"Cannot fetch {source.url}: only http and https work.")
        self._source = source
        self._part = part
        self._name = part.name.removesuffix(".part")
        self._progress = progress
        self._patience = patience
        self._address = source.url
        self._is_joined = False
        # Proxies come from the usual variables, such as https_proxy and no_proxy.
        self._opener = urllib.request.build_opener(_Redirects)

    def run(self) -> bool:
        """Completes the .part file; returns whether it was joined from several answers.

        Raises:
            DownloadError: if the file cannot be had.
            InvalidSettingError: if the URL has no meaning.
        """
        most, failures = size_of(self._part), 0
        while True:
            try:
                if self._attempt():
                    return self._is_joined
            except _InterruptedError as error:
                size = size_of(self._part)
                failures = 1 if size > most else failures + 1
                most = max(most, size)
                self._wait(failures, error)

    def _wait(self, failures: int, error: _InterruptedError) -> None:
        delays = self._patience.delays
        if failures > len(delays):
            kept = (
                "; what has come is kept, and the same command goes on"
                if size_of(self._part)
                else ""
            )
            raise DownloadError(
                f"Cannot fetch {self._source.url}: {error} (tried {failures} times){kept}."
            ) from error
        wait = min(max(delays[failures - 1], error.wait), self._patience.longest)
        self._progress.note(f"{self._name}: {error}; trying again in {wait:.0f} s")
        time.sleep(wait)

    def _attempt(self) -> bool:
        """Returns whether the file is complete; False: ask again at once."""
        begun = self._begun()
        offset = 0 if begun is None else size_of(self._part)
        headers = dict(_HEADERS)
        if begun is not None:
            if offset == begun.total:
                # Complete, but the process ended before it could say so.
                self._is_joined = True
                return True
            headers["Range"] = f"bytes={offset}-"
            # A known hash tells better: networks that spread files name the same file differently.
            if self._source.sha256 is None and begun.validator:
                headers["If-Range"] = begun.validator
        request = urllib.request.Request(self._address, headers=headers)
        with contextlib.closing(self._open(request)) as response:
            return self._take(response, begun, offset)

    def _begun(self) -> Begun | None:
        """What to go on with; None, and nothing is there, if the beginning cannot be used."""
        size = size_of(self._part)
        begun = read_begun(self._part)
        if begun is not None and size:
            is_same = begun.url == self._source.url and begun.validator is not None
            fits = begun.total is None or size <= begun.total
            if fits and (is_same or self._source.sha256 is not None):
                return begun
        discard(self._part)
        return None

    def _open(self, request: urllib.request.Request) -> Any:
        """An answer of whatever status; its type differs between success and error."""
        try:
            return self._opener.open(request, timeout=self._patience.answer)
        except urllib.error.HTTPError as answer:
            return answer
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DownloadError(
                    f"Cannot trust the server of {request.full_url}: {reason.verify_message}."
                ) from error
            if isinstance(error, http.client.InvalidURL):
                raise InvalidSettingError(f"Not a URL: {request.full_url!r}.") from error
            raise _InterruptedError(_words(reason)) from error

    def _take(self, response: Any, begun: Begun | None, offset: int) -> bool:
        status, headers = int(response.status), response.headers
        if status == 416 and begun is not None:
            if headers.get("Content-Range") == f"bytes */{offset}":
                self._is_joined = True
                return True
            # The file is shorter than what is here, or the server counts otherwise.
            discard(self._part)
            raise _InterruptedError("the server has no such part of the file; beginning anew")
        if status in _LATER:
            raise _InterruptedError(f"the server answers {status}", _retry_after(headers))
        if status not in (200, 206):
            raise DownloadError(
                f"Cannot fetch {self._source.url}: HTTP {status} {response.reason or ''}".rstrip()
                + ". If the file is elsewhere by now, name a copy with --mirror."
            )
        self._check_address(response.url)
        if headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise DownloadError(
                f"{self._source.url} comes packed as {headers['Content-Encoding']}, though it was "
                "asked for as it is."
            )
        beginning = self._chunk(response)
        if is_page(headers.get("Content-Type"), b"" if status == 206 else beginning):
            return self._read_page(response, beginning)
        length, total = _lengths(status, headers)
        if status == 206:
            self._check_continues(begun, offset, headers, total)
            self._is_joined = True
        elif begun is not None:
            self._progress.note(f"{self._name}: the server does not go on; beginning anew")
            offset = 0
        self._check_total(total, headers, length, offset)
        expected = self._source.size if total is None else total
        if offset == 0:
            discard(self._part)
        kept = begun if offset else None
        etag = headers.get("ETag", kept and kept.etag)
        date = headers.get("Last-Modified", kept and kept.last_modified)
        write_begun(self._part, Begun(self._source.url, etag, date, expected))
        self._store(response, beginning, offset, expected)
        return True

    def _check_address(self, url: str) -> None:
        if urlsplit(self._source.url).scheme == "https" != urlsplit(url).scheme:
            raise DownloadError(f"{self._source.url} leads to {url}, which is not encrypted.")

    def _check_continues(
        self, begun: Begun | None, offset: int, headers: Mapping[str, str], total: int | None
    ) -> None:
        """The answer must be the rest of the very file that was begun."""
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        is_rest = begun is not None and match is not None and int(match[1]) == offset
        if begun is not None and self._source.sha256 is None:
            is_rest = is_rest and headers.get("ETag", begun.etag) == begun.etag
            changed = headers.get("Last-Modified", begun.last_modified)
            is_rest = is_rest and changed == begun.last_modified
        if begun is not None and None not in (begun.total, total):
            is_rest = is_rest and begun.total == total
        if not is_rest:
            discard(self._part)
            raise _InterruptedError("the server has another file by now; beginning anew")

    def _check_total(
        self, total: int | None, headers: Mapping[str, str], length: int | None, offset: int
    ) -> None:
        source = self._source
        if source.size is not None and total not in (None, source.size):
            raise DownloadError(
                f"{source.url} should have {source.size} bytes, but the server says {total}."
            )
        is_chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        if total is None and not is_chunked and source.size is None and source.sha256 is None:
            raise DownloadError(
                f"The server of {source.url} does not say how long the file is, so nobody could "
                "tell whether all of it has come."
            )
        rest = length if length is not None else (total or 0) - offset
        free = shutil.disk_usage(self._part.parent).free
        if rest > free:
            raise DownloadError(
                f"No room for {self._name}: {human_bytes(rest)} are needed in "
                f"{self._part.parent}, {human_bytes(free)} are free."
            )

    def _store(self, response: Any, chunk: bytes, size: int, total: int | None) -> None:
        self._progress.begin(self._name, size, total)
        with self._part.open("ab") as file:
            while chunk:
                size += len(chunk)
                if total is not None and size > total:
                    break
                file.write(chunk)
                self._progress.advance(size)
                chunk = self._chunk(response)
        if total is not None and size > total:
            discard(self._part)
            raise DownloadError(f"{self._source.url} sends more than the {total} bytes it has.")
        if total is not None and size < total:
            raise _InterruptedError(f"the connection ended after {size} of {total} bytes")
        self._progress.end(size)

    def _chunk(self, response: Any) -> bytes:
        """What has come, without waiting until a chunk is full: a break then loses nothing."""
        try:
            chunk: bytes = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _InterruptedError(_words(error)) from error
        return chunk

    def _read_page(self, response: Any, beginning: bytes) -> bool:
        page = beginning
        while len(page) < _LARGEST_PAGE and (chunk := self._chunk(response)):
            page += chunk
        text = page.decode("utf-8", "replace")
        url = confirmed_url(text, response.url) if self._source.takes_form else None
        if url is not None and self._address == self._source.url:
            self._address = url
            return False
        quota = "quota" in text.lower() or "too many users" in text.lower()
        advice = "It was fetched too often today; try again tomorrow" if quota else "Try later"
        raise DownloadError(
            f"{self._source.url} is a web page ({title_of(text) or 'without title'}), not the "
            f"file. {advice}, or name a copy with --mirror."
        )


def _lengths(status: int, headers: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Bytes of the answer and of the whole file, as far as the server tells."""
    told = headers.get("Content-Length", "")
    length = int(told) if told.isascii() and told.isdigit() else None
    if status == 200:
        return length, length
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return length, int(match[3]) if match and match[3] != "*" else None


def _retry_after(headers: Mapping[str, str]) -> float:
    told = headers.get("Retry-After", "")
    if told.isascii() and told.isdigit():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _words(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "the server does not answer"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
