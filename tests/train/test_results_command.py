"""`atod-train results`: tables, one page and pictures from files alone."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import results_files as files
from html_page import Page

from atod_train.cli import main
from atod_train.reports.figures import METHOD_COLOURS, styles
from atod_train.reports.results import read_results

LABELS = ("atod", "opd", "grpo", "mix", "tcod", "adaptive", "exact", "constant", "uniform")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two parts of one environment; a second environment is in the first alone."""

    def record(label: str, seed: int, solved: str) -> dict:
        greedy = [[1, 0.25], [2, 0.5], [3, solved.count("1") / 4]]
        last = {"s": solved, "t": "01"}
        course = dict.fromkeys(files.evaluations(last), greedy[2:]) | {"s/greedy": greedy}
        return files.run(label, seed, last, course=course)

    still = {"start": {"s": "0001", "t": "01"}, "teacher": {"s": "1110", "t": "11"}}
    houses = [
        files.environment(
            [record("atod", seed, "1101"), record("<opd>", seed, "0101")],
            time=f"2026-01-0{seed + 1}",
            **still,
        )
        for seed in (0, 1)
    ]
    shop = files.environment([record("atod", 0, "1111")], **still)
    return [
        files.write(tmp_path / "1.json", houses=houses[0], shop=shop),
        files.write(tmp_path / "2.json", houses=houses[1]),
    ]


def test_tables_are_printed(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", *map(str, parts)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## houses", "## shop", "## All environments"
    ]  # fmt: skip
    assert "| atod > <opd> | +16.7 [+0.0, +50.0] undecided | – |" in printed  # noqa: RUF001
    assert "| atod > <opd> | 2 | +16.7 [+0.0, +50.0] | undecided |" in printed
    assert "s: tasks solved" not in printed
    assert "atod ends highest and solves 66.7 % [33.3, 100.0] of 6 tasks after step 3" in printed
    pair = ["--pair", "atod", "start", "--splits"]
    assert main(["results", *map(str, parts), *pair]) == 0
    printed = capsys.readouterr().out
    assert "| atod > start | 2 |" in printed
    assert "| atod > <opd> |" not in printed
    assert "s: tasks solved" in printed


def test_a_reader_that_leaves_causes_no_error(parts: list[Path]) -> None:
    words = [sys.executable, "-m", "atod_train.cli", "results", *map(str, parts)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


@pytest.mark.slow
def test_page_and_pictures_are_written(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["results", *map(str, parts), "--out", str(out)]) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert all(target.startswith("#") for target in page.attributes("href"))
    assert all(source.startswith("data:image/png;") for source in page.attributes("src"))
    assert all(len(alt) > 20 for alt in page.attributes("alt"))
    rows = {tuple(row[:3]) for row in page.rows}
    assert ("atod", "2", "66.7 [33.3, 100.0]") in rows
    assert any(row[0] == "<opd>" for row in page.rows)
    assert "2026-01-01, 2026-01-02" in page.text
    for name in ("houses-success", "houses-signals", "shop-success", "shop-signals"):
        picture = (out / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        width, _ = struct.unpack(">II", picture[16:24])
        assert 1100 < width < 1140
        assert len(picture) < 120_000


def test_nine_labels_are_distinguishable(tmp_path: Path) -> None:
    record = files.environment(
        [files.run(label, 0, {"s": "01"}) for label in LABELS],
        start={"s": "00"},
        teacher={"s": "11"},
    )
    [environment] = read_results([files.write(tmp_path / "r.json", houses=record)])
    looks = styles(environment)
    assert list(looks) == list(LABELS)
    assert len({look.colour for look in looks.values()}) == 9
    assert len({look.marker for look in looks.values()}) == 9
    assert looks["tcod"].colour == METHOD_COLOURS["tcod"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["{folder}/none.json"], "cannot be read", id="no-file"),
        pytest.param(["{folder}/1.json", "{folder}/1.json"], "give each run once", id="twice"),
        pytest.param(["{folder}/1.json", "--pair", "atod", "odd"], "no 'odd'; known", id="pair"),
        pytest.param(
            ["{folder}/2.json", "--out", "{folder}/1.json"], "cannot be written", id="no-folder"
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    parts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["results", *(text.format(folder=tmp_path) for text in arguments)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("atod-train: error: ")
    assert message in line
