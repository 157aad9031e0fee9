"""Keep requests to an endpoint below its limits of requests and tokens per minute."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass

_WINDOW = 60.0
_POLL = 0.05
"""Seconds after which a waiting request is checked again."""


@dataclass(slots=True)
class Admission:
    """An admitted request; set `tokens` once the answer says how many it took."""

    time: float
    tokens: int


class RateLimiter:
    """Admit requests in order of arrival, so that no 60 seconds hold more than the limits.

    Kept by hand: aiolimiter admits twice the limit in its first minute and never corrects the
    estimates of tokens.

    Args:
        requests: limit of requests per minute.
        tokens: limit of tokens per minute, those of prompts and completions. A larger request is
            admitted alone.
    """

    def __init__(self, requests: float = math.inf, tokens: float = math.inf) -> None:
        self._requests, self._tokens = requests, tokens
        self._recent: deque[Admission] = deque()
        self._queue = asyncio.Lock()
        self._held_until = -math.inf

    async def admit(self, tokens: int) -> Admission:
        """Wait until a request of about this many tokens, with its answer, may be sent."""
        # The lock is granted in order of arrival and held while waiting.
        async with self._queue:
            while not self._is_free(tokens):
                await asyncio.sleep(_POLL)
            admission = Admission(time.monotonic(), tokens)
            self._recent.append(admission)
            return admission

    def hold(self, seconds: float) -> None:
        """Admit no request for some seconds."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    def _is_free(self, tokens: int) -> bool:
        now = time.monotonic()
        while self._recent and self._recent[0].time + _WINDOW <= now:
            self._recent.popleft()
        used = sum(admission.tokens for admission in self._recent)
        fits = not self._recent or used + tokens <= self._tokens
        return now >= self._held_until and len(self._recent) < self._requests and fits
