"""The tables of results in the README are those of the raw numbers beside the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from atod_train.cli import _parsed
from atod_train.study_file import read_study
from atod_train.study_markdown import TextTable, difference_table, first_pairs, main_table
from atod_train.study_pieces import StudyEnvironment, read_results

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENTS = read_results(sorted((REPOSITORY / "tests/benchmarks/results").glob("*.json")))
STUDIES = sorted((REPOSITORY / "tests/benchmarks/studies").glob("*.toml"))


def tables(environment: StudyEnvironment) -> list[TextTable]:
    return [main_table(environment), difference_table(environment, first_pairs(environment))]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda found: found.name)
def test_the_readme_says_what_was_measured(environment: StudyEnvironment) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for table in tables(environment):
        assert table.markdown in readme


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda found: found.name)
def test_results_are_those_of_the_study_files(
    environment: StudyEnvironment, tmp_path: Path
) -> None:
    """Each run has the settings that its study file gives it today."""
    parts = [
        part
        for path in STUDIES
        for part in read_study(path, tmp_path, _parsed)
        if part.name == environment.name
    ]
    assert len(parts) == 1
    configs = {run.config.study.label: run.config for run in parts[0].runs}
    for run in environment.runs:
        config = configs[run.label]
        for section in ("algorithm", "train"):
            recorded = run.record[section]
            wanted = vars(getattr(config, section))
            for name in ("method", "shape", "anneal_steps", "turn_weights", "steps", "lr"):
                assert recorded.get(name) == wanted.get(name)
    for piece in environment.pieces:
        for name in ("student", "teacher", "student_epochs", "teacher_epochs"):
            assert piece["model"][name] == getattr(parts[0].config.model, name)
