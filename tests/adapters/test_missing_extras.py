"""Adapters can be imported without the packages they are for, and then name what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atod_gym.adapters import openenv, verifiers
from atod_gym.errors import InvalidSettingError, MissingExtraError


def test_verifiers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'atod-gym\[verifiers\]'"):
        verifiers.load_plugin.__wrapped__()


def test_openenv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openenv", "openenv.core", "openenv.core.env_server"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'atod-gym\[openenv\]'"):
        openenv.load_types.__wrapped__()


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'make_ap'"):
        openenv.make_ap  # noqa: B018


def test_importing_an_adapter_imports_nothing_heavy() -> None:
    code = (
        "import sys, atod_gym.adapters.openenv, atod_gym.adapters.verifiers\n"
        "heavy = {'verifiers', 'openenv', 'openai', 'fastapi', 'pydantic', 'torch', 'uvicorn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_prompt_options_of_an_environment_are_checked() -> None:
    from atod_gym.adapters.made_env import made_env

    with pytest.raises(InvalidSettingError, match="Prompt options"):
        made_env("atod/ALFWorld-v0", {"data": "generated"}, {"size": 3})


@pytest.mark.parametrize("name", ["env_id", "id", "colour"])
def test_settings_that_an_environment_does_not_take_are_named(name: str) -> None:
    from atod_gym.adapters.made_env import made_env

    with pytest.raises(InvalidSettingError, match=name):
        made_env("atod/ALFWorld-v0", {"data": "generated", name: "x"})
