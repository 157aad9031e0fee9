"""Play every task of a split once with any agent, several episodes at a time; no torch."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec, TypeVar

import gymnasium

import atod_gym  # noqa: F401 - registers the environments
from atod_gym.parsing import EMPTY_REPLY, ParseProfile, action_verb, invalid_reason
from atod_gym.types import Message
from atod_gym.wrappers import agent_env, make_env
from atod_train.config import PromptStyle
from atod_train.evaluation.agents import Agent, Completion, EpisodeStopped, checked
from atod_train.evaluation.eval_records import TOKEN_COUNTS, EpisodeRecord
from atod_train.rollout.env_pool import new_messages

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PlayedEnv:
    """Settings of the environment and of its prompts."""

    id: str
    split: str
    data: str = "auto"
    max_turns: int | None = None
    """None: the environment's own limit."""
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_style: PromptStyle = "chat"
    parse_profile: ParseProfile = "tags"
    history_window: int = 2
    template: str | None = None
    """Path of a template file."""
    show_admissible: bool = True

    def make(self) -> gymnasium.Env[Any, str]:
        """Make the environment with the wrappers that turn observations into messages.

        Raises:
            AtodError: the environment refuses a setting; the message is the environment's.
        """
        settings: dict[str, Any] = {
            "split": self.split,
            "data": self.data,
            "max_turns": self.max_turns,
            **self.options,
        }
        env = make_env(self.id, **settings)
        try:
            return agent_env(
                env,
                profile=self.parse_profile,
                style=self.prompt_style,
                history_window=self.history_window,
                template=self.template,
                show_admissible=self.show_admissible,
            )
        except Exception:
            env.close()
            raise


class EnvThread:
    """Run an environment in a thread of its own, so that a slow step blocks no other episode.

    Args:
        played: what to make; it is made before this returns.
    """

    def __init__(self, played: PlayedEnv) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
        try:
            self.env: Any = self._thread.submit(played.make).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def run(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Call a function in the thread; a cancelled caller waits until it has ended."""
        future = asyncio.wrap_future(self._thread.submit(function, *arguments, **named))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Closes the environment and ends the thread."""
        try:
            self._thread.submit(self.env.close).result()
        finally:
            self._thread.shutdown()


async def play_tasks(
    played: PlayedEnv,
    first: EnvThread,
    make_agent: Callable[[], Agent],
    task_ids: Sequence[str],
    *,
    concurrency: int,
    on_record: Callable[[EpisodeRecord], None],
    keep_transcripts: bool = False,
) -> None:
    """Plays each task once.

    Args:
        played: the environment.
        first: one that is made already; the caller closes it.
        make_agent: makes an agent for each episode played at the same time.
        task_ids: the tasks, each once; they begin in this order.
        concurrency: episodes at the same time.
        on_record: takes each record when its episode has ended.
        keep_transcripts: whether records hold prompts and completions.

    Raises:
        AtodError: an environment or an agent fails; episodes under way are given up.
    """
    waiting = deque(task_ids)

    async def work(thread: EnvThread | None) -> None:
        own = thread
        if own is None:
            own = await asyncio.to_thread(EnvThread, played)
        try:
            agent = make_agent()
            while waiting:
                task_id = waiting.popleft()
                on_record(await play_episode(own, agent, task_id, keep_transcripts))
        finally:
            if thread is None:
                own.close()

    count = min(concurrency, len(task_ids))
    workers = [asyncio.create_task(work(None if number else first)) for number in range(count)]
    try:
        if workers:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for worker in workers:
            worker.cancel()
        outcomes = await asyncio.gather(*workers, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def play_episode(
    thread: EnvThread, agent: Agent, task_id: str, keep_transcript: bool = False
) -> EpisodeRecord:
    """Play one task and record it; an episode that the agent cannot continue has failed."""
    began = time.monotonic()
    env = thread.env
    messages, info = await thread.run(env.reset, options={"task_id": task_id})
    agent.reset(env, env.unwrapped.observation, info)
    tally = EpisodeTally(keep_transcript)
    stop_reason = stop_message = ""
    while not stop_reason:
        try:
            said = checked(await agent.act(messages, env.unwrapped.observation, info))
        except EpisodeStopped as stop:
            stop_reason, stop_message = stop.reason, str(stop)
            break
        prompt = messages
        messages, _, terminated, truncated, info = await thread.run(env.step, said.text)
        tally.add(new_messages(prompt), said, info)
        if terminated or truncated:
            stop_reason = "terminated" if terminated else "turn_limit"
    return tally.record(info, stop_reason, stop_message, time.monotonic() - began)


class EpisodeTally:
    """Counts the turns of an episode, and keeps them as JSON values for a transcript."""

    def __init__(self, keep_transcript: bool = False) -> None:
        self._keeps_transcript = keep_transcript
        self._turns = self._cut = self._left_out = 0
        self._invalid_reasons: Counter[str] = Counter()
        self._verbs: Counter[str] = Counter()
        self._tokens: dict[str, int | None] = dict.fromkeys(TOKEN_COUNTS, 0)
        self._transcript: list[dict[str, Any]] = []

    def add(self, prompt: Sequence[Message], said: Completion, info: Mapping[str, Any]) -> None:
        """Add a turn.

        Args:
            prompt: the messages that are new in it.
            said: the completion.
            info: `action`, `is_action_valid` and `parse_error` of the step.
        """
        self._turns += 1
        self._cut += said.is_cut
        self._left_out += said.turns_left_out
        for name, total in self._tokens.items():
            more = getattr(said, name)
            self._tokens[name] = None if total is None or more is None else total + more
        reason = invalid_reason(info)
        if not reason:
            self._verbs[action_verb(info["action"])] += 1
        else:
            self._invalid_reasons[_empty_reply(said) or reason] += 1
        if self._keeps_transcript:
            self._transcript.append(
                {
                    "messages": [asdict(message) for message in prompt],
                    "completion": said.text,
                    "reasoning": said.reasoning,
                    "action": info["action"],
                    "is_action_valid": bool(info["is_action_valid"]),
                    "parse_error": info["parse_error"],
                }
            )

    def record(
        self, info: Mapping[str, Any], stop_reason: str, stop_message: str, seconds: float
    ) -> EpisodeRecord:
        """Return the record of the episode.

        Args:
            info: `task_id`, `task_type`, `success` and `score` after the last turn.
            stop_reason: see `EpisodeRecord`.
            stop_message: why the episode stopped early, or empty.
            seconds: wall time of the episode.
        """
        return EpisodeRecord(
            task_id=str(info["task_id"]),
            task_type=str(info["task_type"]),
            success=bool(info["success"]) and stop_reason in ("terminated", "turn_limit"),
            score=float(info["score"]),
            turns=self._turns,
            invalid_turns=sum(self._invalid_reasons.values()),
            invalid_reasons=dict(sorted(self._invalid_reasons.items())),
            actions=tuple(sorted(self._verbs.items())),
            stop_reason=stop_reason,
            stop_message=stop_message,
            **self._tokens,
            cut_completions=self._cut,
            turns_left_out=self._left_out,
            seconds=round(seconds, 3),
            transcript=tuple(self._transcript),
        )


def _empty_reply(said: Completion) -> str:
    """Name what an agent gave instead of a text; empty if it gave one."""
    if said.instead:
        return f"{EMPTY_REPLY} ({said.instead})"
    return "" if said.text.strip() else EMPTY_REPLY
