"""Wrappers between an environment and a language model, and the wrapper stack of an agent.

From the inside out, in the recommended order:

    env -> History -> ParseAction -> InvalidActionPenalty -> ChatPrompt

A completion enters at the outermost wrapper: `ChatPrompt` keeps it for the dialogue, `ParseAction`
converts it to an action and the environment executes the action. `agent_env` makes this stack;
`atod_gym.dialogue.AgentDialogue` does the same without an environment.
"""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import gymnasium
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

import atod_gym
from atod_gym.dialogue import AgentDialogue, TurnHistory
from atod_gym.envs.turn_env import TurnEnv, check_max_turns
from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import CompletionFormat, ParseProfile
from atod_gym.prompts import PromptStyle
from atod_gym.spaces import UnicodeText
from atod_gym.types import ParsedAction

__all__ = ["ChatPrompt", "History", "InvalidActionPenalty", "ParseAction", "agent_env", "make_env"]

Validity = Literal["strict", "format", "either"]


class History(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Add `history` to the observation: the last turns as (text, action), oldest first.

    Args:
        env: an environment with turn-structured observations.
        window: turns to keep; 0 keeps none.

    Raises:
        InvalidSettingError: the window is negative or the observation has no `text`.
    """

    def __init__(self, env: gymnasium.Env[Any, str], window: int = 2) -> None:
        RecordConstructorArgs.__init__(self, window=window)
        gymnasium.Wrapper.__init__(self, env)
        self._history = TurnHistory(window)
        record = spaces.Dict({"text": UnicodeText(), "action": UnicodeText()})
        inner = _turn_space(env, "History")
        self.observation_space = spaces.Dict({**inner.spaces, "history": spaces.Sequence(record)})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode with an empty history."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._history.extend(observation, None), info

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Execute an action and add it to the history."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        extended = self._history.extend(observation, info.get("action", action))
        return extended, reward, terminated, truncated, info


class ParseAction(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Execute the action in a completion; `info["parse_error"]` is the reason of a parse failure.

    A completion that does not parse is not an error: the action that `CompletionFormat` finds,
    possibly an empty one, is executed, and the turn is spent. Settings and errors are those
    of `CompletionFormat`; `last_characters=None` takes the number of published runs.

    Attributes:
        completion_format: reads and writes completions.

    Raises:
        InvalidSettingError: a setting is wrong, or `env` contains a `ParseAction` already.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        profile: ParseProfile = "tags",
        last_characters: int | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, profile=profile, last_characters=last_characters)
        gymnasium.Wrapper.__init__(self, env)
        if env.has_wrapper_attr("completion_format"):
            raise InvalidSettingError("A ParseAction is inside already: it would get actions.")
        self.completion_format = CompletionFormat.of(
            env.unwrapped.metadata, profile, last_characters
        )
        self.action_space = UnicodeText()

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Execute the action in a completion and add `action` and `parse_error` to `info`.

        Raises:
            TypeError: the completion is not a `str`.
        """
        parsed = self.completion_format.parse(action)
        observation, reward, terminated, truncated, info = self.env.step(parsed.action)
        info = {**info, "action": parsed.action, "parse_error": parsed.error}
        return observation, reward, terminated, truncated, info


class InvalidActionPenalty(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Subtract a penalty from the reward of invalid turns; `info` stays as it is.

    Args:
        env: for `format` and `either` with `ParseAction`, which reports whether completions parse.
        penalty: subtracted from the turn's reward, >= 0.
        validity: which turns are invalid. `strict`: the action was not admissible; `format`: the
            completion did not parse (as in published ALFWorld runs); `either`: one of the two.

    Raises:
        InvalidSettingError: a negative penalty, an unknown validity, or no `ParseAction` for it.
    """

    def __init__(
        self, env: gymnasium.Env[Any, str], penalty: float, validity: Validity = "strict"
    ) -> None:
        RecordConstructorArgs.__init__(self, penalty=penalty, validity=validity)
        gymnasium.Wrapper.__init__(self, env)
        if not penalty >= 0:
            raise InvalidSettingError(f"The penalty must be >= 0, not {penalty}.")
        if validity not in get_args(Validity):
            raise InvalidSettingError(
                f"Unknown validity {validity!r}; known: {', '.join(get_args(Validity))}."
            )
        if validity != "strict" and not env.has_wrapper_attr("completion_format"):
            raise InvalidSettingError(
                f"validity={validity!r} needs ParseAction inside; apply the penalty outside it, or "
                "outside agent_env."
            )
        self.penalty = penalty
        self.validity = validity

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute an action; subtract the penalty from the reward if it is invalid."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = float(reward)
        is_malformed = self.validity != "strict" and info["parse_error"]
        if is_malformed or (self.validity != "format" and not info["is_action_valid"]):
            reward -= self.penalty
        return observation, reward, terminated, truncated, info


class ChatPrompt(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Turn the observation into a tuple of messages, dicts of `role` and `content`.

    In window style it is one user message, rebuilt every turn. In chat style it is the dialogue so
    far: the messages of the last turn, the completion as the assistant's message, and one new user
    message, so that every prompt extends the previous one. It needs `ParseAction` inside, whose
    profile the prompts describe: the dialogue keeps unchanged completions, while the environment
    receives the parsed actions. Past turns of the window style come from `History`; settings and
    errors are those of `AgentDialogue`.

    Attributes:
        dialogue: renders the prompts, and shortened ones if they are too long.

    Raises:
        InvalidSettingError: there is no `ParseAction` inside, or a setting is wrong.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        style: PromptStyle = "window",
        template: str | os.PathLike[str] | None = None,
        show_admissible: bool = True,
    ) -> None:
        path = None if template is None else os.fspath(template)
        RecordConstructorArgs.__init__(
            self, style=style, template=path, show_admissible=show_admissible
        )
        gymnasium.Wrapper.__init__(self, env)
        _turn_space(env, "ChatPrompt")
        if not env.has_wrapper_attr("completion_format"):
            raise InvalidSettingError("ChatPrompt needs ParseAction inside.")
        self.dialogue = AgentDialogue(
            env.unwrapped.metadata, style=style, history_window=0, template=path,
            profile=env.get_wrapper_attr("completion_format").profile,
            show_admissible=show_admissible,
        )  # fmt: skip
        message = spaces.Dict({"role": UnicodeText(), "content": UnicodeText()})
        self.observation_space = spaces.Sequence(message)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; return its first prompt."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.dialogue.reset(observation, info), info

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Play a completion; return the next prompt."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        error = info.get("parse_error", "")
        parsed = ParsedAction(info.get("action", action), "", is_valid=not error, error=error)
        messages = self.dialogue.step(action, parsed, observation, info)
        return messages, reward, terminated, truncated, info


def make_env(
    env_id: str, /, max_turns: int | None = None, **settings: Any
) -> gymnasium.Env[Any, Any]:
    """Make an environment with a turn limit, of this or any other package.

    Environments of this package are limited themselves, not only by the wrapper of
    `gymnasium.make`: experts plan with the limit, and a further step is refused.

    Args:
        env_id: what `gymnasium.make` takes.
        max_turns: turn limit; None: the one that the id is registered with.
        **settings: keywords of the environment.

    Raises:
        InvalidSettingError: there is no such environment, or it has no such setting.
        AtodError: the environment cannot be made, see its class.
    """
    check_max_turns(max_turns)
    try:
        # Gymnasium's checker breaks the first step after a refused first reset.
        env = gymnasium.make(env_id, max_turns, disable_env_checker=True, **settings)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        known = f" Environments here: {', '.join(atod_gym.ENV_IDS)}."
        advice = "" if env_id in gymnasium.registry else known
        raise InvalidSettingError(f"{env_id}: {error}{advice}") from error
    except TypeError as error:
        raise InvalidSettingError(f"{env_id} does not take these settings: {error}") from error
    _share_limit(env)
    return env


def agent_env(
    env: gymnasium.Env[Any, str],
    *,
    profile: ParseProfile = "tags",
    style: PromptStyle = "chat",
    history_window: int = 2,
    template: str | os.PathLike[str] | None = None,
    show_admissible: bool = True,
) -> gymnasium.Env[Any, str]:
    """Stack the wrappers of an agent: observations are prompts, actions are completions.

    The environment's observations are turn-structured; for settings and errors see `AgentDialogue`.
    In the stack's `info`, `action` is the executed action, and `parse_error` is the reason why a
    completion did not parse.
    """
    _share_limit(env)
    if style == "window":
        env = History(env, window=history_window)
    env = ParseAction(env, profile=profile)
    return ChatPrompt(env, style=style, template=template, show_admissible=show_admissible)


def _share_limit(env: gymnasium.Env[Any, Any]) -> None:
    """Set the limit of Gymnasium's `TimeLimit` in an environment of this package, too."""
    limit = None if env.spec is None else env.spec.max_episode_steps
    if limit is not None and isinstance(env.unwrapped, TurnEnv):
        env.unwrapped.limit_turns(limit)


def _turn_space(env: gymnasium.Env[Any, str], wrapper: str) -> spaces.Dict:
    """Return the space of turn-structured observations; else raise `InvalidSettingError`."""
    space = env.observation_space
    if not isinstance(space, spaces.Dict) or "text" not in space.spaces:
        raise InvalidSettingError(
            f"{wrapper} needs turn-structured observations (a Dict with text), not {space}; it "
            "belongs inside ChatPrompt."
        )
    return space
