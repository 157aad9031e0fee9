"""Corpus files, and the folders that keep their indexes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from env_servers.retrieval import bm25, corpus_files
from env_servers.retrieval.bm25 import IndexedCorpus, index_file, index_passages
from env_servers.retrieval.corpus import CorpusError, Passage
from env_servers.retrieval.corpus_files import LeftOut, read_corpus

PASSAGES = [
    Passage("7", '"Mill"\nA mill at the river.'),
    Passage(
        "a", '"Bridge"\nThe bridge \u00fcber den Flu\u00df, \u6a4b \U0001f309 "quoted" \\ \x00\x1f'
    ),
    Passage("2", '""\n'),
    Passage("\ud800", '""\nlone \udc00 surrogates'),
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
    """Return the folders of indexes in the cache, and anything next to them."""
    return sorted(
        path for path in cache.iterdir() if path.name != "hashes" and path.suffix != ".lock"
    )


def everything(indexed: IndexedCorpus) -> list[Passage]:
    rows = range(len(indexed.corpus))
    return list(map(Passage, indexed.corpus.ids(rows), indexed.corpus.contents(rows)))


def in_tar(content: bytes, name: str = "data/wiki.jsonl") -> bytes:
    """A tar archive as macOS makes it with a folder and a file in it, compressed."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        attributes = PurePosixPath(name).with_name(f"._{PurePosixPath(name).name}")
        for path, data in ((str(attributes), b"\0\5\26\7"), (name, content)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gzip": gzip.compress, "xz": lzma.compress, "tar in gzip": in_tar,
    "gzip in gzip": lambda content: gzip.compress(gzip.compress(content)),
    "tar": lambda content: gzip.decompress(in_tar(content)),
}  # fmt: skip


def read(path: Path) -> tuple[list[Passage], LeftOut]:
    """Return the passages of a file, and the rows that are left out."""
    left_out = LeftOut()
    return list(read_corpus(path, left_out)), left_out


