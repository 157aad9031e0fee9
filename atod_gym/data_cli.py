"""`atod-data`: fetches the official data sets, and looks whether they are whole."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atod_gym.data_catalogue import DATA_SETS, DataSet, data_set, is_there
from atod_gym.data_checks import lines_of, verify
from atod_gym.data_get import MIRROR_VARIABLE, Wishes, get
from atod_gym.download_progress import Progress, human_bytes
from atod_gym.errors import AtodError, DownloadError
from atod_gym.part_files import part_of

_ALL = "all"
_EPILOG = f"""\
Data sets: {", ".join(known.name for known in DATA_SETS)}.

A mirror holds each file as <data set>/<file name>. The variables https_proxy and
no_proxy count as usual, and HF_ENDPOINT in place of https://huggingface.co.
Exit status: 0 all is well, 1 something is missing, damaged or could not be had,
2 a mistake in the command, 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status, as the help says; what is wrong stands in one line on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except AtodError as error:
        print(f"atod-data: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, DownloadError) else 2
    except KeyboardInterrupt:
        print(
            "\natod-data: interrupted. What has come is kept; the same command goes on.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # Whoever read the output has left; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atod-data",
        description="Fetch the official data sets, and look whether they are whole.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="list|get|verify")
    listed = commands.add_parser("list", help="say what there is, and what of it is here")
    listed.set_defaults(run=_list)
    fetched = commands.add_parser("get", help="download, unpack and verify")
    fetched.set_defaults(run=_get)
    verified = commands.add_parser("verify", help="look for missing and damaged files")
    verified.set_defaults(run=_verify)
    for command in (listed, fetched, verified):
        command.add_argument(
            "--to",
            "--in",
            dest="folder",
            metavar="FOLDER",
            help="folder of the data (webshop-full: webshop-full in it); default: where the "
            "environments find it, else ~/.cache/<name>",
        )
    for command in (listed, verified):
        command.add_argument("--json", action="store_true", help="print JSON for programs")
    for command in (fetched, verified):
        command.add_argument("--quiet", action="store_true", help="show no progress")
    fetched.add_argument("names", nargs="+", metavar="NAME", help="data set, or all")
    fetched.add_argument(
        "--mirror",
        default=os.environ.get(MIRROR_VARIABLE) or None,
        metavar="URL_OR_FOLDER",
        help=f"take the files from there (default: ${MIRROR_VARIABLE}, else the official places)",
    )
    fetched.add_argument("--force", action="store_true", help="fetch again what is there")
    fetched.add_argument(
        "--accept-other",
        action="store_true",
        help="take files whose hash or number of entries is not the known one",
    )
    verified.add_argument(
        "names", nargs="*", metavar="NAME", help="data set, or all (default: what is here)"
    )
    verified.add_argument("--deep", action="store_true", help="count the passages of the corpus")
    return parser


def _chosen(names: Sequence[str]) -> tuple[DataSet, ...]:
    if _ALL in names:
        return DATA_SETS
    return tuple(dict.fromkeys(data_set(name) for name in names))


def _state(data: DataSet, folder: Path) -> str:
    """How much is there, by names and without reading anything."""
    there = [is_there(folder, place) for place in data.places]
    if all(there):
        return "there"
    if any(there):
        return f"{sum(there)} of {len(there)} files"
    aside = (folder / ".atod-downloads" / file.name for file in data.files)
    begun = [part_of(folder / file.name) for file in data.files]
    begun += [path for one in aside for path in (one, part_of(one))]
    size = sum(path.stat().st_size for path in begun if path.is_file())
    return f"begun, {human_bytes(size)}" if size else "not there"


def _list(options: argparse.Namespace) -> int:
    rows = []
    for data in DATA_SETS:
        folder = data.folder(options.folder)
        rows.append((data, folder, _state(data, folder)))
    if options.json:
        print(json.dumps([_row(*row) for row in rows], indent=1))
        return 0
    wide = max(len(data.name) for data in DATA_SETS)
    print(f"{'DATA SET':{wide}}  {'DOWNLOAD':9}  {'STATE':16}  FOLDER")
    for data, folder, state in rows:
        print(f"{data.name:{wide}}  {_size(data):9}  {state:16}  {folder}")
        print(f"{'':{wide}}  {data.title}")
        print(f"{'':{wide}}  Licence: {data.licence}")
    print("\natod-data get NAME downloads one; atod-data verify looks whether it is whole.")
    return 0


def _row(data: DataSet, folder: Path, state: str) -> dict[str, object]:
    return {"name": data.name, "title": data.title, "source": data.source,
            "licence": data.licence, "download_bytes": data.size,
            "unpacked_bytes": data.unpacked_size or None, "folder": str(folder),
            "state": state, "files": [file.name for file in data.files]}  # fmt: skip


def _size(data: DataSet) -> str:
    return "unknown" if data.size is None else human_bytes(data.size)


def _get(options: argparse.Namespace) -> int:
    chosen = _chosen(options.names)
    wishes = Wishes(options.mirror, options.force, options.accept_other)
    status = 0
    for data in chosen:
        folder = data.folder(options.folder)
        size = f"{_size(data)} to download"
        if data.unpacked_size:
            size += f", {human_bytes(data.unpacked_size)} unpacked"
        print(f"{data.name}: {data.title}")
        print(f"  Licence: {data.licence}")
        print(f"  Source:  {options.mirror or data.source}")
        print(f"  Folder:  {folder} ({size})", flush=True)
        progress = Progress(quiet=options.quiet)
        report = get(data, folder, wishes, progress=progress, say=_say)
        print("\n".join(lines_of(report)))
        status = max(status, int(not report.is_right))
        if folder not in data.folders():
            print(f"  The environments find it with {data.variable}={folder.absolute()}")
        sys.stdout.flush()
    return status


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def _verify(options: argparse.Namespace) -> int:
    chosen = _chosen(options.names)
    if not options.names:
        chosen = tuple(d for d in DATA_SETS if _is_begun(d, d.folder(options.folder)))
        if not chosen:
            raise DownloadError("Nothing is here to verify; atod-data list says what there is.")
    progress = Progress(quiet=options.quiet)
    reports = []
    for data in chosen:
        report = verify(data, data.folder(options.folder), deep=options.deep, progress=progress)
        reports.append(report)
        if not options.json:
            print(f"{data.name} in {report.folder}: {'right' if report.is_right else 'NOT RIGHT'}")
            print("\n".join(lines_of(report)), flush=True)
    if options.json:
        print(json.dumps([report.as_json() for report in reports], indent=1))
    return int(not all(report.is_right for report in reports))


def _is_begun(data: DataSet, folder: Path) -> bool:
    return any(is_there(folder, place) for place in data.places)


if __name__ == "__main__":
    sys.exit(main())
