"""`atod-data`: list, download and verify the official data sets."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

import filelock
from tqdm import tqdm

from atod_gym.datasets import DataSet, catalogue, data_set, verify
from atod_gym.datasets.get import DOWNLOADS, get
from atod_gym.errors import AtodError, DownloadError
from atod_gym.tasks import data_folders, expanded
from atod_gym.terminal import flush_output

_EPILOG = f"""\
Data sets: {", ".join(catalogue())}.
A mirror holds each file as <data set>/<file name>. The variables https_proxy and
no_proxy are respected, and HF_ENDPOINT replaces https://huggingface.co.
Exit status: 0 success, 1 a file is missing, wrong or cannot be downloaded, 2 a mistake in
the command, 130 interrupted."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process; return its exit status."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except BrokenPipeError:
        return 0
    except (AtodError, OSError) as error:
        print(f"atod-data: {' '.join(_explain(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, (DownloadError, OSError)) else 2
    except KeyboardInterrupt:
        print("\natod-data: interrupted; the same command continues.", file=sys.stderr)
        return 130
    finally:
        flush_output()


def _explain(error: Exception) -> str:
    if isinstance(error, filelock.Timeout):
        return f"Another process downloads into {Path(error.lock_file).parent}. Wait, or use --to."
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        advice = "Free some space: the same command continues" if is_full else "Choose another path"
        return f"Cannot use {error.filename or 'the folder'}: {error.strerror or error}. {advice}."
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atod-data", description="List, download and verify the official data sets.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="list|get|verify")
    listed = commands.add_parser("list", help="list the data sets and the files that are present")
    fetched = commands.add_parser("get", help="download, unpack and verify")
    verified = commands.add_parser("verify", help="report missing and damaged files")
    place = "folder of the data; default: where the environments find it, else ~/.cache/<name>"
    for command, run in ((listed, _list), (fetched, _get), (verified, _verify)):
        command.set_defaults(run=run)
        command.add_argument("--to", "--in", dest="folder", metavar="FOLDER", help=place)
    fetched.add_argument("names", nargs="+", metavar="NAME", help="data set, or all")
    mirror = os.environ.get("ATOD_DATA_MIRROR")
    text = "location of copies; default: $ATOD_DATA_MIRROR"
    fetched.add_argument("--mirror", metavar="URL_OR_FOLDER", default=mirror, help=text)
    fetched.add_argument("--force", action="store_true", help="download existing files again")
    text = "accept files that differ from the published ones; verify still reports them"
    fetched.add_argument("--accept-other", action="store_true", help=text)
    text = "data set, all, or a folder or file of questions; default: data sets that are present"
    verified.add_argument("names", nargs="*", metavar="NAME_OR_FOLDER", help=text)
    return parser


def _list(options: argparse.Namespace) -> int:
    for data in catalogue().values():
        _describe(data, _folder(data, options.folder))
    print("\natod-data get NAME downloads one; atod-data verify checks the files that are present.")
    return 0


def _describe(data: DataSet, folder: Path) -> None:
    size = tqdm.format_sizeof(data.download_size, "B")
    begun = ", a download is incomplete" * (folder / f"{DOWNLOADS}-{data.name}").is_dir()
    state = f"{len(_there(data, folder))} of {len(data.places)} present{begun}"
    print(f"{data.name}: {data.title}\n  Licence: {data.licence}\n  Source:  {data.source}")
    print(f"  Folder:  {folder} ({state}; {size} to download)", flush=True)


def _get(options: argparse.Namespace) -> int:
    names, status = catalogue() if "all" in options.names else options.names, 0
    for data in [data_set(name) for name in names]:
        folder = _folder(data, options.folder)
        _describe(data, folder)
        found = get(data, folder, mirror=options.mirror, force=options.force,
                    accept_other=options.accept_other)  # fmt: skip
        status |= _show(found) * (not options.accept_other)
        # A folder with both shops is played as the small one, so the full one has its own.
        if folder not in data_folders(data.cache.removesuffix("-full"), (data.variable,)):
            print(f"  The environments find it with {data.variable}={folder.absolute()}")
    return status


def _verify(options: argparse.Namespace) -> int:
    here = [one.name for one in catalogue().values() if _there(one, _folder(one, options.folder))]
    names = list(catalogue()) if "all" in options.names else options.names or here
    if not names:
        raise DownloadError("No data set was found to verify; atod-data list shows them all.")
    status = 0
    for name in names:
        if name not in catalogue() and Path(name).exists():
            title, found = f"questions in {name}", verify.verify_questions(Path(name))
        else:
            folder = _folder(data_set(name), options.folder)
            title, found = f"{name} in {folder}", verify.verify(data_set(name), folder)
        print(title)
        status |= _show(found)
    return status


def _show(findings: list[verify.Finding]) -> int:
    for name, kind, text in findings:
        print(f"  {kind:7}  {name}: {text}", flush=True)
    return int(any(kind in ("missing", "wrong") for _, kind, _ in findings))


def _folder(data: DataSet, chosen: str | None) -> Path:
    """Return the folder that has a data set, else the folder to download it to."""
    if chosen is not None:
        return expanded(chosen) / ("webshop-full" * (data.name == "webshop-full"))
    folders = data_folders(data.cache.removesuffix("-full"), (data.variable,))
    for place in (place for folder in folders for place in (folder, folder / data.cache)):
        if _there(data, place) - {"items_human_ins.json"}:  # Both shops have these goals.
            return place
    return Path.home() / ".cache" / data.cache


def _there(data: DataSet, folder: Path) -> set[str]:
    return {place for place in data.places if verify.find(folder, place)}
