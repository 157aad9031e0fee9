from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import DEFAULT, Mock

import filelock
import pytest
from faulty_files import PAGE, FaultyFiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from urllib3.util import Retry
from written_games import write_games

import atod_gym
import env_servers
from atod_gym import datasets
from atod_gym.datasets import RECORD_FILE, DataFile, DataSet, cli, data_set, verify
from atod_gym.datasets import get as getting
from atod_gym.envs.alfworld import games
from atod_gym.envs.search_qa import questions
from atod_gym.envs.search_qa import settings as search_qa
from atod_gym.envs.webshop import settings as webshop
from atod_gym.errors import AtodError, DownloadError

CONTENT = bytes(range(256)) * 1000
PRODUCTS = json.dumps([{"asin": f"B{n:09}", "name": "x" * 500} for n in range(4000)]).encode()
GAMES = {"train": 6, "valid_seen": 2, "valid_unseen": 1}
LINES = b'{"id": "0", "contents": "\\"A\\"\\ntext"}\n' * 50
ZIP = "alfworld/json_2.1.2_tw-pddl.zip"

Run = Callable[..., tuple[int, str, str]]


def test_the_catalogue_is_pinned_and_imports_no_download_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned = r"https://(huggingface\.co/.*/resolve/[0-9a-f]{40}/|github\.com/.*/0\.4\.0/)"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    # Client and server of the shop share no code, so the server has the hashes once more.
    folder = Path(env_servers.__file__).parent / "webshop"
    server = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    for data in datasets.catalogue().values():
        for file in data.files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "") or re.match(pinned, file.url)
            url = getting.source_url(data, file, None)
            assert url.startswith("https://hub.example/d") == data.name.startswith("searchqa")
            assert not data.name.startswith("webshop") or str(file.sha256) in server
    entries = data_set("searchqa").entries
    assert sum(n for name, n in entries.items() if "train" not in name) == 51_713
    assert sum(entries.values()) == 51_713 + 169_615
    code = "import sys, atod_gym.datasets as d; d.catalogue(); print('requests' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"


# Below: small files in the official formats, from a folder or a server that misbehaves.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, DataSet]]:
    """A mirror of small files, and the catalogue in which they are the official ones."""
    root, made, sets = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("games"), {}
    write_games(made / "json_2.1.1", GAMES, house_size="tiny")
    members = {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*.tw-pddl")}
    row = b'{"id": "1", "question": "Who?", "golden_answers": ["a"]}\n'
    contents = {"alfworld": (zipped(members), None), "searchqa": (row * 3, 3),
                "searchqa-corpus": (gzip.compress(LINES), 50)}  # fmt: skip
    for data in datasets.catalogue().values():
        files = []
        for file in data.files:
            other = (PRODUCTS, 4000) if "shuffle" in file.name else (b'{"B0": 1}', 1)
            content, count = contents.get(data.name, other)
            path = root / data.name / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest() if file.sha256 else None
            size = len(content) if file.size else None
            files.append(replace(file, size=size, sha256=sha256, entries=count))
        sets[data.name] = replace(data, files=tuple(files), unpacked_size=0)
    hashes = {name: games.scan_games(made / "json_2.1.1", name).content_hash for name in GAMES}
    sets["alfworld"] = replace(sets["alfworld"], manifest_hashes=hashes)
    return root, sets


@pytest.fixture
def mirror(small: tuple[Path, dict[str, DataSet]], monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (datasets, cli):
        monkeypatch.setattr(module, "catalogue", lambda: small[1])
    return small[0]


@pytest.fixture
def server(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyFiles]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    retry = Retry(2, status_forcelist=(429, 503), raise_on_status=False)
    for name, value in (("_RETRY", retry), ("_TIMEOUT", 1), ("_CHUNK", 1000)):
        monkeypatch.setattr(getting, name, value)
    server = FaultyFiles()
    files = {str(path.relative_to(mirror)): path for path in mirror.rglob("*") if path.is_file()}
    server.reset(file=CONTENT, **{name: path.read_bytes() for name, path in files.items()})
    yield server
    server.close()


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_user_data: None
) -> Run:
    """Runs the command in this process; gives its status and what it wrote."""
    for name in ("ATOD_DATA_MIRROR", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(one) for one in arguments])
        return status, *capsys.readouterr()

    return run


