"""Environments of this package for `verifiers`, its evaluations and prime-rl.

verifiers 0.4 has one protocol (`verifiers.v1`): a taskset with the tasks, an environment that
plays an episode of a task, and a harness through which an agent calls its model. `vf-eval` runs
this protocol; the older `MultiTurnEnv` was removed. Here

- a task is one task id of a split,
- the environment opens a Gymnasium environment for each episode, in its own thread, passes the
  agent one user message per turn and passes the completions to the Gymnasium environment,
- the harness requests one chat completion per turn from this process; it needs no sandbox.

In chat style a turn's request is the whole dialogue, and the trace is one branch. In window style
every turn's message is self-contained and starts its own branch of the trace.

`vf-eval atod-verifiers`, and env servers such as those of prime-rl, load all of it from the module
`atod_verifiers`, which is installed with this package; its settings are
`--env.taskset.env-id atod/WebShop-v0` and so on.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium

from atod_gym.adapters.made_env import made_env
from atod_gym.adapters.verifiers_episode import Episode
from atod_gym.errors import InvalidSettingError, MissingExtraError
from atod_gym.parsing import ParseProfile
from atod_gym.prompts import PromptStyle
from atod_gym.tasks import spread

PLUGIN_ID = "atod-verifiers"
"""Id of the taskset, the environment and the harness in verifiers."""

REWARD = "environment_reward"
"""Name of the reward in traces: the sum of the rewards of the turns."""


class Plugin(NamedTuple):
    """The classes that verifiers loads by their id."""

    taskset: Any
    taskset_config: Any
    environment: Any
    environment_config: Any
    harness: Any


def load_environment(
    env_id: str = "atod/ALFWorld-v0",
    *,
    split: str | None = None,
    data: str | None = None,
    prompt_style: PromptStyle = "chat",
    parse_profile: ParseProfile = "tags",
    max_turns: int | None = None,
    tasks: int = -1,
    history_window: int = 2,
    show_admissible: bool = True,
    template: str | None = None,
    **env_options: Any,
) -> Any:
    """Return a `verifiers.v1.Env` over an environment of this package.

    Args:
        env_id: what `gymnasium.make` takes.
        split: of the tasks; None: the environment's default, as for `data` and `max_turns`.
        data: `auto`, `official`, `generated` or a path.
        prompt_style: `chat`: the dialogue grows; `window`: every turn is one message that shows
            the last `history_window` turns.
        parse_profile: how completions are parsed, see `atod_gym.parsing`.
        max_turns: turn limit of the environment.
        tasks: how many tasks of the split are played, spread evenly over it; -1: all.
        history_window: past turns that a prompt in window style shows.
        show_admissible: whether prompts list the admissible actions.
        template: path of a prompt template, see `atod_gym.prompts`.
        env_options: further keywords of the environment, such as `products` or `server_url`. They
            are part of the configuration that verifiers saves, so they must be JSON.

    Raises:
        MissingExtraError: if verifiers is not installed.
        InvalidSettingError: if a setting is invalid.
        AtodError: if the environment cannot be made, see its class.
    """
    plugin = load_plugin()
    try:
        taskset = plugin.taskset_config(
            id=PLUGIN_ID,
            env_id=env_id,
            split=split,
            data=data,
            prompt_style=prompt_style,
            parse_profile=parse_profile,
            max_turns=max_turns,
            tasks=tasks,
            history_window=history_window,
            show_admissible=show_admissible,
            template=template,
            options=env_options,
        )
    except ValueError as error:
        raise InvalidSettingError(str(error)) from error
    return plugin.environment(plugin.environment_config(taskset=taskset))


@functools.cache
def load_plugin() -> Plugin:
    """Return the classes of this adapter, derived from those of verifiers.

    Raises:
        MissingExtraError: if verifiers is not installed.
    """
    try:
        import verifiers.v1 as vf
    except ImportError as error:
        raise MissingExtraError(
            "This adapter needs verifiers 0.4 (Python 3.11 or newer): "
            f"pip install 'atod-gym[verifiers]'. ({error})"
        ) from error

    class AtodTaskData(vf.TaskData):
        prompt_style: str = "chat"

    class AtodTask(vf.Task[AtodTaskData]):
        @property
        def key(self) -> str:
            return str(self.data.id)

    class AtodTasksetConfig(vf.TasksetConfig):
        env_id: str = "atod/ALFWorld-v0"
        """Id of the gym environment."""
        split: str | None = None
        """Split of the tasks (None: the environment's default)."""
        data: str | None = None
        """auto, official, generated, or a path."""
        prompt_style: PromptStyle = "chat"
        """chat: the dialogue so far; window: one message per turn that contains the last turns."""
        parse_profile: ParseProfile = "tags"
        """The format of completions, see `atod_gym.parsing`."""
        max_turns: int | None = None
        """Turn limit (None: the environment's default)."""
        tasks: int = -1
        """Number of tasks to play, spread evenly over the split (-1: all)."""
        history_window: int = 2
        """Past turns shown in window style."""
        show_admissible: bool = True
        """Whether prompts list the admissible actions."""
        template: str | None = None
        """Path of a prompt template."""
        options: dict[str, Any] = {}  # noqa: RUF012 - pydantic gives each its own
        """Further keywords of the environment."""

    class AtodTaskset(vf.Taskset[AtodTask, AtodTasksetConfig]):
        """One task for each task id, in manifest order."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if config.tasks < -1 or config.tasks == 0:
                raise InvalidSettingError(f"tasks must be >= 1, or -1 for all, not {config.tasks}.")
            with _made(config) as env:
                self.task_ids = spread(env.get_wrapper_attr("task_ids"), max(0, config.tasks))

        def load(self) -> Iterator[Any]:
            style = self.config.prompt_style
            for task_id in self.task_ids:
                data = AtodTaskData(id=task_id, name=task_id, prompt_style=style)
                yield AtodTask(data, self.config.task)

    class AtodEnvConfig(vf.EnvConfig):
        # Without a program to run, the agent needs no sandbox.
        agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())

    class AtodEnv(_Playing, vf.Env[AtodEnvConfig]):
        pass

    class ChatHarness(_Chatting, vf.Harness[vf.HarnessConfig]):
        APPENDS_SYSTEM_PROMPT = True
        EXECUTES_CODE = False
        NEEDS_CONTAINER = False

    return Plugin(AtodTaskset, AtodTasksetConfig, AtodEnv, AtodEnvConfig, ChatHarness)


def _made(config: Any) -> gymnasium.Env[Any, str]:
    """Make the Gymnasium environment that the settings of a taskset describe."""
    chosen = {"split": config.split, "data": config.data, "max_turns": config.max_turns}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name in chosen.keys() & config.options.keys():
        raise InvalidSettingError(f"{name} is set twice: directly and in options. Remove one.")
    prompt_options = {
        "profile": config.parse_profile,
        "style": config.prompt_style,
        "history_window": config.history_window,
        "template": config.template,
        "show_admissible": config.show_admissible,
    }
    return made_env(config.env_id, {**chosen, **config.options}, prompt_options)


class _Playing:
    """The environment of verifiers: one Gymnasium environment for each episode."""

    config: Any
    taskset: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        harness = config.agent_harnesses()["agent"].id
        if config.taskset.prompt_style == "window" and harness != config.taskset.id:
            raise InvalidSettingError(
                f"The harness {harness!r} keeps the whole dialogue, so it cannot play in window "
                "style: leave the harness out, or set prompt_style to chat."
            )

    async def run(self, task: Any, agents: Any) -> None:
        """Play one episode; record reward, metrics and the task's origin in its trace."""
        episode = Episode(functools.partial(_made, self.taskset.config))
        try:
            message = await episode.start(task.data.id)
            async with agents.agent.interaction(task) as interaction:
                while not episode.stop_reason:
                    segment = await interaction.turn(message)
                    if segment.terminated:
                        break
                    message = await episode.play(_completion(segment))
                if episode.stop_reason:
                    interaction.trace.stop(episode.stop_reason)
        finally:
            await episode.close()
        trace = interaction.trace
        trace.record_reward(REWARD, episode.total_reward)
        trace.record_metrics(episode.metrics())
        trace.info["atod"] = episode.origin()


def _completion(segment: Any) -> str:
    """Return the agent's last text unchanged: white space is part of it."""
    if segment.root_reply is not None:
        return str(segment.root_reply)
    said = (m.content for m in reversed(segment.messages) if m.role == "assistant")
    return next(said, None) or ""


class _Chatting:
    """The harness: one request to the model per turn, from this process."""

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Mapping[str, str],
        data: Any,
    ) -> Any:
        """Request one completion for the prompt of the task, a text or messages."""
        prompt = data.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return await _ask(ctx.model, endpoint, secret, data.system_prompt, messages or ())

    async def resume(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Mapping[str, str],
        data: Any,
        messages: Iterable[Any],
        tool_interception_url: str | None = None,
    ) -> Any:
        """Request one completion for the dialogue; in window style for the new messages only."""
        past = trace.branches[-1].messages if trace.branches else []
        if getattr(data, "prompt_style", "chat") == "window":
            past = []
        dialogue = [message for message in past if message.role != "system"]
        return await _ask(ctx.model, endpoint, secret, data.system_prompt, [*dialogue, *messages])


async def _ask(
    model: str, endpoint: str, secret: str, system_prompt: str | None, messages: Iterable[Any]
) -> Any:
    """Request one chat completion; verifiers intercepts the endpoint and records it."""
    import openai
    from verifiers.v1 import ProgramResult
    from verifiers.v1.dialects.chat import message_to_wire

    wire = [m if isinstance(m, dict) else message_to_wire(m) for m in messages]
    if system_prompt:
        wire.insert(0, {"role": "system", "content": system_prompt})
    http_client = openai.DefaultAsyncHttpxClient(verify=_certificates())
    async with openai.AsyncOpenAI(
        base_url=endpoint, api_key=secret, timeout=None, http_client=http_client
    ) as client:
        await client.chat.completions.create(model=model, messages=wire)
    return ProgramResult(exit_code=0, stdout="", stderr="")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates once: a new client needs 40 ms for them, and every turn has one."""
    return ssl.create_default_context()
