"""Run an episode of a Gymnasium environment in a thread, for the asynchronous verifiers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import gymnasium

from atod_gym.adapters.made_env import encodable

T = TypeVar("T")


class Episode:
    """A Gymnasium environment in its own thread, so that a slow one blocks no other.

    All calls run in that thread one after the other. Closing therefore waits for a call whose
    rollout was cancelled.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, str]]) -> None:
        self._make = make
        self._env: gymnasium.Env[Any, str] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="atod-episode")
        self._info: dict[str, Any] = {}
        self.turns = 0
        self.inadmissible = 0
        self.malformed = 0
        self.total_reward = 0.0
        self.stop_reason = ""
        """`terminated` or `truncated`; empty while the episode runs."""

    async def start(self, task_id: str) -> str:
        """Open the environment; return the first user message."""

        def opened() -> tuple[Any, dict[str, Any]]:
            self._env = self._make()
            return self._env.reset(options={"task_id": task_id})

        messages, self._info = await self._in_thread(opened)
        return encodable(messages[-1]["content"])

    async def play(self, completion: str) -> str:
        """Play a turn; return the next user message."""
        assert self._env is not None
        step = await self._in_thread(self._env.step, completion)
        messages, reward, terminated, truncated, info = step
        self._info = info
        self.turns += 1
        self.inadmissible += not info["is_action_valid"]
        self.malformed += bool(info["parse_error"])
        self.total_reward += float(reward)
        self.stop_reason = "terminated" if terminated else "truncated" if truncated else ""
        return encodable(messages[-1]["content"])

    async def close(self) -> None:
        """Close the environment if it was opened."""

        def closed() -> None:
            if self._env is not None:
                self._env.close()

        closing = self._thread.submit(closed)
        self._thread.shutdown(wait=False)
        # A rollout that is cancelled a second time does not wait; closing continues.
        await asyncio.shield(asyncio.wrap_future(closing))

    def metrics(self) -> dict[str, float]:
        """Return figures of the episode so far."""
        turns = max(self.turns, 1)
        return {
            "success": float(self._info["success"]),
            "score": float(self._info["score"]),
            "turns": float(self.turns),
            "invalid_share": self.inadmissible / turns,
            "malformed_share": self.malformed / turns,
        }

    def origin(self) -> dict[str, str]:
        """Return which task of which data was played."""
        return {name: self._info[name] for name in ("task_id", "task_type", "split", "data")}

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.wrap_future(self._thread.submit(call, *arguments))
