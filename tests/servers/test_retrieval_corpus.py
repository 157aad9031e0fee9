"""Corpus files, and the folders that keep their indexes."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_servers.retrieval import corpus as corpus_module
from env_servers.retrieval import file_hash as file_hash_module
from env_servers.retrieval import indexed_corpus
from env_servers.retrieval.corpus import CorpusError, Passage, read_corpus
from env_servers.retrieval.indexed_corpus import IndexedCorpus, index_file, index_passages
from env_servers.search.bm25 import BM25Index

PASSAGES = [
    Passage("7", '"Mill"\nA mill at the river.'),
    Passage(
        "a", '"Bridge"\nThe bridge \u00fcber den Flu\u00df, \u6a4b \U0001f309 "quoted" \\ \x00\x1f'
    ),
    Passage("2", ""),
    Passage("\ud800", "lone \udc00 surrogates"),
]
Write = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which indexes are kept by default."""
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retrieval"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a corpus file."""

    def write_file(passages: Sequence[Passage] = PASSAGES, name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(passage._asdict()) + "\n" for passage in passages))
        return path

    return write_file


def indexes(cache: Path) -> list[Path]:
    """The folders of indexes in the cache, and what else stands beside them."""
    return sorted(path for path in cache.iterdir() if path.name != "hashes")


def everything(indexed: IndexedCorpus) -> list[Passage]:
    rows = range(len(indexed.corpus))
    return list(map(Passage, indexed.corpus.ids(rows), indexed.corpus.contents(rows)))


