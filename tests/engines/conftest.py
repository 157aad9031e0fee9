"""Tests with the real vLLM; `tests/engines/run` makes their environment and runs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from served_vllm import ServedVllm

if importlib.util.find_spec("vllm") is None:
    # Elsewhere there is nothing to run.
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks these tests as slow, and leaves time for a server to start."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("slow")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, made once per machine."""
    from atod_train.models import pretrained

    return pretrained._smollm2_folder()


@pytest.fixture(scope="session")
def vllm_server(
    smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedVllm]:
    """A server of SmolLM2 (`smollm2`) for all tests; those that stop one start their own."""
    from served_vllm import served_vllm

    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with served_vllm(smollm2_folder, log) as served:
        yield served
