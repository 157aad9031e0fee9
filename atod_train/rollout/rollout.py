"""Collect trajectories: many episodes at a time, with batched generation for the active ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from atod_gym.errors import AtodError
from atod_train.config import RunConfig, parse_sampler
from atod_train.distributed import Processes
from atod_train.memory import give_back
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator, Sampler
from atod_train.models.policy import Policy
from atod_train.models.vllm_sampler import VllmSampler
from atod_train.progress import PhaseTimes
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Episode, Limits

_Task = TypeVar("_Task")


def seed_for(seed: int, step: int, stream: str) -> int:
    """Return a seed for one use at one step, so that a resumed run draws the same numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def tasks_for_step(task_ids: Sequence[_Task], step: int, count: int, seed: int) -> list[_Task]:
    """Return the tasks of a step: consecutive parts of shuffled passes over the split.

    Args:
        task_ids: the split in manifest order, or other items that are drawn in passes.
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


def make_sampler(
    policy: Policy,
    dialogue: DialogueEncoder,
    pool: EnvPool,
    config: RunConfig,
    *,
    temperature: float,
    seed: int,
    engine: str = "plain",
) -> Sampler:
    """Return the sampler of a policy's completions, with the limits of a run.

    Args:
        policy: the model.
        dialogue: renders its prompts.
        pool: environments that it plays in.
        config: the settings.
        temperature: of sampling; 0: greedy.
        seed: of the episodes' random streams.
        engine: as `model.sampler`, which is for the student alone.
    """
    name, share = parse_sampler(engine)
    kind: Callable[..., Sampler] = Generator
    if name == "vllm":
        kind = partial(VllmSampler, share=share)
    return kind(
        policy,
        dialogue,
        temperature=temperature,
        max_completion_tokens=config.train.max_completion_tokens,
        completion_format=pool.completion_format,
        max_context=config.model.max_context,
        generator=torch.Generator().manual_seed(seed),
    )


def collect(
    pool: EnvPool,
    sampler: Sampler,
    task_ids: Sequence[str],
    *,
    group_size: int,
    turn_limit: int,
    times: PhaseTimes | None = None,
    processes: Processes | None = None,
    on_end: Callable[[Trajectory], None] | None = None,
    on_turn: Callable[[int], None] | None = None,
    at_once: int = 0,
) -> list[Trajectory]:
    """Play `group_size` episodes of each task, as many at a time as fit memory, and record them.

    Args:
        pool: environments of the split that the tasks belong to.
        sampler: samples completions; its dialogue must have the pool's prompt style.
        task_ids: the tasks, one group each.
        group_size: G, episodes per task.
        turn_limit: episodes are cut after this many turns (at most the environment's own limit).
        times: records the seconds of the phases `environment` and `generation`.
        processes: share the tasks; each samples the same as a single process would.
        on_end: called with each trajectory as soon as its episode has ended.
        on_turn: called with the number of tokens sampled in a turn of all active episodes.
        at_once: maximum number of episodes at a time; 0: as many as fit the sampler. More are
            played in waves, in which each samples the same as if all were played together.

    Returns:
        The trajectories that this process has played, task after task in the given order;
        `group_id` is the index of the task in `task_ids`. An episode whose first prompt does not
        fit the model's context has no turns.
    """
    times = times or PhaseTimes()
    processes = processes or Processes()
    share = processes.share(len(task_ids))
    groups = [group for group in share for _ in range(group_size)]
    seeds = sampler.draw_seeds(len(task_ids) * group_size)[share.start * group_size :]
    at_once = at_once or sampler.episodes_at_once(processes.count)
    ended: dict[int, Trajectory] = {}
    for first in range(0, len(groups), at_once):
        rows = range(first, min(first + at_once, len(groups)))
        with times.phase("generation"):
            sampler.start([seeds[row] for row in rows])
        with times.phase("environment"):
            episodes = pool.start([task_ids[groups[row]] for row in rows])
        active = dict(enumerate(episodes))
        while active:
            sampled = _play_turn(active, sampler, pool, turn_limit, times)
            if on_turn is not None:
                on_turn(sampled)
            for number, episode in list(active.items()):
                if episode.stop_reason is not None:
                    row = rows[number]
                    ended[row] = active.pop(number).trajectory(groups[row])
                    if on_end is not None:
                        on_end(ended[row])
        give_back()
    sampler.end()
    return [ended[row] for row in range(len(groups))]


def nothing_fits() -> AtodError:
    """Return the error if no episode could begin."""
    return AtodError(
        "No first prompt fits the model's context. Raise model.max_context, or choose a shorter "
        "prompt (env.show_admissible, env.prompt_style)."
    )


def _play_turn(
    active: dict[int, Episode],
    sampler: Sampler,
    pool: EnvPool,
    turn_limit: int,
    times: PhaseTimes,
) -> int:
    """Play one turn of the running episodes, by their rows; return the number of sampled tokens."""
    limits = Limits(sampler.max_completion_tokens, sampler.max_context)
    with times.phase("generation"):
        found = {row: e.next_prompt(sampler.dialogue, limits) for row, e in active.items()}
        prompts = {row: prompt.whole for row, prompt in found.items() if prompt is not None}
        completions = sampler.prompt(list(prompts.values()), list(prompts))
        texts = [sampler.dialogue.decode(completion.ids) for completion in completions]
    with times.phase("environment"):
        playing = [active[row] for row in prompts]
        pool.play(playing, texts, completions)
        for episode in playing:
            if episode.stop_reason is None and len(episode.turns) >= turn_limit:
                episode.stop_reason = "turn_limit"
    return sum(len(completion.ids) for completion in completions)
