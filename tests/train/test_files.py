"""JSON, JSON lines and files that are replaced whole."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from atod_train.files import (
    FileError,
    end_last_line,
    read_json,
    read_json_lines,
    replacing,
    write_json,
)


def test_torn_last_lines_are_left_out_and_other_broken_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = json.dumps({"text": "one\rline\u2028 and\x0b none more"}, ensure_ascii=False).encode()
    for end, left in ((b"", 2), (b"\n", 2), (b'\n{"a": 1', 2), (b'\n{"a": "\xc3', 2)):
        path.write_bytes(b'{"a": 0}\n\n' + whole + end)
        assert len(list(read_json_lines(path))) == left, end
    with pytest.raises(FileError, match=r"line 4 of .*lines\.jsonl is broken"):
        list(read_json_lines(path, required=True))
    for broken in (b"torn\n{}\n", b"[1]\n"):
        path.write_bytes(broken)
        with pytest.raises(FileError, match="line 1 of"):
            list(read_json_lines(path))
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []
    with pytest.raises(FileError, match="No such file"):
        list(read_json_lines(tmp_path / "none.jsonl", required=True))


@pytest.mark.parametrize("end", [b"", b"\n", b'{"a": 1', b'{"a": 1}'])
def test_lines_appended_after_a_torn_one_are_whole(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n' + end)
    before = list(read_json_lines(path))
    end_last_line(path)
    with path.open("ab") as file:
        file.write(b'{"a": 2}\n')
    assert list(read_json_lines(path, required=True)) == [*before, {"a": 2}]


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"a": float("inf"), "b": (1, float("nan"))})
    assert read_json(path) == {"a": None, "b": [1, None]}
    with pytest.raises(UnicodeEncodeError), replacing(path, sync=True) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    assert read_json(path) == {"a": None, "b": [1, None]}
    with replacing(path, sync=True) as partial:
        partial.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_files_are_readable_for_those_that_the_umask_allows(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "weights") as partial:
            private(partial)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == 0o640
