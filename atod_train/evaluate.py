"""Evaluation: every task of a split exactly once, greedy or sampled."""

from __future__ import annotations

import torch

from atod_train.config import RunConfig
from atod_train.dialogue import DialogueEncoder
from atod_train.generation import Generator
from atod_train.intervals import EvaluationMode, EvaluationResult, TaskResult
from atod_train.policy import Policy
from atod_train.processes import Processes
from atod_train.rollout import EnvPool, collect, nothing_fits, seed_for
from atod_train.types import Trajectory

SAMPLING_TEMPERATURE = 0.4
"""Of the sampled mode, as in the published validation of ALFWorld and WebShop."""

EPISODES_AT_ONCE = 128


def evaluate(
    policy: Policy,
    pool: EnvPool,
    config: RunConfig,
    mode: EvaluationMode = "greedy",
    processes: Processes | None = None,
) -> EvaluationResult:
    """Plays every task of the pool's split once, or the first `env.eval_tasks` of them.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and (for the sampled mode) the seed.
        mode: `greedy`, or `sampled` at `SAMPLING_TEMPERATURE`.
        processes: share the tasks; each has the same policy.

    Returns:
        One result per task, in manifest order.

    Raises:
        AtodError: no first prompt fits the model's context.
    """
    task_ids = pool.task_ids[: config.env.eval_tasks or None]
    generator = Generator(
        policy,
        DialogueEncoder(policy.tokenizer, config.env.prompt_style, config.env.template_options),
        temperature=0.0 if mode == "greedy" else SAMPLING_TEMPERATURE,
        max_completion_tokens=config.train.max_completion_tokens,
        max_context=min(config.model.max_context, policy.max_positions),
        generator=torch.Generator().manual_seed(seed_for(config.train.seed, 0, "evaluation")),
    )
    processes = processes or Processes()
    results: list[TaskResult] = []
    for start in range(0, len(task_ids), EPISODES_AT_ONCE * processes.count):
        part = task_ids[start : start + EPISODES_AT_ONCE * processes.count]
        share = processes.share(len(part))
        groups = collect(
            pool,
            generator,
            part[share.start : share.stop],
            group_size=1,
            turn_limit=config.env.max_turns,
            first_episode=share.start,
            episodes_in_all=len(part),
        )
        own = [_result(record) for group in groups for record in group.trajectories]
        results += processes.gather(own)
    if not any(result.turns for result in results):
        raise nothing_fits()
    return EvaluationResult(pool.split, pool.data, mode, tuple(results))


def _result(record: Trajectory) -> TaskResult:
    return TaskResult(
        task_id=record.task_id,
        task_type=record.task_type,
        success=record.success,
        score=record.score,
        turns=len(record.turns),
        invalid_turns=sum(not turn.is_action_valid for turn in record.turns),
        actions=tuple(sorted(record.verbs.items())),
    )
