"""Environments of one's own: any Gymnasium environment whose actions and observations are text.

`EnvConfig.id` takes Gymnasium's `module:id`; the module, which registers the id, is looked for in
the current folder too. What the trainer reads of an environment, and what it does without:

| the environment has | without it |
|---|---|
| an action space `gymnasium.spaces.Text`, and an answer to any text | refused |
| observations that are a text, or a dict with `text` and, optionally, `instruction` and `admissible_actions` | refused |
| `success` (a truth value) or `score` (1.0 is success) in the `info` of every step | refused |
| `task_ids`, of which `reset(options={"task_id": ..})` plays one | seeds are the tasks |
| the keywords `split` and `data` | splits are ranges of seeds |
| `is_action_valid` in `info` | what is not among `admissible_actions` is invalid |
| `task_type` in `info` | all tasks are of one type |
| a method `expert()`, see `atod_train.rollout.episode.Expert` | no models from scratch |

`atod_train/examples/own_environment.py` is one.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
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
"""Tasks of the split train and of any other split, where seeds are the tasks."""


def find_spec(env_id: str) -> EnvSpec:
    """Return what an environment is registered with; imports the module of `module:id`.

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
                f"({type(error).__name__}: {error}). It is looked for among the installed packages "
                "and in the current folder."
            ) from error
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        advice = (
            f"The module {module} must call gymnasium.register(id={name!r}, entry_point=...)."
            if module
            else f"Environments here: {', '.join(atod_gym.ENV_IDS)}. "
            f"Name the module of an environment of your own: env.id my_module:{name}."
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


def make_text_env(config: EnvConfig, split: str, max_turns: int | None) -> gymnasium.Env[Any, str]:
    """Make an environment with turn-structured observations, of this project or any other.

    Raises:
        AtodError: it is missing something, or refuses a setting.
    """
    spec = find_spec(config.id)
    settings: dict[str, Any] = {
        name: value for name, value in config.options.items() if name != "max_turns"
    }
    given = {"split": split, "data": config.data}
    if is_turn_env(spec):
        return make_env(config.id, max_turns, **given, **settings)
    parameters = inspect.signature(_creator(spec)).parameters
    takes_split = "split" in parameters
    if "data" not in parameters and config.data not in ("auto", "generated"):
        raise InvalidSettingError(f"{config.id} takes no data; leave out env.data {config.data}.")
    settings |= {name: value for name, value in given.items() if name in parameters}
    env = make_env(config.id, max_turns, **settings)
    try:
        return TextEnv(env, config.id, split, takes_split=takes_split)
    except Exception:
        env.close()
        raise


class TextEnv(gymnasium.Wrapper[Any, str, Any, str]):
    """Give a Gymnasium environment of texts the observations, infos and tasks of a `TurnEnv`.

    Args:
        env: the environment, see the table of this module.
        env_id: for messages.
        split: of the tasks.
        takes_split: whether the environment was made for this split; then seeds begin at 0 in each.

    Raises:
        InvalidSettingError: its spaces are not of text.
    """

    def __init__(
        self, env: gymnasium.Env[Any, str], env_id: str, split: str, *, takes_split: bool
    ) -> None:
        super().__init__(env)
        self._id, self._split = env_id, split
        if not isinstance(env.action_space, spaces.Text):
            raise InvalidSettingError(
                f"{env_id} has actions {env.action_space}, and a language model writes text. Give "
                "it an action_space of gymnasium.spaces.Text, or wrap it in one."
            )
        space: Any = env.observation_space
        text = space.spaces.get("text") if isinstance(space, spaces.Dict) else space
        if not isinstance(text, spaces.Text):
            raise self._no_text(f"observations {space}")
        self.observation_space = turn_observation_space()
        self._seeds: dict[str, int] = {}
        self.task_ids: tuple[str, ...] = tuple(getattr(env.unwrapped, "task_ids", ()))
        """Tasks of the split: those of the environment, else seeds."""
        if not self.task_ids:
            count = _TRAINING_SEEDS if split == "train" else _OTHER_SEEDS
            first = 0 if takes_split or split == "train" else _first_seed(split)
            self._seeds = {f"seed-{seed:010}": seed for seed in range(first, first + count)}
            self.task_ids = tuple(self._seeds)
        limit = None if env.spec is None else env.spec.max_episode_steps
        self.max_turns: int = limit or int(getattr(env.unwrapped, "max_turns", 0))
        """Turn limit."""
        if not self.max_turns:
            raise InvalidSettingError(f"{env_id} has no turn limit; give max_turns.")
        self.data: str = getattr(env.unwrapped, "data", "own")
        self._task_id = self._task_type = self._instruction = ""
        self._actions: tuple[str, ...] = ()
        self._turn_index = 0

    @property
    def manifest(self) -> TaskManifest:
        """The tasks of the split; of seeds and ids the hash, as their content is not known."""
        own = getattr(self.env.unwrapped, "manifest", None)
        if isinstance(own, TaskManifest):
            return own
        digests = {
            task_id: hashlib.sha256(f"{self._id} {self._split} {task_id}".encode()).hexdigest()
            for task_id in self.task_ids
        }
        return TaskManifest(self._id, self._split, tuple(sorted(digests)), content_hash(digests))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Begin the episode of `options["task_id"]`.

        Raises:
            TaskNotFoundError: there is no such task.
        """
        self._task_id = str((options or {}).get("task_id", self.task_ids[0]))
        if self._seeds:
            if self._task_id not in self._seeds:
                raise task_not_found(self._task_id, self.task_ids, self._split)
            raw, info = self.env.reset(seed=self._seeds[self._task_id])
        else:
            raw, info = self.env.reset(seed=seed, options={"task_id": self._task_id})
        self._turn_index = 0
        self._instruction = str(info.get("instruction", ""))
        self._task_type = str(info.get("task_type", "task"))
        return self._observed(raw), self._told({"success": False, "is_action_valid": True, **info})

    def step(self, action: str) -> tuple[TurnObservation, float, bool, bool, dict[str, Any]]:
        """Play an action.

        Raises:
            InvalidSettingError: the step gives no text, or neither success nor score.
        """
        listed = self._actions
        raw, reward, terminated, truncated, info = self.env.step(action)
        self._turn_index += 1
        if "success" not in info and "score" not in info:
            raise InvalidSettingError(
                f"{self._id} gives neither info['success'] nor info['score'], and a reward alone "
                "does not say whether the task was solved. Add one of them to the info of step()."
            )
        is_valid = not listed or action in listed
        told = self._told({"is_action_valid": is_valid, **info})
        return self._observed(raw), float(reward), bool(terminated), bool(truncated), told

    def _observed(self, raw: Any) -> TurnObservation:
        found: Any = {"text": raw} if isinstance(raw, str) else raw
        if not isinstance(found, Mapping) or not isinstance(found.get("text"), str):
            raise self._no_text(f"an observation of type {type(raw).__name__}")
        self._instruction = str(found.get("instruction", self._instruction))
        self._actions = tuple(found.get("admissible_actions", ()))
        return {
            "instruction": self._instruction,
            "text": found["text"],
            "admissible_actions": self._actions,
            "turn_index": self._turn_index,
        }

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        score = float(info["score"] if "score" in info else info["success"])
        success = bool(info.get("success", score == 1.0))
        usual = {
            "task_type": self._task_type,
            "split": self._split,
            "data": self.data,
            "message": "",
        }
        own = {"task_id": self._task_id, "success": success, "score": score}
        return {**usual, **info, **own}

    def _no_text(self, what: str) -> InvalidSettingError:
        return InvalidSettingError(
            f"{self._id} has {what}; a language model reads text. Give it observations of "
            "gymnasium.spaces.Text, or of gymnasium.spaces.Dict with a Text named 'text'."
        )


def check_env(config: EnvConfig, from_scratch: str = "") -> None:
    """Play one turn in an environment that is not a `TurnEnv`, to find what it lacks at once.

    Args:
        config: the environment.
        from_scratch: a model that is made from the expert's episodes; empty: there is none.

    Raises:
        AtodError: names what is missing and what to do.
    """
    if is_turn_env(find_spec(config.id)):
        return
    for split in dict.fromkeys(("train", *config.eval_splits)):
        env = make_text_env(config, split, config.max_turns)
        try:
            _check_turn(env, config.id)
            inner: Any = env.unwrapped
            if from_scratch and not (hasattr(inner, "expert") or hasattr(inner, "demonstrator")):
                raise no_expert(config.id, from_scratch)
        finally:
            env.close()


def no_expert(name: str, from_scratch: str) -> AtodError:
    """Return the error for an environment whose expert is needed."""
    return AtodError(
        f"{name} has no expert, and the model {from_scratch} is made from an expert's episodes. "
        "Start from language models (--model.student smollm2 --model.teacher NAME), or give the "
        "environment a method expert(), see atod_train.rollout.episode.Expert."
    )


def _check_turn(env: Any, env_id: str) -> None:
    action = env.action_space.sample()
    try:
        env.reset(options={"task_id": env.get_wrapper_attr("task_ids")[0]})
        env.step(action)
    except AtodError:
        raise
    except Exception as error:
        raise InvalidSettingError(
            f"{env_id} raised {type(error).__name__} ({error}) on the action {action!r}. A model "
            "can write any text: answer it with an observation."
        ) from error


def _first_seed(split: str) -> int:
    """Return where the seeds of a split begin: beyond those of train, by its name."""
    digest = hashlib.sha256(split.encode()).digest()
    return _TRAINING_SEEDS + _OTHER_SEEDS * int.from_bytes(digest[:3], "big")
