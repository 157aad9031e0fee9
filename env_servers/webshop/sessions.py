"""Manage the live sessions of a shop: one episode each, until closed or expired when idle.

Not thread-safe: all handlers of the server run on its event loop.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from env_servers.service import ServiceError
from env_servers.webshop.episode import Episode, Outcome
from env_servers.webshop.pages import Page
from env_servers.webshop.shop import Shop

_ID_BYTES = 16


@dataclass(slots=True)
class Session:
    """One episode and its progress."""

    episode: Episode
    session_id: str
    task_id: str
    task_type: str
    touched: float
    """Time of the last use."""
    turn_index: int = 0
    """Number of steps so far."""
    last_action: int = 0
    """The hash of the text: a session does not store texts of clients."""
    last_outcome: Outcome | None = None

    @property
    def page(self) -> Page:
        """The current page."""
        return self.episode.page

    @property
    def over(self) -> bool:
        """Whether something was bought."""
        return self.episode.over

    @property
    def score(self) -> float:
        """0 until the purchase, which is the last step."""
        return self.last_outcome.score if self.last_outcome else 0.0


class SessionStore:
    """The sessions of one shop."""

    def __init__(
        self,
        shop: Shop,
        *,
        capacity: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty; a session that is idle for `idle_seconds` is closed."""
        self.shop = shop
        self.capacity = capacity
        self.idle_seconds = idle_seconds
        self._clock = clock
        # In the order of last use, so that idle ones come first.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        # Counts since the start.
        self.created = self.closed = self.expired = self.steps = 0
        self.step_seconds = 0.0
        """Time within the engine."""

    def create(self, task_id: str) -> Session:
        """Start a session for one task.

        Raises:
            ServiceError: 404 unknown_task, 503 at_capacity.
        """
        try:
            goal = self.shop.goal(task_id)
        except KeyError:
            message = "Unknown task; GET /tasks/{split} lists the tasks."
            raise ServiceError(404, "unknown_task", message) from None
        if self.live() >= self.capacity:
            message = f"All {self.capacity} sessions are in use; close some, or raise --capacity."
            raise ServiceError(503, "at_capacity", message)
        episode = Episode(self.shop, goal, str(goal.index))
        session_id = secrets.token_urlsafe(_ID_BYTES)
        session = Session(episode, session_id, task_id, goal.category, self._clock())
        self._sessions[session_id] = session
        self.created += 1
        return session

    def create_in_split(self, split: str, seed: int) -> Session:
        """Start a session for the task of a split that the seed determines.

        Raises:
            ServiceError: 404 unknown_split or unknown_task, 503 at_capacity.
        """
        places = self.split_range(split)
        if not places:
            raise ServiceError(404, "unknown_task", f"The split {split} of this shop has no tasks.")
        place = places[Random(seed).randrange(len(places))]
        return self.create(f"{self.shop.name}/{place}")

    def split_range(self, split: str) -> range:
        """Return the indexes of a split's goals, which are the last part of their task ids.

        Raises:
            ServiceError: 404 unknown_split.
        """
        if split not in self.shop.splits:
            known = ", ".join(self.shop.splits)
            raise ServiceError(404, "unknown_split", f"Unknown split; known: {known}.")
        return self.shop.splits[split]

    def step(self, session_id: str, turn_index: int, action: str) -> Outcome:
        """Play one action, or return the same answer again if it was the last action played.

        `turn_index` is the number of steps of the session so far; a repeated step repeats it.

        Raises:
            ServiceError: 404 unknown_session, 409 wrong_turn_index or episode_over.
        """
        session = self.find(session_id)
        if turn_index == session.turn_index - 1 and session.last_outcome is not None:
            if hash(action) != session.last_action:
                raise _wrong_turn(session.turn_index, "that step was played with another action")
            return session.last_outcome
        if turn_index != session.turn_index:
            raise _wrong_turn(session.turn_index, "steps are played in order")
        if session.over:
            message = "The episode ended with a purchase; create a new session."
            raise ServiceError(409, "episode_over", message)
        started = time.perf_counter()
        session.last_outcome = outcome = session.episode.step(action)
        self.step_seconds += time.perf_counter() - started
        self.steps += 1
        session.last_action = hash(action)
        session.turn_index += 1
        return outcome

    def close(self, session_id: str) -> None:
        """End a session.

        Raises:
            ServiceError: 404 unknown_session.
        """
        self.find(session_id)
        del self._sessions[session_id]
        self.closed += 1

    def expire(self) -> float:
        """Close the sessions that were idle for too long.

        Returns:
            Seconds until the next one can be due.
        """
        now = self._clock()
        while self._sessions:
            session_id, session = next(iter(self._sessions.items()))
            left = session.touched + self.idle_seconds - now
            if left > 0:
                return left
            del self._sessions[session_id]
            self.expired += 1
        return self.idle_seconds

    def live(self) -> int:
        """Return the number of sessions, after closing idle ones."""
        self.expire()
        return len(self._sessions)

    def find(self, session_id: str) -> Session:
        """Return a session; counts as use.

        Raises:
            ServiceError: 404 unknown_session.
        """
        self.expire()
        session = self._sessions.get(session_id)
        if session is None:
            message = "Unknown session: closed, expired or never created."
            raise ServiceError(404, "unknown_session", message)
        session.touched = self._clock()
        self._sessions.move_to_end(session_id)
        return session


def _wrong_turn(turn_index: int, reason: str) -> ServiceError:
    message = f"The session is at turn_index {turn_index}; {reason}."
    return ServiceError(409, "wrong_turn_index", message)
