"""`atod-train study FILE` makes the runs of a study; `atod-train results FILE ..` looks at them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atod_gym.errors import AtodError
from atod_train.reports.report import write_report
from atod_train.reports.results import (
    REFERENCES,
    RESULTS_FILE,
    Results,
    ResultsError,
    finished_runs,
    read_results,
    results_of,
    write_results,
)
from atod_train.reports.run_summary import RunSummary
from atod_train.reports.tables import all_tables, as_text, claims_table, describe

if TYPE_CHECKING:
    from atod_train.studies.file import ParseArguments, StudyPart


def study(arguments: Sequence[str], parse: ParseArguments) -> None:
    """Makes the runs of a study file, or goes on with them, and writes results and report.

    Args:
        arguments: the command line after `study`.
        parse: reads settings as the command line has them.

    Raises:
        AtodError: a setting, file or environment that cannot be used; the message says what to do.
        StoppedByUser: after Ctrl-C; the results of finished runs are there.
    """
    from atod_train.distributed import is_main_process
    from atod_train.studies.file import Selection, read_study

    options = _study_parser().parse_args(arguments)
    out = options.out or Path("runs") / options.file.stem
    selection = Selection(options.seeds, options.environments, options.runs, options.jobs)
    parts = read_study(options.file, out, parse, selection)
    if not options.results_only:
        _train(parts, out)
    if not is_main_process():
        return
    finished = _write_results(parts, out)
    if not finished:
        raise AtodError(f"No run of {options.file} in {out} has finished; there are no results.")
    environments = [results_of(name, runs) for name, runs in finished.items()]
    report = write_report(out, environments, finished, pictures=True)
    print(f"results: {out / RESULTS_FILE}\nreport of the study: {report}")


def _study_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atod-train study",
        description="Make the runs of a study file, or go on with them; "
        "the format is described in atod_train/studies/file.py.",
    )
    parser.add_argument("file", type=Path, help="TOML file")
    parser.add_argument("--out", type=Path, help="folder (default: runs/<name of the file>)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="these seeds, not those of the file"
    )
    parser.add_argument(
        "--environments", nargs="+", metavar="NAME", help="only these environments of the file"
    )
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only these runs of the file")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time")
    parser.add_argument(
        "--results-only",
        action="store_true",
        help="train nothing; write results and report of the runs that have finished",
    )
    return parser


def _train(parts: Sequence[StudyPart], out: Path) -> None:
    """Makes the selected runs; results of those that finish are written in any case."""
    from atod_train.distributed import is_main_process
    from atod_train.studies.study import make_runs

    for part in parts:
        if not part.runs:
            continue
        try:
            make_runs(part.config, part.runs, part.folder)
        finally:
            if is_main_process():
                finished = _write_results(parts, out)
        if is_main_process():
            results = results_of(part.name, finished[part.name])
            print(f"\n{part.name}\n{as_text(all_tables(results, by_split=True))}")


def _write_results(parts: Sequence[StudyPart], out: Path) -> dict[str, list[RunSummary]]:
    """Write results.json from all finished runs in the folder; return them by environment."""
    finished = {}
    for part in parts:
        runs, left_out = finished_runs(part.folder, part.settings)
        if runs:
            finished[part.name] = runs
        for line in left_out:
            print(f"not in the results: {line}", file=sys.stderr)
    write_results(out / RESULTS_FILE, finished)
    return finished


def results(arguments: Sequence[str]) -> int:
    """Prints the tables of results files; returns the exit code (2: a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="atod-train results",
        description="Print the tables of a study as Markdown, from the results.json of all its "
        "parts. Each (file, seed) is one replicate; intervals are 95 % bootstrap intervals over "
        "replicates and tasks.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="results files")
    parser.add_argument("--out", type=Path, help="also write report.html and figures (PNG) here")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("A", "B"),
        help="ask whether A solves more than B; may be repeated (default: the first run with each "
        "other one); start and teacher are allowed",
    )
    parser.add_argument("--splits", action="store_true", help="a table for each split too")
    options = parser.parse_args(arguments)
    try:
        environments = read_results(options.files)
        pairs = [(a, b) for a, b in options.pair]
        _check_pairs(pairs, environments)
        for environment in environments:
            print(f"## {environment.name}\n\n{describe(environment)}\n")
            for table in all_tables(environment, pairs, by_split=options.splits):
                print(f"{table.title}:\n\n{table.markdown}")
        if len(environments) > 1:
            claims = claims_table(environments, pairs)
            print(f"## All environments\n\n{claims.title}:\n\n{claims.markdown}")
        if options.out:
            print(f"report: {write_report(options.out, environments, pictures=True)}")
    except (AtodError, OSError) as error:
        print(f"atod-train: error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_pairs(pairs: Sequence[tuple[str, str]], environments: Sequence[Results]) -> None:
    known = dict.fromkeys(label for environment in environments for label in environment.labels)
    names = (*known, *REFERENCES)
    for name in (name for pair in pairs for name in pair):
        if name not in names:
            raise ResultsError(f"--pair: there is no {name!r}; known: {', '.join(names)}.")
