"""The tables in the record of studies are those of the raw numbers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from atod_train.reports.analysis import Selection, difference, verdict
from atod_train.reports.results import Results, read_results
from atod_train.reports.tables import (
    Table,
    claims_table,
    difference_table,
    first_pairs,
    main_table,
    phase_table,
)
from atod_train.studies.file import read_study

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "tests/benchmarks/results"
README = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
RECORD = (RESULTS / "README.md").read_text(encoding="utf-8")
ENVIRONMENTS = read_results(sorted(RESULTS.glob("*.json")))
AT_A_GLANCE = (
    "alfworld-close",
    "alfworld-official",
    "alfworld-weak",
    "houses-generated",
    "houses-near",
    "searchqa-generated",
    "searchqa-real",
    "webshop-generated",
    "webshop-official",
)
"""Studies of the table of all claims."""
BY_HAND = (
    "| study | ",
    "| method | ends at, % |",
    "| model | goals without turns left |",
    "| start | best set by hand |",
    "| turn weights | solved",
)
"""First cells of tables that describe studies or repeat numbers of the text."""
STUDIES = sorted((REPOSITORY / "tests/benchmarks/studies").glob("*.toml"))


def glance() -> Table:
    return claims_table([found for found in ENVIRONMENTS if found.name in AT_A_GLANCE])


def tables(environment: Results) -> list[Table]:
    return [main_table(environment), difference_table(environment, first_pairs(environment))]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda found: found.name)
def test_the_record_contains_the_measurements(environment: Results) -> None:
    for table in tables(environment):
        assert table.markdown in RECORD


def test_the_record_shows_all_claims_at_a_glance() -> None:
    assert glance().markdown in RECORD


@pytest.mark.slow
def test_the_findings_count_what_holds() -> None:
    """They count all studies besides the quickstart and one whose setting is gone."""
    others = ("quickstart", "alfworld-constrained")
    studies = [found for found in ENVIRONMENTS if found.name not in others]

    def verdicts(first: str, second: str, least: float = -100.0, most: float = 100.0) -> list[str]:
        found = []
        for study in studies:
            last = Selection(study.modes[-1])
            gap = difference(study, "teacher", "start", last)
            compared = difference(study, first, second, last)
            if compared and gap and least < round(100 * gap.value, 1) <= most:
                found.append(verdict(compared))
        return found

    assert f"In {len(studies)} studies with tiny models besides the quickstart" in README
    assert Counter(verdicts("atod", "opd")) == {"holds": 7, "undecided": 4, "one seed": 1}
    assert "ATOD is above OPD in seven of eleven comparisons**, and below it in none" in README
    close = Counter(verdicts("atod", "teacher", most=13))
    assert close == {"holds": 1, "does not hold": 1, "undecided": 8}
    assert "ten teachers at most 13 points above the start it passes one, stays below one" in README
    assert set(verdicts("atod", "teacher", least=13)) == {"does not hold", "one seed"}
    assert "holds" not in verdicts("opd", "teacher")


@pytest.mark.slow
def test_every_table_of_results_is_of_the_raw_numbers() -> None:
    made = {glance().markdown} | {
        table.markdown
        for found in ENVIRONMENTS
        for table in (
            *tables(found),
            phase_table(found),
            *(main_table(found, split) for split in found.tasks),
        )
    }
    shown = [
        table
        for table in re.findall(r"(?:^\|.*\n)+", RECORD, re.MULTILINE)
        if not table.startswith(BY_HAND)
    ]
    assert shown
    assert set(shown) <= made


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    # A setting of this study is gone, and its file with it.
    [found for found in ENVIRONMENTS if found.name != "alfworld-constrained"],
    ids=lambda found: found.name,
)
def test_results_are_those_of_the_study_files(environment: Results, tmp_path: Path) -> None:
    """Each run has the settings that its study file gives it today."""
    parts = [
        part
        for path in STUDIES
        for part in read_study(path, tmp_path).parts
        if part.name == environment.name
    ]
    assert len(parts) == 1
    configs = {run.label: run.config for run in parts[0].runs}
    for run in environment.runs:
        config = configs[run.label]
        for section in ("algorithm", "train"):
            recorded = run.record[section]
            wanted = vars(getattr(config, section))
            # What is one setting today was two when these runs were made.
            if recorded.get("mean_preserving"):
                recorded = {**recorded, "turn_weights": "mean_preserving"}
            if "anneal_steps" in recorded:
                shape, steps = recorded["shape"], recorded["anneal_steps"]
                takes_steps = shape in ("linear", "cosine")
                recorded = {**recorded, "schedule": f"{shape}:{steps}" if takes_steps else shape}
            for name in ("method", "schedule", "turn_weights", "steps", "lr"):
                assert recorded.get(name) == wanted.get(name)
    for part in environment.parts:
        for name in ("student", "teacher"):
            assert part["model"][name] == getattr(parts[0].config.model, name)
        model = part["model"]
        recorded = (
            model["start"]["epochs"]
            if "start" in model
            else (model["student_epochs"], model["teacher_epochs"])
        )
        assert tuple(recorded) == parts[0].config.start.epochs
