"""Evaluation: every task of a split, played once, greedily or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atod_gym.tasks import spread
from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.policy import Policy
from atod_train.progress import progress
from atod_train.records import Trajectory
from atod_train.reports.evaluations import (
    EvaluationMode,
    EvaluationResult,
    task_result,
    temperature_of,
)
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, make_sampler, nothing_fits, seed_for

_MOST_EPISODES = 128
"""At once: a split may have thousands of tasks, and each episode has an environment."""


def evaluate(
    policy: Policy,
    pool: EnvPool,
    config: RunConfig,
    mode: EvaluationMode = "greedy",
    processes: Processes | None = None,
    engine: str = "plain",
) -> EvaluationResult:
    """Play every task of the pool's split, or `env.eval_tasks` spread evenly over it, once.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and (for the sampled mode) the seed.
        mode: how completions are chosen, see `temperature_of`.
        processes: share the tasks; each has the same policy.
        engine: what samples, as `model.sampler`.

    Returns:
        One result per task, in manifest order.

    Raises:
        AtodError: no first prompt fits the model's context.
    """
    task_ids = spread(pool.task_ids, config.env.eval_tasks)
    temperature = temperature_of(mode)
    processes = processes or Processes()
    title = f"evaluating {policy.name} on {pool.split}, {mode}"
    with progress(len(processes.share(len(task_ids))), title) as advance:
        episodes = play_tasks(
            policy, pool, config, task_ids, temperature=temperature, processes=processes,
            on_end=lambda _: advance(), on_turn=lambda tokens: advance(0, tokens=tokens),
            engine=engine,
        )  # fmt: skip
    results = processes.gather([task_result(episode) for episode in episodes])
    if not any(result.turns for result in results):
        raise nothing_fits()
    return EvaluationResult(pool.split, pool.data, mode, tuple(results))


def play_tasks(
    policy: Policy,
    pool: EnvPool,
    config: RunConfig,
    task_ids: Sequence[str],
    *,
    temperature: float,
    on_end: Callable[[Trajectory], None] | None = None,
    on_turn: Callable[[int], None] | None = None,
    stream: int = 0,
    at_once: int | None = None,
    processes: Processes | None = None,
    engine: str = "plain",
) -> list[Trajectory]:
    """Play each task once; return the trajectories that this process has played.

    Args:
        policy: the model; it is not changed.
        pool: environments of the split.
        config: prompt style, limits and seed.
        task_ids: the tasks.
        temperature: of sampling; 0: greedy.
        on_end: receives each trajectory as soon as its episode has ended.
        on_turn: see `collect`.
        stream: another number draws other samples from the same seed.
        at_once: most episodes at once; None: as many as memory holds, up to 128.
        processes: share the tasks.
        engine: what samples, as `model.sampler`.
    """
    processes = processes or Processes()
    sampler = make_sampler(
        policy,
        DialogueEncoder(policy.tokenizer, config.env.prompt_style, config.env.template_options),
        pool,
        config,
        temperature=temperature,
        seed=seed_for(config.train.seed, stream, "evaluation"),
        engine=engine,
    )
    return collect(
        pool,
        sampler,
        task_ids,
        group_size=1,
        turn_limit=config.env.max_turns,
        processes=processes,
        on_end=on_end,
        on_turn=on_turn,
        at_once=at_once or min(_MOST_EPISODES, sampler.episodes_at_once(processes.count)),
    )
