"""Plays every task of a split once with any agent, several episodes at a time; no torch."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import gymnasium

import atod_gym  # noqa: F401 - registers the environments
from atod_gym.parsing import EMPTY_REPLY, ParseProfile, action_verb, invalid_reason
from atod_gym.wrappers import agent_env, make_env
from atod_train.config import PromptStyle
from atod_train.evaluation.agents import Agent, Completion, EpisodeStopped, checked
from atod_train.evaluation.eval_records import EpisodeRecord

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PlayedEnv:
    """Which environment is played, and how it is put to the agent."""

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
        """An environment that speaks messages.

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
    """An environment in a thread of its own, so that a slow step keeps nobody waiting.

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
        """Calls a function in the thread; who is cancelled meanwhile waits for its end."""
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
        keep_transcripts: whether records hold what was said.

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
    """Plays one task and records it; an episode that the agent cannot go on with has failed."""
    began = time.monotonic()
    env = thread.env
    messages, info = await thread.run(env.reset, options={"task_id": task_id})
    agent.reset(env, env.unwrapped.observation, info)
    taken = _Taken()
    stop_reason = stop_message = ""
    while not stop_reason:
        try:
            said = checked(await agent.act(messages, env.unwrapped.observation, info))
        except EpisodeStopped as stop:
            stop_reason, stop_message = stop.reason, str(stop)
            break
        prompt = messages
        messages, _, terminated, truncated, info = await thread.run(env.step, said.text)
        taken.add(said, info)
        if keep_transcript:
            taken.transcript.append(_transcribed(prompt, said, info))
        if terminated or truncated:
            stop_reason = "terminated" if terminated else "turn_limit"
    return EpisodeRecord(
        task_id=str(info["task_id"]),
        task_type=str(info["task_type"]),
        success=bool(info["success"]) and stop_reason in ("terminated", "turn_limit"),
        score=float(info["score"]),
        turns=taken.turns,
        invalid_turns=sum(taken.invalid_reasons.values()),
        invalid_reasons=dict(sorted(taken.invalid_reasons.items())),
        actions=tuple(sorted(taken.verbs.items())),
        stop_reason=stop_reason,
        stop_message=stop_message,
        prompt_tokens=taken.prompt_tokens,
        completion_tokens=taken.completion_tokens,
        reasoning_tokens=taken.reasoning_tokens,
        cut_completions=taken.cut_completions,
        turns_left_out=taken.turns_left_out,
        seconds=round(time.monotonic() - began, 3),
        transcript=tuple(taken.transcript),
    )


class _Taken:
    """What the turns of an episode took so far."""

    def __init__(self) -> None:
        self.turns = self.cut_completions = self.turns_left_out = 0
        self.invalid_reasons: Counter[str] = Counter()
        self.verbs: Counter[str] = Counter()
        self.prompt_tokens: int | None = 0
        self.completion_tokens: int | None = 0
        self.reasoning_tokens: int | None = 0
        self.transcript: list[dict[str, Any]] = []

    def add(self, said: Completion, info: Mapping[str, Any]) -> None:
        self.turns += 1
        self.cut_completions += said.is_cut
        self.turns_left_out += said.turns_left_out
        self.prompt_tokens = _sum(self.prompt_tokens, said.prompt_tokens)
        self.completion_tokens = _sum(self.completion_tokens, said.completion_tokens)
        self.reasoning_tokens = _sum(self.reasoning_tokens, said.reasoning_tokens)
        reason = invalid_reason(info)
        if not reason:
            self.verbs[action_verb(info["action"])] += 1
        else:
            self.invalid_reasons[_empty_reply(said) or reason] += 1


def _empty_reply(said: Completion) -> str:
    """Names what an agent said instead of a text; empty if it said one."""
    if said.instead:
        return f"{EMPTY_REPLY} ({said.instead})"
    return "" if said.text.strip() else EMPTY_REPLY


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more


def _transcribed(
    prompt: Sequence[dict[str, str]], said: Completion, info: Mapping[str, Any]
) -> dict[str, Any]:
    """A turn for people to read: what is new in the prompt, what was said and what came of it."""
    answered = [number for number, message in enumerate(prompt) if message["role"] == "assistant"]
    new = prompt[answered[-1] + 1 :] if answered else prompt
    return {
        "messages": [dict(message) for message in new],
        "completion": said.text,
        "reasoning": said.reasoning,
        "action": info["action"],
        "is_action_valid": bool(info["is_action_valid"]),
        "parse_error": info["parse_error"],
    }
