"""`atod-train study FILE` makes the runs of a study; `atod-train results FILE ..` looks at them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atod_gym.errors import AtodError
from atod_train.reports.report import write_report
from atod_train.reports.results import REFERENCES, Results, ResultsError, read_results
from atod_train.reports.tables import all_tables, claims_table, describe


def study(arguments: Sequence[str]) -> None:
    """Make the runs of a study file, or continue them, and write results and report.

    Args:
        arguments: the command line after `study`.

    Raises:
        AtodError: a setting, file or environment that cannot be used; the message says what to do.
        StoppedByUser: after Ctrl-C; the results of finished runs are there.
    """
    from atod_train.studies.file import Selection, read_study
    from atod_train.studies.study import report_study, run_study

    options = _study_parser().parse_args(arguments)
    out = options.out or Path("runs") / options.file.stem
    selection = Selection(options.seeds, options.environments, options.runs, options.jobs)
    study = read_study(options.file, out, selection)
    if options.results_only:
        report_study(study, out)
    else:
        run_study(study, out, options.resume)


def _study_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atod-train study",
        description="Make the runs of a study file; its format: atod_train/studies/file.py.",
    )
    parser.add_argument("file", type=Path, help="TOML file")
    parser.add_argument("--out", type=Path, help="folder (default: runs/<name of the file>)")
    parser.add_argument("--resume", action="store_true", help="continue runs that the folder holds")
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
