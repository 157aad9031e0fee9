"""Make Gymnasium environments from external settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium

from atod_gym.errors import InvalidSettingError
from atod_gym.wrappers import agent_env, make_env


def made_env(
    env_id: str, env_options: Mapping[str, Any], prompt_options: Mapping[str, Any] | None = None
) -> gymnasium.Env[Any, str]:
    """Make an environment.

    Args:
        env_id: what `gymnasium.make` takes.
        env_options: keywords of the environment.
        prompt_options: keywords of `agent_env`, so that the environment exchanges messages; None:
            it takes actions.

    Raises:
        InvalidSettingError: if a keyword is unknown or invalid.
        AtodError: if the environment cannot be made, see its class.
    """
    env = make_env(env_id, **env_options)
    if prompt_options is None:
        return env
    try:
        return agent_env(env, **prompt_options)
    except BaseException as error:
        env.close()
        if isinstance(error, TypeError):
            raise InvalidSettingError(f"Prompt options: {error}") from error
        raise


def encodable(text: str) -> str:
    """Return the text with `?` for lone surrogates, which UTF-8 and most libraries cannot carry."""
    return text.encode("utf-8", "replace").decode("utf-8")
