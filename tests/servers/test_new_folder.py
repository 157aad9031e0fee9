"""Check that new folders are complete or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from env_servers.new_folder import new_folder


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "[x]*"
    with new_folder(folder) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("content")
        assert not folder.exists()
    assert (folder / "deep" / "file").read_text() == "content"
    assert os.listdir(folder.parent) == ["[x]*"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fill()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file" / "below"):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_the_first_of_two_stays(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with new_folder(folder) as slow:
        (slow / "file").write_text("slow")
        with new_folder(folder) as fast:
            assert (slow / "file").exists()
            (fast / "file").write_text("fast")
        assert (folder / "file").read_text() == "fast"
    assert (folder / "file").read_text() == "fast"
    assert os.listdir(tmp_path) == ["x"]


def test_files_left_by_a_killed_process_are_deleted(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from env_servers.new_folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').write_text('half'); print(flush=True); sys.stdin.read()\n"
    )
    folder, other = tmp_path / "[x]", tmp_path / "x"
    makers = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for path in (folder, folder, other)
    ]  # fmt: skip
    for maker in makers:
        assert maker.stdout is not None
        maker.stdout.readline()
    assert len(list(tmp_path.glob("*/file"))) == 3
    for maker in makers[1:]:
        maker.kill()
        maker.wait()
    with new_folder(folder) as partial:
        (partial / "file").write_text("whole")
    # Left are the one that is still being filled, and what belongs to another folder.
    assert len(list(tmp_path.glob(".[[]x]-partial-*/file"))) == 1
    assert len(list(tmp_path.glob(".x-partial-*/file"))) == 1
    makers[0].communicate("")
    assert (folder / "file").read_text() == "whole"
    assert not list(tmp_path.glob(".[[]x]-partial-*"))
    for maker in makers[1:]:
        maker.communicate()