def zipped(members: dict[str, bytes], mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def fetch(server: FaultyFiles, target: Path, path: str = "file", **known: Any) -> None:
    getting._fetch(f"{server.url}/{path}", DataFile(target.name, **known), target, 0)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.slow
def test_a_dropped_connection_continues_where_it_stopped(
    server: FaultyFiles, tmp_path: Path
) -> None:
    server.faults.extend([("drop", 9000)] * 9 + [("stall", 9000), "hang up", ("status", 503)])
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    ranges = [asked for _, asked in server.requests]
    assert ranges[:3] == [None, "bytes=9000-", "bytes=18000-"]
    assert ranges[-1] == "bytes=90000-"


@pytest.mark.parametrize("path", ["file", "mirror"])
def test_a_download_that_is_given_up_is_continued_by_the_next(
    server: FaultyFiles, tmp_path: Path, path: str
) -> None:
    server.files["mirror"] = CONTENT
    # Another server may continue it if the hash of the whole is known.
    known = {"sha256": hashlib.sha256(CONTENT).hexdigest()} if path == "mirror" else {}
    server.faults.extend([("drop", 5000)] + [("drop", 0)] * 10 + ["page"])
    with pytest.raises(DownloadError, match=r"connections broke .* is kept; .*continues"):
        fetch(server, tmp_path / "file", **known)
    with pytest.raises(DownloadError, match=r"a web page .*Quota exceeded.*--mirror"):
        fetch(server, tmp_path / "file", **known)
    assert names(tmp_path) == ["file.part", "file.part.json"]
    fetch(server, tmp_path / "file", path, **known)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == (path, "bytes=5000-")


@pytest.mark.parametrize("has_tags", [True, False])
@pytest.mark.parametrize(
    "fault", ["new version", "blind", ("part from", 5), "416", "no range", "cut chunk"]
)
def test_pieces_of_different_files_are_never_joined(
    server: FaultyFiles, tmp_path: Path, fault: Any, has_tags: bool
) -> None:
    server.has_tags = has_tags
    server.faults.extend([("drop", 70_000), fault])
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes(n ^ (server.version - 1) for n in CONTENT)
    # Without tags and hash nothing shows that the file is the same: all of it is requested again.
    assert (server.requests[1][1] is None) == (not has_tags)
    assert fault != "new version" or len(server.requests) == 2


def test_a_failed_download_is_reported(server: FaultyFiles, tmp_path: Path) -> None:
    server.faults.extend([("status", 403), ("longer", 10)])
    for url, size, words in (
        (f"{server.url}/file", None, r"not available: HTTP 403.*--mirror"),
        (f"{server.url}/file", 256_000, "has 256010 bytes, not 256000"),
        ("http://127.0.0.1:9/x", None, r"127\.0\.0\.1:9/x: .*refused\. .*--mirror"),
        ("http://127.0.0.1:port/x", None, "Cannot fetch"),
        (server.url, 10**15, "No space for file: 1,000,000,000,000,000 bytes needed"),
    ):
        with pytest.raises(DownloadError, match=words):
            getting._fetch(url, DataFile("file", size=size), tmp_path / "file", size or 0)
    assert names(tmp_path) == []


FAULTS = st.one_of(
    st.tuples(st.sampled_from(["drop", "longer", "part from"]), st.integers(0, 9000)),
    st.tuples(st.just("status"), st.sampled_from([404, 416, 429, 503])),
    st.sampled_from(["hang up", "no range", "page", "cut chunk", "no length", "416",
                     "new version", "good"]),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FAULTS, max_size=6), st.sampled_from([None, 9001]), st.booleans())
def test_a_file_is_always_complete_or_absent(
    server: FaultyFiles, tmp_path_factory: pytest.TempPathFactory, faults: list[Any],
    size: int | None, has_tags: bool,
) -> None:  # fmt: skip
    content = CONTENT[:9001]
    server.reset(file=content)
    server.has_tags = has_tags
    server.faults.extend(faults)
    target = tmp_path_factory.mktemp("any") / "file"
    with contextlib.suppress(AtodError):
        fetch(server, target, size=size)
    if not target.exists():
        server.faults.clear()
        fetch(server, target, size=size)
    assert target.read_bytes() in {bytes(byte ^ n for byte in content) for n in range(8)}
    assert names(target.parent) in (["file"], ["file", "file.part.json"])


def place(path: Path, target: Path) -> None:
    data = replace(data_set("alfworld"), unpacks_to=target.name, manifest_hashes={})
    getting._unpack(data, path, target, False)


