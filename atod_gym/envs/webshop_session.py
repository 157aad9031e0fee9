"""The client's side of an episode: its session on the server, also many of them in one request."""

from __future__ import annotations

import os
from collections.abc import Sequence

from atod_gym.envs.webshop_choice import ShopChoice
from atod_gym.envs.webshop_client import OpenedEpisode, ShopTurn, connect
from atod_gym.errors import InvalidSettingError, ServerError

MAX_ACTION_LENGTH = 10_000
"""Longer actions, in characters, are not sent: they do nothing, like any malformed action."""


class ShopSession:
    """One session after another; an episode lasts from `open` to `close`."""

    def __init__(self, choice: ShopChoice, split: str) -> None:
        """Connects.

        Raises:
            DataNotFoundError: if the data or split is not there; says how to get it.
            MissingExtraError: if a server is to be started whose packages are not installed.
            ServerError: if the server does not start or answer.
            InvalidSettingError: if the server at `server_url` serves something else.
        """
        self._choice = choice
        self._split = split
        self.server = connect(choice)
        self.tasks = self.server.tasks(split)
        self.turn: ShopTurn | None = None
        """What the server said last; None without an episode."""
        self._opener = 0
        self._opened_ahead: tuple[str, OpenedEpisode | ServerError] | None = None
        self._played_ahead: tuple[str, ShopTurn | ServerError] | None = None

    def open(self, task_id: str) -> OpenedEpisode:
        """Starts an episode, unless `open_ahead` has; finds the server anew if it was lost.

        Raises:
            ServerError: if the server fails, or has other tasks than before.
        """
        ahead = self._opened_ahead
        if ahead is None or ahead[0] != task_id:
            self.close()
            opened: OpenedEpisode | ServerError = self._open_session(task_id)
            self._opener = os.getpid()
        else:
            opened = ahead[1]
            self._opened_ahead = None
        if isinstance(opened, ServerError):
            raise opened
        self.turn = opened.turn
        return opened

    def play(self, action: str) -> ShopTurn:
        """Plays an action, unless `play_ahead` has; there must be an episode.

        Raises:
            ServerError: if the server fails. The episode goes on if only the answer is missing: the
                same call may be repeated.
            InvalidSettingError: if `play_ahead` has played another action.
        """
        assert self.turn is not None
        played: ShopTurn | ServerError
        if self._played_ahead is None:
            try:
                played = self.server.step(
                    self.turn.session_id, self.turn.turn_index, _sendable(action)
                )
            except ServerError as error:
                played = error
        else:
            expected, played = self._played_ahead
            if action != expected:
                raise InvalidSettingError(
                    f"prefetch_steps has played {expected!r} in this turn, so step() cannot play "
                    f"{action!r}; give it the same action, or reset()."
                )
            self._played_ahead = None
        if isinstance(played, ServerError):
            if played.status in (404, 409):
                # The server's answer will not change: this episode is over.
                self.turn = None
            raise played
        self.turn = played
        return played

    def close(self) -> None:
        """Ends the episode, if there is one, and its session; a failing server is no matter."""
        self.server.close(self._forget())

    def abandon(self) -> None:
        """Leaves the closing to somebody else: for destructors, which must not send anything."""
        for session_id in self._forget():
            self.server.abandon(session_id)

    def _open_session(self, task_id: str) -> OpenedEpisode:
        self._reconnect()
        try:
            return self.server.open(task_id)
        except ServerError:
            if not self._can_replace_server():
                raise
        self._reconnect()
        return self.server.open(task_id)

    def _can_replace_server(self) -> bool:
        """Whether a dead server is ours to replace; any other is its owner's business."""
        return self._choice.server_url is None and self.server.is_lost

    def _forget(self) -> list[str]:
        """Leaves the episode; the ids of its sessions, if they are this process's to close."""
        sessions = [] if self.turn is None else [self.turn.session_id]
        if self._opened_ahead is not None and isinstance(self._opened_ahead[1], OpenedEpisode):
            sessions.append(self._opened_ahead[1].turn.session_id)
        self.turn = self._opened_ahead = self._played_ahead = None
        # After a fork, the parent goes on playing in its sessions.
        return sessions if self._opener == os.getpid() else []

    def _reconnect(self) -> None:
        """After a failure: the server again, or the one that has taken its place."""
        if not self.server.is_lost:
            return
        server = connect(self._choice)
        tasks = server.tasks(self._split)
        if tasks.manifest.content_hash != self.tasks.manifest.content_hash:
            raise ServerError(
                f"The server at {server.url} has other tasks than before. Make the environment "
                "anew to play them."
            )
        self.server, self.tasks = server, tasks

    @staticmethod
    def open_ahead(sessions: Sequence[ShopSession], task_ids: Sequence[str]) -> None:
        """Starts an episode in each session with two requests at most; `open` then needs none.

        Raises:
            InvalidSettingError: if the sessions do not fit together.
            ServerError: if the server fails as a whole; one task's failure comes with its `open`.
        """
        _check_together(sessions, task_ids)
        if not sessions:
            return
        sessions[0].server.close([name for session in sessions for name in session._forget()])
        for session in sessions:
            session._reconnect()
        try:
            opened = sessions[0].server.open_many(task_ids)
        except ServerError:
            if not sessions[0]._can_replace_server():
                raise
            for session in sessions:
                session._reconnect()
            opened = sessions[0].server.open_many(task_ids)
        for session, task_id, result in zip(sessions, task_ids, opened, strict=True):
            session._opened_ahead = (task_id, result)
            session._opener = os.getpid()

    @staticmethod
    def play_ahead(sessions: Sequence[ShopSession], actions: Sequence[str]) -> None:
        """Plays an action in each session with one request; `play` then needs none.

        Each session must have an episode.

        Raises:
            InvalidSettingError: if the sessions do not fit together.
            ServerError: if the server fails as a whole; one session's failure comes with its
                `play`.
        """
        _check_together(sessions, actions)
        steps = []
        for session, action in zip(sessions, actions, strict=True):
            assert session.turn is not None
            steps.append((session.turn.session_id, session.turn.turn_index, _sendable(action)))
        results = sessions[0].server.step_many(steps) if sessions else []
        for session, action, result in zip(sessions, actions, results, strict=True):
            session._played_ahead = (action, result)


def _check_together(sessions: Sequence[ShopSession], items: Sequence[str]) -> None:
    if len(set(map(id, sessions))) < len(sessions):
        raise InvalidSettingError("Prefetching takes each environment once.")
    if len(items) != len(sessions):
        raise InvalidSettingError(
            f"Prefetching takes one item for each environment, not {len(items)} for "
            f"{len(sessions)}."
        )
    urls = sorted({session.server.url for session in sessions if not session.server.is_lost})
    if len(urls) > 1:
        raise InvalidSettingError(
            f"Prefetching is for environments of one server, not of {', '.join(urls)}."
        )


def _sendable(action: str) -> str:
    return action if len(action) <= MAX_ACTION_LENGTH else ""
