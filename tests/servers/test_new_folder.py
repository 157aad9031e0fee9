"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
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
        # As if it had been at work for long.
        os.utime(slow, (0, 0))
        (slow / "file").write_text("slow")
        os.utime(slow, (0, 0))
        with new_folder(folder) as fast:
            assert (slow / "file").exists()
            (fast / "file").write_text("fast")
        assert (folder / "file").read_text() == "fast"
    assert (folder / "file").read_text() == "fast"
    assert os.listdir(tmp_path) == ["x"]


def test_what_was_left_behind_is_deleted(tmp_path: Path) -> None:
    names = [".[x]-partial-old", ".[x]-partial-young", ".x-partial-old", "[x]-partial-old"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
        if name.endswith("old"):
            os.utime(tmp_path / name, (0, 0))
    with new_folder(tmp_path / "[x]"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(["[x]", *names[1:]])
