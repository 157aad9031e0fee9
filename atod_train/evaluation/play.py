"""Play each task of a split once with any agent, several episodes at the same time; no torch.

A local model plays with `atod_train.evaluation.local_model` instead.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from atod_gym.errors import AtodError
from atod_train.evaluation.agents import Agent, Completion, EpisodeStopped
from atod_train.evaluation.eval_records import EpisodeRecord
from atod_train.rollout.env_pool import EnvPool


def play_tasks(
    first: EnvPool,
    make_pool: Callable[[], EnvPool],
    make_agent: Callable[[], Agent],
    task_ids: Sequence[str],
    *,
    concurrency: int,
    on_record: Callable[[EpisodeRecord], None],
    close: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Play each task once.

    Args:
        first: a pool that exists already, which the caller closes.
        make_pool: makes a pool for each further episode that is played at the same time.
        make_agent: makes an agent for each episode that is played at the same time.
        task_ids: the tasks, each once; they begin in this order.
        concurrency: episodes at the same time.
        on_record: receives each record when its episode has ended.
        close: closes what the agents share.

    Raises:
        AtodError: an environment or an agent fails; unfinished episodes are dropped.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    pools = [first]
    idle = [first]
    waiting = deque(task_ids)

    def made() -> EnvPool:
        pools.append(make_pool())
        return pools[-1]

    async def work() -> None:
        pool = idle.pop() if idle else await asyncio.to_thread(made)
        agent = make_agent()
        while waiting:
            on_record(await play_episode(pool, agent, waiting.popleft()))

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
        for pool in pools[1:]:
            pool.close()


async def play_episode(pool: EnvPool, agent: Agent, task_id: str) -> EpisodeRecord:
    """Play one task and record it; an episode that the agent cannot continue has failed.

    Raises:
        AtodError: the environment or the agent fails.
    """
    began = time.monotonic()
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
        if episode.stop_reason is None and len(completions) >= pool.max_turns:
            episode.stop_reason = "turn_limit"
    seconds = time.monotonic() - began
    return EpisodeRecord.of(episode.trajectory(), completions, seconds, stop_message)
