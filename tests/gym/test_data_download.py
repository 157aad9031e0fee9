from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_files import PAGE, FaultyFiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atod_gym import download_http
from atod_gym.data_archives import check_zip
from atod_gym.download import fetch
from atod_gym.download_http import Patience, Source
from atod_gym.download_pages import confirmed_url, is_page
from atod_gym.errors import AtodError, DownloadError, InvalidSettingError
from atod_gym.part_files import Begun, part_of, write_begun

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HASTY = Patience(delays=(0, 0, 0), answer=5, longest=0)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[FaultyFiles]:
    server = FaultyFiles()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: FaultyFiles, monkeypatch: pytest.MonkeyPatch) -> FaultyFiles:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shared_server.reset()
    shared_server.files["file"] = CONTENT
    return shared_server


def get(server: FaultyFiles, target: Path, **known: Any) -> None:
    patience = known.pop("patience", HASTY)
    check = known.pop("check", None)
    path = known.pop("path", "file")
    fetch(Source(f"{server.url}/{path}", **known), target, patience=patience, check=check)


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_a_file_comes_whole_and_leaves_nothing_else(server: FaultyFiles, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.bin"
    source = Source(f"{server.url}/file", len(CONTENT), SHA256)
    fetched = fetch(source, target, patience=HASTY)
    assert (fetched.size, fetched.sha256) == (len(CONTENT), SHA256)
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == []
    assert server.requests == [("file", None)]


def test_an_empty_file_is_a_file(server: FaultyFiles, tmp_path: Path) -> None:
    server.files["file"] = b""
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""
    assert leftovers(tmp_path / "file") == []


@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_a_dropped_connection_goes_on_where_it_stopped(
    server: FaultyFiles, tmp_path: Path, kind: str
) -> None:
    # Each attempt brings something new, so many more are made than there are delays.
    server.faults.extend([("drop", 9000)] * 9 + [(kind, 9000)])
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    ranges = [asked for _, asked in server.requests]
    assert ranges[:3] == [None, "bytes=9000-", "bytes=18000-"]
    if kind == "drop":
        assert server.sent == len(CONTENT)


def test_a_server_that_never_brings_anything_new_is_given_up(
    server: FaultyFiles, tmp_path: Path
) -> None:
    server.faults.extend([("drop", 500)] + [("drop", 0)] * 20)
    target = tmp_path / "file"
    target.write_bytes(b"before")
    with pytest.raises(DownloadError, match=r"tried 4 times.*goes on") as caught:
        get(server, target)
    assert "ended after 500 of 102400 bytes" in str(caught.value)
    assert target.read_bytes() == b"before"
    assert part_of(target).stat().st_size == 500
    assert len(server.requests) == 4
    server.faults.clear()
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("file", "bytes=500-")


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(
    server: FaultyFiles, tmp_path: Path
) -> None:
    server.faults.extend([("drop", 70_000), "no range"])
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [None, "known"])
def test_a_file_that_changes_in_between_is_never_joined(
    server: FaultyFiles, tmp_path: Path, sha256: str | None
) -> None:
    server.faults.extend([("drop", 70_000), "new version"])
    new = bytes(byte ^ 2 for byte in CONTENT)
    known = hashlib.sha256(new).hexdigest() if sha256 else None
    get(server, tmp_path / "file", sha256=known)
    assert (tmp_path / "file").read_bytes() == new


def test_without_tag_and_date_only_a_known_hash_allows_to_go_on(
    server: FaultyFiles, tmp_path: Path
) -> None:
    server.has_etag = server.has_date = False
    server.faults.append(("drop", 60_000))
    get(server, tmp_path / "first")
    assert [asked for _, asked in server.requests] == [None, None]
    server.faults.append(("drop", 60_000))
    get(server, tmp_path / "second", sha256=SHA256)
    assert server.requests[-1] == ("file", "bytes=60000-")
    server.faults.extend([("drop", 60_000), "new version"])
    new = bytes(byte ^ 2 for byte in CONTENT)
    get(server, tmp_path / "third", sha256=hashlib.sha256(new).hexdigest())
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes() == CONTENT
    assert (tmp_path / "third").read_bytes() == new


