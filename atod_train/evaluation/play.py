"""Play each task of a split once with any agent, several episodes at the same time; no torch.

A local model plays with `atod_train.evaluation.local_model` instead.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

import atod_gym  # noqa: F401 - registers the environments
from atod_gym.errors import AtodError
from atod_gym.wrappers import agent_env, make_env
from atod_train.config import EnvConfig
from atod_train.evaluation.agents import Agent, Completion, EpisodeStopped
from atod_train.evaluation.eval_records import AgentTurn, EpisodeRecord
from atod_train.rollout.episode import new_messages


@dataclass(frozen=True)
class PlayedEnv:
    """The environment of an evaluation and its prompts.

    Attributes:
        config: settings; a `max_turns` of 0 is the environment's own limit.
        split: of the tasks.
        template: file with a prompt template; None: that of the prompt style.
    """

    config: EnvConfig
    split: str
    template: Path | None = None

    def make(self) -> gymnasium.Env[Any, str]:
        """Make the environment with the wrappers that turn observations into messages.

        Raises:
            AtodError: the environment refuses a setting; the message is the environment's.
        """
        config = self.config
        settings: dict[str, Any] = {
            "split": self.split,
            "data": config.data,
            "max_turns": config.max_turns or None,
            **config.options,
        }
        env = make_env(config.id, **settings)
        try:
            return agent_env(
                env,
                profile=config.parse_profile,
                style=config.prompt_style,
                history_window=config.history_window,
                template=self.template,
                show_admissible=config.show_admissible,
            )
        except Exception:
            env.close()
            raise


def play_tasks(
    played: PlayedEnv,
    first: gymnasium.Env[Any, str],
    make_agent: Callable[[], Agent],
    task_ids: Sequence[str],
    *,
    concurrency: int,
    on_record: Callable[[EpisodeRecord], None],
    close: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Play each task once.

    Args:
        played: the environment.
        first: one that is made already, which the caller closes.
        make_agent: makes an agent for each episode that is played at the same time.
        task_ids: the tasks, each once; they begin in this order.
        concurrency: episodes at the same time.
        on_record: receives each record when its episode has ended.
        close: closes what the agents share.

    Raises:
        AtodError: an environment or an agent fails; unfinished episodes are dropped.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    envs: list[Any] = [first]
    idle = [first]
    waiting = deque(task_ids)

    def made() -> Any:
        envs.append(played.make())
        return envs[-1]

    async def work() -> None:
        env = idle.pop() if idle else await asyncio.to_thread(made)
        agent = make_agent()
        while waiting:
            on_record(await play_episode(env, agent, waiting.popleft()))

    async def run() -> None:
        count = min(concurrency, len(task_ids))
        # In threads a slow step blocks no other episode. asyncio.run waits for their end.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max(1, count)))
        workers = [asyncio.create_task(work()) for _ in range(count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if close is not None:
                await close()

    try:
        asyncio.run(run())
    finally:
        for env in envs[1:]:
            env.close()


async def play_episode(env: Any, agent: Agent, task_id: str) -> EpisodeRecord:
    """Play one task and record it; an episode that the agent cannot continue has failed.

    Raises:
        AtodError: the environment or the agent fails.
    """
    began = time.monotonic()
    messages, info = await asyncio.to_thread(env.reset, options={"task_id": task_id})
    agent.reset(env, env.unwrapped.observation, info)
    turns: list[AgentTurn] = []
    stop_reason = stop_message = ""
    while not stop_reason:
        try:
            completion: object = await agent.act(messages, env.unwrapped.observation, info)
        except EpisodeStopped as stop:
            stop_reason, stop_message = stop.reason, str(stop)
            break
        if not (isinstance(completion, Completion) and isinstance(completion.text, str)):
            raise AtodError(
                "An agent's act must return an atod_train.evaluation.agents.Completion,"
                f" not {type(completion).__name__}"
            )
        prompt = new_messages(messages)
        messages, _, terminated, truncated, info = await asyncio.to_thread(
            env.step, completion.text
        )
        turns.append(AgentTurn(prompt, completion, info))
        if terminated or truncated:
            stop_reason = "terminated" if terminated else "turn_limit"
    seconds = time.monotonic() - began
    return EpisodeRecord.of(turns, info, stop_reason, seconds, stop_message)
