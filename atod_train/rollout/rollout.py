"""Collects trajectories: many episodes at once, generation batched over the active ones only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from atod_gym.errors import AtodError
from atod_gym.parsing import invalid_reason
from atod_train.config import EnvConfig
from atod_train.models.generation import Completion, Generator
from atod_train.progress import PhaseTimes
from atod_train.records import StopReason, TokenizedTurn, Trajectory, TrajectoryGroup, Turn
from atod_train.rollout.env_pool import EnvEpisode, EnvPool
from atod_train.rollout.episode_prompts import EpisodePrompt, next_prompt

_Task = TypeVar("_Task")


def seed_for(seed: int, step: int, stream: str) -> int:
    """A seed for one use at one step, so that a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def tasks_for_step(task_ids: Sequence[_Task], step: int, count: int, seed: int) -> list[_Task]:
    """Return the tasks of a step: consecutive pieces of one shuffled pass after the other.

    Args:
        task_ids: the split, in manifest order, or what else is drawn in passes.
        step: 1-based optimiser cycle.
        count: tasks per step.
        seed: seed of the run; the same seed gives the same tasks to every method.
    """
    chosen: list[_Task] = []
    position = (step - 1) * count
    while len(chosen) < count:
        epoch, offset = divmod(position + len(chosen), len(task_ids))
        order = np.random.default_rng(seed_for(seed, epoch, "tasks")).permutation(len(task_ids))
        wanted = count - len(chosen)
        chosen += [task_ids[i] for i in order[offset : offset + wanted]]
    return chosen


class _Episode:
    """One episode while it is played."""

    def __init__(self, env: EnvEpisode, group_id: int) -> None:
        self.env = env
        self.group_id = group_id
        self.turns: list[Turn] = []
        self.stop_reason: StopReason | None = None

    def prompt(self, generator: Generator, row: int) -> EpisodePrompt:
        """Return what the model is fed before the next turn."""
        return next_prompt(self.env.dialogue, self.env.messages, self.turns, generator, row)

    def record(
        self, completion: Completion, text: str, prompt: EpisodePrompt, config: EnvConfig
    ) -> None:
        """Record the turn that a completion has played."""
        env = self.env
        tokens = TokenizedTurn(
            prompt_ids=prompt.ids,
            completion_ids=completion.ids,
            sampling_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            extends_previous=prompt.extends_previous,
        )
        penalty = config.invalid_action_penalty if env.info["parse_error"] else 0.0
        reason = invalid_reason(env.info)
        turn = Turn(
            index=len(self.turns),
            prompt=prompt.messages,
            completion=text,
            action=env.info["action"],
            reward=env.reward * config.success_reward - penalty,
            is_action_valid=not reason,
            tokens=tokens,
            penalty=penalty,
            invalid_reason=reason,
            turns_left_out=prompt.turns_left_out,
        )
        self.turns.append(turn)
        if env.terminated or env.truncated:
            self.stop_reason = "terminated" if env.terminated else "turn_limit"

    def trajectory(self) -> Trajectory:
        """The record of the episode, which has ended."""
        assert self.stop_reason is not None
        return Trajectory(
            group_id=self.group_id,
            task_id=self.env.info["task_id"],
            task_type=self.env.info["task_type"],
            turns=tuple(self.turns),
            terminated=self.stop_reason == "terminated",
            truncated=self.stop_reason != "terminated",
            stop_reason=self.stop_reason,
            success=bool(self.env.info["success"]),
            score=float(self.env.info["score"]),
        )


def collect(
    pool: EnvPool,
    generator: Generator,
    task_ids: Sequence[str],
    *,
    group_size: int,
    turn_limit: int,
    times: PhaseTimes | None = None,
    first_episode: int = 0,
    episodes_in_all: int | None = None,
    on_end: Callable[[Trajectory], None] | None = None,
) -> list[TrajectoryGroup]:
    """Plays `group_size` episodes of each task, all at once, and records them.

    Args:
        pool: environments of the split that the tasks belong to.
        generator: samples completions; its dialogue must have the pool's prompt style.
        task_ids: the tasks, one group each.
        group_size: G, episodes per task.
        turn_limit: episodes are cut after this many turns (at most the environment's own limit).
        times: takes the seconds of the phases `environment` and `generation`.
        first_episode: where several processes share a rollout, the number of this one's first
            episode among all.
        episodes_in_all: then the episodes of all processes; None: those of this call.
        on_end: takes each trajectory as soon as its episode has ended.

    Returns:
        One group per task, in the order given; group ids count from `first_episode / group_size`.
        An episode whose first prompt does not fit the model's context has no turns.

    Raises:
        AtodError: no first prompt fits, and `episodes_in_all` is None: who shares a rollout is to
            look at the episodes of all processes.
    """
    times = times or PhaseTimes()
    wanted = [
        (first_episode // group_size + number, task)
        for number, task in enumerate(task_ids)
        for _ in range(group_size)
    ]
    in_all = first_episode + len(wanted) if episodes_in_all is None else episodes_in_all
    after = in_all - first_episode - len(wanted)
    generator.start(len(wanted), before=first_episode, after=after)
    if not wanted:
        return []
    with times.phase("environment"):
        started = pool.start([task for _, task in wanted])
    episodes = [_Episode(env, group) for env, (group, _) in zip(started, wanted, strict=True)]
    active = dict(enumerate(episodes))
    while active:
        _play_turn(active, generator, pool, turn_limit, times)
        for episode in active.values():
            if episode.stop_reason is not None and on_end is not None:
                on_end(episode.trajectory())
        active = {row: e for row, e in active.items() if e.stop_reason is None}
    if episodes_in_all is None and not any(episode.turns for episode in episodes):
        raise nothing_fits()
    records = [episode.trajectory() for episode in episodes]
    return [
        TrajectoryGroup(task, tuple(records[i * group_size : (i + 1) * group_size]))
        for i, task in enumerate(task_ids)
    ]


def nothing_fits() -> AtodError:
    """The error where not a single episode could begin."""
    return AtodError(
        "No first prompt fits the model's context. Raise model.max_context, or choose a shorter "
        "prompt (env.show_admissible, env.prompt_style)."
    )


def _play_turn(
    active: dict[int, _Episode],
    generator: Generator,
    pool: EnvPool,
    turn_limit: int,
    times: PhaseTimes,
) -> None:
    """One turn of the episodes that have not ended, by their rows in the generator."""
    with times.phase("generation"):
        prompts = [episode.prompt(generator, row) for row, episode in active.items()]
        for row, prompt in zip(active, prompts, strict=True):
            if not prompt.extends_previous:
                generator.restart(row)
        completions = generator.prompt([prompt.ids for prompt in prompts], list(active))
        texts = ["" if c is None else generator.dialogue.decode(c.ids) for c in completions]
    with times.phase("environment"):
        turns = list(zip(active.values(), prompts, completions, texts, strict=True))
        playing = [(episode.env, text) for episode, _, completion, text in turns if completion]
        pool.play([env for env, _ in playing], [text for _, text in playing])
        for episode, prompt, completion, text in turns:
            if completion is None:
                episode.stop_reason = "context_limit"
                continue
            episode.record(completion, text, prompt, pool.config)
            if episode.stop_reason is None and len(episode.turns) >= turn_limit:
                episode.stop_reason = "turn_limit"
