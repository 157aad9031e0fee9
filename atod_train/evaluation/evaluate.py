"""Evaluation: every task of a split, once greedily or some times sampled."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence

import torch

from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.memory import give_back
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.records import Trajectory
from atod_train.reports.statistics import EvaluationMode, EvaluationResult, TaskResult
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, nothing_fits, seed_for

SAMPLING_TEMPERATURE = 0.4
"""Of the sampled mode, as in the published validation of ALFWorld and WebShop."""

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
    """Plays every task of the pool's split, or the first `env.eval_tasks` of them.

    Once greedily, and sampled `env.eval_samples` times.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and (for the sampled mode) the seed.
        mode: `greedy`, or `sampled` at `SAMPLING_TEMPERATURE`.
        processes: share the tasks; each has the same policy.

    Returns:
        One result per task, in manifest order, the mean of its plays.

    Raises:
        AtodError: no first prompt fits the model's context.
    """
    task_ids = pool.task_ids[: config.env.eval_tasks or None]
    plays = config.env.eval_samples if mode == "sampled" else 1
    generator = Generator(
        policy,
        DialogueEncoder(policy.tokenizer, config.env.prompt_style, config.env.template_options),
        temperature=0.0 if mode == "greedy" else SAMPLING_TEMPERATURE,
        max_completion_tokens=config.train.max_completion_tokens,
        completion_format=pool.completion_format,
        max_context=config.model.max_context,
        generator=torch.Generator().manual_seed(seed_for(config.train.seed, 0, "evaluation")),
    )
    processes = processes or Processes()
    results: list[TaskResult] = []
    at_once = episodes_at_once(policy, generator.max_context, processes.count)
    at_once = max(1, at_once // plays) * processes.count
    for start in range(0, len(task_ids), at_once):
        part = task_ids[start : start + at_once]
        share = processes.share(len(part))
        groups = collect(
            pool,
            generator,
            part[share.start : share.stop],
            group_size=plays,
            turn_limit=config.env.max_turns,
            first_episode=share.start * plays,
            episodes_in_all=len(part) * plays,
        )
        give_back()
        results += processes.gather([_result(group.trajectories) for group in groups])
    if not any(result.turns for result in results):
        raise nothing_fits()
    return EvaluationResult(pool.split, pool.data, mode, tuple(results), plays)


def episodes_at_once(policy: Policy, max_context: int, processes: int = 1) -> int:
    """Return how many episodes are played at once: as many as memory holds, from 1 to 128.

    It depends on the model and the machine alone, so that all processes get the same number.

    Args:
        policy: the model.
        max_context: longest sequence in tokens.
        processes: how many share a processor's memory; each has a GPU of its own.
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


def _result(plays: Sequence[Trajectory]) -> TaskResult:
    """The mean of the plays of a task."""
    n = len(plays)
    invalid = sum(not turn.is_action_valid for play in plays for turn in play.turns)
    verbs = sum((play.verbs for play in plays), Counter())
    return TaskResult(
        task_id=plays[0].task_id,
        task_type=plays[0].task_type,
        success=sum(play.success for play in plays) / n,
        score=math.fsum(play.score for play in plays) / n,
        turns=sum(len(play.turns) for play in plays) / n,
        invalid_turns=invalid / n,
        actions=tuple((verb, count / n) for verb, count in sorted(verbs.items())),
    )
