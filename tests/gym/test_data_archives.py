from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from atod_gym.data_archives import check_zip, unpack_gzip, unpack_zips
from atod_gym.data_records import Record, locked, read_record, write_record
from atod_gym.download_progress import Progress, human_bytes, human_seconds
from atod_gym.errors import DownloadError

QUIET = Progress(quiet=True)
LINES = b'{"id": "0", "contents": "\\"A\\"\\ntext"}\n' * 1000


def zipped(path: Path, members: dict[str, bytes], mode: int | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if mode is not None:
                info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_archives_are_joined_in_one_folder(tmp_path: Path) -> None:
    first = zipped(tmp_path / "1.zip", {"top/": b"", "top/a/x": b"1", "top/y": b"old", "z": b"-"})
    second = zipped(tmp_path / "2.zip", {"top/a/w": b"3", "top/y": b"new"})
    folder = tmp_path / "to"
    folder.mkdir()
    digests = unpack_zips([first, second], folder, "top", QUIET)
    assert names(folder) == ["top", "top/a", "top/a/w", "top/a/x", "top/y"]
    assert (folder / "top/y").read_bytes() == b"new"
    assert digests["top/y"] == (hashlib.sha256(b"new").hexdigest(), 3)
    assert sorted(digests) == ["top/a/w", "top/a/x", "top/y"]
    unpack_zips([second], folder, "top", QUIET, replace=True)
    assert names(folder) == ["top", "top/a", "top/a/w", "top/y"]


@pytest.mark.parametrize(
    "name",
    ["../evil", "top/../../evil", "/evil", "top/..", "C:/evil", "top\\..\\evil", "//host/evil"],
)
def test_members_that_would_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", {"top/good": b"1", name: b"2"})
    folder = tmp_path / "deep" / "to"
    folder.mkdir(parents=True)
    for refuse in (
        lambda: check_zip(archive),
        lambda: unpack_zips([archive], folder, "top", QUIET),
    ):
        with pytest.raises(DownloadError, match="not safe to unpack"):
            refuse()
    assert names(tmp_path) == ["a.zip", "deep", "deep/to"]


def test_links_are_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"top/link": b"/etc/passwd"}, mode=0o120777)
    with pytest.raises(DownloadError, match="is a link"):
        unpack_zips([archive], tmp_path, "top", QUIET)
    assert names(tmp_path) == ["a.zip"]


def test_broken_archives_leave_nothing_and_take_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/old").write_bytes(b"old")
    archive = zipped(tmp_path / "a.zip", {"top/x": b"long " * 1000, "top/y": b"2"})
    content = bytearray(archive.read_bytes())
    content[60] ^= 1
    for broken, message in (
        (bytes(content), "broken"),
        (content[:-30], "broken"),
        (b"PK", "broken"),
        (zipped(tmp_path / "b.zip", {"other/x": b""}).read_bytes(), "holds no folder top"),
    ):
        archive.write_bytes(broken)
        with pytest.raises(DownloadError, match=message):
            unpack_zips([archive], tmp_path, "top", QUIET, replace=True)
        assert names(tmp_path / "top") == ["old"]
        assert [name for name in names(tmp_path) if "unpacking" in name] == []


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("is_tar", [False, True])
def test_a_packed_corpus_is_unpacked_even_from_a_hidden_tar(tmp_path: Path, is_tar: bool) -> None:
    archive = tmp_path / "wiki.jsonl.gz"
    packed = tarred({"data/readme": b"no", "/data/../dump.jsonl": LINES}) if is_tar else None
    archive.write_bytes(packed or gzip.compress(LINES))
    digest, size = unpack_gzip(archive, tmp_path / "wiki.jsonl", QUIET)
    assert (tmp_path / "wiki.jsonl").read_bytes() == LINES
    assert (digest, size) == (hashlib.sha256(LINES).hexdigest(), len(LINES))
    assert names(tmp_path) == ["wiki.jsonl", "wiki.jsonl.gz"]


@pytest.mark.parametrize(
    "content",
    [b"plain", gzip.compress(LINES)[:-20], tarred({"dump.txt": LINES}), tarred({"a": b""})[:-9]],
)
def test_a_corpus_that_cannot_be_unpacked_is_named(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "wiki.jsonl.gz"
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match=r"wiki\.jsonl\.gz (is broken|holds no)"):
        unpack_gzip(archive, tmp_path / "wiki.jsonl", QUIET)
    assert not (tmp_path / "wiki.jsonl").exists()


def test_a_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib\nfrom atod_gym.data_records import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DownloadError, match="Another process is downloading"), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        pass


def test_records_of_data_sets_lie_in_one_file(tmp_path: Path) -> None:
    assert read_record(tmp_path, "a") == Record()
    record = Record(files={"x/y": ("ab", 3)})
    record.add_download("y.zip", "http://a/y.zip", "cd", 9)
    record.add_download("y.zip", "http://b/y.zip", "cd", 9)
    write_record(tmp_path, "a", record)
    write_record(tmp_path, "b", Record())
    assert read_record(tmp_path, "a") == record
    assert [one["url"] for one in record.downloads] == ["http://b/y.zip"]
    assert names(tmp_path) == ["atod-data.json"]
    for broken in ("", "[]", '{"data_sets": 3}', '{"data_sets": {"a": {"files": {"x": 1}}}}'):
        (tmp_path / "atod-data.json").write_text(broken, encoding="utf-8")
        assert read_record(tmp_path, "a") == Record()
    (tmp_path / "atod-data.json").write_text(json.dumps({"data_sets": {"a": None}}))
    assert read_record(tmp_path, "a") == Record()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now = [0.0]
    screen = Terminal()
    progress = Progress(stream=screen, clock=lambda: now[0])
    progress.begin("x", 0, 10_000_000)
    for step in range(1, 5):
        now[0] += 1
        progress.advance(step * 1_000_000)
    progress.note("something happens")
    progress.end(10_000_000)
    lines = screen.getvalue().split("\n")
    assert [line.count("\r") for line in lines] == [5, 0, 1, 0]
    assert "x: 4 MB of 10 MB, 40%, 1 MB/s, 6 s left" in lines[0]
    assert lines[1] == "something happens"
    assert "100%" in lines[2]


def test_progress_in_a_pipe_is_a_line_now_and_then() -> None:
    now = [0.0]
    pipe = io.StringIO()
    progress = Progress(stream=pipe, clock=lambda: now[0])
    progress.begin("x", 500, None)
    for _ in range(50):
        now[0] += 0.5
        progress.advance(1500)
    progress.end(1500)
    assert pipe.getvalue() == "x: 1.5 kB, 100 B/s\nx: 1.5 kB, 50 B/s\n"
    quiet = io.StringIO()
    Progress(stream=quiet, quiet=True).note("nothing")
    assert quiet.getvalue() == ""


def test_numbers_are_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 36_507_267, 5_479_720_229)] == [
        "0 B", "999 B", "1 kB", "36.5 MB", "5.5 GB",
    ]  # fmt: skip
    assert [human_seconds(n) for n in (0.4, 61, 7300)] == ["0 s", "1 min 1 s", "2 h 1 min"]
