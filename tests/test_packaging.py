"""Check the install commands in all texts: `atod` on the package index is another project."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# The project as a distribution (`atod[extra]`), not `atod-gym`, `atod_gym` or `atod/..`.
OLD_NAME = re.compile(
    r"""pip install [^\n]*(?<![\w./-])atod(?![\w/-])|(?<![\w-])atod\\?\[|version\(.atod.\)"""
)


def test_no_file_says_to_install_another_project() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found = []
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if path.suffix not in {".py", ".md", ".toml", ".html", ".txt"} or path == Path(__file__):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{name}:{i}: {line}" for i, line in enumerate(lines, 1) if OLD_NAME.search(line)]
    assert found == []


def test_the_old_name_would_be_found() -> None:
    for text in (
        "pip install atod",
        "pip install 'atod[train]'",
        r"atod\[eval\]",
        'version("atod")',
    ):
        assert OLD_NAME.search(text), text
    for text in ("pip install 'atod-gym[train]'", "atod/ALFWorld-v0", "atod_gym[0]", "atod.py"):
        assert not OLD_NAME.search(text), text


def test_the_installed_distribution_has_our_name() -> None:
    assert metadata.version("atod-gym") == "0.2.0"
