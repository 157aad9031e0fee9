"""Brings a data set into its folder: downloads, checks, unpacks, and takes down what came."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from atod_gym.data_archives import unpack_gzip, unpack_zips
from atod_gym.data_catalogue import DataFile, DataSet, find_file
from atod_gym.data_checks import Report, check_content, verify
from atod_gym.data_records import Record, locked, read_record, write_record
from atod_gym.download import fetch
from atod_gym.download_http import PATIENCE, Patience, Source
from atod_gym.download_progress import Progress, human_bytes
from atod_gym.errors import DownloadError, InvalidSettingError
from atod_gym.part_files import discard, explained, part_of, sha256_of

MIRROR_VARIABLE = "ATOD_DATA_MIRROR"
"""Environment variable with the URL or folder of a mirror."""

_HUB = "https://huggingface.co"
_HUB_VARIABLE = "HF_ENDPOINT"
_DRIVE = "https://drive.usercontent.google.com"
_DOWNLOADS = ".atod-downloads"


@dataclass(frozen=True, slots=True)
class Wishes:
    """How to download."""

    mirror: str | None = None
    """URL or folder; None: the official addresses."""
    force: bool = False
    """Fetch again what is there."""
    accept_other: bool = False
    """Take files that are not the known ones, as long as they can be read."""
    patience: Patience = PATIENCE


def get(
    data: DataSet,
    folder: Path,
    wishes: Wishes,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> Report:
    """Downloads what is not there, and looks whether all is right.

    Args:
        data: the data set.
        folder: where to; made if it is not there.
        wishes: how.
        progress: told how far it is.
        say: called with each thing that was done.

    Returns:
        What `verify` finds in the end.

    Raises:
        DownloadError: if something cannot be had or is wrong; what is right stays.
        InvalidSettingError: if the folder cannot be used, or the mirror has no meaning.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if data.unpacks_to:
                return _get_archives(data, folder, wishes, progress, say)
            for file in data.files:
                _get_file(data, file, folder, wishes, progress, say)
            return verify(data, folder, deep=False, progress=progress)
    raise AssertionError("errors are explained, not passed over")


def source_of(data: DataSet, file: DataFile, mirror: str | None) -> Source:
    """Where a file comes from.

    Args:
        data: its data set.
        file: the file.
        mirror: URL or folder, in which the file is `<data set>/<name>`; None: the official place,
            or that of `$HF_ENDPOINT` in place of huggingface.co.

    Raises:
        InvalidSettingError: if the mirror has no meaning.
    """
    if mirror is not None:
        return Source(f"{_base_of(mirror)}/{data.name}/{file.name}", file.size, file.sha256)
    url = file.url
    endpoint = os.environ.get(_HUB_VARIABLE, "").rstrip("/")
    if endpoint and url.startswith(f"{_HUB}/"):
        url = endpoint + url.removeprefix(_HUB)
    return Source(url, file.size, file.sha256, takes_form=url.startswith(f"{_DRIVE}/"))


def _base_of(mirror: str) -> str:
    scheme = urlsplit(mirror).scheme if "://" in mirror else ""
    if scheme in ("http", "https"):
        return mirror.rstrip("/")
    if scheme not in ("", "file"):
        raise InvalidSettingError(
            f"A mirror is a URL of http or https, or a folder, not {mirror!r}."
        )
    path = unquote(urlsplit(mirror).path) if scheme else mirror
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InvalidSettingError(f"The mirror {mirror} is no folder.")
    return str(folder.absolute())


def _get_file(
    data: DataSet,
    file: DataFile,
    folder: Path,
    wishes: Wishes,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    record = read_record(folder, data.name)
    there = find_file(folder, file.name)
    if there is not None and not wishes.force:
        _check_there(file, there, record, folder, progress)
        say(f"{there} is there and right.")
        return
    target = folder / file.name
    _download(data, file, target, wishes, progress, record)
    name, url, sha256, size = (record.downloads[-1][k] for k in ("name", "url", "sha256", "size"))
    record.files[name] = (sha256, size)
    write_record(folder, data.name, record)
    say(f"{target}: {human_bytes(size)} from {url}, SHA-256 {sha256}")


def _check_there(
    file: DataFile, path: Path, record: Record, folder: Path, progress: Progress
) -> None:
    name = path.relative_to(folder).as_posix()
    sha256 = record.files[name][0] if name in record.files else file.sha256
    try:
        if sha256 is not None and path.suffix == Path(file.name).suffix:
            if sha256_of(path, progress) != sha256:
                raise DownloadError("its SHA-256 is not the known one")
        else:
            check_content(file, path)
    except DownloadError as error:
        raise DownloadError(
            f"{path} is there, but not right ({error}). Delete it, or replace it with --force."
        ) from error


def _download(
    data: DataSet,
    file: DataFile,
    target: Path,
    wishes: Wishes,
    progress: Progress,
    record: Record,
) -> None:
    source = source_of(data, file, wishes.mirror)
    if wishes.accept_other:
        file = DataFile(file.name, file.url)
        source = Source(source.url, takes_form=source.takes_form)

    def check(path: Path) -> None:
        check_content(file, path)

    got = fetch(source, target, progress=progress, check=check, patience=wishes.patience)
    record.add_download(file.name, source.url, got.sha256, got.size)


def _get_archives(
    data: DataSet, folder: Path, wishes: Wishes, progress: Progress, say: Callable[[str], None]
) -> Report:
    there = find_file(folder, data.unpacks_to) or folder / data.unpacks_to
    if there.exists() and not wishes.force:
        report = verify(data, folder, deep=False, progress=progress)
        if report.is_right:
            say(f"{there} is there and right.")
            return report
        path, problem = report.problems[0]
        more = f" and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
        raise DownloadError(
            f"{there} is there, but not right ({path}: {problem}{more}). Delete it, or replace it "
            "with --force."
        )
    free = shutil.disk_usage(folder).free
    if free < data.unpacked_size:
        raise DownloadError(
            f"No room to unpack {data.name}: {human_bytes(data.unpacked_size)} are needed in "
            f"{folder}, {human_bytes(free)} are free."
        )
    record = Record()
    archives = []
    for file in data.files:
        target = folder / _DOWNLOADS / file.name
        _download_archive(data, file, target, wishes, progress, record)
        archives.append(target)
        done = record.downloads[-1]
        say(f"{file.name}: {human_bytes(done['size'])} from {done['url']}, SHA-256 "
            f"{done['sha256']}")  # fmt: skip
    if data.files[0].name.endswith(".zip"):
        record.files = unpack_zips(archives, folder, data.unpacks_to, progress, replace=True)
    else:
        target = folder / data.unpacks_to
        record.files = {data.unpacks_to: unpack_gzip(archives[0], target, progress)}
    write_record(folder, data.name, record)
    shutil.rmtree(folder / _DOWNLOADS)
    say(f"{folder / data.unpacks_to}: {len(record.files)} files unpacked")
    return verify(data, folder, deep=False, progress=progress)


def _download_archive(
    data: DataSet,
    file: DataFile,
    target: Path,
    wishes: Wishes,
    progress: Progress,
    record: Record,
) -> None:
    """Takes an archive that an earlier run fetched but could not unpack, else fetches it."""
    if target.is_file() and file.sha256 is not None and not wishes.force:
        sha256 = sha256_of(target, progress)
        if sha256 == file.sha256:
            url = source_of(data, file, wishes.mirror).url
            record.add_download(file.name, url, sha256, target.stat().st_size)
            return
    if wishes.force:
        discard(part_of(target))
    _download(data, file, target, wishes, progress, record)
