"""WebShop as a Gymnasium environment: find a product in a shop and buy it, page by page."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, cast
from urllib.parse import quote

from atod_gym.envs.turn_env import TurnEnv, TurnResult, check_integer
from atod_gym.envs.webshop.expert import ScriptedShopper
from atod_gym.envs.webshop.settings import SEARCH_PLACEHOLDER, SOURCE, ShopSettings
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.serving.connection import ENDED_CODE, ServedConnection, ServedEnv, read_field
from atod_gym.serving.http import in_batches
from atod_gym.tasks import TaskManifest
from atod_gym.types import RewardDetails, WebShopInfo

MAX_ACTION_LENGTH = 10_000
"""Actions with more characters are not sent: they have no effect, like any malformed action."""

BATCH_LIMIT = 1024
"""Maximum number of entries of one batch request."""

_HASH = re.compile("[0-9a-f]{64}")
_RESET = "Call reset() to start a new episode."
_EXPLANATIONS = {
    "unknown_session": "The episode was idle for too long, or the server has been restarted. "
    + _RESET,
    "wrong_turn_index": "Another client has played in this session, or an answer was lost and "
    f"another action followed. {_RESET}",
    "episode_over": _RESET,
}


class WebShopEnv(TurnEnv, ServedEnv):
    """A shopping task: search, open a product, choose its options and buy it.

    The shop runs in a server that all environments of a Python process and its workers share. It
    starts with the first of them and ends with the process; `server_url` names a
    running one instead. A browser shows the shop at `<server_url>/shop`.

    ## Observation
    A Dict (`TurnObservation`): `instruction`, what to buy; `text`, the page exactly as the original
    text environment shows it; `admissible_actions`, a `click[...]` for everything that can be
    clicked, and the placeholder `search[<query>]` where the page has a search bar; `turn_index`.

    ## Action
    Any string. `search[red shoes]` works on every page, as in the original; `click[buy now]` works
    if the page has it. Anything else, also the placeholder itself, leaves the page unchanged and
    costs the turn; `info["message"]` gives the reason.

    ## Reward
    1.0 for a purchase with score 1.0, else 0.0. `info["score"]` is the original's score, 0 to 1.

    ## End of the episode
    `terminated` by a purchase; `truncated` after `max_turns` turns without one. A further step
    raises `gymnasium.error.ResetNeeded`, except after a truncation by `gym.make` alone.

    ## Start
    `reset(seed=...)` picks a task; `reset(options={"task_id": ...})` plays that task.

    ## Info
    See `WebShopInfo`. `is_action_valid` says whether the action had an effect.

    ## Arguments
    See `__init__`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **TurnEnv.metadata,
        # Published runs executed the last characters of a completion without tags.
        "last_characters": 20,
    }
    example_action = "search[red shoes]"
    default_max_turns = 15
    source = SOURCE
    _session_id = ""
    """On the server; empty: none."""
    _session_owner = 0
    """The process that opened the session."""

    def __init__(
        self,
        split: str = "train",
        data: str | os.PathLike[str] = "auto",
        server_url: str | None = None,
        split_rule: str = "original",
        max_turns: int | None = None,
        products: int = 1000,
        goal_seed: int = 233,
        text_style: str = "text",
        human_goals: bool = False,
        expert_turns: int | None = None,
        timeout: float = 60.0,
        token: str | None = None,
        render_mode: str | None = None,
        task_types: Sequence[str] | str | None = None,
    ) -> None:
        """Connect to the server, and start one if none is running.

        Args:
            split: `train`, `dev` or `test`; `train` or `val` under the rule `verl-agent`.
            data: `official`, `generated`, `auto` (official where found, else generated) or the path
                of a folder with files in the official format. With `server_url`: the data that
                the server must have; `auto` accepts any.
            server_url: A running server, such as `http://127.0.0.1:3000`; None: start one.
            split_rule: `original` (goals 0-499 are test, 500-1,499 dev, the rest train) or
                `verl-agent` (0-499 val, the rest train).
            max_turns: Turn limit, at least 1; None: that of `gym.make` (`max_episode_steps`).
            products: Number of products of the generated shop; files are used completely.
            goal_seed: Seed of price limits and of the order of the goals, and thus of the splits.
            text_style: `text`, or `text_rich` with marked buttons.
            human_goals: Use goals written by people instead of generated ones, if the data has any.
            expert_turns: Turns within which `expert()` buys, at least 1; None: `max_turns`. With 6
                it rarely reads sub pages, and its episodes are half as long.
            timeout: Seconds to wait for an answer.
            token: Of the server at `server_url`. It is part of the spec and of pickles; a token in
                the environment variable ATOD_SERVER_TOKEN is not.
            render_mode: `ansi` makes `render()` return the page as text.
            task_types: Play only tasks of these types (product categories such as `beauty`): a
                name, a list, or names separated by commas.

        Raises:
            InvalidSettingError: An argument is out of range, or contradicts the server's.
            DataNotFoundError: The data or split is missing; the message names the remedy.
            MissingExtraError: The packages of the server are not installed.
            ServerError: The server does not start or answer; names the URL and the command.
        """
        TurnEnv.__init__(self, split, max_turns, render_mode)
        if expert_turns is not None:
            check_integer("expert_turns", expert_turns, 1)
        self._expert_turns = expert_turns
        self._settings = ShopSettings(
            data=data,
            server_url=server_url,
            split_rule=split_rule,
            products=products,
            goal_seed=goal_seed,
            text_style=text_style,
            human_goals=human_goals,
            timeout=timeout,
            token=token,
        )
        self._connection, self.data = self._settings.connect()
        manifest, types = _tasks(self._connection, split)
        if not types:
            raise self._empty_split()
        self._set_tasks(manifest, types, task_types, self.data)
        self._details: RewardDetails | None = None

    def expert(self) -> ScriptedShopper:
        """Return a scripted shopper that acts on what the agent sees; one for each episode."""
        return ScriptedShopper(min(self.max_turns, self._expert_turns or self.max_turns))

    def close(self) -> None:
        """End the session on the server; may be called twice."""
        _leave_all([self])
        super().close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A destructor must not send requests: the next request that closes sessions includes it.
        # When Python exits first and clears the globals of modules, the server ends with it.
        if not is_finalizing():
            self._leave()

    def _open(self, task_id: str) -> tuple[str, TurnResult]:
        return self._open_many([self], [task_id])[0]

    def _play(self, action: str) -> TurnResult:
        return self._play_many([self], [action])[0]

    @classmethod
    def _open_many(
        cls, envs: Sequence[WebShopEnv], task_ids: Sequence[str]
    ) -> list[tuple[str, TurnResult]]:
        try:
            return _opened(envs, task_ids)
        except ServerError as error:
            if error.code != ENDED_CODE:
                raise
        # The server of this process has ended: a new one replaces it.
        return _opened(envs, task_ids)

    @classmethod
    def _play_many(cls, envs: Sequence[WebShopEnv], actions: Sequence[str]) -> list[TurnResult]:
        refusals = [_refusal(action) for action in actions]
        # The server counts turns as well, so an empty action replaces a refused one.
        items = [
            {
                "session_id": env._session_id,
                "turn_index": env._turn_index,
                "action": "" if refusal else action,
            }
            for env, action, refusal in zip(envs, actions, refusals, strict=True)
        ]
        found = dict(_batch(envs, "step", "steps", items))
        answers = [found[row] for row in range(len(envs))]
        _raise_errors(envs, "step", answers)
        results = []
        for env, answer, refusal in zip(envs, answers, refusals, strict=True):
            with env._connection.reading("/batch/step"):
                _check(answer, turn_index=env._turn_index + 1, session_id=env._session_id)
                details = answer.get("details")
                env._details = None if details is None else _details(details)
                is_valid = read_field(answer, "is_action_valid", bool)
                message = refusal or read_field(answer, "message", str)
                results.append(_result(answer, is_valid, message))
        return results

    def _leave(self) -> None:
        """Leave the session, for `_leave_all` to close it."""
        # After a fork, the parent continues to play in its sessions.
        if self._session_id and self._session_owner == os.getpid():
            self._connection.left.append(self._session_id)
        self._session_id = ""

    def _own_info(self) -> dict[str, Any]:
        info: WebShopInfo = {"noun_tagger": str(self._connection.health.get("noun_tagger"))}
        if self._details is not None:
            info["reward_details"] = self._details.copy()
        return cast("dict[str, Any]", info)

    def _empty_split(self) -> InvalidSettingError:
        health, rule = self._connection.health, self._settings.split_rule
        filled = [f"{name} ({count})" for name, count in health["splits"].items() if count]
        return InvalidSettingError(
            f"Split {self.split!r} of the {self.data} shop has no task: the shop has "
            f"{health.get('goals')} goals (human_goals={self._settings.human_goals}), and "
            f"split_rule={rule!r} puts none of them in it. Splits with tasks: {', '.join(filled)}."
        )