def read_bytes(folder: Path, content: bytes, name: str = "corpus.jsonl") -> list[Passage]:
    """The passages of a file that has no others."""
    path = folder / name
    path.write_bytes(content)
    passages, left_out = read(path)
    assert not left_out.counts
    return passages


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("packing", PACKED)
def test_files_plain_and_compressed(tmp_path: Path, packing: str) -> None:
    rows = [
        {"id": 7, "contents": '"A"\nby number', "other": [1]},
        {"contents": '"B"\nwithout id'},
        {"id": "x", "title": "T", "text": "t"},
        {"contents": '"C"\nwithout id either'},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\r\n \n"
    expected = [
        Passage("7", '"A"\nby number'),
        Passage("1", '"B"\nwithout id'),
        Passage("x", '"T"\nt'),
        Passage("3", '"C"\nwithout id either'),
    ]
    # A name never matters.
    for name in ("a.jsonl", "a.jsonl.gz", "a.xz", "a.json", "a.tsv", "a"):
        assert read_bytes(tmp_path, PACKED[packing](text.encode()), name) == expected
    for indent in (None, 1):
        array = "\ufeff" + json.dumps(rows, indent=indent)
        assert read_bytes(tmp_path, PACKED[packing](array.encode())) == expected
    objects = "\n".join(json.dumps(row, indent=2) for row in rows)
    assert read_bytes(tmp_path, PACKED[packing](objects.encode())) == expected


@pytest.mark.parametrize(
    ("row", "contents"),
    [
({"title": "T", "text": "t"}, '"T"\nt'), ({"title": "", "text": "t"}, '""\nt'),
        ({"title": " ", "text": "t"}, '""\nt'), ({"title": None, "text": "t"}, '""\nt'),
        ({"text": "t"}, '""\nt'), ({"text": "one\ntwo"}, '""\none\ntwo'),
        ({"title": 1984, "text": "A novel."}, '"1984"\nA novel.'),
        ({"title": "A\n B", "text": "t"}, '"A B"\nt'), ({"contents": '"T"\nt'}, '"T"\nt'),
        ({"contents": "T\nt"}, "T\nt"), ({"contents": "a text alone"}, '""\na text alone'),
        ({"contents": "a text alone\n"}, '""\na text alone\n'), ({"contents": ""}, '""\n'),
        ({"contents": None, "text": "t"}, '""\nt'), ({"contents": "", "text": "t"}, '""\nt'),
        ({"contents": "T\nt", "text": "other"}, "T\nt"),
        ({"title": "T", "contents": "a text alone"}, '"T"\na text alone'),
        ({"title": "T", "contents": "one\ntwo"}, '"T"\none\ntwo'),
        ({"title": "T", "contents": "T\nt"}, "T\nt"),
        ({"title": "T", "contents": '"T"\nt'}, '"T"\nt'),
        ({"title": None, "contents": '"T"\nt'}, '"T"\nt'),
        ({"title": "T", "contents": "T"}, '"T"\nT'), ({"contents": '"T"\n'}, '"T"\n'),
        ({"contents": '""\n'}, '""\n'),
    ],
)  # fmt: skip
def test_titles_in_a_field_in_the_text_and_missing(
    tmp_path: Path, row: dict[str, object], contents: str
) -> None:
    assert read_bytes(tmp_path, lines(row)) == [Passage("0", contents)]
    assert read_bytes(tmp_path, json.dumps([row]).encode()) == [Passage("0", contents)]


@pytest.mark.parametrize(
    ("row", "passage_id"),
    [
        ({"id": "a"}, "a"), ({"id": 7}, "7"), ({"id": 7.5}, "7.5"), ({"id": 0}, "0"),
        ({"_id": "MED-10"}, "MED-10"), ({"docid": "1#2"}, "1#2"), ({"_id": 3, "docid": 4}, "3"),
        ({"id": None, "_id": "b"}, "b"), ({"id": "", "docid": 9}, "9"), ({"id": None}, "1"),
        ({"doc": "x"}, "1"), ({}, "1"), ({"id": 10**30}, str(10**30)),
    ],
)  # fmt: skip
def test_ids_have_several_names(tmp_path: Path, row: dict[str, object], passage_id: str) -> None:
    first = {"id": "first", "text": ""}
    for content in (lines(first, {**row, "text": ""}), json.dumps([first, {**row, "text": ""}])):
        content = content if isinstance(content, bytes) else content.encode()
        assert [found.id for found in read_bytes(tmp_path, content)] == ["first", passage_id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4rest", "is a zip archive: unpack it"),
        (b"PAR1rest", "is a parquet file: write it as JSON lines"),
        (b"BZh91AY&SY", "is compressed by bzip2: unpack it"),
        (b"(\xb5/\xfdrest", "is compressed by zstandard"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page, perhaps the error page of a download"),
        (b"\xef\xbb\xbf \n<html>", "is an HTML page"),
        (b"<DOC><DOCNO>1</DOCNO>", "is XML or TREC text"),
        ('{"text": "caf\u00e9"}\n{"text": "x"}\n'.encode("latin-1"), "perhaps in Latin-1: convert"),
        ('[{"text": "caf\u00e9"}]'.encode("latin-1"), "perhaps in Latin-1: convert"),
        ("id\ttext\n1\tcaf\u00e9\n".encode("latin-1"), "perhaps in Latin-1: convert"),
        ('{"text": "x"}'.encode("utf-16"), "is text in UTF-16"),
        ('{"text": "x"}'.encode("utf-16-le"), "is a binary file of unknown kind"),
        (b"\x93NUMPY\1\0", "given with --vectors"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"", "contains no passage"),
        (b"\n \n", "contains no passage"),
        (b"[]", "contains no passage"),
        (b"id\ttext\n", "contains no passage"),
        (b"no JSON", "contains no passage: 1 not JSON in UTF-8 .the first: line 1 "),
        (lines({"question": "q", "answer": 1}), "line 1 .its fields: 'question', 'answer'"),
        (lines(["a"], ["b"]), "is damaged after row 1"),
        (b'[{"text": "a"}, {"text": "b"', "is damaged after row 1: it is not JSON"),
        (b'[{"text": "a"}] x', "is damaged after row 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["plain", "tar in gzip"])
@pytest.mark.usefixtures("cache")
def test_unreadable_files_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packing: str, content: bytes, message: str
) -> None:
    # Whatever the file is called.
    for name in ("corpus.jsonl", "corpus.xz"):
        path = tmp_path / name
        path.write_bytes(PACKED[packing](content))
        with pytest.raises(CorpusError, match=f"(?s){name} .*{message}") as caught:
            index_file(path, 0.9, 0.4)
        assert "\n" not in str(caught.value)
        # An index is announced only where a passage comes before the damage.
        assert bool(caplog.messages) == content.startswith(b'[{"text": "a"}')


def test_a_long_beginning_without_passages_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(lines(*({"question": "q"} for _ in range(1500)), {"text": "t"}))
    with pytest.raises(CorpusError, match=r"questions.jsonl contains no passage: 1,000 without"):
        read(path)


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "cut": (b"{", "not JSON in UTF-8"),
    "bytes": (b"\xff", "not JSON in UTF-8"),
    "deep": (b"[" * 100_000, "not JSON in UTF-8"),
    "long number": (b'{"id": ' + b"9" * 5000 + b', "text": ""}', "not JSON in UTF-8"),
    "list": (b"[]", "that is no JSON object"),
    "text": (b'"text"', "that is no JSON object"),
    "empty": (b"{}", "without 'contents' and 'text'"),
    "title alone": (b'{"title": "T"}', "without 'contents' and 'text'"),
    "null": (b'{"text": null}', "without 'contents' and 'text'"),
    "number": (b'{"contents": 1}', "with 'contents' that is no text"),
    "texts": (b'{"text": ["a"]}', "with 'text' that is no text"),
    "titles": (b'{"text": "a", "title": ["T"]}', "with 'title' that is no text and no number"),
    "id list": (b'{"id": [1], "text": ""}', "with 'id' that is no text and no number"),
    "id true": (b'{"_id": true, "text": ""}', "with '_id' that is no text and no number"),
    "id NUL": (b'{"id": "a\\u0000", "text": ""}', "with a NUL character in 'id'"),
    "id twice": (b'{"id": "first", "text": ""}', "with the id of an earlier row"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_left_out_and_counted(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    row, reason = BAD_ROWS[kind]
    good = b'{"text": "fine"}\n' * 250
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": "first", "text": "fine"}\n\n' + row + b"\n" + row + b"\n" + good)
    for _ in range(2):
        caplog.clear()
        indexed = index_file(path, 0.9, 0.4)
        # Rows without an id are called by their number in the file.
        assert everything(indexed)[:2] == [
            Passage("first", '""\nfine'), Passage("3", '""\nfine')
        ]  # fmt: skip
        assert len(indexed.corpus) == 251
        assert indexed.left_out.counts == {reason: 2}
        (said,) = [text for text in caplog.messages if "left out" in text]
        assert f"{path}: 2 of 253 rows are left out: 2 {reason} (the first: line 3" in said
        assert "\n" not in said


def test_the_first_row_with_an_id_counts(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    ids = ["b", "a", "b", "x" * 100, "c", "a", "b", "x" * 100, 4, "d"]
    path.write_bytes(lines(*({"id": i, "text": str(row)} for row, i in enumerate(ids))))
    indexed = index_file(path, 0.9, 0.4)
    assert everything(indexed) == [
        Passage(str(ids[row]), f'""\n{row}') for row in (0, 1, 3, 4, 8, 9)
    ]  # fmt: skip
    assert indexed.left_out.counts == {"with the id of an earlier row": 4}
    assert indexed.bm25.search("9", 1)[0].id == "d"


def test_a_line_that_is_no_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "LONGEST_LINE", 1 << 16)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"contents": "fine"}\n\n' + b" " * 70_000)
    with pytest.raises(CorpusError, match="line 3 is longer than 65536 bytes"):
        read(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)
ROWS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "_id", "contents", "title", "text"), JSON_VALUES)
)
LINES = st.lists(
    st.binary(max_size=12) | ROWS.map(lambda row: json.dumps(row).encode()), max_size=4
)
TABLES = st.lists(st.binary(max_size=8), max_size=6).map(b"\t".join)
CONTENTS = st.one_of(
    LINES.map(b"\n".join),
    st.lists(ROWS, max_size=3).map(lambda rows: json.dumps(rows).encode()),
    TABLES.map(lambda rest: b"id\ttext\ttitle\n" + rest),
    st.binary(max_size=30),
)
MARKS = st.sampled_from([b"", *corpus_files._FOREIGN, *corpus_files._OPENERS])


def indexed_or_message(path: Path) -> tuple[list[Passage], str]:
    """The passages of a file, or the one line that refuses it."""
    try:
        return everything(index_file(path, 0.9, 0.4)), ""
    except CorpusError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return [], message


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONTENTS, st.sampled_from(list(PACKED)), MARKS, st.integers(0, 3000), st.booleans())
def test_any_bytes_give_an_index_or_a_corpus_error(
    cache: Path, tmp_path: Path, content: bytes, packing: str, mark: bytes, cut: int, is_cut: bool
) -> None:
    path = tmp_path / "any"
    packed = mark + PACKED[packing](content)
    path.write_bytes(packed[: cut % (len(packed) + 1)] if is_cut else packed)
    passages, message = indexed_or_message(path)
    if not message:
        assert len({passage.id for passage in passages}) == len(passages) > 0
        assert all("\n" in passage.contents for passage in passages)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(PACKED)), st.lists(st.tuples(st.integers(0), st.binary(max_size=3))))
