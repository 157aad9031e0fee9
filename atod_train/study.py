"""Several runs on the same start, teacher, tasks and budget: every method with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from atod_gym.errors import AtodError
from atod_train.baselines import needs_teacher
from atod_train.config import RunConfig
from atod_train.demonstrations import Starts
from atod_train.evaluate import evaluate
from atod_train.intervals import EvaluationResult, mean_interval, paired_by_task
from atod_train.metrics import Evaluation
from atod_train.policy import Policy
from atod_train.progress import progress
from atod_train.report import write_report
from atod_train.report_data import RunSummary, read_run
from atod_train.rollout import EnvPool
from atod_train.run_folder import SUMMARY_FILE, read_json
from atod_train.trainer import Trainer


def run_study(config: RunConfig, out: Path) -> Path:
    """Makes the start and the teacher, trains every method with every seed, writes the report.

    Args:
        config: the settings; `study` says which methods and seeds.
        out: folder of the study; one folder per run in it.

    Returns:
        Path of report.html.

    Raises:
        AtodError: a setting, file or environment that cannot be used; the message says what to do.
        StoppedByUser: after Ctrl-C.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    methods = config.study.methods or (config.algorithm.method,)
    seeds = config.study.seeds or (config.train.seed,)
    _check_steps(config)
    _check_folder(out)
    train_pool = EnvPool(config.env, "train")
    eval_pools = [EnvPool(config.env, split) for split in config.env.eval_splits]
    try:
        starts = Starts(config, train_pool)
        wants_teacher = any(needs_teacher(method) for method in methods)
        teacher = starts.teacher() if wants_teacher else None
        student = starts.student()
        run_dirs = [out / f"{method}-seed{seed}" for seed in seeds for method in methods]
        known: Sequence[Evaluation] = ()
        for run_dir, (seed, method) in zip(
            run_dirs, ((s, m) for s in seeds for m in methods), strict=True
        ):
            if config.study.resume and read_json(run_dir / SUMMARY_FILE).get("finished"):
                continue
            known = known or _evaluate_known(student, teacher, eval_pools, config)
            run_config = replace(
                config,
                algorithm=replace(config.algorithm, method=method),
                train=replace(config.train, seed=seed),
            )
            trainer = Trainer(
                run_config,
                run_dir,
                starts.student(),
                teacher if needs_teacher(method) else None,
                train_pool,
                eval_pools,
                known,
            )
            trainer.run(resume=config.study.resume)
    finally:
        for pool in (train_pool, *eval_pools):
            pool.close()
    return write_report(out, [read_run(run_dir) for run_dir in run_dirs])


def _check_steps(config: RunConfig) -> None:
    train = config.train
    for name in ("steps", "tasks_per_step", "group_size", "minibatches", "max_completion_tokens"):
        if getattr(train, name) < 1:
            raise AtodError(f"train.{name} must be at least 1, not {getattr(train, name)}.")
    if train.lr <= 0 or train.temperature <= 0:
        raise AtodError("train.lr and train.temperature must be above 0.")


def _check_folder(out: Path) -> None:
    """Tries to write before minutes are spent on what could not be kept."""
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise AtodError(
            f"The folder {out} cannot be written ({error.strerror}); choose another one with "
            "--study.out."
        ) from error


def _evaluate_known(
    student: Policy, teacher: Policy | None, pools: Sequence[EnvPool], config: RunConfig
) -> list[Evaluation]:
    """The start and the teacher on every evaluation split, greedy and sampled."""
    policies = [("student", student), *([("teacher", teacher)] if teacher else [])]
    wanted = [
        (role, policy, pool, mode)
        for role, policy in policies
        for pool in pools
        for mode in ("greedy", "sampled")
    ]
    known = []
    with progress(len(wanted), "evaluating start and teacher") as advance:
        for role, policy, pool, mode in wanted:
            assert policy is not None
            result = evaluate(policy, pool, config, mode)  # type: ignore[arg-type]
            known.append(Evaluation(0, role, result))  # type: ignore[arg-type]
            advance()
    return known


# -- the table -------------------------------------------------------------------------------------


def print_table(runs: Sequence[RunSummary], console: Console) -> None:
    """Prints success rates with 95 % intervals: start, teacher, and each run last and best."""
    for board in dict.fromkeys(board for run in runs for board in run.boards):
        split, mode = board
        table = Table(title=f"{split}, {mode}: success rate with 95 % interval")
        for column in ("model", "success", "turns", "invalid", "gain over start (paired)"):
            table.add_column(column)
        start, teacher = runs[0].start(board), None
        for run in runs:
            teacher = teacher or run.teacher(board)
        for name, result in (("start", start), ("teacher", teacher)):
            if result is not None:
                table.add_row(name, *_cells(result, None if name == "start" else start))
        for run in runs:
            last, best = run.last(board), run.best(board)
            if last is not None:
                table.add_row(f"{run.name}, last", *_cells(last.result, start))
            if best is not None and last is not None and best.step != last.step:
                table.add_row(f"{run.name}, best (step {best.step})", *_cells(best.result, start))
        for method in dict.fromkeys(run.method for run in runs):
            lasts = [run.last(board) for run in runs if run.method == method]
            rates = [100 * last.result.success_rate for last in lasts if last is not None]
            if len(rates) > 1:
                low, high = mean_interval(rates)
                mean = sum(rates) / len(rates)
                table.add_row(
                    f"{method}, mean of {len(rates)} seeds", f"{mean:.1f} [{low:.1f}, {high:.1f}]"
                )
        console.print(table)


def _cells(result: EvaluationResult, start: EvaluationResult | None) -> list[str]:
    low, high = result.interval
    gain = ""
    if start is not None:
        interval = paired_by_task(start, result)
        if interval is not None:
            difference = 100 * (result.success_rate - start.success_rate)
            gain = f"{difference:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return [
        f"{100 * result.success_rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{result.mean_turns:.1f}",
        f"{100 * result.invalid_share:.0f} %",
        gain,
    ]
