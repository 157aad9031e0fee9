"""Agents that answer prompts with completions: random, expert, human, or one's own; no torch.

An agent plays one episode at a time; for several at once there are several agents.
"""

from __future__ import annotations

import os
import pkgutil
import random
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from atod_gym import play
from atod_gym.dialogue import Prompt
from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ACTION_TAGS
from atod_gym.types import TurnObservation
from atod_train.rollout.episode import Episode

Info = Mapping[str, Any]

_PLACEHOLDER = re.compile(r"<\w+>")
"""Part of an admissible action that the agent replaces by words of its own."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An agent's completion and its tokens; None: not known."""

    text: str
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    """Including those of the reasoning."""
    reasoning_tokens: int | None = 0
    reasoning: str = ""
    """Thoughts that a server returns next to the text."""
    is_cut: bool = False
    """The text ends where the token limit was reached."""
    turns_left_out: int = 0
    """Past turns that the prompt left out, because they would not fit the context."""
    instead: str = ""
    """Content of an answer without text, such as tool calls; empty if there is a text."""


class EpisodeStopped(Exception):
    """The agent cannot continue an episode, which counts as failed; others can be played."""

    def __init__(self, reason: Literal["context_limit", "refused"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Agent(Protocol):
    """An agent that plays one episode after the other."""

    def reset(self, episode: Episode, observation: TurnObservation, info: Info) -> None:
        """Start an episode.

        Args:
            episode: with `env`, the environment, and `dialogue`, which reads completions.
            observation: the first one.
            info: of the reset.
        """

    async def act(self, messages: Prompt, observation: TurnObservation, info: Info) -> Completion:
        """Return the completion of this turn.

        Args:
            messages: the prompt, each with `role` and `content`.
            observation: that the prompt shows.
            info: of the last reset or step; `info["action"]` was executed last.

        Raises:
            EpisodeStopped: the episode cannot be continued.
            AtodError: no episode can be continued.
        """


class RandomAgent:
    """Play a random admissible action; where none are listed, random words of the observation.

    Actions depend on the seed and the task alone, not on other episodes.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def reset(self, episode: Episode, observation: TurnObservation, info: Info) -> None:
        """Start an episode."""
        self._dialogue = episode.dialogue
        self._random = random.Random(f"{self._seed}/{info['task_id']}")

    async def act(self, messages: Prompt, observation: TurnObservation, info: Info) -> Completion:
        """Return the completion of this turn."""
        actions = observation["admissible_actions"]
        if actions:
            action = _PLACEHOLDER.sub(lambda _: self._words(observation), self._one_of(actions))
        else:
            tag = self._one_of(self._dialogue.completion_format.tags)
            words = self._words(observation)
            action = words if (tag,) == ACTION_TAGS else f"{tag}[{words}]"
        return Completion(self._dialogue.format(action))

    def _words(self, observation: TurnObservation) -> str:
        """Return one to three consecutive words of the observation."""
        words = re.findall(r"\w+", f"{observation['instruction']} {observation['text']}")
        first = self._below(len(words)) if words else 0
        return " ".join(words[first : first + 1 + self._below(3)])

    def _one_of(self, choices: Sequence[str]) -> str:
        return choices[self._below(len(choices))]

    def _below(self, count: int) -> int:
        # random() is the only method that is the same in all versions of Python.
        return int(self._random.random() * count)


class ExpertAgent:
    """Play the actions of the environment's scripted expert, which sees no more than a model."""

    def reset(self, episode: Episode, observation: TurnObservation, info: Info) -> None:
        """Start an episode.

        Raises:
            InvalidSettingError: the environment has no expert.
        """
        env = episode.env.unwrapped
        if not hasattr(env, "expert"):
            raise InvalidSettingError(
                f"{type(env).__name__} has no scripted expert; choose another --agent."
            )
        self._dialogue = episode.dialogue
        self._expert = env.expert()
        self._expert.reset(observation["instruction"], observation["text"])

    async def act(self, messages: Prompt, observation: TurnObservation, info: Info) -> Completion:
        """Return the completion of this turn."""
        last = info["action"] if observation["turn_index"] else None
        choices = observation["admissible_actions"]
        action = self._expert.act(observation["text"], choices, last)
        return Completion(self._dialogue.format(action))


class HumanAgent:
    """Ask a person in the terminal."""

    def reset(self, episode: Episode, observation: TurnObservation, info: Info) -> None:
        """Show the task."""
        self._dialogue = episode.dialogue
        tags = episode.dialogue.completion_format.tags
        print(f"\nTask {info['task_id']}\nGoal: {observation['instruction']}\n\n{play.HELP}")
        if tags != ACTION_TAGS:
            print(f"Actions: {', '.join(f'{tag}[..]' for tag in tags)}")

    async def act(self, messages: Prompt, observation: TurnObservation, info: Info) -> Completion:
        """Ask for an action.

        Raises:
            KeyboardInterrupt: the person entered `q`, or the end of the input.
        """
        print(f"\n{play.page(observation, info)}")
        while True:
            # Blocking the event loop is harmless: a person plays one episode at a time. But the
            # loop would handle Ctrl-C only after the input.
            of_loop = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                action = play.ask(observation)
            except EOFError:
                action = None
            finally:
                signal.signal(signal.SIGINT, of_loop)
            if action is None:
                raise KeyboardInterrupt
            try:
                return Completion(self._dialogue.format(action))
            except InvalidSettingError as error:
                print(error)


def load_agent(name: str) -> Callable[[], Agent]:
    """Import a function or class that makes an agent.

    Args:
        name: `module:attribute`. The attribute is called without arguments, once for each episode
            that is played at the same time. The current folder is searched for the module too.

    Raises:
        InvalidSettingError: there is no such module or attribute.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidSettingError(f"There is no agent {name!r}: {error}.") from error
    if not callable(found):
        raise InvalidSettingError(f"There is no agent {name!r}: that cannot be called to make one.")
    return found
