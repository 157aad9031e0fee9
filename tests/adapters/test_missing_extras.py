"""Adapters can be imported without the packages they are for, and then name what to install."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

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


def test_a_missing_name_is_an_attribute_error() -> None:
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


@pytest.mark.slow
def test_the_recipe_for_verl_prints_its_settings_without_it(tmp_path: Path) -> None:
    out = tmp_path / "my runs"
    arguments = ["webshop", "--student", "my a", "--teacher", "b, kappa=1", "--out", str(out)]
    code = (
        "import runpy, sys; sys.modules['hydra'] = None\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "runpy.run_module('atod_train.examples.verl_recipe', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not checked, and no tasks written: hydra is not installed" in result.stderr
    assert {
        f"data.train_files={out}/train.parquet", f"data.val_files={out}/val.parquet",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={out}/loop.yaml",
        f"trainer.default_local_dir={out}/checkpoints", "trainer.n_gpus_per_node=8",
        "actor_rollout_ref.model.path=my a", "+trainer.v1.atod.teacher='b, kappa=1'",
    } < set(shlex.split(result.stdout))  # fmt: skip
    refused = subprocess.run(
        [sys.executable, "-m", "atod_train.examples.verl_recipe", "webshop", "--student", "a",
         "--teacher", "b", "--gpus", "3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (refused.returncode, "--gpus must divide" in refused.stderr) == (2, True)


def test_prompt_options_of_an_environment_are_checked() -> None:
    from atod_gym.adapters.made_env import made_env

    with pytest.raises(InvalidSettingError, match="Prompt options"):
        made_env("atod/ALFWorld-v0", {"data": "generated"}, {"size": 3})


@pytest.mark.parametrize("name", ["env_id", "id", "colour"])
def test_settings_that_an_environment_does_not_take_are_named(name: str) -> None:
    from atod_gym.adapters.made_env import made_env

    with pytest.raises(InvalidSettingError, match=name):
        made_env("atod/ALFWorld-v0", {"data": "generated", name: "x"})