# The requests of the shop's API.


def _tasks(connection: ServedConnection, split: str) -> tuple[TaskManifest, Mapping[str, str]]:
    """Return the tasks of a split and the type of each, requested once per connection."""
    with connection.reading("/health"):
        known = read_field(connection.health, "splits", dict)
    if split not in known:
        data = connection.health.get("data")
        raise DataNotFoundError(
            f"No split {split!r} in the {data} shop; known: {', '.join(known)}."
        )
    path = f"/tasks/{quote(split, safe='')}"
    if path not in connection.cache:
        answer = connection.read_list(path)
        with connection.reading(path):
            ids = tuple(map(str, answer["task_ids"]))
            manifest = TaskManifest(str(answer["name"]), split, ids, str(answer["content_hash"]))
            if not _HASH.fullmatch(manifest.content_hash):
                raise ValueError(f"content_hash {manifest.content_hash!r}")
            types = dict(zip(ids, map(str, answer["task_types"]), strict=True))
            connection.cache[path] = manifest, types
    tasks: tuple[TaskManifest, Mapping[str, str]] = connection.cache[path]
    return tasks


def _opened(envs: Sequence[WebShopEnv], task_ids: Sequence[str]) -> list[tuple[str, TurnResult]]:
    """Open a session for each environment: all of them or none."""
    for env in envs:
        env._leave()
        env._renew()
    _leave_all(envs)
    answers: list[dict[str, Any]] = [{} for _ in envs]
    sessions = [{"task_id": task_id} for task_id in task_ids]
    opened = []
    try:
        for row, answer in _batch(envs, "create", "sessions", sessions):
            answers[row], env = answer, envs[row]
            env._session_id, env._session_owner = str(answer.get("session_id", "")), os.getpid()
            env._details = None
        _raise_errors(envs, "create", answers)
        for env, task_id, answer in zip(envs, task_ids, answers, strict=True):
            with env._connection.reading("/batch/create"):
                _check(answer, turn_index=0, task_id=task_id)
                read_field(answer, "session_id", str)
                opened.append((read_field(answer, "instruction", str), _result(answer)))
    except ServerError:
        _leave_all(envs)
        raise
    return opened


