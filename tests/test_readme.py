"""The README's promises that a test can hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


ELSEWHERE = ("from trl import", "adapters.openenv import")
"""Snippets that need a package or a server: tests/adapters runs them."""


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("**/README.md")), ids=str)
def test_every_snippet_of_python_runs(
    path: Path, capsys: pytest.CaptureFixture[str], no_user_data: None
) -> None:
    for snippet in _blocks("python", path.read_text(encoding="utf-8")):
        if not any(mark in snippet for mark in ELSEWHERE):
            exec(compile(snippet, str(path), "exec"), {})


def test_the_first_example_is_eight_lines_and_runs(
    capsys: pytest.CaptureFixture[str], no_user_data: None
) -> None:
    example = _blocks("python")[0]
    assert len(example.strip().splitlines()) <= 8
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_first_screen_has_the_two_commands() -> None:
    first_screen = README.split("\n## ")[0] + README.split("\n## ")[1]
    assert "atod-train quickstart" in first_screen
    assert "pytest" in first_screen


def test_every_benchmark_and_script_named_exists() -> None:
    for path in re.findall(r"tests/benchmarks/\w+\.py", README):
        assert (REPOSITORY / path).is_file(), path


def test_every_preset_named_exists() -> None:
    presets = pytest.importorskip("atod_train.presets")
    for name in re.findall(r"atod-train ([a-z][\w-]+)", README):
        assert (
            name in ("quickstart", "doctor", "resume", "serve-teacher", "study", "results")
            or name in presets.PRESETS
        ), name


def test_the_file_tree_names_files_that_exist() -> None:
    tree = next(block for block in _blocks("text") if "atod_gym/" in block)
    for name in re.findall(r"[\w-]+\.(?:py|md|toml)\b", tree):
        assert list(REPOSITORY.rglob(name)), name
