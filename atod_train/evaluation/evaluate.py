"""Evaluation: every task of a split, played once, greedily or sampled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import torch

from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.memory import give_back
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.progress import progress
from atod_train.records import Trajectory
from atod_train.reports.evaluations import (
    EvaluationMode,
    EvaluationResult,
    TaskResult,
    temperature_of,
)
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, nothing_fits, seed_for

_MOST_EPISODES = 128
_CACHE_SHARE = 0.2
"""Of the memory of the device, for keys and values of the episodes that are played at once."""


def evaluate(
    policy: Policy,
    pool: EnvPool,
    config: RunConfig,
    mode: EvaluationMode = "greedy",
    processes: Processes | None = None,
) -> EvaluationResult:
    """Play every task of the pool's split, or `env.eval_tasks` spread evenly over it, once.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and (for the sampled mode) the seed.
        mode: how completions are chosen, see `temperature_of`.
        processes: share the tasks; each has the same policy.

    Returns:
        One result per task, in manifest order.

    Raises:
        AtodError: no first prompt fits the model's context.
    """
    known = len(pool.task_ids)
    count = min(config.env.eval_tasks, known) or known
    task_ids = [pool.task_ids[i * known // count] for i in range(count)]
    temperature = temperature_of(mode)
    processes = processes or Processes()
    results: list[TaskResult] = []
    title = f"evaluating {policy.name} on {pool.split}, {mode}"
    with progress(-(-len(task_ids) // processes.count), title) as advance:
        for episodes in play_in_batches(
            policy, pool, config, task_ids, temperature=temperature, processes=processes,
            on_end=lambda episode: advance(tokens=episode.sampled_tokens),
        ):  # fmt: skip
            results += processes.gather([_result(episode) for episode in episodes])
    if not any(result.turns for result in results):
        raise nothing_fits()
    return EvaluationResult(pool.split, pool.data, mode, tuple(results))


def play_in_batches(
    policy: Policy,
    pool: EnvPool,
    config: RunConfig,
    task_ids: Sequence[str],
    *,
    temperature: float,
    on_end: Callable[[Trajectory], None],
    stream: int = 0,
    at_once: int | None = None,
    processes: Processes | None = None,
) -> Iterator[list[Trajectory]]:
    """Play each task once, as many at the same time as memory holds.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and seed.
        task_ids: the tasks.
        temperature: of sampling; 0: greedy.
        on_end: receives each trajectory as soon as its episode has ended.
        stream: another number draws other samples from the same seed.
        at_once: episodes at the same time; None: `episodes_at_once`.
        processes: share the tasks.

    Yields:
        The trajectories of one batch after the other that this process has played.
    """
    generator = Generator(
        policy,
        DialogueEncoder(policy.tokenizer, config.env.prompt_style, config.env.template_options),
        temperature=temperature,
        max_completion_tokens=config.train.max_completion_tokens,
        completion_format=pool.completion_format,
        max_context=config.model.max_context,
        generator=torch.Generator().manual_seed(seed_for(config.train.seed, stream, "evaluation")),
    )
    processes = processes or Processes()
    at_once = at_once or episodes_at_once(policy, generator.max_context, processes.count)
    at_once *= processes.count
    for start in range(0, len(task_ids), at_once):
        trajectories = collect(
            pool,
            generator,
            task_ids[start : start + at_once],
            group_size=1,
            turn_limit=config.env.max_turns,
            processes=processes,
            on_end=on_end,
        )
        give_back()
        yield trajectories


def episodes_at_once(policy: Policy, max_context: int, processes: int = 1) -> int:
    """Return how many episodes are played at once: as many as memory holds, from 1 to 128.

    It depends on the model, `max_context` and the machine alone, so that all processes get the same
    number. Processes share a processor's memory; each has a GPU of its own.
    """
    config = policy.model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    held_heads = getattr(config, "num_key_value_heads", None) or heads
    size = 4  # bytes of a float32
    per_episode = 2 * size * config.num_hidden_layers * held_heads * width * max_context
    if policy.device.type == "cuda":
        memory = torch.cuda.get_device_properties(policy.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    return max(1, min(_MOST_EPISODES, int(_CACHE_SHARE * memory) // per_episode))


def _result(episode: Trajectory) -> TaskResult:
    return TaskResult(
        task_id=episode.task_id,
        task_type=episode.task_type,
        success=episode.success,
        score=episode.score,
        turns=len(episode.turns),
        invalid_turns=sum(not turn.is_action_valid for turn in episode.turns),
    )
