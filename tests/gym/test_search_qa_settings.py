"""Check where Search-QA finds questions and corpus, and its messages if it does not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from atod_gym.datasets import data_set
from atod_gym.envs.search_qa.settings import SearchQASettings
from atod_gym.errors import DataNotFoundError, InvalidSettingError

PASSAGE = {"id": "0", "contents": "Brenn\nBrenn is a town on Lake Orla."}
QUESTION = {"question": "On which lake does Brenn lie?", "golden_answers": ["Lake Orla"]}


def write(folder: Path, **files: Any) -> Path:
    """Write files; what is no bytes is written as a line of JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def found_corpus(data: Path | str, **settings: Any) -> str:
    option, path = SearchQASettings(data=str(data), **settings).server_arguments()
    assert option == "--corpus"
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.jsonl", PASSAGE),
        ("corpus.jsonl.gz", gzip.compress(b"a tar or whatever else the server reads")),
        ("corpus.json", [PASSAGE]),
        ("wiki-18.jsonl", PASSAGE),
        ("wiki18_100w.jsonl", PASSAGE),
        ("retrieval-corpus/wiki18_100w.jsonl", PASSAGE),
        ("retrieval-corpus/anything.jsonl", PASSAGE),
        ("passages.jsonl", PASSAGE),
        ("beir.jsonl", {"_id": "MED-10", "title": "Brenn", "text": "A town."}),
        ("psgs_w100.tsv", b'id\ttext\ttitle\n1\t"A town."\tBrenn\n'),
        ("psgs_w100.tsv.gz", gzip.compress(b"id\ttext\n1\tA town.\n")),
        ("no_title.json", [{"docid": "1", "text": "A town."}]),
    ],
)
def test_the_corpus_next_to_the_questions(tmp_path: Path, name: str, content: Any) -> None:
    write(tmp_path, **{"nq/test.jsonl": QUESTION, name: content})
    corpus = str((tmp_path / name).resolve())
    assert found_corpus(tmp_path) == corpus
    # Also next to a single file given as data, or next to the folder of its set.
    assert found_corpus(tmp_path / "nq/test.jsonl") == corpus
    assert found_corpus(tmp_path, corpus=str(tmp_path / name)) == corpus


@pytest.mark.parametrize("name", ["c.zip", "psgs.tsv", "corpus", "c.jsonl.bz2"])
def test_any_file_may_be_given_as_corpus(tmp_path: Path, name: str) -> None:
    write(tmp_path / "data", **{"nq/test.jsonl": QUESTION, "corpus.jsonl": PASSAGE})
    write(tmp_path, **{name: b"for the server to read"})
    assert found_corpus(tmp_path / "data", corpus=str(tmp_path / name)) == str(tmp_path / name)


def test_a_usual_name_comes_before_other_passages(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jsonl": PASSAGE, "corpus.jsonl": PASSAGE, "nq/test.jsonl": QUESTION})
    assert found_corpus(tmp_path) == str(tmp_path / "corpus.jsonl")
    (tmp_path / "corpus.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(
        DataNotFoundError, match=r"2 files of passages, .*There: a.jsonl is a corpus; b"
    ):
        found_corpus(tmp_path)


def test_a_corpus_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    name = "retrieval-corpus/wiki18_100w.zip"
    write(tmp_path, **{"nq/test.jsonl": QUESTION, name: b"PK\x03\x04"})
    with pytest.raises(
        DataNotFoundError, match=r"No corpus .*wiki18_100w.zip is a zip archive: un"
    ):
        found_corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", b"PAR1", "train.parquet is parquet: write it as JSON lines"),
        ("corpus.jsonl", PASSAGE, "corpus.jsonl is a corpus"),
        ("passages.json", [PASSAGE], "passages.json is a corpus"),
        (
            "nq/notes.jsonl",
            QUESTION,
            "notes.jsonl is in a folder whose question files must be named",
        ),
        ("nq/test.jsonl", b"version https://git-lfs.github.com", "test.jsonl is a git-lfs pointer"),
    ],
)
def test_a_folder_without_questions_is_described(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    write(tmp_path, **{name: content, "README.md": b"text"})
    with pytest.raises(DataNotFoundError, match=rf"No Search-QA data in .* There: .*{message}"):
        found_corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.zip", b"PK\x03\x04", "test.zip is a zip archive: unpack it"),
        ("nq.parquet", b"PAR1", "nq.parquet is parquet"),
        ("c.jsonl", PASSAGE, "c.jsonl is a corpus, not questions"),
        ("test", b"who?", "test is not JSON lines: it begins with 'who"),
        ("mmlu.jsonl", {**QUESTION, "golden_answers": [0], "choices": ["a", "b"]}, "multiple-ch"),
    ],
)
def test_one_file_without_questions_is_named(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    write(tmp_path, **{name: content, "corpus.jsonl": PASSAGE})
    with pytest.raises(InvalidSettingError, match=message):
        found_corpus(tmp_path / name)


def test_official_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATOD_DATA", raising=False)  # the tests' data, whose place is searched, too
    monkeypatch.setenv("SEARCHQA_DATA", str(tmp_path))
    write(tmp_path, **{"corpus.jsonl": PASSAGE})
    for name, rows in data_set("searchqa").entries.items():
        write(tmp_path, **{name: json.dumps(QUESTION).encode() + b"\n{}" * (rows - 1)})
    assert found_corpus("official") == str(tmp_path / "corpus.jsonl")
    damaged = gzip.compress((json.dumps(QUESTION).encode() + b"\n") * 14_267)[:-9]
    for content, why in ((QUESTION, "has 1 rows, not 14267"), (damaged, "cannot be read: .*")):
        write(tmp_path, **{"popqa/test.jsonl": content})
        with pytest.raises(DataNotFoundError, match=rf"popqa/test.jsonl {why}\. To play .* To get"):
            found_corpus("official")


@pytest.mark.parametrize("server_url", [5, "", "shop", "ftp://h", "http://h/retrieve?x=1"])
def test_wrong_addresses_are_named(server_url: Any, tmp_path: Path) -> None:
    from atod_gym.envs.search_qa.env import SearchQAEnv

    with pytest.raises(InvalidSettingError, match=r"http://127\.0\.0\.1:3000"):
        SearchQAEnv(server_url=server_url, data=write(tmp_path, **{"x.jsonl": QUESTION}))
