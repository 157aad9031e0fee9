"""Fixtures of the trainer's tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
from served_chat import FakeChat


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    """A server of chat completions; tests with it need the client library."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if importlib.util.find_spec("openai") is None:
        if os.environ.get("CI"):
            pytest.fail("no package openai; under CI these tests must run")
        pytest.skip("no package openai: pip install 'atod-gym[eval]'")
    with FakeChat() as served:
        yield served