def _leave_all(envs: Sequence[WebShopEnv]) -> None:
    """Close the sessions of environments, and all sessions left earlier.

    Those of a lost connection are closed through its replacement, or expire.
    """
    for env in envs:
        env._leave()
    for connection in dict.fromkeys(env._connection for env in envs):
        left = connection.left.copy()
        del connection.left[: len(left)]
        with suppress(ServerError):
            for part in in_batches([] if connection.is_lost else left, BATCH_LIMIT):
                connection.post("/batch/close", {"session_ids": part})
        if connection.is_lost:
            connection.left.extend(left)


def _batch(
    envs: Sequence[WebShopEnv], what: str, name: str, items: Sequence[object]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Send an item for each environment, in one request per connection and `BATCH_LIMIT` items.

    Yields:
        The index of each environment in `envs` and its answer, which may be an error. Yields
        directly after each request, since a later one may fail.
    """
    path = f"/batch/{what}"
    for connection in dict.fromkeys(env._connection for env in envs):
        rows = [row for row, env in enumerate(envs) if env._connection is connection]
        left = iter(rows)
        for part in in_batches([items[row] for row in rows], BATCH_LIMIT):
            answer = connection.post(path, {name: part})
            with connection.reading(path):
                results = read_field(answer, "results", list)
                if len(results) != len(part) or not all(isinstance(one, dict) for one in results):
                    raise ValueError(f"not {len(part)} results that are objects")
            for result in results:
                yield next(left), result


def _raise_errors(
    envs: Sequence[WebShopEnv], what: str, answers: Sequence[Mapping[str, Any]]
) -> None:
    """Raise the first error among the answers; leave the episodes that have ended."""
    errors = []
    for env, answer in zip(envs, answers, strict=True):
        error = answer.get("error")
        if isinstance(error, dict):
            code, status = str(error.get("code")), error.get("status")
            if status in (404, 409):
                # The server's answer will not change: this episode is over.
                env._result = None
            message = f"POST {env.server_url}/batch/{what}: {error.get('message')} (HTTP {status})"
            message = f"{message} {_EXPLANATIONS.get(code, '')}".rstrip()
            status = status if isinstance(status, int) else 0
            errors.append(ServerError(message, status=status, code=code))
    if errors:
        raise errors[0]


def _refusal(action: str) -> str:
    """Return the reason for not sending an action; empty: it is sent."""
    if len(action) > MAX_ACTION_LENGTH:
        return (
            f"Nothing was done: the action has {len(action):,} characters, more than "
            f"{MAX_ACTION_LENGTH:,}."
        )
    if action.strip().lower() == SEARCH_PLACEHOLDER:
        return f"Nothing was done: in {SEARCH_PLACEHOLDER}, write words in place of <query>."
    return ""


def _check(answer: Mapping[str, Any], **expected: object) -> None:
    for name, value in expected.items():
        if answer[name] != value:
            raise ValueError(f"{name} {answer[name]!r}, expected {value!r}")


def _result(
    answer: Mapping[str, Any], is_action_valid: bool = True, message: str = ""
) -> TurnResult:
    """Read the fields that the answers to opening a session and to a step share."""
    score = answer["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"score {score!r}")
    # The search button stands among the clickables, but a click on it does nothing.
    actions = {f"click[{name}]" for name in map(str, answer["clickables"]) if name != "search"}
    if read_field(answer, "has_search_bar", bool):
        actions.add(SEARCH_PLACEHOLDER)
    return TurnResult(
        text=read_field(answer, "text", str),
        admissible_actions=tuple(sorted(actions)),
        score=float(score),
        terminated=read_field(answer, "over", bool),
        is_action_valid=is_action_valid,
        message=message,
    )


def _details(details: Mapping[str, Any]) -> RewardDetails:
    """Return the reward's parts without inapplicable ones."""
    parts = {name: details[name] for name in RewardDetails.__annotations__}
    return cast(
        "RewardDetails", {name: value for name, value in parts.items() if value is not None}
    )
