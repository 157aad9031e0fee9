"""Play each task of a split once with any agent, several episodes at the same time; no torch.

A local model plays with `atod_train.evaluation.local_model` instead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from atod_gym.errors import AtodError
from atod_train.config import EnvConfig
from atod_train.evaluation.agents import Agent, Completion, EpisodeStopped
from atod_train.evaluation.eval_records import EpisodeRecord
from atod_train.reports.evaluations import EvaluationMode
from atod_train.rollout.env_pool import EnvPool


@dataclass(frozen=True)
class AgentPlayer:
    """Agents that play one episode each at a time; a `LocalModel` plays many in one batch."""

    label: str
    """For tables and folders."""
    mode: EvaluationMode
    make: Callable[[], Agent]
    """Makes an agent for each episode that is played at the same time."""
    settings: Mapping[str, Any]
    """Settings that results depend on."""
    concurrency: int = 1
    """Usual number of episodes at the same time."""
    close: Callable[[], Awaitable[None]] | None = None
    """Closes what the agents share."""

    def load(self, env: EnvConfig) -> Mapping[str, Any]:
        """Return the settings that results depend on."""
        return self.settings

    def play(
        self,
        pool: EnvPool,
        task_ids: Sequence[str],
        on_record: Callable[[EpisodeRecord], None],
        *,
        on_turn: Callable[[int], None] | None = None,
        concurrency: int | None = None,
        already: int = 0,
    ) -> None:
        """Play each task once.

        Args:
            pool: environments of the split; there are others for further episodes at the same time.
            task_ids: the tasks, each once; they begin in this order.
            on_record: receives each record when its episode has ended.
            on_turn: receives the number of tokens of each completion that has any.
            concurrency: episodes at the same time; None: the usual number.
            already: episodes of earlier sessions; agents do not depend on them.

        Raises:
            AtodError: an environment or an agent fails; unfinished episodes are dropped.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        waiting = deque(task_ids)
        count = min(concurrency or self.concurrency, len(task_ids))

        async def work(number: int) -> None:
            own = await asyncio.to_thread(another) if number else pool
            agent = self.make()
            while waiting:
                on_record(await play_episode(own, agent, waiting.popleft(), on_turn))

        async def run() -> None:
            # In threads a slow step blocks no other episode. asyncio.run waits for their end.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max(1, count)))
            workers = [asyncio.create_task(work(number)) for number in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                if self.close is not None:
                    await self.close()

        with ExitStack() as others:

            def another() -> EnvPool:
                made = EnvPool(pool.config, pool.split, pool.template)
                return others.enter_context(closing(made))

            asyncio.run(run())


async def play_episode(
    pool: EnvPool, agent: Agent, task_id: str, on_turn: Callable[[int], None] | None = None
) -> EpisodeRecord:
    """Play one task and record it; an episode that the agent cannot continue has failed.

    Raises:
        AtodError: the environment or the agent fails.
    """
    [episode] = await asyncio.to_thread(pool.start, [task_id])
    agent.reset(episode, episode.observation, episode.info)
    completions: list[Completion] = []
    stop_message = ""
    while episode.stop_reason is None:
        try:
            completion: object = await agent.act(
                episode.dialogue.prompt, episode.observation, episode.info
            )
        except EpisodeStopped as stop:
            episode.stop_reason, stop_message = stop.reason, str(stop)
            break
        if not (isinstance(completion, Completion) and isinstance(completion.text, str)):
            raise AtodError(
                "An agent's act must return an atod_train.evaluation.agents.Completion,"
                f" not {type(completion).__name__}"
            )
        await asyncio.to_thread(pool.play, [episode], [completion.text])
        completions.append(completion)
        if on_turn is not None and completion.completion_tokens:
            on_turn(completion.completion_tokens)
        if episode.stop_reason is None and len(completions) >= pool.max_turns:
            episode.stop_reason = "turn_limit"
    return EpisodeRecord.of(episode.trajectory(), completions, stop_message)
