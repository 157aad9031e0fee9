"""Environments for TRL's trainers: a tool that plays an episode, and tasks as a data set.

TRL's `environment_factory` (tested with TRL 1.16) makes one object per rollout, offers the object's
public methods to the model as tools, and reads the reward from the object. The model must support
tool calls. For models that write actions themselves, in chat or window style, use
`atod_train.adapters.trl`, which also has the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from atod_gym.adapters import tasks
from atod_gym.adapters.made_env import made_env
from atod_gym.parsing import ACTION_TAGS, action_tags
from atod_gym.prompts import CHAT_TEMPLATE, render_prompt, shown_text, turn_hint

_TOOL = "Call the tool act, again and again, until the task is done: one action each time"
_OVER = "The episode is over; nothing more can be done."


def task_dataset(env_id: str, *, tools: bool = True, **settings: Any) -> Any:
    """Return the tasks of a split as a data set for TRL's trainers.

    Args:
        env_id: such as `atod/WebShop-v0`.
        tools: rows for `environment_factory`: an empty prompt, to which the task is added, and
            `task_id`. False: rows for `atod_train.adapters.trl.Rollouts`: the prompt is the id.
        **settings: of the environment, such as `split` and `data`.

    Returns:
        A `datasets.Dataset` with one row per task, in manifest order.

    Raises:
        MissingExtraError: if the package datasets is not installed.
        AtodError: as the environment raises it.
    """
    empty = [{"role": "user", "content": ""}]
    rows = [
        {"prompt": empty if tools else task_id, "task_id": task_id}
        for task_id in tasks.task_ids(env_id, **settings)
    ]
    return tasks.dataset(rows, "trl")


def environment_factory(
    env_id: str,
    *,
    invalid_action_penalty: float = 0.0,
    show_admissible: bool = True,
    **settings: Any,
) -> Callable[[], TaskTool]:
    """Return a value for `GRPOTrainer(environment_factory=...)`.

    Args:
        env_id: such as `atod/WebShop-v0`.
        invalid_action_penalty: subtracted from the environment's reward for every action that was
            not valid.
        show_admissible: whether the model is shown the admissible actions.
        **settings: of the environment, such as `split`, `data` and `max_turns`.

    Returns:
        A function that makes one environment for each rollout.
    """
    return lambda: TaskTool(made_env(env_id, settings), invalid_action_penalty, show_admissible)


class TaskTool:
    """One environment whose actions are calls of the tool `act`.

    TRL offers every public method except `reset` and `get_reward` as a tool.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        invalid_action_penalty: float = 0.0,
        show_admissible: bool = True,
    ) -> None:
        """See `environment_factory`."""
        self.env = env
        self.invalid_action_penalty = invalid_action_penalty
        self.show_admissible = show_admissible
        self.info: dict[str, Any] = {}
        """The `info` of the last reset or action."""
        self._reward = 0.0
        tags = action_tags(env.unwrapped.metadata)
        forms = "." if tags == ACTION_TAGS else f": {' or '.join(f'{tag}[..]' for tag in tags)}."
        first = CHAT_TEMPLATE.first.replace("{reply_format}", f"{_TOOL}{forms}")
        self._template = replace(CHAT_TEMPLATE, first=first)

    def reset(self, task_id: str | None = None, **row: object) -> str:
        """Start an episode; the returned text is added to the prompt.

        Args:
            task_id: the task; None: a random one.
            **row: the other columns of the data set, unused.
        """
        options = {} if task_id is None else {"task_id": task_id}
        observation, self.info = self.env.reset(options=options)
        self._reward = 0.0
        return self._told(observation)

    def act(self, action: str) -> str:
        """Does one action and tells what happens.

        Args:
            action: The action, written as the task asks for it.

        Returns:
            What can be observed then.
        """
        try:
            observation, reward, terminated, truncated, self.info = self.env.step(str(action))
        except ResetNeeded:
            return _OVER
        self._reward += float(reward)
        if not self.info["is_action_valid"]:
            self._reward -= self.invalid_action_penalty
        if terminated or truncated:
            return f"{shown_text(observation, self.info)}\n\n{_OVER}"
        return self._told(observation)

    def get_reward(self) -> float:
        """Return the sum of the episode's rewards, penalties included."""
        return self._reward

    def _told(self, observation: Any) -> str:
        return render_prompt(
            observation,
            template=self._template,
            profile="plain",
            show_admissible=self.show_admissible,
            hint=turn_hint(observation, self.info),
        )
