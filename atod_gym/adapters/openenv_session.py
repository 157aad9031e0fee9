"""Implement a session of an OpenEnv server with a Gymnasium environment."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
from gymnasium.error import ResetNeeded

from atod_gym.adapters.made_env import encodable, made_env
from atod_gym.envs.turn_env import TurnEnv
from atod_gym.errors import InvalidSettingError
from atod_gym.prompts import shown_text


class ServedTasks(NamedTuple):
    """The settings that all sessions of a server share."""

    env_id: str
    env_options: Mapping[str, Any]
    prompt_options: Mapping[str, Any] | None
    """None: a step's text is an action, not a completion."""
    split: str
    task_ids: tuple[str, ...]

    @property
    def completions(self) -> bool:
        """Whether a step's text is a completion of a model."""
        return self.prompt_options is not None


class Session:
    """OpenEnv's environment: one session with its Gymnasium environment."""

    observation_class: Any
    state_class: Any

    def __init__(self, served: ServedTasks) -> None:
        super().__init__()
        self._served = served
        self._env: gymnasium.Env[Any, str] | None = None
        self._episode_id: str | None = None
        self._info: dict[str, Any] = {}
        self._total_reward = 0.0

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        task_id: str | None = None,
        split: str | None = None,
        index: int | None = None,
        **unknown: Any,
    ) -> Any:
        """Start an episode of a task, given by its id or its number, else of a random one.

        Raises:
            InvalidSettingError: for an unknown keyword, another split, or two tasks.
            TaskNotFoundError: if the split has no such task.
            AtodError: if the task cannot be loaded; the next reset may name another one.
        """
        if unknown:
            raise InvalidSettingError(
                f"Unknown reset option {next(iter(unknown))!r}; known: seed, episode_id, task_id, "
                "split, index."
            )
        self._check_split(split)
        if index is not None:
            if task_id is not None:
                raise InvalidSettingError("A reset takes task_id or index, not both.")
            task_id = self._task_at(index)
        if self._env is None:
            served = self._served
            self._env = made_env(served.env_id, served.env_options, served.prompt_options)
        options = {} if task_id is None else {"task_id": task_id}
        observed, info = self._env.reset(seed=seed, options=options)
        self._episode_id = episode_id or str(uuid.uuid4())
        self._total_reward = 0.0
        return self._observation(observed, info)

    def step(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """Play the text of an action; an invalid one costs the turn.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset and after the end of an episode.
            ServerError: if the environment's own server fails; the same step may be sent again.
        """
        if self._env is None:
            raise ResetNeeded(
                "call reset() before step(); a session belongs to one websocket connection, so a "
                "lost connection, and each request over plain HTTP, begins a new one"
            )
        observed, reward, terminated, truncated, info = self._env.step(action.text)
        self._total_reward += float(reward)
        end = {"done": terminated or truncated, "terminated": terminated, "truncated": truncated}
        return self._observation(observed, info, reward=float(reward), **end)

    @property
    def state(self) -> Any:
        """Return the state of the episode."""
        names = ("task_id", "task_type", "split", "data", "success")
        return self.state_class(
            episode_id=self._episode_id,
            step_count=self._info.get("turn_index", 0),
            env_id=self._served.env_id,
            total_reward=self._total_reward,
            **{name: self._info[name] for name in names if name in self._info},
        )

    def close(self) -> None:
        """Close the Gymnasium environment; may be called twice."""
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def get_metadata(self) -> Any:
        """Return the answer to `/metadata`."""
        from importlib.metadata import version

        from openenv.core.env_server.types import EnvironmentMetadata

        kind = "completions" if self._served.completions else "actions"
        return EnvironmentMetadata(
            name=self._served.env_id,
            description=f"{self._served.env_id}, split {self._served.split}: takes {kind}.",
            version=version("atod-gym"),
        )

    def web_actions(self, observation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Return the buttons of OpenEnv's web page: the admissible actions without placeholders."""
        if self._served.completions:
            return []
        actions = observation.get("admissible_actions", ())
        playable = [action for action in actions if not TurnEnv.is_placeholder(action)]
        return [(action, {"text": action}) for action in playable]

    def list_splits(self) -> list[str]:
        """Return the one split that is served."""
        return [self._served.split]

    def num_tasks(self, split: str) -> int:
        """Return the number of tasks in the split."""
        self._check_split(split)
        return len(self._served.task_ids)

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """Return all tasks, in manifest order."""
        return self.get_task_range(split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return one task by its number; raise `IndexError` if there is none."""
        self._check_split(split)
        return {"id": self._task_at(index), "index": index}

    def get_task_range(
        self, split: str, start: int | None = None, stop: int | None = None
    ) -> list[dict[str, Any]]:
        """Return tasks by their numbers, as in a Python slice."""
        self._check_split(split)
        numbers = range(len(self._served.task_ids))[start:stop]
        return [{"id": self._served.task_ids[index], "index": index} for index in numbers]

    def _task_at(self, index: Any) -> str:
        task_ids = self._served.task_ids
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(task_ids):
            raise IndexError(f"No task {index!r}: the split has {len(task_ids)}, from 0 on.")
        return task_ids[index]

    def _check_split(self, split: str | None) -> None:
        if split is not None and split != self._served.split:
            raise InvalidSettingError(
                f"This server plays split {self._served.split!r}, not {split!r}."
            )

    def _observation(self, observed: Any, info: dict[str, Any], **more: Any) -> Any:
        self._info = _plain(info)
        if self._served.completions:
            assert self._env is not None
            more["messages"] = _plain(observed)
            observed = self._env.get_wrapper_attr("observation")
        else:
            observed = {**observed, "text": shown_text(observed, info)}
        return self.observation_class(**_plain(observed), metadata=self._info, **more)


def _plain(value: Any) -> Any:
    """Convert a value for JSON: tuples to lists, lone surrogates to `?`."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
