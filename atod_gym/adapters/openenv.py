"""Serve environments of this package as an OpenEnv server, and connect to one.

`make_app` returns OpenEnv's ASGI application for an environment, and

    python -m atod_gym.adapters.openenv --env-id atod/WebShop-v0 --port 8000

serves it. `AtodClient` is the client; it needs only the server's address:

    with AtodClient(base_url="http://127.0.0.1:8000").sync() as client:
        result = client.reset(task_id=...)
        result = client.step("search[red shoes]")

Every session (a websocket) has its own Gymnasium environment, opened at the first reset and closed
with the session. OpenEnv's plain HTTP routes keep no session: `/reset` shows the start of a task,
and `/step` answers 409.

A reset takes `seed`, `episode_id`, and one of `task_id` and `index`, the task's number in the
split. OpenEnv's task routes (`/<name>/tasks` and so on) list the tasks.
"""

from __future__ import annotations

import argparse
import functools
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import gymnasium
from gymnasium.error import ResetNeeded

import atod_gym
from atod_gym.adapters.made_env import encodable, made_env
from atod_gym.adapters.openenv_session import ServedTasks, Session
from atod_gym.errors import (
    AtodError,
    InvalidSettingError,
    MissingExtraError,
    ServerError,
    TaskNotFoundError,
)

MAX_SESSIONS = 256
"""Default limit of concurrent sessions of a server."""

_BACKLOG = 2048


class Types(NamedTuple):
    """Classes derived from OpenEnv's."""

    action: Any
    observation: Any
    state: Any
    environment: Any
    client: Any


def make_app(
    env_id: str = "atod/ALFWorld-v0",
    *,
    completions: bool = False,
    prompt_options: Mapping[str, Any] | None = None,
    max_sessions: int = MAX_SESSIONS,
    session_timeout: float | None = None,
    **env_options: Any,
) -> Any:
    """Return the ASGI application that serves an environment in OpenEnv's protocol.

    Args:
        env_id: what `gymnasium.make` takes.
        completions: False: a step's text is an action, as the environment takes it; True: it is
            the completion of a model, and observations have the `messages` to answer.
        prompt_options: with completions: keywords of `atod_gym.wrappers.agent_env`.
        max_sessions: limit of concurrent sessions; one more is refused.
        session_timeout: seconds after which OpenEnv ends idle sessions without a websocket.
        env_options: keywords of the environment, such as `split` or `data`.

    Raises:
        MissingExtraError: if OpenEnv is not installed.
        InvalidSettingError: if a setting is invalid.
        AtodError: if the environment cannot be made, see its class.
    """
    types = load_types()
    from openenv.core.env_server import create_app
    from openenv.core.env_server.types import ConcurrencyConfig

    if prompt_options and not completions:
        raise InvalidSettingError("prompt_options need completions=True: actions have no prompt.")
    if max_sessions < 1:
        raise InvalidSettingError(f"max_sessions must be >= 1, not {max_sessions}.")
    prompt_options = dict(prompt_options or {}) if completions else None
    # Made once at the start, so that mistakes are reported before the first session.
    with made_env(env_id, env_options, prompt_options) as env:
        tasks = env.get_wrapper_attr("split"), env.get_wrapper_attr("task_ids")
    served = ServedTasks(env_id, env_options, prompt_options, *tasks)
    app = create_app(
        functools.partial(types.environment, served),
        types.action,
        types.observation,
        env_name=env_id.rpartition("/")[2],
        concurrency_config=ConcurrencyConfig(
            max_concurrent_envs=max_sessions, session_timeout=session_timeout
        ),
        state_cls=types.state,
    )
    _answer_errors(app)
    return app


