"""Web pages that come where a file was expected: what they say, and the form that some ask to send.

Google Drive answers with a page when a file is too large for its virus scan (the page holds a form
whose answer is the file) or when a file was fetched too often on one day (no form helps then).
"""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urlencode, urljoin, urlsplit

_DRIVE_HOSTS = ("drive.google.com", "drive.usercontent.google.com", "docs.google.com")
_STARTS = (b"<!doctype html", b"<html")
_SHOWN = 100


def is_page(content_type: str | None, beginning: bytes) -> bool:
    """Whether an answer is HTML, by what the server calls it or by how it begins."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        return True
    return beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:20].lower().startswith(_STARTS)


def title_of(page: str) -> str:
    """What a page calls itself, shortened; empty if nothing."""
    return _parsed(page).title[:_SHOWN]


def confirmed_url(page: str, url: str) -> str | None:
    """The URL that sending the page's form would open; None if there is no such form.

    Only a form that leads to the page's own host, or from Google Drive to itself, is taken.

    Args:
        page: HTML.
        url: where the page came from.
    """
    form = _parsed(page)
    if form.action is None or "id" not in form.fields:
        return None
    target = urljoin(url, form.action)
    host, own = urlsplit(target).hostname, urlsplit(url).hostname
    same_scheme = urlsplit(target).scheme == urlsplit(url).scheme
    if not same_scheme or not (host == own or (host in _DRIVE_HOSTS and own in _DRIVE_HOSTS)):
        return None
    joint = "&" if urlsplit(target).query else "?"
    return f"{target}{joint}{urlencode(form.fields)}"


def _parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    parser.title = " ".join(parser.title.split())
    return parser


class _Page(HTMLParser):
    """Collects the title and the hidden fields of the first form."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "title":
            self._inside = tag
        elif tag == "form" and self.action is None:
            self.action, self._inside = values.get("action", ""), tag
        elif tag == "input" and self._inside == "form" and values.get("name"):
            self.fields[values["name"]] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.title += data
