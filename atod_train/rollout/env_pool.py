"""Play the environments of a split as one vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from atod_gym.dialogue import AgentDialogue
from atod_gym.envs.vector import TurnVectorEnv
from atod_gym.errors import AtodError, InvalidSettingError, TaskNotFoundError
from atod_gym.parsing import CompletionFormat
from atod_train.config import EnvConfig, parse_prompt_style
from atod_train.rollout.episode import Episode
from atod_train.rollout.own_env import find_spec, is_turn_env, keywords_of, make_text_env

if TYPE_CHECKING:
    from atod_train.models.generation import SampledTokens


class EnvPool:
    """Plays many episodes of a split at the same time, each turn of all in one call.

    Args:
        config: the environment, its prompts and its limits. A `max_turns` of 0 means the
            environment's own limit.
        split: a split of the environment.
        template: of prompts; None: that of the prompt style.

    Attributes:
        task_ids: of the split, in manifest order.
        max_turns: turn limit of an episode.
        content_hash: of the split's tasks.
        code_hash: of an environment that is not a `TurnEnv`, see `TextEnv.code_hash`; else empty.
        data: the data that is played, see `StepInfo`.
        completion_format: how completions are written.

    Raises:
        AtodError: the environment refuses a setting; the message is the environment's.
    """

    def __init__(self, config: EnvConfig, split: str, template: Path | None = None) -> None:
        self.config = config
        self.split = split
        self.template = template
        self.max_turns = config.max_turns
        self._envs = self._make(1)
        first: Any = self._envs.envs[0]
        self.max_turns = self.max_turns or first.get_wrapper_attr("max_turns")
        self.task_ids: tuple[str, ...] = tuple(first.get_wrapper_attr("task_ids"))
        self.content_hash: str = first.get_wrapper_attr("manifest").content_hash
        self.code_hash: str = getattr(first, "code_hash", "")
        self.data: str = first.get_wrapper_attr("data")
        self._dialogues = [self._dialogue(first)]
        self.completion_format: CompletionFormat = self._dialogues[0].completion_format

    def start(self, task_ids: Sequence[str]) -> list[Episode]:
        """Start an episode for each task; those of the last call end.

        Raises:
            AtodError: there is no such task, or it cannot be started.
        """
        if len(task_ids) > len(self._envs.envs):
            self._envs.close()
            self._envs = self._make(len(task_ids))
            self._dialogues = []
        envs = self._envs.envs[: len(task_ids)]
        self._dialogues += [self._dialogue(env) for env in envs[len(self._dialogues) :]]
        try:
            starts = self._envs.begin(range(len(envs)), task_ids)
        except TaskNotFoundError as error:
            raise AtodError(str(error)) from error
        return [
            Episode(number, env, self._dialogues[number], self.config, *start)
            for number, (env, start) in enumerate(zip(envs, starts, strict=True))
        ]

    def play(
        self,
        episodes: Sequence[Episode],
        texts: Sequence[str],
        sampled: Sequence[SampledTokens] | None = None,
    ) -> None:
        """Play and record one turn of some episodes.

        Args:
            episodes: of the last `start`, each once; all of them still running.
            texts: a completion for each.
            sampled: the tokens of the completions; None: unknown.
        """
        parsed = [
            episode.dialogue.parse(text) for episode, text in zip(episodes, texts, strict=True)
        ]
        numbers = [episode.number for episode in episodes]
        results = self._envs.play(numbers, [found.action for found in parsed])
        tokens: Sequence[SampledTokens | None] = sampled or [None] * len(episodes)
        for episode, *turn in zip(episodes, texts, parsed, results, tokens, strict=True):
            episode.record(*turn)

    def close(self) -> None:
        """Close all environments; may be called twice."""
        self._envs.close()

    def _make(self, count: int) -> TurnVectorEnv | SingleEnvs:
        config = self.config
        spec = find_spec(config.id)
        if spec.vector_entry_point is None or not is_turn_env(spec):
            return SingleEnvs([make_text_env(config, self.split) for _ in range(count)])
        limit = self.max_turns or spec.max_episode_steps
        settings = keywords_of(config, self.split)
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
        style, window = parse_prompt_style(config.prompt_style)
        return AgentDialogue(
            env.unwrapped.metadata,
            profile=config.parse_profile,
            style=style,
            history_window=window,
            template=self.template,
            show_admissible=config.show_admissible,
        )


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