def test_damaged_archives_give_an_index_or_a_corpus_error(
    cache: Path, tmp_path: Path, packing: str, damages: list[tuple[int, bytes]]
) -> None:
    packed = bytearray(PACKED[packing](lines(*({"text": f"{row} text"} for row in range(30)))))
    for place, damage in damages:
        at = place % len(packed)
        packed[at : at + len(damage)] = damage
    path = tmp_path / "any"
    path.write_bytes(packed)
    passages, message = indexed_or_message(path)
    assert bool(message) != bool(passages)


def test_files_that_cannot_be_read(tmp_path: Path, cache: Path) -> None:
    varied = b"".join(b'{"contents": "%x"}\n' % (7**number) for number in range(300))
    cut = gzip.compress(varied)[:-20]
    for name, content in (("a.gz", cut), ("b", in_tar(varied)[: len(in_tar(varied)) // 2])):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.gz").write_bytes(in_tar(b"", "readme.txt"))
    for path, message in (
        (tmp_path / "a.gz", "Cannot read .*a.gz after"),
        (tmp_path / "b", "Cannot read .*b after"),
        (tmp_path / "d.gz", r"is a tar archive without a \.jsonl or \.json or \.tsv file"),
        (tmp_path / "missing.jsonl", "There is no corpus file .*missing"),
        (tmp_path, "is a folder"),
        (tmp_path / "b" / "below", "Cannot read .*Not a directory"),
    ):
        for attempt in (read, lambda path: index_file(path, 0.9, 0.4)):
            with pytest.raises(CorpusError, match=message):
                attempt(path)
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
        assert json.loads(indexed.corpus.encoded_contents(3)) == PASSAGES[3].contents
        assert "\u6a4b".encode() in indexed.corpus.encoded_contents(1)
    assert len(indexes(cache)) == 1


def test_starts_at_the_same_time_build_one_index(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, path = count_builds(monkeypatch), write()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: everything(index_file(path, 0.9, 0.4)), range(4)))
    assert found == [PASSAGES] * 4
    assert seen.count("build") == 1
    assert os.listdir(cache / indexes(cache)[0].name)
    assert not list(cache.glob(".*"))


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one name for each index that is built and each file that is hashed."""
    seen: list[str] = []
    build = bm25._build

    def counted_build(*arguments: Any) -> None:
        seen.append("build")
        build(*arguments)

    def counted_hash(*content: bytes) -> Any:
        seen.extend(() if content else ["hash"])
        return hashlib.sha256(*content)

    monkeypatch.setattr(bm25, "_build", counted_build)
    monkeypatch.setattr(bm25, "hashlib", SimpleNamespace(sha256=counted_hash))
    return seen


def test_only_changed_parts_are_made_again(
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
    assert (folder / "corpus.json").exists()
    assert everything(made) == everything(index_file(write(), 0.9, 0.4, folder)) == PASSAGES
    for path, k1 in ((write(), 1.5), (write(PASSAGES[:1]), 0.9)):
        with pytest.raises(CorpusError, match=f"{folder} contains the index of another corpus, or"):
            index_file(path, k1, 0.4, folder)
    with pytest.raises(CorpusError, match=f"{tmp_path} contains files but no index"):
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
    wanted = (
        f"{folder} contains files but" if is_other else f"Cannot use {folder}, .*Delete this folder"
    )
    with pytest.raises(CorpusError, match=wanted) as caught:
        index_file(write(), 0.9, 0.4)
    assert "\n" not in str(caught.value)


def test_failed_builds_leave_nothing(write: Write, cache: Path, tmp_path: Path) -> None:
    twice = [*PASSAGES, Passage("c", ""), Passage("a", "")]
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(CorpusError, match="empty contains no passage"):
        index_file(tmp_path / "empty", 0.9, 0.4)
    with pytest.raises(ValueError, match="k1"):
        index_file(write(), -1, 0.4)
    with pytest.raises(ValueError, match="same id"):
        index_passages(twice, 0.9, 0.4)
    assert indexes(cache) == []


def serving(*arguments: str, file_bytes: int | None = None) -> list[str]:
    """The command `atod-serve retrieval`, perhaps with a limit on the bytes of a file."""
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({file_bytes},) * 2);"
    main = "import sys; from env_servers.cli import main; sys.exit(main())"
    code = (limit if file_bytes else "") + main
    return [sys.executable, "-c", code, "retrieval", "--port", "0", *arguments]


@pytest.mark.slow
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
    assert "--index sets another folder" in line
    assert "Traceback" not in ended.stderr
    assert indexes(cache) == []


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_killed_build_is_no_index(write: Write, tmp_path: Path) -> None:
    path = write([Passage(str(row), f"some words w{row % 100}") for row in range(60_000)])
    folder = tmp_path / "index" / "mine"
    command = serving("--corpus", str(path), "--index", str(folder))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.parent.glob(".mine-partial/*")):
            time.sleep(0.01)
        process.kill()
    left = list(folder.parent.iterdir())
    assert {path.name for path in left} == {".mine-partial", ".mine.lock"}
    assert everything(index_file(write(), 0.9, 0.4, folder)) == PASSAGES
    assert list(folder.parent.iterdir()) == [folder]


def test_contents_are_mapped_and_not_read(write: Write, cache: Path) -> None:
    index_file(write(), 0.9, 0.4)
    (folder,) = indexes(cache)
    indexed = index_file(write(), 0.9, 0.4)
    (folder / "contents.bin").unlink()
    if Path("/proc/self/maps").exists():
        assert str(folder / "contents.bin") in Path("/proc/self/maps").read_text()
    assert everything(indexed) == PASSAGES
    assert np.load(folder / "offsets.npy").tolist()[0] == 0
