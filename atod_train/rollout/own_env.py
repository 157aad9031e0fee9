"""Adapt any Gymnasium environment whose actions and observations are text.

`EnvConfig.id` accepts Gymnasium's `module:id`; the module, which registers the id, is searched in
the current folder, too. A table in `atod_train/README.md` lists what the trainer uses of an
environment, and its defaults; `atod_train/examples/own_environment.py` is an example.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

import atod_gym
from atod_gym.envs.turn_env import TurnEnv
from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.spaces import turn_observation_space
from atod_gym.tasks import TaskManifest, content_hash, task_not_found
from atod_gym.types import TurnObservation
from atod_gym.wrappers import make_env
from atod_train.config import EnvConfig

_TRAINING_SEEDS = 10_000
_OTHER_SEEDS = 100
"""Number of tasks of the split train and of any other split, if tasks are seeds."""


_FLAGS = {
    "split": "--split (atod-eval) or --env.eval-splits",
    "data": "--data (atod-eval) or --env.data",
    "max_turns": "--max-turns (atod-eval) or --env.max-turns",
}
_FLAGS["max_episode_steps"] = _FLAGS["max_turns"]
"""Keywords of environments that have settings of their own."""


def find_spec(env_id: str) -> EnvSpec:
    """Return the registration of an environment; imports the module of `module:id`.

    Raises:
        InvalidSettingError: the module cannot be imported, or the id is not registered.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except Exception as error:
            raise InvalidSettingError(
                f"env.id {env_id}: the module {module} cannot be imported "
                f"({type(error).__name__}: {error}). It is searched in the installed packages "
                "and in the current folder."
            ) from error
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        advice = (
            f"The module {module} must call gymnasium.register(id={name!r}, entry_point=...)."
            if module
            else f"Environments here: {', '.join(atod_gym.ENV_IDS)}. "
            f"Give the module of your own environment: env.id my_module:{name}."
        )
        raise InvalidSettingError(f"env.id {env_id} is not registered: {error} {advice}") from error


def _creator(spec: EnvSpec) -> Any:
    """Return the class or function that makes an environment."""
    entry_point: Any = spec.entry_point
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def is_turn_env(spec: EnvSpec) -> bool:
    """Return whether an environment is a `TurnEnv`, which needs no `TextEnv`."""
    creator = _creator(spec)
    return isinstance(creator, type) and issubclass(creator, TurnEnv)


def keywords_of(config: EnvConfig, split: str) -> dict[str, Any]:
    """Return the keywords of an environment, besides its turn limit.

    Raises:
        InvalidSettingError: an option has a setting of its own.
    """
    for name in _FLAGS.keys() & config.options.keys():
        raise InvalidSettingError(
            f"The option {name}={config.options[name]!r} of {config.id} has a setting of its own: "
            f"use {_FLAGS[name]}."
        )
    return {"split": split, "data": config.data, **config.options}


def make_text_env(config: EnvConfig, split: str) -> gymnasium.Env[Any, str]:
    """Make an environment with turn-structured observations, of this project or any other.

    Raises:
        AtodError: the environment lacks something, or refuses a setting.
    """
    spec = find_spec(config.id)
    settings, limit = keywords_of(config, split), config.max_turns or None
    if is_turn_env(spec):
        return make_env(config.id, limit, **settings)
    parameters = inspect.signature(_creator(spec)).parameters
    if "data" not in parameters and config.data not in ("auto", "generated"):
        raise InvalidSettingError(f"{config.id} takes no data; leave out env.data {config.data}.")
    for name in {"split", "data"} - parameters.keys():
        del settings[name]
    env = make_env(config.id, limit, **settings)
    try:
        return TextEnv(env, config, split)
    except Exception:
        env.close()
        raise


