"""Unpacks downloaded archives so that nothing leaves its folder and nothing half is ever there."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from atod_gym.download_progress import Progress, human_bytes
from atod_gym.errors import DownloadError
from atod_gym.part_files import part_of, put_in_place

_CHUNK = 1 << 20
_TAR_MARK = slice(257, 262)
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
)

Digests = dict[str, tuple[str, int]]
"""Path of a file in its folder -> SHA-256 in hexadecimal, bytes."""


def check_zip(path: Path) -> None:
    """Refuses what is no zip archive, and one with a member that would leave its folder.

    Raises:
        DownloadError: names the member.
    """
    with _broken_named(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _safe_path(member, path)


def unpack_zips(
    archives: Sequence[Path], folder: Path, top: str, progress: Progress, *, replace: bool = False
) -> Digests:
    """Unpacks the folder `top` of all archives into `folder`, where it appears when it is complete.

    Args:
        archives: later ones win; what is not in `top` is left out.
        folder: must be there.
        top: name of the folder in the archives.
        progress: told what happens.
        replace: whether `folder/top` may be there already; else it must not.

    Returns:
        What was unpacked, by path in `folder`.

    Raises:
        DownloadError: if an archive is broken or would write elsewhere, or there is no room.
    """
    aside = folder / f".unpacking-{top}"
    _remove(aside)
    aside.mkdir()
    digests: Digests = {}
    try:
        for archive in archives:
            _unpack_zip(archive, aside, top, digests, progress)
        if not (aside / top).is_dir():
            raise DownloadError(f"{archives[-1].name} holds no folder {top}.")
        # So many small files are written out faster together than one by one.
        os.sync()
        old = folder / f".replaced-{top}"
        _remove(old)
        if replace and (folder / top).exists():
            (folder / top).rename(old)
        (aside / top).rename(folder / top)
        _remove(old)
    finally:
        _remove(aside)
    return digests


def unpack_gzip(archive: Path, target: Path, progress: Progress) -> tuple[str, int]:
    """Unpacks one file, which may lie in a tar archive of its own inside.

    The published wiki-18.jsonl.gz is such an archive, in spite of its name.

    Returns:
        SHA-256 in hexadecimal, and bytes.

    Raises:
        DownloadError: if the archive is broken or holds no JSON lines.
    """
    part = part_of(target)
    total = hashlib.sha256()
    size = 0
    try:
        with _broken_named(archive), _inner_file(archive) as source, part.open("wb") as copy:
            progress.begin(f"unpacking {target.name}", 0, None)
            while chunk := source.read(_CHUNK):
                copy.write(chunk)
                total.update(chunk)
                size += len(chunk)
                progress.advance(size)
            progress.end(size)
    except BaseException:
        # It cannot be gone on with, and takes the room that may be missing.
        part.unlink(missing_ok=True)
        raise
    put_in_place(part, target)
    return total.hexdigest(), size


def _unpack_zip(path: Path, aside: Path, top: str, digests: Digests, progress: Progress) -> None:
    with _broken_named(path), zipfile.ZipFile(path) as archive:
        members = [(_safe_path(member, path), member) for member in archive.infolist()]
        chosen = [(name, one) for name, one in members if name.parts[:1] == (top,)]
        size = sum(member.file_size for _, member in chosen)
        free = shutil.disk_usage(aside).free
        if size > free:
            raise DownloadError(
                f"No room to unpack {path.name}: {human_bytes(size)} are needed in {aside.parent}, "
                f"{human_bytes(free)} are free."
            )
        progress.begin(f"unpacking {path.name}", 0, size)
        done = 0
        for name, member in chosen:
            target = aside.joinpath(*name.parts)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Reading to the end also checks the sum that the archive holds for each member.
            content = archive.read(member)
            target.write_bytes(content)
            digests[str(name)] = (hashlib.sha256(content).hexdigest(), len(content))
            done += len(content)
            progress.advance(done)
        progress.end(done)


def _safe_path(member: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    name = member.filename
    path = PurePosixPath(name)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if (
        is_link
        or path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or "\\" in name
        or re.match("[A-Za-z]:", name)
    ):
        kind = "a link" if is_link else "a path that leaves its folder"
        raise DownloadError(f"{archive.name} is not safe to unpack: {name!r} is {kind}.")
    return path


@contextmanager
def _inner_file(archive: Path) -> Iterator[IO[bytes]]:
    with gzip.open(archive, "rb") as unpacked:
        is_tar = unpacked.read(512)[_TAR_MARK] == b"ustar"
    with gzip.open(archive, "rb") as unpacked:
        if not is_tar:
            yield cast("IO[bytes]", unpacked)
            return
        with tarfile.open(fileobj=unpacked, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None and member.name.endswith(".jsonl"):
                    yield file
                    return
    raise DownloadError(f"{archive.name} holds no file of JSON lines.")


@contextmanager
def _broken_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        name = path.name.removesuffix(".part")
        raise DownloadError(f"{name} is broken: {error or type(error).__name__}.") from error


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
