"""The environments of a split as one vector environment, with the dialogue of each episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium

from atod_gym.dialogue import AgentDialogue
from atod_gym.envs.turn_env import TurnEnv
from atod_gym.envs.vector import TurnVectorEnv
from atod_gym.errors import AtodError, InvalidSettingError, TaskNotFoundError
from atod_gym.parsing import CompletionFormat
from atod_gym.types import Message
from atod_gym.wrappers import make_env
from atod_train.config import EnvConfig


class EnvEpisode:
    """One episode of an `EnvPool`: messages come out, completions go in.

    Attributes:
        dialogue: renders the prompts and reads the completions.
        observation: of the last turn.
        info: of the last turn; `parse_error` says why the last completion did not parse.
        messages: what the last turn adds to the prompt; in window style the whole prompt.
        reward: of the last turn.
        terminated: whether the episode has ended by the task.
        truncated: whether it has ended by the turn limit.
    """

    def __init__(self, number: int, env: Any, dialogue: AgentDialogue) -> None:
        self.number = number
        self.env = env
        self.dialogue = dialogue
        self.observation: Any = {}
        self.info: Any = {}
        self.messages: tuple[Message, ...] = ()
        self.reward = 0.0
        self.terminated = self.truncated = False

    @property
    def actions(self) -> tuple[str, ...]:
        """The listed actions, without placeholders that are to be filled in."""
        listed = self.observation["admissible_actions"]
        return tuple([action for action in listed if not TurnEnv.is_placeholder(action)])

    def expert(self) -> Any:
        """Return a scripted player that has been shown the first observation of this episode.

        An environment's `demonstrator()`, which may know the answer, is preferred to `expert()`.

        Raises:
            AtodError: the environment has neither.
        """
        unwrapped = self.env.unwrapped
        make = getattr(unwrapped, "demonstrator", None) or getattr(unwrapped, "expert", None)
        if make is None:
            raise AtodError(
                f"{type(unwrapped).__name__} has no scripted expert; give model.student and "
                "model.teacher as paths of saved models instead."
            )
        expert = make()
        expert.reset(self.observation["instruction"], self.observation["text"])
        return expert

    def _started(self, observation: Any, info: Any) -> None:
        self.observation, self.info = observation, info
        self.messages = new_messages(self.dialogue.reset(observation, info))
        self.reward = 0.0
        self.terminated = self.truncated = False


class EnvPool:
    """Plays many episodes of a split at the same time, each turn of all in one call.

    Args:
        config: which environment, and how it is put to the model.
        split: a split of the environment.

    Attributes:
        task_ids: of the split, in manifest order.
        content_hash: of the split's tasks.
        data: which data is played, see `StepInfo`.
        completion_format: how completions are written.

    Raises:
        AtodError: the environment refuses a setting; the message is the environment's.
    """

    def __init__(self, config: EnvConfig, split: str) -> None:
        self.config = config
        self.split = split
        self._envs = self._make(1)
        self._episodes: list[EnvEpisode] = []
        first: Any = self._envs.envs[0].unwrapped
        self.task_ids: tuple[str, ...] = tuple(first.task_ids)
        self.content_hash: str = first.manifest.content_hash
        self.data: str = first.data
        self.completion_format = CompletionFormat.of(first.metadata, config.parse_profile)

    def start(self, task_ids: Sequence[str]) -> list[EnvEpisode]:
        """Start an episode for each task; those of the last call are over.

        Raises:
            AtodError: there is no such task, or it cannot be started.
        """
        if len(task_ids) > len(self._envs.envs):
            self._envs.close()
            self._envs = self._make(len(task_ids))
            self._episodes = []
        for number in range(len(self._episodes), len(task_ids)):
            env = self._envs.envs[number]
            self._episodes.append(EnvEpisode(number, env, self._dialogue(env)))
        episodes = self._episodes[: len(task_ids)]
        try:
            starts = self._envs.begin([episode.number for episode in episodes], task_ids)
        except TaskNotFoundError as error:
            raise AtodError(str(error)) from error
        for episode, start in zip(episodes, starts, strict=True):
            episode._started(*start)
        return episodes

    def play(self, episodes: Sequence[EnvEpisode], completions: Sequence[str]) -> None:
        """Play one turn of some episodes, whose attributes then hold what it brought.

        Args:
            episodes: of the last `start`, each once; none of them has ended.
            completions: one for each.
        """
        parsed = [
            episode.dialogue.parse(completion)
            for episode, completion in zip(episodes, completions, strict=True)
        ]
        numbers = [episode.number for episode in episodes]
        turns = self._envs.play(numbers, [found.action for found in parsed])
        for episode, completion, found, turn in zip(
            episodes, completions, parsed, turns, strict=True
        ):
            observation, reward, episode.terminated, episode.truncated, info = turn
            episode.reward = float(reward)
            episode.observation = observation
            episode.info = {**info, "action": found.action, "parse_error": found.error}
            messages = episode.dialogue.step(completion, found, observation, episode.info)
            episode.messages = new_messages(messages)

    def close(self) -> None:
        """Close all environments; may be called twice."""
        self._envs.close()

    def _make(self, count: int) -> _Envs:
        config = self.config
        settings: dict[str, Any] = {"split": self.split, "data": config.data}
        limit = config.options.get("max_turns", config.max_turns)
        settings |= {name: value for name, value in config.options.items() if name != "max_turns"}
        spec = gymnasium.registry.get(config.id)
        if spec is None or spec.vector_entry_point is None:
            return SingleEnvs(
                [make_env(config.id, max_turns=limit, **settings) for _ in range(count)]  # type: ignore[arg-type]
            )
        try:
            envs = gymnasium.make_vec(
                config.id, count, max_episode_steps=limit, autoreset_mode="Disabled", **settings
            )
        except TypeError as error:
            raise InvalidSettingError(
                f"{config.id} does not take these settings: {error}"
            ) from error
        assert isinstance(envs, TurnVectorEnv)
        return envs

    def _dialogue(self, env: Any) -> AgentDialogue:
        config = self.config
        return AgentDialogue(
            env.unwrapped.metadata,
            profile=config.parse_profile,
            style=config.prompt_style,
            history_window=config.history_window,
            show_admissible=config.show_admissible,
        )


def new_messages(messages: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    """Return what a prompt adds to the one before: all that follows the last assistant message."""
    new: list[Message] = []
    for message in reversed(messages):
        if message["role"] == "assistant":
            break
        new.append(Message(message["role"], message["content"]))  # type: ignore[arg-type]
    return tuple(reversed(new))


class _Envs(Protocol):
    """The part of `TurnVectorEnv` that is used here."""

    envs: list[Any]

    def begin(self, numbers: Sequence[int], task_ids: Sequence[str]) -> list[Any]:
        """Start episodes in some environments."""

    def play(self, numbers: Sequence[int], actions: Sequence[str]) -> list[Any]:
        """Play one turn in some environments."""

    def close(self) -> None:
        """Close all environments."""


class SingleEnvs:
    """Environments without a native vector environment, one after the other."""

    def __init__(self, envs: list[Any]) -> None:
        self.envs = envs

    def begin(self, numbers: Sequence[int], task_ids: Sequence[str]) -> list[Any]:
        """Start episodes in some environments."""
        return [
            self.envs[number].reset(options={"task_id": task_id})
            for number, task_id in zip(numbers, task_ids, strict=True)
        ]

    def play(self, numbers: Sequence[int], actions: Sequence[str]) -> list[Any]:
        """Play one turn in some environments."""
        return [
            self.envs[number].step(action) for number, action in zip(numbers, actions, strict=True)
        ]

    def close(self) -> None:
        """Close all environments."""
        for env in self.envs:
            env.close()
