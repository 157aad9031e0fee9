"""Corpus files of tab-separated lines, plain and with fields in quotation marks."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_servers.retrieval.corpus import Passage
from env_servers.retrieval.corpus_files import LeftOut, read_corpus


def read(path: Path) -> tuple[list[Passage], LeftOut]:
    left_out = LeftOut()
    return list(read_corpus(path, left_out)), left_out


def read_bytes(folder: Path, content: bytes) -> list[Passage]:
    path = folder / "corpus.tsv"
    path.write_bytes(content)
    passages, left_out = read(path)
    assert not left_out.counts
    return passages


def test_tables_of_dpr_are_read(tmp_path: Path) -> None:
    rows = (
        "id\ttext\ttitle\r\n"
        '1\t"Aaron ( or ; ""Ah\u00e4r\u00f4n"") is a prophet."\tAaron\r\n'
        "2\tplain\t\r\n\r\n"
        '3\t"two\nlines"\tT\r\n'
    )
    expected = [
        Passage("1", '"Aaron"\nAaron ( or ; "Ah\u00e4r\u00f4n") is a prophet.'),
        Passage("2", '""\nplain'),
        Passage("3", '"T"\ntwo\nlines'),
    ]
    assert read_bytes(tmp_path, rows.encode()) == expected
    assert read_bytes(tmp_path, gzip.compress(b"\xef\xbb\xbf" + rows.encode())) == expected
    assert read_bytes(tmp_path, b'\n"text"\tdocid\nx\t8\n') == [Passage("8", '""\nx')]
    path = tmp_path / "table"
    path.write_bytes(b"id\ttext\n1\t\xc3\xa9\n2\n3\t\xff\n4\tb\n5\t" + b"x" * 200_000 + b"\n6\tc\n")
    passages, left_out = read(path)
    assert [passage.id for passage in passages] == ["1", "4", "5", "6"]
    assert left_out.counts == {
        "with another number of columns than the header": 1, "not in UTF-8": 1,
    }  # fmt: skip
    assert left_out.first == "line 3"


def test_a_quotation_mark_that_is_not_closed_swallows_no_row(tmp_path: Path) -> None:
    texts = [
        '"To be or not to be, he wrote', "Plain.", 'He said "yes" and went.', '"Yesterday" is',
        '"', '""', 'ends"', '"all of it"', '"""',
    ]  # fmt: skip
    table = "id\ttext\ttitle\n" + "".join(f"{n}\t{text}\tT\n" for n, text in enumerate(texts))
    found = read_bytes(tmp_path, f'{table}\n9\tlast\t"T'.encode())
    texts[5], texts[7] = "", "all of it"
    expected = [(str(n), f'"T"\n{text}') for n, text in enumerate(texts)]
    assert found == [*expected, ("9", '""T"\nlast')]


_CELLS = st.text(st.sampled_from('a"" '), max_size=4)
_COLUMNS = st.permutations(["id", "text", "title"])


@pytest.mark.slow
@given(
    _COLUMNS, st.lists(st.tuples(_CELLS, _CELLS), max_size=6), st.lists(st.integers(1, 5)),
    st.sampled_from(["\n", "\r\n"]),
)  # fmt: skip
def test_all_rows_of_plain_tables_are_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str],
    rows: list[tuple[str, str]], lengths: list[int], ending: str,
) -> None:  # fmt: skip
    table = ["\t".join(columns)]
    for number, (text, title) in enumerate(rows):
        row = {"id": f"r{number}", "text": text, "title": title}
        table.append("\t".join(row[name] for name in columns))
    table += ["\t".join(["x"] * length) for length in lengths if length != 3]
    path = tmp_path_factory.getbasetemp() / "plain.tsv"
    path.write_text(ending.join(table) + ending, newline="")
    passages, left_out = read(path)
    assert [passage.id for passage in passages] == [f"r{number}" for number in range(len(rows))]
    assert left_out.counts.total() == len(table) - 1 - len(rows)


@pytest.mark.slow
@given(
    _COLUMNS, st.sampled_from("\t\n"), st.lists(st.lists(_CELLS, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)  # fmt: skip
def test_tables_of_the_csv_module_are_read(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], inner: str,
    rows: list[list[str]], ending: str, quoting: Any,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "quoted.tsv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, columns, delimiter="\t", lineterminator=ending, quoting=quoting
        )
        writer.writeheader()
        expected = []
        for number, parts in enumerate(rows):
            text = inner.join(parts)
            writer.writerow({"id": f"r{number}", "text": text, "title": "T"})
            expected.append(Passage(f"r{number}", f'"T"\n{text}'))
    passages, left_out = read(path)
    assert (passages, left_out.counts.total()) == (expected, 0)
