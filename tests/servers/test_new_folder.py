"""Check that new folders are complete or absent, and made once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from env_servers import new_folder as module
from env_servers.new_folder import new_folder


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "[x]*"
    with new_folder(folder) as partial:
        assert partial is not None
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("content")
        assert not folder.exists()
    assert (folder / "deep" / "file").read_text() == "content"
    assert os.listdir(folder.parent) == ["[x]*"]
    assert folder.stat().st_mode & 0o777 == 0o755
    with new_folder(folder) as second:
        assert second is None


def test_an_error_leaves_only_the_lock(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "x") as partial:
            assert partial is not None
            (partial / "file").write_text("half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fill()
    assert os.listdir(tmp_path) == [".x.lock"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file" / "below"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".x.lock", "file"]


def test_of_several_at_once_one_fills_it_and_the_others_report_their_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.05)
    caplog.set_level(logging.WARNING, logger="env_servers")
    is_filling, filled = threading.Event(), []

    def make(_: int) -> None:
        with new_folder(tmp_path / "x") as partial:
            if partial is not None:
                is_filling.set()
                threading.Event().wait(0.15)
                (partial / "file").write_text("whole")
                filled.append(partial)
        assert (tmp_path / "x" / "file").read_text() == "whole"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(make, range(3)))
    assert len(filled) == 1
    assert os.listdir(tmp_path) == ["x"]
    assert caplog.text.count(f"Waiting for another process that is making {tmp_path / 'x'}") >= 2


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
        for path in (folder, other)
    ]  # fmt: skip
    for maker in makers:
        assert maker.stdout is not None
        maker.stdout.readline()
    assert len(list(tmp_path.glob("*/file"))) == 2
    for maker in makers:
        maker.kill()
        maker.communicate()
    with new_folder(folder) as partial:
        assert partial is not None
        assert os.listdir(partial) == []
        (partial / "file").write_text("whole")
    # What belongs to another folder is left.
    assert sorted(os.listdir(tmp_path)) == [".x-partial", ".x.lock", "[x]"]