@functools.cache
def load_types() -> Types:
    """Return the classes of this adapter, derived from those of OpenEnv.

    Raises:
        MissingExtraError: if OpenEnv is not installed.
    """
    try:
        from openenv.core import EnvClient
        from openenv.core.client_types import StepResult
        from openenv.core.env_server import Action, Environment, Observation, State
    except ImportError as error:
        raise MissingExtraError(
            f"This adapter needs OpenEnv 0.10: pip install 'atod-gym[openenv]'. ({error})"
        ) from error
    from pydantic import BeforeValidator

    class AtodAction(Action):
        """An action of the environment, or a model's completion."""

        text: Annotated[str, BeforeValidator(_any_text)]

    class AtodObservation(Observation):
        """An observation of the environment; `metadata` is the Gymnasium environment's info."""

        instruction: str = ""
        text: str = ""
        admissible_actions: list[str] = []  # noqa: RUF012 - pydantic gives each its own
        turn_index: int = 0
        terminated: bool = False
        truncated: bool = False
        messages: list[dict[str, str]] = []  # noqa: RUF012

    class AtodState(State):
        """The state of the episode; empty texts before the first reset."""

        task_id: str = ""
        task_type: str = ""
        split: str = ""
        data: str = ""
        env_id: str = ""
        success: bool = False
        total_reward: float = 0.0

    class AtodEnvironment(Session, Environment[AtodAction, AtodObservation, AtodState]):
        SUPPORTS_CONCURRENT_SESSIONS = True
        observation_class = AtodObservation
        state_class = AtodState

    class AtodClient(EnvClient[AtodAction, AtodObservation, AtodState]):
        """A session at a server; `step` takes a text or an `AtodAction`."""

        def _step_payload(self, action: Any) -> dict[str, Any]:
            return {"text": action if isinstance(action, str) else action.text}

        def _parse_result(self, payload: dict[str, Any]) -> Any:
            reward, done = payload.get("reward"), payload.get("done", False)
            observation = AtodObservation(**payload["observation"], reward=reward, done=done)
            return StepResult(observation, reward, done, observation.metadata)

        def _parse_state(self, payload: dict[str, Any]) -> Any:
            return AtodState(**payload)

    return Types(AtodAction, AtodObservation, AtodState, AtodEnvironment, AtodClient)


def __getattr__(name: str) -> Any:
    """Create `AtodClient` and the other classes on access, as OpenEnv may be missing."""
    for cls in load_types() if name.startswith("Atod") else ():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _any_text(text: object) -> object:
    return encodable(text) if isinstance(text, str) else text


def _answer_errors(app: Any) -> None:
    """Make the plain HTTP routes report errors of the environment as they report their own."""
    from fastapi.responses import JSONResponse

    def answer(request: Any, error: Exception) -> Any:
        status = {ResetNeeded: 409, TaskNotFoundError: 404, IndexError: 404, ServerError: 503}
        return JSONResponse({"detail": str(error)}, status.get(type(error), 422))

    for kind in (AtodError, ResetNeeded, IndexError):
        app.add_exception_handler(kind, answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve an environment until stopped; print its address as JSON once it listens.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status: 2 for a mistake of the user, which is reported on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m atod_gym.adapters.openenv", description="Serve an environment (OpenEnv)."
    )
    parser.add_argument("--env-id", default=atod_gym.ENV_IDS[0], help="default: %(default)s")
    parser.add_argument("--split", help="split of the tasks, such as train")
    parser.add_argument("--data", help="auto, official, generated, or a path to data")
    parser.add_argument("--options", default="{}", help="further keywords, as a JSON object")
    parser.add_argument("--completions", action="store_true", help="steps are completions")
    parser.add_argument("--max-sessions", type=int, default=MAX_SESSIONS)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.port < 2**16:
            raise InvalidSettingError(f"--port must be 0 to 65535, not {options.port}.")
        app = make_app(
            options.env_id,
            completions=options.completions,
            max_sessions=options.max_sessions,
            **_further_options(options),
        )
        listener = socket.create_server((options.host, options.port), backlog=_BACKLOG)
    except (AtodError, gymnasium.error.Error, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    import uvicorn

    url = f"http://{options.host}:{listener.getsockname()[1]}"
    print(json.dumps({"service": "openenv", "url": url}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0


def _further_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return split, data and the keywords in `--options`; refuse those with their own option."""
    try:
        chosen = json.loads(options.options)
    except ValueError as error:
        raise InvalidSettingError(f"--options is not JSON: {error}") from error
    if not isinstance(chosen, dict):
        raise InvalidSettingError("--options must be a JSON object.")
    named = {"split": options.split, "data": options.data}
    named = {name: value for name, value in named.items() if value is not None}
    for name in chosen.keys() & {"env_id", "completions", "max_sessions", *named}:
        raise InvalidSettingError(f"Give {name} as --{name.replace('_', '-')}, not in --options.")
    return {**chosen, **named}


if __name__ == "__main__":
    sys.exit(main())