def in_tar(content: bytes, name: str = "data/wiki.jsonl") -> bytes:
    """A tar archive with a folder and a file in it, compressed."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.json", bytes), ("a.jsonl.gz", gzip.compress),
     ("b.jsonl.gz", in_tar), ("a.jsonl.xz", lzma.compress)],
)  # fmt: skip
def test_files_plain_and_compressed(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    lines = [
        {"id": 7, "contents": "by number", "other": [1]},
        {"contents": "without id"},
        {"id": "x", "title": "T", "text": "t"},
        {"contents": "without id either"},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\r\n \n"
    path = tmp_path / name
    path.write_bytes(pack(text.encode()))
    assert list(read_corpus(path)) == [
        Passage("7", "by number"),
        Passage("1", "without id"),
        Passage("x", '"T"\nt'),
        Passage("3", "without id either"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON in UTF-8"),
        (b"\xff", "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON in UTF-8"),
        (b"[]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b"{}", "There is no 'title'.*'contents', or with 'title' and 'text'"),
        (b'{"title": "T"}', "There is no 'text'"),
        (b'{"text": "t"}', "There is no 'title'"),
        (b'{"contents": null, "title": "T", "text": "t"}', "'contents' must be a text"),
        (b'{"contents": 1}', "'contents' must be a text"),
        (b'{"id": null, "contents": ""}', "'id' must be"),
        (b'{"id": true, "contents": ""}', "'id' must be"),
        (b'{"id": 1.5, "contents": ""}', "'id' must be"),
        (b'{"id": "a\\u0000", "contents": ""}', "NUL"),
        (b" " * 70_000, "longer than 65536 bytes"),
    ],
)
def test_wrong_lines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    if not line.startswith(b"["):
        monkeypatch.setattr(corpus_module, "LONGEST_LINE", 1 << 16)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"contents": "fine"}\n\n' + line + b'\n{"contents": "fine"}\n')
    with pytest.raises(CorpusError, match=rf"(?s)corpus\.jsonl, line 3[: ].*{message}") as caught:
        list(read_corpus(path))
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)
LINES = st.one_of(
    st.binary(max_size=12),
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("id", "contents", "title", "text"), JSON_VALUES),
    ).map(lambda fields: json.dumps(fields).encode()),
)


@given(st.lists(LINES, max_size=3))
def test_any_file_is_read_or_refused_with_a_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    passages, message = [], ""
    try:
        passages.extend(read_corpus(path))
    except CorpusError as error:
        message = str(error)
    assert not message or f"{path}, line " in message
    assert all(isinstance(text, str) for passage in passages for text in passage)
    assert len(passages) <= path.read_bytes().count(b"\n") + 1


def test_files_that_cannot_be_read(tmp_path: Path, cache: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b'{"contents": "fine"}\n' * 1000)
    cut = gzip.compress(broken.read_bytes())[:-20]
    for name, content in (("a.gz", cut), ("b.xz", b"no xz"), ("c.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorpusError, match=f"Cannot read .*{name} after line"):
            index_file(tmp_path / name, 0.9, 0.4)
    varied = b"".join(b'{"contents": "%x"}\n' % (7**number) for number in range(300))
    (tmp_path / "d.gz").write_bytes(in_tar(b"", "readme.txt"))
    (tmp_path / "e.gz").write_bytes(in_tar(varied)[: len(in_tar(varied)) // 2])
    for path, message in (
        (tmp_path / "d.gz", "is a tar archive without a .jsonl file"),
        (tmp_path / "e.gz", "Cannot read .*e.gz after line"),
        (tmp_path / "missing.jsonl", "There is no corpus file .*missing"),
        (tmp_path, "is a folder"),
        (broken / "below", "Cannot read .*Not a directory"),
    ):
        for read in (lambda path: list(read_corpus(path)), lambda path: index_file(path, 0.9, 0.4)):
            with pytest.raises(CorpusError, match=message):
                read(path)
    assert indexes(cache) == []


def test_a_saved_corpus_is_the_one_in_memory(write: Write, cache: Path) -> None:
    fresh = index_file(write(), 0.9, 0.4)
    again = index_file(write(), 0.9, 0.4)
    memory = index_passages(PASSAGES, 0.9, 0.4)
    assert everything(fresh) == everything(again) == everything(memory) == PASSAGES
    assert fresh.corpus.hash == again.corpus.hash == memory.corpus.hash
    for indexed in (fresh, again, memory):
        (hit,) = indexed.bm25.search("bridge", 3)
        assert (hit.row, hit.id) == (1, "a")
        assert json.loads(indexed.corpus.encoded_contents(3)) == "lone \udc00 surrogates"
        assert "\u6a4b".encode() in indexed.corpus.encoded_contents(1)
    assert indexes(cache) == [again.folder] == [fresh.folder]
    assert memory.folder is None


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one name for each index that is built and each file that is hashed."""
    seen: list[str] = []
    build, sha256 = BM25Index.build, file_hash_module.hashlib.sha256

    def counted_build(*arguments: object, **options: object) -> object:
        seen.append("build")
        return build(*arguments, **options)

    def counted_hash(content: bytes | None = None) -> object:
        if content is None:
            seen.append("hash")
            return sha256()
        return sha256(content)

    monkeypatch.setattr(indexed_corpus.BM25Index, "build", counted_build)
    monkeypatch.setattr(file_hash_module, "hashlib", type("", (), {"sha256": counted_hash}))
    return seen


def test_only_what_has_changed_is_done_again(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_builds(monkeypatch)
    path = write()
    index_file(path, 0.9, 0.4)
    assert seen == ["hash", "build"]
    index_file(path, 0.9, 0.4)
    assert seen == ["hash", "build"]
    os.utime(path, ns=(1, 1))
    index_file(path, 0.9, 0.4)
    assert seen == ["hash", "build", "hash"]
    index_file(path.rename(path.with_name("moved.jsonl")), 0.9, 0.4)
    assert seen == ["hash", "build", "hash", "hash"]
    index_file(path.with_name("moved.jsonl"), 1.2, 0.4)
    assert seen[4:] == ["build"]
    changed = index_file(write(PASSAGES[:2], "moved.jsonl"), 0.9, 0.4)
    assert seen[5:] == ["hash", "build"]
    assert everything(changed) == PASSAGES[:2]
    assert len(indexes(cache)) == 3
    # A note that is damaged counts as none.
    for note in (cache / "hashes").iterdir():
        note.write_text("[]")
    index_file(path.with_name("moved.jsonl"), 0.9, 0.4)
    assert seen[7:] == ["hash"]


@pytest.mark.usefixtures("cache")
def test_a_folder_of_ones_own(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "mine"
    folder.mkdir(parents=True)
    made = index_file(write(), 0.9, 0.4, folder)
    assert made.folder == folder
    assert everything(index_file(write(), 0.9, 0.4, folder)) == PASSAGES
    for path, k1 in ((write(), 1.5), (write(PASSAGES[:1]), 0.9)):
        with pytest.raises(CorpusError, match=f"{folder} has the index of another corpus, or"):
            index_file(path, k1, 0.4, folder)
    with pytest.raises(CorpusError, match=f"{tmp_path} has files but no index"):
        index_file(write(), 0.9, 0.4, tmp_path)


@pytest.mark.parametrize("name", ["corpus.json", "contents.bin", "offsets.npy", "bm25/docs.npy"])
@pytest.mark.parametrize("left", [0, 40, None])
def test_damaged_folders_are_named(write: Write, cache: Path, name: str, left: int | None) -> None:
    index_file(write(), 0.9, 0.4)
    (folder,) = indexes(cache)
    if left is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:left])
    is_other = (name, left) == ("corpus.json", None)
    wanted = f"{folder} has files but" if is_other else f"Cannot use {folder}, .*Delete this folder"
    with pytest.raises(CorpusError, match=wanted) as caught:
        index_file(write(), 0.9, 0.4)
    assert "\n" not in str(caught.value)


