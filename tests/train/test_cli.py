"""The commands of `atod-train` and the settings of a run, as a user finds them."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from atod_train import config
from atod_train.cli import main
from atod_train.config import RunConfig
from atod_train.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "tests/benchmarks/results/quickstart-1.json"
COMMANDS = (*PRESETS, "study", "resume", "results", "doctor", "serve-teacher")


def _help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_the_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    for name in COMMANDS:
        assert re.search(rf"• {name} \w+", text), name
    assert "--version" in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"atod-train {metadata.version('atod-gym')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_each_of_its_arguments(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _help(capsys, name)
    flags = re.split(r" (?=--[a-z])", text.partition("show this help message")[2])[1:]
    assert flags or name == "resume"
    for flag in flags:
        assert re.search(r"[a-z]{2,} [a-z]{2,}", flag), flag


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom atod_train.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "atod_train.cli:main --help",
        "atod_train.cli:main --version",
        "atod_train.cli:main doctor",
        f"atod_train.cli:main results {RESULTS}",
        "atod_train.evaluation.eval_cli:main --help",
        "atod_train.evaluation.eval_cli:main --agent random --split valid_seen --tasks 1",
        "atod_gym.datasets.cli:main --help",
        "atod_gym.datasets.cli:main list",
        "atod_gym.play:main --help",
        "atod_gym.play:main --data generated",
    ],
)
def test_a_reader_that_leaves_is_no_error(command: str, tmp_path: Path) -> None:
    main_function, *words = command.split()
    module, function = main_function.split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert not re.search("Errno|Exception|Traceback|server is running", done.stderr)


def test_a_command_that_is_unknown_is_answered_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["quickstrat"])
    assert end.value.code == 2
    assert "serve-teacher" in capsys.readouterr().err


def _settings(kind: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        name = f"{prefix}{field.name}"
        found += _settings(hint, f"{name}.") if is_dataclass(hint) else [name]
    return found


def test_settings_are_few_and_each_is_explained() -> None:
    assert len(_settings(RunConfig)) + len(("out", "log", "resume")) <= 48
    for section in ast.parse(inspect.getsource(config)).body:
        if not (isinstance(section, ast.ClassDef) and section.name != "RunConfig"):
            continue
        for field, text in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr), ast.unparse(field)
                assert isinstance(text.value, ast.Constant), ast.unparse(field)
                assert len(str(text.value.value).split()) >= 8, ast.unparse(field)
