"""JSON, JSON lines and files that are replaced whole."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
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


_KILLED = """
import os, shutil, sys
from pathlib import Path
from atod_train.files import replacing_folder
target, left, identity = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def counted(function):
    def call(*arguments, **settings):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return function(*arguments, **settings)
    return call

for owner, name in (
    (os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "mkdir")
):
    setattr(owner, name, counted(getattr(owner, name)))
with replacing_folder(target, "config", last="*.weights") as partial:
    partial.mkdir()
    for file in ("config", "new", "a.weights"):
        (partial / file).write_text(identity)
"""


@pytest.mark.slow
@pytest.mark.parametrize("identity", ["old", "new"])
def test_a_killed_save_leaves_nothing_behind(identity: str, tmp_path: Path) -> None:
    """Killed before each operation on files; saving again leaves exactly the complete folder."""
    for left in range(100):
        folder = tmp_path / str(left)
        target = folder / "model"
        target.mkdir(parents=True)
        for name in ("config", "stale", "a.weights"):
            (target / name).write_text("old")
        command = [sys.executable, "-c", _KILLED, str(target)]
        killed = subprocess.run([*command, str(left), identity], check=False)
        alive = [path for path in folder.iterdir() if (path / "a.weights").is_file()]
        assert alive
        subprocess.run([*command, "-1", identity], check=True)
        assert {path.name for path in folder.iterdir()} == {"model", ".lock"}
        assert {path.name for path in target.iterdir()} == {"config", "new", "a.weights"}
        assert all(path.read_text() == identity for path in target.iterdir())
        if killed.returncode == 0:
            break
        assert killed.returncode == 9
    assert left >= 5


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
