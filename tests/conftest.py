"""Fixtures shared by all tests: where the real data lies."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two workers on two cores: threads of one more would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their argument: compressed ones hold the time, and names must be stable."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data: `$ATOD_DATA`, else `../shared/data` next to the repository."""
    configured = os.environ.get("ATOD_DATA")
    folder = Path(configured) if configured else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        _missing(f"no real data: {folder} does not exist (set ATOD_DATA)")
    return folder


@pytest.fixture(scope="session")
def alfworld_data(data_folder: Path) -> Path:
    """The folder json_2.1.1 with the official games."""
    for folder in (data_folder, data_folder / "json_2.1.1", data_folder / "alfworld/json_2.1.1"):
        if (folder / "train").is_dir() and (folder / "valid_seen").is_dir():
            return folder
    archive = data_folder / "alfworld.tar.xz"
    if not archive.is_file():
        _missing(f"no ALFWorld games in {data_folder}")
    return _unpacked(archive) / "json_2.1.1"


@pytest.fixture(scope="session")
def webshop_data(data_folder: Path) -> Path:
    """The folder with the official small set of WebShop and what the original did with it."""
    folder = data_folder / "webshop"
    if not (folder / "golden").is_dir():
        _missing(f"no WebShop data in {data_folder}")
    return folder


@pytest.fixture(scope="session")
def searchqa_data(data_folder: Path) -> Path:
    """The folder with real questions, their corpus and what a reference server found in it."""
    folder = data_folder / "searchqa"
    if not (folder / "nq_subset.jsonl").is_file():
        _missing(f"no Search-QA data in {data_folder}")
    return folder


@pytest.fixture
def no_user_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps `data="auto"` from finding what the machine happens to have."""
    for name in ("ATOD_DATA", "ALFWORLD_DATA", "WEBSHOP_DATA", "SEARCHQA_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def usual_sigint() -> Iterator[None]:
    """Python's own handling of Ctrl-C, which shells switch off for what they run in background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; under CI these tests must run")
    pytest.skip(reason)


def _unpacked(archive: Path) -> Path:
    """The archive's content in the cache; unpacked once per archive, whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atod-tests"
    target = cache / f"{archive.name}-{archive.stat().st_size}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache, prefix="partial-"))
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(partial, filter="data")
            else:
                tar.extractall(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another test process was faster.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@pytest.fixture(params=["packed", "padded"])
def feeding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rollouts as on a processor, and as on other devices."""
    if request.param == "padded":
        monkeypatch.setattr("atod_train.models.generation.can_be_packed", lambda policy: False)
    kind: str = request.param
    return kind
