"""Check where servers store indexes."""

from __future__ import annotations

from pathlib import Path

import pytest

from env_servers.caches import cache_folder


@pytest.mark.parametrize(
    ("atod", "xdg", "expected"),
    [
        ("/a", "/x", "/a"), ("~/a", "/x", "/home/me/a"), (None, "/x", "/x/atod"),
        ("", "/x", "/x/atod"), (None, None, "/home/me/.cache/atod"),
        ("", "", "/home/me/.cache/atod"),
    ],
)  # fmt: skip
def test_one_rule_for_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, atod: str | None, xdg: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("ATOD_CACHE", atod), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("name", ["ATOD_CACHE", "XDG_CACHE_HOME"])
def test_a_missing_home_folder_is_explained(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("ATOD_CACHE", raising=False)
    monkeypatch.setenv(name, "~no-such-user/a")
    with pytest.raises(ValueError, match="no home folder for ~no-such-user/a: give the full path"):
        cache_folder()
