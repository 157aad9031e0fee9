"""WebShop as a Gymnasium environment: find a product in a shop and buy it, page by page."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.utils import EzPickle

from atod_gym.data import TaskManifest
from atod_gym.envs.arguments import (
    RENDER_MODES,
    check_max_turns,
    check_render_mode,
    check_task,
    choose_task,
)
from atod_gym.envs.webshop_choice import ShopChoice
from atod_gym.envs.webshop_client import ShopTurn
from atod_gym.envs.webshop_session import ShopSession
from atod_gym.errors import InvalidSettingError
from atod_gym.spaces import UnicodeText, turn_observation_space
from atod_gym.types import TurnObservation, WebShopInfo

if TYPE_CHECKING:
    from atod_gym.envs.webshop_shopper import ScriptedShopper


class WebShopEnv(gymnasium.Env[TurnObservation, str], EzPickle):
    """A shopping task: search, open a product, choose its options and buy it.

    The shop runs in a server, one for all environments of a Python process and its workers. It is
    started when the first of them is made and ends with the process; `server_url` names one that
    runs already.

    ## Observation
    A Dict (`TurnObservation`): `instruction`, what to buy; `text`, the page exactly as the original
    text environment shows it; `admissible_actions`, a `click[...]` for everything that can be
    clicked, and `search[<query>]`, to be filled in, where the page has a search bar; `turn_index`.

    ## Action
    Any string. `search[red shoes]` works on every page, as in the original; `click[buy now]` where
    the page has it. Anything else leaves the page as it is and costs the turn.

    ## Reward
    1.0 for a purchase with score 1.0, else 0.0. `info["score"]` is the original's score, 0 to 1.

    ## End of the episode
    `terminated` by a purchase; `truncated` after `max_turns` turns without one. Stepping on raises
    `gymnasium.error.ResetNeeded`.

    ## Start
    `reset(seed=...)` picks a task of the split; `reset(options={"task_id": ...})` plays that task.

    ## Info
    See `WebShopInfo`. `is_action_valid` says whether the action did something. The last turn's
    `episode` has the keys of Gymnasium's `RecordEpisodeStatistics`.

    ## Arguments
    See `__init__`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [*RENDER_MODES],
        "render_fps": 4,
        # How much of a completion without tags published runs took for the action.
        "last_characters": 20,
    }

    def __init__(
        self,
        split: str = "train",
        data: str | os.PathLike[str] = "auto",
        server_url: str | None = None,
        split_rule: str = "original",
        max_turns: int = 15,
        products: int = 1000,
        goal_seed: int = 233,
        text_style: str = "text",
        human_goals: bool = False,
        timeout: float = 60.0,
        token: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Connects to the server, and starts it if need be.

        Args:
            split: `train`, `dev` or `test`; `train` or `val` under the rule `verl-agent`.
            data: `official`, `generated`, `auto` (official where found, else generated) or the path
                of a folder with files in the official format. With `server_url`: what the server
                must have, where `auto` takes anything.
            server_url: a running server, such as `http://127.0.0.1:3000`; None: one of our own.
            split_rule: `original` (goals 0-499 are test, 500-1,499 dev, the rest train) or
                `verl-agent` (0-499 val, the rest train).
            max_turns: turn limit, at least 1.
            products: size of the generated shop; files are played whole.
            goal_seed: seeds price limits and the order of the goals, and thus the splits.
            text_style: `text`, or `text_rich` with marked buttons.
            human_goals: goals in people's words, instead of generated ones, where the data has any.
            timeout: seconds to wait for an answer; steps that got none are repeated.
            token: of the server at `server_url`. It is part of the spec and of pickles; a token in
                the environment variable ATOD_SERVER_TOKEN is not.
            render_mode: `ansi` makes `render()` return the page as text.

        Raises:
            InvalidSettingError: if an argument has no meaning, or contradicts the server's.
            DataNotFoundError: if the data or split is not there; says how to get it.
            MissingExtraError: if the packages of the server are not installed.
            ServerError: if the server does not start or answer; names the URL and the command.
        """
        # JSON, and with it the spec of the environment, has no paths.
        data = data if isinstance(data, str) else os.fspath(data)
        EzPickle.__init__(
            self, split, data, server_url, split_rule, max_turns, products, goal_seed, text_style,
            human_goals, timeout, token, render_mode,
        )  # fmt: skip
        check_max_turns(max_turns)
        check_render_mode(render_mode)
        if not isinstance(split, str) or not split:
            raise InvalidSettingError(f"split must be a name such as train, not {split!r}.")
        self.split = split
        self.max_turns = max_turns
        self.render_mode = render_mode
        choice = ShopChoice(
            data,
            server_url,
            split_rule,
            goal_seed,
            text_style,
            human_goals,
            timeout,
            token,
            products,
        )
        self._session = ShopSession(choice, split)
        if not self.task_ids:
            raise InvalidSettingError(f"Split {split!r} of the {self.data} shop has no task.")
        self.observation_space = cast(
            "gymnasium.Space[TurnObservation]", turn_observation_space(max_turns)
        )
        self.action_space = UnicodeText()
        self._task_id = ""
        self._instruction = ""
        self._action = ""
        self._over = False
        self._started = 0.0

    @property
    def manifest(self) -> TaskManifest:
        """All tasks of the split, with their content hash."""
        return self._session.tasks.manifest

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The task ids of the split, in manifest order."""
        return self._session.tasks.manifest.task_ids

    @property
    def data(self) -> str:
        """Which data is played: `official`, `generated` or the path of other data."""
        return self._session.server.data

    @property
    def server_url(self) -> str:
        """Where the server listens; a browser shows the shop at `<server_url>/shop`."""
        return self._session.server.url

    @property
    def observation(self) -> TurnObservation:
        """The observation of the last reset or step.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._session.turn is None:
            raise ResetNeeded("call reset() before asking for the observation")
        return self._observation(self._session.turn)

    def expert(self) -> ScriptedShopper:
        """A scripted shopper that acts on what the agent sees; one for each episode."""
        from atod_gym.envs.webshop_shopper import ScriptedShopper

        return ScriptedShopper(max_turns=self.max_turns)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Starts an episode; finds or starts the server anew if it was lost.

        Args:
            seed: seeds the choice of tasks, of this and of later resets.
            options: `{"task_id": ...}` plays exactly that task.

        Raises:
            TaskNotFoundError: if the task id is not among `task_ids`.
            InvalidSettingError: if `options` has other keys.
            ServerError: if the server fails; names the URL and the command. reset() may be
                called again.
        """
        super().reset(seed=seed)
        known = self._session.tasks.types
        task_id = choose_task(options, self.task_ids, known, self.split, self.np_random)
        opened = self._session.open(task_id)
        self._task_id = task_id
        self._instruction = opened.instruction
        self._action = ""
        self._over = opened.turn.over
        self._started = time.perf_counter()
        return self._observation(opened.turn), self._info(opened.turn)

    def step(self, action: str) -> tuple[TurnObservation, float, bool, bool, dict[str, Any]]:
        """Plays one action.

        Raises:
            TypeError: if the action is not a `str`.
            gymnasium.error.ResetNeeded: before the first reset and after the end of an episode.
            ServerError: if the server fails; names the URL and the command. If only the way to it
                failed, the same step may be called again; else the message says to reset.
            InvalidSettingError: if `prefetch_steps` has played another action.
        """
        self._check_playing()
        if not isinstance(action, str):
            raise TypeError(
                f'an action is a str, such as "search[red shoes]", not {type(action).__name__}'
            )
        turn = self._session.play(action)
        self._action = action
        terminated = turn.over
        truncated = not terminated and turn.turn_index >= self.max_turns
        self._over = terminated or truncated
        reward = 1.0 if turn.score == 1.0 else 0.0
        info = self._info(turn)
        if self._over:
            # Earlier turns earn nothing, so the return is the last reward.
            seconds = round(time.perf_counter() - self._started, 6)
            info["episode"] = {"r": reward, "l": turn.turn_index, "t": seconds}
        return self._observation(turn), reward, terminated, truncated, info

    def render(self) -> str | None:
        """With `render_mode="ansi"`: the last action and the page that it led to.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() shows nothing without render_mode="ansi"')
            return None
        if self._session.turn is None:
            raise ResetNeeded("call reset() before render()")
        command = f"> {self._action}\n\n" if self._session.turn.turn_index else ""
        return f"{command}{self._session.turn.text}\n"

    def close(self) -> None:
        """Ends the session on the server; may be called twice."""
        self._session.close()

    def __del__(self) -> None:
        # There is no session if __init__ has failed.
        if hasattr(self, "_session"):
            self._session.abandon()

    @staticmethod
    def prefetch_steps(envs: Sequence[gymnasium.Env[Any, Any]], actions: Sequence[str]) -> None:
        """Plays an action in each of many environments at the cost of one request.

        Each environment's next `step` must get the same action and then needs no request, so that
        wrappers work as ever. Environments may be wrapped; the actions are those that reach them.

        Args:
            envs: each once, all with one server; more than 1,024 take several requests.
            actions: one for each.

        Raises:
            gymnasium.error.ResetNeeded: if an environment cannot be stepped.
            InvalidSettingError: if lengths, environments or servers do not fit.
            ServerError: if the server fails as a whole; one environment's failure comes with its
                `step`.
        """
        shops = _unwrapped(envs)
        for shop in shops:
            shop._check_playing()
        ShopSession.play_ahead([shop._session for shop in shops], actions)

    @staticmethod
    def prefetch_resets(envs: Sequence[gymnasium.Env[Any, Any]], task_ids: Sequence[str]) -> None:
        """Starts an episode in each of many environments at the cost of two requests at most.

        Each environment's next `reset` with that task then needs none.

        Args:
            envs: each once, all with one server; more than 1,024 take several requests.
            task_ids: one for each.

        Raises:
            TaskNotFoundError: if an environment does not have its task.
            InvalidSettingError: if lengths, environments or servers do not fit.
            ServerError: if the server fails as a whole; one environment's failure comes with its
                `reset`.
        """
        sessions = [shop._session for shop in _unwrapped(envs)]
        for shop, task_id in zip(_unwrapped(envs), task_ids, strict=False):
            check_task(task_id, shop.task_ids, shop._session.tasks.types, shop.split)
        ShopSession.open_ahead(sessions, task_ids)

    def _check_playing(self) -> None:
        if self._session.turn is None:
            raise ResetNeeded("call reset() before step()")
        if self._over:
            raise ResetNeeded("the episode is over: call reset() before the next step()")

    def _observation(self, turn: ShopTurn) -> TurnObservation:
        # The search button stands among the clickables, but a click on it does nothing.
        actions = {f"click[{name}]" for name in turn.clickables if name != "search"}
        if turn.has_search_bar:
            actions.add("search[<query>]")
        return {
            "instruction": self._instruction,
            "text": turn.text,
            "admissible_actions": tuple(sorted(actions)),
            "turn_index": turn.turn_index,
        }

    def _info(self, turn: ShopTurn) -> dict[str, Any]:
        info: WebShopInfo = {
            "task_id": self._task_id,
            "task_type": self._session.tasks.types[self._task_id],
            "split": self.split,
            "data": self._session.server.data,
            "success": turn.score == 1.0,
            "score": turn.score,
            "action": self._action,
            "is_action_valid": turn.is_action_valid,
            "parse_error": "",
            "turn_index": turn.turn_index,
            "noun_tagger": self._session.server.noun_tagger,
            "message": turn.message,
        }
        if turn.details is not None:
            info["reward_details"] = turn.details.copy()
        return cast("dict[str, Any]", info)


def _unwrapped(envs: Sequence[gymnasium.Env[Any, Any]]) -> list[WebShopEnv]:
    shops = []
    for env in envs:
        if not isinstance(env.unwrapped, WebShopEnv):
            raise InvalidSettingError(f"Prefetching is for WebShop environments, not for {env}.")
        shops.append(env.unwrapped)
    return shops