class TextEnv(gymnasium.Wrapper[Any, str, Any, str]):
    """Give a Gymnasium environment of texts the observations, infos and tasks of a `TurnEnv`.

    Args:
        env: the environment.
        config: its id, and its options, on which the content of tasks may depend.
        split: of the tasks.

    Raises:
        InvalidSettingError: its spaces are not of text, or it has no turn limit.
    """

    def __init__(self, env: gymnasium.Env[Any, str], config: EnvConfig, split: str) -> None:
        super().__init__(env)
        env_id = self._id = config.id
        self._split, self._options = split, config.options
        if not isinstance(env.action_space, spaces.Text):
            raise InvalidSettingError(
                f"{env_id} has actions {env.action_space}, and a language model writes text. Give "
                "it an action_space of gymnasium.spaces.Text, or wrap it in one."
            )
        space: Any = env.observation_space
        text = space.get("text") if isinstance(space, spaces.Dict) else space
        if not isinstance(text, spaces.Text):
            raise self._no_text(f"observations {space}")
        self.observation_space = turn_observation_space()
        inner: Any = env.unwrapped
        self.task_ids: tuple[str, ...] = tuple(getattr(inner, "task_ids", ()))
        """Tasks of the split: those of the environment, else seeds."""
        self._seeds: dict[str, int] = {}
        if not self.task_ids:
            first, count = 0, _TRAINING_SEEDS
            if split != "train":  # beyond those of train, by the split's name
                number = int.from_bytes(hashlib.sha256(split.encode()).digest()[:3], "big")
                first, count = _TRAINING_SEEDS + _OTHER_SEEDS * number, _OTHER_SEEDS
            self._seeds = {f"seed-{seed:010}": seed for seed in range(first, first + count)}
            self.task_ids = tuple(self._seeds)
        self.max_turns = None if env.spec is None else env.spec.max_episode_steps
        if not self.max_turns:
            raise InvalidSettingError(f"{env_id} has no turn limit; give max_turns.")
        self.data: str = getattr(inner, "data", "own")
        self._actions: tuple[str, ...] = ()

    @property
    def manifest(self) -> TaskManifest:
        """The tasks of the split; the hash covers ids and options, as the content is unknown."""
        options = json.dumps(self._options, sort_keys=True, default=str) if self._options else ""
        known = f"{self._id} {self._split} {options}".strip()
        digests = {
            task_id: hashlib.sha256(f"{known} {task_id}".encode()).hexdigest()
            for task_id in self.task_ids
        }
        return TaskManifest(self._id, self._split, tuple(sorted(digests)), content_hash(digests))

    @property
    def code_hash(self) -> str:
        """Hash of the source files of the environment's classes and of its expert's method."""
        inner = self.env.unwrapped
        experts = (getattr(inner, name, None) for name in ("expert", "demonstrator"))
        digest = hashlib.sha256()
        for part in (*type(inner).__mro__, *experts):
            with suppress(TypeError, OSError):  # no file, such as those of notebooks
                digest.update(Path(inspect.getfile(part)).read_bytes())  # type: ignore[arg-type]
        return digest.hexdigest()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Begin the episode of `options["task_id"]`.

        Raises:
            TaskNotFoundError: there is no such task.
        """
        self._task_id = str((options or {}).get("task_id", self.task_ids[0]))
        if not self._seeds:
            raw, info = self.env.reset(seed=seed, options={"task_id": self._task_id})
        elif self._task_id in self._seeds:
            raw, info = self.env.reset(seed=self._seeds[self._task_id])
        else:
            raise task_not_found(self._task_id, self.task_ids, self._split)
        self._turn_index = 0
        self._instruction = ""
        self._task_type = str(info.get("task_type", "task"))
        return self._turn(raw, {"success": False, "is_action_valid": True, **info})

    def step(self, action: str) -> tuple[TurnObservation, float, bool, bool, dict[str, Any]]:
        """Play an action.

        Raises:
            InvalidSettingError: the step returns no text, or neither success nor score.
        """
        is_valid = not self._actions or action in self._actions
        raw, reward, terminated, truncated, info = self.env.step(action)
        if "success" not in info and "score" not in info:
            raise InvalidSettingError(
                f"{self._id} returns neither info['success'] nor info['score'], and a reward alone "
                "does not show whether the task was solved. Add one of them to the info of step()."
            )
        self._turn_index += 1
        observation, info = self._turn(raw, {"is_action_valid": is_valid, **info})
        return observation, float(reward), bool(terminated), bool(truncated), info

    def _turn(self, raw: Any, info: dict[str, Any]) -> tuple[TurnObservation, dict[str, Any]]:
        """Return the observation and the info of a turn, with missing fields filled in."""
        found: Any = {"text": raw} if isinstance(raw, str) else raw
        if not isinstance(found, Mapping) or not isinstance(found.get("text"), str):
            raise self._no_text(f"an observation of type {type(raw).__name__}")
        self._instruction = str(found.get("instruction", self._instruction))
        self._actions = tuple(found.get("admissible_actions", ()))
        score = float(info["score"] if "score" in info else info["success"])
        observation: TurnObservation = {
            "instruction": self._instruction,
            "text": found["text"],
            "admissible_actions": self._actions,
            "turn_index": self._turn_index,
        }
        return observation, {
            "task_type": self._task_type,
            "split": self._split,
            "data": self.data,
            "message": "",
            **info,
            "task_id": self._task_id,
            "success": bool(info.get("success", score == 1.0)),
            "score": score,
        }

    def _no_text(self, what: str) -> InvalidSettingError:
        return InvalidSettingError(
            f"{self._id} has {what}; a language model reads text. Give it observations of "
            "gymnasium.spaces.Text, or of gymnasium.spaces.Dict with a Text named 'text'."
        )


def check_env(config: EnvConfig, from_scratch: str = "") -> None:
    """Play one turn in an environment that is not a `TurnEnv`, to report missing parts early.

    Args:
        config: the environment.
        from_scratch: a model that is made from the expert's episodes; empty: none.

    Raises:
        AtodError: names the missing part and the remedy.
    """
    if is_turn_env(find_spec(config.id)):
        return
    for split in dict.fromkeys(("train", *config.eval_splits)):
        env: Any = make_text_env(config, split)
        action = env.action_space.sample()
        try:
            env.reset(options={"task_id": env.task_ids[0]})
            env.step(action)
        except AtodError:
            raise
        except Exception as error:
            raise InvalidSettingError(
                f"{config.id} raised {type(error).__name__} ({error}) on the action {action!r}. A "
                "model can write any text: answer it with an observation."
            ) from error
        finally:
            env.close()
        inner = env.unwrapped
        if from_scratch and not (hasattr(inner, "expert") or hasattr(inner, "demonstrator")):
            raise AtodError(
                f"{config.id} has no expert, and the model {from_scratch} is made from an expert's "
                "episodes. Start from language models (--model.student smollm2 --model.teacher "
                "NAME), or give the environment a method expert(), see "
                "atod_train.training.supervised.Expert."
            )
