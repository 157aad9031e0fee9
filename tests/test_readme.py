"""Promises of the READMEs that a test can hold: snippets, links, names and sizes."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FOLDERS = ("atod_gym", "atod_train", "env_servers", "tests")
GUIDES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("README.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *GUIDES]
ELSEWHERE = ("from trl import", "adapters.openenv import") + ("to_dataset",) * (
    find_spec("datasets") is None
)
"""Snippets that need a package or a server: tests/adapters runs them."""
NO_SETTINGS = {"env.step", "train.parquet", "--env.taskset"}
"""Names that look like settings; the last are flags of verifiers."""

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES]
)


def _blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@every_page
def test_snippets_of_python_run(
    page: Path, capsys: pytest.CaptureFixture[str], no_user_data: None
) -> None:
    for snippet in _blocks("python", page.read_text(encoding="utf-8")):
        if not any(mark in snippet for mark in ELSEWHERE):
            exec(compile(snippet, str(page), "exec"), {})


@every_page
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@every_page
def test_scripts_and_commands_that_are_named_exist(page: Path) -> None:
    presets = pytest.importorskip("atod_train.presets").PRESETS
    commands = {"doctor", "resume", "serve-teacher", "study", "results", *presets}
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"tests/\w+/\w+\.py", text):
        assert (REPOSITORY / path).is_file(), path
    for name in re.findall(r"atod-train ([a-z][\w-]+)", text):
        assert name in commands, name
    for module in re.findall(r"python -m (atod_\w+(?:\.\w+)+)", text):
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").is_file(), module


@every_page
def test_settings_that_are_named_exist(page: Path) -> None:
    config = pytest.importorskip("atod_train.config").RunConfig()
    text = page.read_text(encoding="utf-8")
    sections = "env|model|start|algorithm|train"
    flags = re.findall(rf"--(?:{sections})\.[\w-]+", text)
    names = re.findall(rf"`((?:{sections})\.\w+)`", text)
    for setting in {*flags, *names} - NO_SETTINGS:
        section, _, name = setting.removeprefix("--").replace("-", "_").partition(".")
        assert hasattr(getattr(config, section), name), setting


def test_the_files_of_the_contributing_table_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("\n## Where a change goes\n")[2].partition("\n## ")[0]
    files = {str(path) for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.*")}
    for name in re.findall(r"`([\w/]+\.(?:py|j2|toml))`", table):
        if "NAME" not in name:
            assert any(path.endswith(f"/{name}") for path in files), name


@pytest.mark.parametrize("guide", GUIDES, ids=[path.parent.name for path in GUIDES])
def test_a_long_guide_has_a_table_of_contents(guide: Path) -> None:
    text = _prose(guide)
    if len(text.splitlines()) > 150:
        linked = set(re.findall(r"\]\(#([^)]+)\)", text.split("\n## ")[0]))
        sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
        missing = [
            title
            for title in sections
            if re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") not in linked
        ]
        assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_first_example_has_at_most_ten_lines(
    capsys: pytest.CaptureFixture[str], no_user_data: None
) -> None:
    example = _blocks("python", README)[0]
    assert len(example.strip().splitlines()) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_first_screen_has_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:35])
    assert "&& .venv/bin/atod-train quickstart\n" in first_screen
    assert "&& .venv/bin/python -m pytest\n" in first_screen


def test_the_table_of_where_to_read_names_what_its_files_define() -> None:
    section = README.partition("\n## Where to read\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|.*\]\((\S+\.py)\) \| (.*) \|$", section, flags=re.MULTILINE)
    assert {"Schedule", "turn_weights", "collect", "update_policy"} <= set(
        re.findall(r"`(\w+)`", section)
    )
    for path, names in rows:
        assert set(re.findall(r"`(\w+)`", names)) <= _definitions(REPOSITORY / path), path


def test_the_findings_are_in_the_record_of_studies() -> None:
    record = REPOSITORY / "tests/benchmarks/results/README.md"
    findings = README.partition("\n## Findings\n")[2].partition("\n## ")[0]
    intervals = re.findall(r"\[[+-][\d.]+, [+-][\d.]+\]", findings)
    assert intervals
    for interval in intervals:
        assert interval in record.read_text(encoding="utf-8"), interval


def test_the_citation_names_this_version_and_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    paper = citation["preferred-citation"]
    assert paper["title"] in README
    assert "2606.27814" in paper["url"]
