"""Keep requests to an endpoint below its limits of requests and tokens per minute."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from atod_gym.errors import InvalidSettingError

_WINDOW = 60.0
_ROUNDING = 1e-6
_LONGEST_SLEEP = 1.0
"""Seconds after which a waiting request is checked again: `settle` may have freed tokens."""


@dataclass(slots=True)
class Admission:
    """An admitted request: when, and with how many tokens."""

    time: float
    tokens: int


class RateLimiter:
    """Admit requests in order of arrival, so that no 60 seconds hold more than the limits.

    Args:
        requests_per_minute: None: any number.
        tokens_per_minute: of prompts and completions; None: any number. A larger request is
            admitted alone.
        clock: gives seconds.
        sleep: waits for seconds.

    Raises:
        InvalidSettingError: a limit is below 1.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
            if limit is not None and limit < 1:
                raise InvalidSettingError(f"--{name}-per-minute must be >= 1, not {limit}.")
        self._requests = requests_per_minute
        self._tokens = tokens_per_minute
        self._clock = clock
        self._sleep = sleep
        self._recent: deque[Admission] = deque()
        self._queue = asyncio.Lock()
        self._held_until = -_WINDOW

    async def admit(self, tokens: int) -> Admission:
        """Wait until a request may be sent.

        Args:
            tokens: estimate for prompt and completion; see `settle`.
        """
        # The lock is granted in order of arrival and held while waiting.
        async with self._queue:
            while (seconds := self._seconds_to_wait(tokens)) > 0:
                await self._sleep(min(seconds, _LONGEST_SLEEP))
            admission = Admission(self._clock(), tokens)
            if self._requests is not None or self._tokens is not None:
                self._recent.append(admission)
            return admission

    def settle(self, admission: Admission, tokens: int) -> None:
        """Replace the estimate of a request by its tokens."""
        admission.tokens = tokens

    def hold(self, seconds: float) -> None:
        """Admit no request for some seconds, as the endpoint requests."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def _seconds_to_wait(self, tokens: int) -> float:
        now = self._clock()
        while self._recent and self._recent[0].time + _WINDOW <= now + _ROUNDING:
            self._recent.popleft()
        free = self._held_until
        if self._requests is not None and len(self._recent) >= self._requests:
            free = max(free, self._recent[-self._requests].time + _WINDOW)
        if self._tokens is not None:
            used = sum(admission.tokens for admission in self._recent)
            for admission in self._recent:
                if used + tokens <= self._tokens:
                    break
                used -= admission.tokens
                free = max(free, admission.time + _WINDOW)
        wait = free - now
        return wait if wait > _ROUNDING else 0.0