def test_another_part_than_asked_for_is_not_taken(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.extend([("drop", 5000), ("part from", 4999)])
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT[:-1], CONTENT, CONTENT + b"x"])
def test_a_beginning_of_any_length_is_made_a_whole(
    server: FaultyFiles, tmp_path: Path, part: bytes
) -> None:
    target = tmp_path / "file"
    for total in (len(CONTENT), None):
        part_of(target).write_bytes(part)
        write_begun(part_of(target), Begun(f"{server.url}/file", '"v1"', None, total))
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert leftovers(target) == []


@pytest.mark.parametrize("state", [b"", b"[]", b'{"url": 1}', b"\xff", b"[" * 100_000])
def test_a_beginning_of_unknown_origin_is_not_used(
    server: FaultyFiles, tmp_path: Path, state: bytes
) -> None:
    part_of(tmp_path / "file").write_bytes(b"something else")
    (tmp_path / "file.part.json").write_bytes(state)
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("file", None)]


def test_a_range_that_is_refused_begins_anew(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.extend([("drop", 5000), "416"])
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_length_that_is_too_long_is_not_believed(server: FaultyFiles, tmp_path: Path) -> None:
    # Asked for the rest, the server has to say that there is none.
    server.faults.append(("longer", 10))
    get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == ("file", f"bytes={len(CONTENT)}-")
    server.faults.extend([("longer", 10), "no range", ("longer", 10), "no range"])
    get(server, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == CONTENT
    server.faults.append(("longer", 10))
    with pytest.raises(DownloadError, match="should have 102400 bytes, but the server says 102410"):
        get(server, tmp_path / "other", size=len(CONTENT))
    server.faults.append(("longer", 10))
    get(server, tmp_path / "known", sha256=SHA256)
    assert (tmp_path / "known").read_bytes() == CONTENT


def test_a_length_that_is_too_short_is_found_out(server: FaultyFiles, tmp_path: Path) -> None:
    target = tmp_path / "file"
    for known, message in (
        ({"size": len(CONTENT)}, "server says 102390"),
        ({"sha256": SHA256}, "not the file that is expected"),
        ({"check": check_zip}, "broken"),
    ):
        server.faults.append(("shorter", 10))
        with pytest.raises(DownloadError, match=message):
            get(server, target, **known)
        assert leftovers(target) == []
        assert not target.exists()


def test_more_bytes_than_the_file_has_are_refused(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.append("chunked")
    with pytest.raises(DownloadError, match="sends more than the 1000 bytes"):
        get(server, tmp_path / "file", size=1000)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_without_length(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.append("no length")
    with pytest.raises(DownloadError, match="does not say how long"):
        get(server, tmp_path / "file")
    server.faults.extend(["no length", "cut chunk", "chunked"])
    get(server, tmp_path / "known", sha256=SHA256)
    get(server, tmp_path / "chunked")
    assert (tmp_path / "known").read_bytes() == (tmp_path / "chunked").read_bytes() == CONTENT


def test_a_wrong_hash_keeps_nothing(server: FaultyFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(DownloadError, match=f"SHA-256 is {SHA256} instead of {'0' * 64}"):
        get(server, tmp_path / "file", sha256="0" * 64)
    assert (tmp_path / "file").read_bytes() == b"before"
    assert leftovers(tmp_path / "file") == []


def test_a_file_that_others_packed_is_refused(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.append("gzip")
    with pytest.raises(DownloadError, match="comes packed as gzip"):
        get(server, tmp_path / "file")


def test_errors_for_good_are_not_repeated(server: FaultyFiles, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"HTTP 404.*--mirror"):
        get(server, tmp_path / "none", path="none")
    assert len(server.requests) == 1
    server.faults.append(("status", 403, None))
    with pytest.raises(DownloadError, match="HTTP 403"):
        get(server, tmp_path / "file")


def test_busy_servers_are_asked_again_as_late_as_they_wish(
    server: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download_http.time, "sleep", waits.append)
    server.faults.extend([("status", 503, 7), ("status", 429, 1000), ("status", 500, None)])
    get(server, tmp_path / "file", patience=Patience(delays=(1, 2, 4), longest=60))
    assert waits == [7, 60, 4]
    server.faults.extend([("status", 503, "Fri, 01 Jan 2100 00:00:00 GMT"), ("status", 503, "x")])
    get(server, tmp_path / "second", patience=Patience(delays=(1, 2), longest=60))
    assert waits[3:] == [60, 2]


def test_silence_ends_by_itself(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.extend(["hang up", ("stall", 3000)])
    get(server, tmp_path / "file", patience=Patience(delays=(0, 0), answer=0.3))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == ("file", "bytes=3000-")


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9/x: .*refused \(tried 4 times\)\."):
        fetch(Source("http://127.0.0.1:9/x"), tmp_path / "file", patience=HASTY)
    assert list(tmp_path.iterdir()) == []
    for url in ("ftp://127.0.0.1/x", "http://127.0.0.1:port/x"):
        with pytest.raises(InvalidSettingError):
            fetch(Source(url), tmp_path / "file", patience=HASTY)


def test_redirects_are_followed(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.extend([("moved", "/file"), ("drop", 500), ("moved", "/file")])
    get(server, tmp_path / "file", path="old")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == ("file", "bytes=500-")
    server.faults.extend([("moved", "/file")] * 30)
    with pytest.raises(DownloadError):
        get(server, tmp_path / "loop")


def test_proxies_are_used(
    server: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://files.example/file"] = CONTENT
    fetch(Source("http://files.example/file"), tmp_path / "file", patience=HASTY)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_download_goes_on_at_another_address_if_the_hash_is_known(
    server: FaultyFiles, tmp_path: Path
) -> None:
    server.faults.extend([("drop", 900)] + [("status", 503, None)] * 9)
    with pytest.raises(DownloadError, match="503"):
        get(server, tmp_path / "file", sha256=SHA256)
    server.faults.clear()
    server.files["mirror"] = CONTENT
    get(server, tmp_path / "file", sha256=SHA256, path="mirror")
    assert server.requests[-1] == ("mirror", "bytes=900-")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_web_pages_are_not_taken_for_files(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.append("page")
    with pytest.raises(DownloadError, match=r"web page \(Quota exceeded\).*tomorrow.*--mirror"):
        get(server, tmp_path / "file", takes_form=True)
    server.files["file"] = b"\n<html>I say that I am data</html>"
    with pytest.raises(DownloadError, match="without title"):
        get(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_the_form_on_a_page_is_sent_once(server: FaultyFiles, tmp_path: Path) -> None:
    form = b"""<!DOCTYPE html><html><head><title>Virus scan warning</title></head><body>
    <form id="download-form" action="/really" method="get"><input type="submit" value="go">
    <input type="hidden" name="id" value="a&amp;b"><input type="hidden" name="confirm" value="t">
    </form><form action="/other"><input name="id" value="c"></form></body></html>"""
    server.pages["ask"] = form
    answer = "really?id=a%26b&confirm=t"
    server.files[answer] = CONTENT
    server.faults.extend(["good", ("drop", 1000)])
    get(server, tmp_path / "file", path="ask", takes_form=True)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("ask", None), (answer, None), (answer, "bytes=1000-")]
    with pytest.raises(DownloadError, match="Virus scan warning"):
        get(server, tmp_path / "none", path="ask")
    server.pages[answer] = form
    with pytest.raises(DownloadError, match="Virus scan warning"):
        get(server, tmp_path / "none", path="ask", takes_form=True)


def test_forms_lead_nowhere_else() -> None:
    page = '<form action="{}"><input name="id" value="x"></form>'
    drive = "https://drive.google.com/uc?id=x"
    file = "https://drive.usercontent.google.com/download"
    assert confirmed_url(page.format(file), drive) == f"{file}?id=x"
    for action in ("https://example.org/x", "http://drive.google.com/x", "file:///etc/passwd"):
        assert confirmed_url(page.format(action), drive) is None
    assert confirmed_url("<form><input name='q'></form>", drive) is None
    assert confirmed_url("no form", drive) is None
    assert is_page("Text/HTML; charset=utf-8", b"")
    assert not is_page(None, b'{"a": "<html>"}')
    assert is_page("text/plain", PAGE)


def test_places_that_cannot_be_written_are_named(server: FaultyFiles, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    with pytest.raises(InvalidSettingError, match=r"plain.*--to"):
        get(server, tmp_path / "plain" / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidSettingError, match="is a folder"):
        get(server, tmp_path / "folder")
    assert server.requests == []


def test_a_full_disk_is_named(
    server: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"No room for file: 102 kB .* 1 kB are free"):
        get(server, tmp_path / "file")
    monkeypatch.undo()

    def no_room(part: Path, begun: Begun) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(part))

    monkeypatch.setattr(download_http, "write_begun", no_room)
    with pytest.raises(DownloadError, match="goes on where it stopped"):
        get(server, tmp_path / "file")


def test_files_are_copied_from_folders(tmp_path: Path) -> None:
    origin = tmp_path / "mirror.bin"
    origin.write_bytes(CONTENT)
    fetch(Source(str(origin), len(CONTENT), SHA256), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="102400 bytes instead of 7"):
        fetch(Source(str(origin), 7), tmp_path / "other")
    with pytest.raises(DownloadError, match=r"Cannot read .*absent: No such file"):
        fetch(Source(str(tmp_path / "absent")), tmp_path / "other")
    assert leftovers(tmp_path / "copy") == ["mirror.bin"]


NUMBERS = st.integers(0, 3000)
FAULTS = st.one_of(
    st.tuples(st.sampled_from(["drop", "reset", "longer", "shorter", "part from"]), NUMBERS),
    st.tuples(st.just("status"), st.sampled_from([404, 416, 429, 500, 503]), st.just(0)),
    st.sampled_from(
        ["hang up", "no range", "page", "gzip", "chunked", "cut chunk", "no length", "416",
         "new version", "good"]
    ),
)  # fmt: skip


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    faults=st.lists(FAULTS, max_size=6),
    knows=st.sampled_from(["nothing", "size", "hash", "both"]),
    tags=st.tuples(st.booleans(), st.booleans()),
)
def test_whatever_happens_the_file_is_right_or_not_there(
    server: FaultyFiles,
    tmp_path_factory: pytest.TempPathFactory,
    faults: list[Any],
    knows: str,
    tags: tuple[bool, bool],
) -> None:
    if knows == "nothing":
        # A server that sends less than it has and calls that all cannot be seen through.
        faults = [fault for fault in faults if fault[0] != "shorter"]
    server.reset()
    server.has_etag, server.has_date = tags
    content = CONTENT[:3001]
    server.files["file"] = content
    server.faults.extend(faults)
    target = tmp_path_factory.mktemp("any") / "file"
    known: dict[str, Any] = {}
    if knows in ("size", "both"):
        known["size"] = len(content)
    if knows in ("hash", "both"):
        known["sha256"] = hashlib.sha256(content).hexdigest()
    with contextlib.suppress(AtodError):
        get(server, target, **known)
    if not target.exists():
        server.faults.clear()
        server.version = 1
        get(server, target, **known)
    versions = {bytes(byte ^ v for byte in content) for v in range(2, 9)} | {content}
    assert target.read_bytes() in ({content} if "sha256" in known else versions)
    assert leftovers(target) == []