def test_a_kill_while_a_folder_is_replaced_leaves_every_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"top/a": b"old a", "top/b": b"old b", "top/own": b"not in the archive"}
    new = {"top/a": b"new a", "top/b": b"new b", "top/sub/c": b"new c"}
    archive, folder = tmp_path / "a.zip", tmp_path / "to"
    archive.write_bytes(zipped(new))
    (folder / "top").mkdir(parents=True)
    for survived in range(4):
        for name, content in old.items():
            (folder / name).write_bytes(content)
        stop = [DEFAULT] * survived + [KeyboardInterrupt] * 9
        monkeypatch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=stop))
        with contextlib.suppress(KeyboardInterrupt):
            place(archive, folder / "top")
        monkeypatch.undo()
        for name, content in old.items():
            assert (folder / name).read_bytes() in (content, new.get(name))
        place(archive, folder / "top")
        assert {name: (folder / name).read_bytes() for name in old | new} == old | new


@pytest.mark.parametrize("is_tar", [False, True])
def test_a_corpus_is_unpacked_even_from_a_hidden_tar(tmp_path: Path, is_tar: bool) -> None:
    archive, target = tmp_path / "wiki.jsonl.gz", tmp_path / "wiki.jsonl"
    archive.write_bytes(gzip.compress(LINES * 1000))
    if is_tar:
        target.write_bytes(LINES * 1000)
        with tarfile.open(archive, mode="w:gz") as tar:
            tar.add(target, "data/../dump.jsonl")
        target.unlink()
    place(archive, target)
    assert target.read_bytes() == LINES * 1000
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(verify.BROKEN):
        place(archive, tmp_path / "other.jsonl")
    assert names(tmp_path) == ["wiki.jsonl", "wiki.jsonl.gz"]