def test_what_fails_leaves_nothing(write: Write, cache: Path, tmp_path: Path) -> None:
    twice = [*PASSAGES, Passage("c", ""), Passage("a", "")]
    with pytest.raises(CorpusError, match=r"twice: lines 2 and 6 have the same id 'a'"):
        index_file(write(twice, "twice"), 0.9, 0.4)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(CorpusError, match="empty holds no passage"):
        index_file(tmp_path / "empty", 0.9, 0.4)
    with pytest.raises(ValueError, match="k1"):
        index_file(write(), -1, 0.4)
    with pytest.raises(ValueError, match="same id"):
        index_passages(twice, 0.9, 0.4)
    assert indexes(cache) == []


def serving(*arguments: str, file_bytes: int | None = None) -> list[str]:
    """The command `atod-serve retrieval`, perhaps with files of at most so many bytes."""
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({file_bytes},) * 2);"
    main = "import sys; from env_servers.cli import main; sys.exit(main())"
    code = (limit if file_bytes else "") + main
    return [sys.executable, "-c", code, "retrieval", "--port", "0", *arguments]


@pytest.mark.parametrize("file_bytes", [200, 20_000, 120_000])
def test_a_disk_without_room(write: Write, cache: Path, file_bytes: int) -> None:
    # Contents of 84,000 bytes, postings of 160,000.
    path = write([Passage(str(row), "0 1 2 3 4 5 6 7 8 9") for row in range(4000)])
    command = serving("--corpus", str(path), file_bytes=file_bytes)
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2, ended
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"atod-serve: error: Cannot use {cache}")
    assert "File too large" in line
    assert "--index names another place" in line
    assert "Traceback" not in ended.stderr
    assert indexes(cache) == []


@pytest.mark.usefixtures("cache")
def test_a_killed_build_is_no_index(write: Write, tmp_path: Path) -> None:
    path = write([Passage(str(row), f"some words w{row % 100}") for row in range(60_000)])
    folder = tmp_path / "index" / "mine"
    command = serving("--corpus", str(path), "--index", str(folder))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.parent.glob(".mine-partial-*/*")):
            time.sleep(0.01)
        process.kill()
    (left,) = folder.parent.iterdir()
    assert left.name.startswith(".mine-partial-")
    os.utime(left, (0, 0))
    assert everything(index_file(write(), 0.9, 0.4, folder)) == PASSAGES
    assert list(folder.parent.iterdir()) == [folder]


def test_contents_are_mapped_and_not_read(write: Write, cache: Path) -> None:
    index_file(write(), 0.9, 0.4)
    (folder,) = indexes(cache)
    indexed = index_file(write(), 0.9, 0.4)
    (folder / "contents.bin").unlink()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder / "contents.bin") in maps.read_text()
    assert everything(indexed) == PASSAGES
    assert isinstance(indexed.corpus._encoded._offsets, memoryview)
    assert np.load(folder / "offsets.npy").tolist()[0] == 0