def test_all_data_comes_from_a_mirror_and_is_found(
    run: Run, server: FaultyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "data"
    status, out, err = run("get", "all", "--to", to, "--mirror", server.url)
    assert (status, err) == (0, "")
    assert out.count("Licence: ") == out.count("Folder: ") == 5
    assert f"ALFWORLD_DATA={to}" in out
    assert out.count("(recorded; expected: unknown)") == 1 + 8
    assert "6 train, 2 valid_seen, 1 valid_unseen games, identical to the published ones" in out
    assert len(server.requests) == 1 + 3 + 3 + 9 + 1
    assert (to / "wiki-18.jsonl").read_bytes() == LINES
    assert not re.findall(r"\.part|\.gz|\.zip|downloads|unpacked", " ".join(names(to)))
    # What is whole needs no lock: its folder may be one that cannot be written.
    monkeypatch.setattr("filelock.FileLock", None)
    assert run("get", "all", "--mirror", server.url, "--to", to)[0] == 0
    assert len(server.requests) == 1 + 3 + 3 + 9 + 1
    monkeypatch.setenv("ATOD_DATA", str(to))
    found = [source.found() for source in (games.SOURCE, webshop.SOURCE, search_qa.SOURCE)]
    assert found == [to / "json_2.1.1", to, to]
    status, out, _ = run("verify", to)
    assert (status, out.count("  ok ") - out.count("a corpus"), "atod-data" in out) == (0, 9, False)
    assert f"{to} (9 of 9 present; 702MB to download)" in run("list")[1]


def test_a_folder_is_a_mirror(
    run: Run, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_DATA_MIRROR", str(mirror))
    assert "The environments find it with" not in run("get", "searchqa")[1]
    assert "The environments find it with WEBSHOP_DATA=" in run("get", "webshop-full")[1]
    folder = Path.home() / ".cache/searchqa"
    assert "No question files" in run("verify", Path.home() / ".cache/webshop-full")[2]
    modes = {path.stat().st_mode for path in (Path.home() / ".cache").rglob("*.json*")}
    (tmp_path / "usual").touch()
    assert modes == {(tmp_path / "usual").stat().st_mode}
    status, out, _ = run("verify", folder)
    assert (status, out.count("  ok "), out.count("\n")) == (0, 9, 10)
    assert questions.missing_official(folder) == ""
    status, out, _ = run("verify")
    assert (status, out.count("3 rows, SHA-256 as expected"), "alfworld" in out) == (0, 9, False)
    # Where no hash is published, the first download decides.
    (folder / RECORD_FILE).write_text(
        (folder / RECORD_FILE).read_text().replace('"sha256": "', '"sha256": "0')
    )
    (folder / "nq/test.jsonl").unlink()
    assert "nq/train.jsonl is damaged or differs (its SHA-256 is" in run("get", "searchqa")[2]
    status, _, err = run("get", "searchqa", "--force")
    assert (status, "nq/train.jsonl is not the expected file: its SH" in err) == (1, True)


def test_every_damaged_or_missing_file_is_named_and_replaced_on_request(
    run: Run, mirror: Path, tmp_path: Path
) -> None:
    assert run("get", "all", "--to", tmp_path, "--mirror", mirror)[0] == 0
    game = next(tmp_path.glob("json_2.1.1/valid_seen/*/*/game.tw-pddl"))
    for path, name, words in (
        (game, "alfworld", "json_2.1.1: 2 valid_seen games that differ from the published ones"),
        (tmp_path / "items_ins_v2_1000.json", "webshop", "items_ins_v2_1000.json: its SHA-256"),
        (tmp_path / "musique/dev.jsonl", "searchqa", "musique/dev.jsonl: its SHA-256 is"),
        (tmp_path / "wiki-18.jsonl", "searchqa-corpus", "wiki-18.jsonl: its SHA-256 is"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
        status, out, _ = run("verify", "all", "--in", tmp_path)
        assert (status, out.count("  wrong "), f"  wrong    {words}" in out) == (1, 1, True)
        status, _, err = run("get", name, "--to", tmp_path, "--mirror", mirror)
        assert (status, err.count("\n"), "is damaged or differs" in err) == (1, 1, True)
        path.write_bytes(content)
    (tmp_path / "popqa/test.jsonl").unlink()
    game.unlink()
    status, out, _ = run("verify", "--in", tmp_path)
    assert "  wrong    json_2.1.1: 1 valid_seen games" in out
    assert "  missing  popqa/test.jsonl: not found" in out
    force = ("--force", "--to", tmp_path, "--mirror", mirror)
    assert run("get", "alfworld", "searchqa", *force)[0] == 0
    # Without a record, data is compared with what is published.
    (tmp_path / RECORD_FILE).write_text("[oops")
    plain = tmp_path / "nq/test.jsonl"
    (tmp_path / "nq/test.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    status, out, _ = run("verify", "--in", tmp_path)
    assert (status, "3 rows, no SHA-256 is known" in out, "SHA-256 as expected" in out) == (0, 1, 1)
    question = b'{"question": "q"}\n'
    for name, content, words in (
        ("nq/train.jsonl", question * 4, "4 rows, not 3"),
        ("wiki-18.jsonl", LINES + LINES[:38], "51 rows, not 50"),
        ("popqa/test.jsonl", question[:-2], "row 1 is not a question"),
        ("musique/dev.jsonl", question + b"\n[1]\n", "row 2 is not a question"),
        (
            "bamboogle/test.jsonl",
            PAGE,
            "it is a web page (Drive - Quota exceeded), not the expected file",
        ),
        ("items_shuffle_1000.json", PRODUCTS[:-1], f"{len(PRODUCTS) - 1} bytes, not "),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in run("verify", "all", "--in", tmp_path)[1]


def test_other_files_are_taken_only_on_request(
    run: Run, server: FaultyFiles, tmp_path: Path
) -> None:
    arguments = ("get", "searchqa", "webshop", "--to", tmp_path, "--mirror", server.url)
    row = server.files["searchqa/nq/train.jsonl"]
    server.files["searchqa/nq/train.jsonl"] += row
    server.files["webshop/items_shuffle_1000.json"] = PRODUCTS.replace(b"x", b"y")
    status, _, err = run(*arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert "nq/train.jsonl is not the expected file: it has 6 rows, not 3." in err
    assert (
        "The download was deleted. --accept-other accepts"
        in run("get", "webshop", *arguments[3:])[2]
    )
    assert not [*tmp_path.glob("*.json"), *tmp_path.glob("nq/*")]
    status, out, _ = run(*arguments, "--accept-other")
    assert (status, out.count("  wrong ")) == (0, 2)
    assert run("verify", "webshop", "--in", tmp_path)[0] == 1
    server.files["webshop/items_shuffle_1000.json"] = b"[oops"
    status, _, err = run(*arguments, "--accept-other", "--force")
    assert (status, "it is damaged" in err) == (1, True)
    assert b"y" in (tmp_path / "items_shuffle_1000.json").read_bytes()


def test_unsafe_archives_are_not_unpacked(run: Run, server: FaultyFiles, tmp_path: Path) -> None:
    arguments = ("--to", tmp_path / "to", "--mirror", server.url, "--accept-other")
    for name in ("../evil", "x/../../evil", "/evil", "top/..", "C:/evil", "x\\..\\evil", "link"):
        server.files[ZIP] = zipped({name: b"x"}, 0o120777 if name == "link" else 0o644)
        status, _, err = run("get", "alfworld", *arguments)
        assert status == 1
        assert f"not safe to unpack: {name!r} is a link or leaves it" in err
        assert not [path for path in tmp_path.rglob("*") if path.name in ("evil", "link")]


def test_games_that_are_not_the_published_ones_are_not_put_in_place(
    run: Run, server: FaultyFiles, tmp_path: Path
) -> None:
    with zipfile.ZipFile(io.BytesIO(server.files[ZIP])) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    # The same length, other games: only the manifest shows it.
    server.files[ZIP] = zipped({member: game[:-1] + b" " for member, game in members.items()})
    status, _, err = run("get", "alfworld", "--to", tmp_path, "--mirror", server.url)
    assert status == 1
    assert "6 train games that differ from the published ones; 2 valid_seen games" in err
    assert not (tmp_path / "json_2.1.1").exists()
    server.files[ZIP] = zipped(members)
    assert run("get", "alfworld", "--to", tmp_path, "--mirror", server.url)[0] == 0


def test_the_rows_that_the_environment_reads_are_reported(run: Run, tmp_path: Path) -> None:
    row = {"id": 1, "question": "Where?", "golden_answers": ["Brenn"]}
    (tmp_path / "mine_test.jsonl").write_text(f'{json.dumps(row)}\n{{"question": "no answer?"}}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert "ok       mine_test.jsonl: 1 of 2 rows are read; left out: 1 (no answer)" in out
    assert "wrong    broken.jsonl: is one JSON object" in out
    assert run("verify", tmp_path / "mine_test.jsonl")[0] == 0


def test_mistakes_are_named_in_one_line(
    run: Run, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(command: str, status: int, words: str) -> None:
        found, _, err = run(*command.split())
        assert (found, err.count("\n"), err[:11]) == (status, 1, "atod-data: ")
        assert words in err

    get = f"get webshop --to {tmp_path} --mirror {mirror}"
    check("get webshp", 2, "Unknown data set 'webshp'; known: alfworld, webshop,")
    check("get webshop --mirror ftp://x/y", 1, "No connection adapters were found for")
    check("get webshop --mirror /nowhere", 1, "The mirror has no file /nowhere/webshop/items")
    check("get webshop --to /dev/null/x", 1, "Cannot use /dev/null")
    check("verify", 1, "No data set was found to verify")
    check(f"verify {tmp_path}", 2, "No question files and no corpus in")
    with filelock.FileLock(tmp_path / ".atod-data.lock"):
        check(get, 1, f"Another process downloads into {tmp_path}")
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "x.part"))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfile", full)
        check(
            get, 1, "x.part: No space left on device. Free some space: the same command continues"
        )
    assert run(*get.split())[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("usual_sigint")
def test_an_interrupted_download_continues(
    run: Run, server: FaultyFiles, tmp_path: Path, sign: signal.Signals
) -> None:
    server.faults.append(("stall", len(PRODUCTS) // 2))
    # Also without the modules that Windows lacks.
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "from atod_gym.datasets import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["get", "webshop", "--to", str(tmp_path), "--mirror", server.url, "--accept-other"]
    environment = {**os.environ, "PYTHONPATH": str(Path(atod_gym.__file__).parents[1])}
    target = tmp_path / "items_shuffle_1000.json"
    part = tmp_path / f"{getting.DOWNLOADS}-webshop" / f"{target.name}.part"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE,
                          env=environment, text=True) as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size >= len(PRODUCTS) // 4):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sign)
        _, err = process.communicate(timeout=30)
    if sign == signal.SIGINT:
        assert (process.returncode, "the same command continues" in err) == (130, True)
        assert "Traceback" not in err
    have = part.stat().st_size
    assert not target.exists()
    assert part.read_bytes() == PRODUCTS[:have]
    assert run(*arguments)[0] == 0
    assert server.requests[1] == ("webshop/items_shuffle_1000.json", f"bytes={have}-")
    assert target.read_bytes() == PRODUCTS
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.slow
def test_real_data_is_the_known_one(run: Run, alfworld_data: Path, webshop_data: Path) -> None:
    status, out, _ = run("verify", "alfworld", "--in", alfworld_data.parent)
    assert (status, out.count("identical to the published ones")) == (0, 1)
    out = run("verify", "webshop", "--in", webshop_data)[1]
    assert "items_ins_v2_1000.json: 1000 entries, SHA-256 as expected" in out


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert datasets.cli.main(["list"]) == 0
