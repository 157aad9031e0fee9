"""Several runs on the same start, teacher, tasks and budget: every method with every seed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock, Timeout

from atod_gym.errors import AtodError
from atod_train.algorithm.methods import has_exact_signal, needs_teacher
from atod_train.config import RunConfig, is_url
from atod_train.distributed import Processes, is_main_process, join_processes
from atod_train.models.checks import check_config
from atod_train.models.policy import MODEL_SHAPES, Policy, llama_config
from atod_train.models.pretrained import has_word_vocabulary, read_shape
from atod_train.progress import no_lines, plain_lines
from atod_train.reports.evaluations import EvaluatedModel, Evaluation
from atod_train.reports.report import REPORT_FILE, write_report
from atod_train.reports.results import results_of
from atod_train.reports.run_folder import (
    ANOTHER_FOLDER,
    CONFIG_FILE,
    check_same_settings,
    is_finished,
)
from atod_train.reports.run_summary import read_run
from atod_train.rollout.env_pool import EnvPool
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.teachers.remote import RemoteTeacher, connect, describe
from atod_train.training.bookkeeping import interruptible
from atod_train.training.checks import check_settings
from atod_train.training.supervised import Starts, evaluate_start
from atod_train.training.trainer import StoppedByUser, Trainer


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    config: RunConfig
    folder: Path


def run_study(config: RunConfig, out: Path) -> Path:
    """Makes the start and the teacher, trains every method with every seed, writes the report.

    Args:
        config: the settings; `study` says which methods and seeds, and how many at the same time.
        out: folder of the study; one folder per run in it.

    Returns:
        Path of report.html.

    Raises:
        AtodError: a setting, file or environment that cannot be used; the message says what to do.
        StoppedByUser: after Ctrl-C.
    """
    runs = [
        Run(
            replace(config, algorithm=replace(config.algorithm, method=method)).with_seed(seed),
            out / f"{method}-seed{seed}",
        )
        for seed in config.study.seeds or (config.train.seed,)
        for method in config.study.methods or (config.algorithm.method,)
    ]
    make_runs(config, runs, out)
    if is_main_process():
        summaries = [read_run(run.folder) for run in runs]
        write_report(out, [results_of(out.name, summaries)], {out.name: summaries})
    return out / REPORT_FILE


def make_runs(config: RunConfig, runs: Sequence[Run], out: Path) -> None:
    """Makes the start and the teacher, then some runs.

    Args:
        config: what all runs share: environment, models, and how many at the same time.
        runs: they differ in algorithm, budget and seed only.
        out: folder of the study.

    Raises:
        AtodError, StoppedByUser: as `run_study`.
    """
    for run in runs:
        _check_settings(run.config)
    _check_settings(config)
    processes = join_processes(config.model.device, config.model.teacher_device)
    if processes.is_main:
        _check_folder(out)
    else:
        no_lines()
    with _held(out) if processes.is_main else nullcontext():
        left = [
            run
            for run in runs
            if not (run.config.study.resume and is_finished(run.folder, run.config))
        ]
        for run in filter(_is_begun, left):
            check_same_settings(run.folder, run.config)
        # Nobody looks later than the main process writes.
        processes.wait()
        if left:
            wants_teacher = any(needs_teacher(run.config.algorithm.method) for run in runs)
            _make_runs(config, wants_teacher, left, out, processes)
        processes.wait()


def _make_runs(
    config: RunConfig,
    wants_teacher: bool,
    left: Sequence[Run],
    folder: Path,
    processes: Processes,
) -> None:
    """Makes what all runs share, then the runs that are left."""
    teacher_is_here = wants_teacher and not is_url(config.model.teacher)
    roles: list[EvaluatedModel] = ["teacher", "student"] if teacher_is_here else ["student"]
    # Processes that train together make one run after the other.
    with _workers(config.study.jobs if processes.count == 1 else 1) as call_all:
        if processes.is_main:
            _find_models(config, wants_teacher)
            # Models that are loaded come first: whether they can be takes no minutes to tell.
            made = [role for role in roles if getattr(config.model, role) in MODEL_SHAPES]
            loaded = [role for role in roles if role not in made]
            for some in (loaded, made):
                call_all(_make_start, [(config, role) for role in some])
        processes.wait()
        if wants_teacher and not {config.model.teacher, config.model.student} <= set(MODEL_SHAPES):
            # Models made from the same demonstrations share their tokenizer.
            call_all(_check_teacher, [(config,)])
        wanted = [
            (config, role, split, folder, processes)
            for role in roles
            for split in config.env.eval_splits
        ]
        known = [e for found in call_all(evaluate_start, wanted) for e in found]
        call_all(_train, [(run, known, processes) for run in left])


def _is_begun(run: Run) -> bool:
    """Whether a run can be gone on with."""
    return run.config.study.resume and (run.folder / CONFIG_FILE).is_file()


# -- pieces of work, each of which can run in a process of its own --------------------------------


def _make_start(config: RunConfig, role: EvaluatedModel) -> None:
    """Makes a start unless it is cached or a saved model."""
    pool = EnvPool(config.env, "train")
    try:
        Starts(config, pool).policy(role)
    finally:
        pool.close()


def _check_teacher(config: RunConfig) -> None:
    """Refuses a teacher that cannot score the student, before minutes are spent on evaluations."""
    pool = EnvPool(config.env, "train")
    try:
        starts = Starts(config, pool)
        _teacher(config, starts, starts.policy("student"))
    finally:
        pool.close()


def _teacher(config: RunConfig, starts: Starts, student: Policy) -> Teacher:
    """The teacher, in this process or behind a URL."""
    model = config.model
    if is_url(model.teacher):
        return RemoteTeacher(model.teacher, student, max_context=model.max_context)
    return LocalTeacher(
        starts.policy("teacher"),
        student,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
    )


def _train(run: Run, known: Sequence[Evaluation], processes: Processes) -> None:
    """One run, from the start or from its last checkpoint."""
    config = run.config
    train_pool = EnvPool(config.env, "train")
    eval_pools = [EnvPool(config.env, split) for split in config.env.eval_splits]
    try:
        starts = Starts(config, train_pool)
        student = starts.policy("student")
        wanted = needs_teacher(config.algorithm.method)
        teacher = _teacher(config, starts, student) if wanted else None
        trainer = Trainer(
            config, run.folder, student, teacher, train_pool, eval_pools, known, processes
        )
        trainer.run(resume=config.study.resume)
    finally:
        for pool in (train_pool, *eval_pools):
            pool.close()


CallAll = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""Calls a function with each of the argument lists, some at the same time."""


@contextmanager
def _workers(jobs: int) -> Iterator[CallAll]:
    """Calls in this process if `jobs` is 1, else in that many processes."""
    if jobs == 1:
        yield lambda function, calls: [function(*arguments) for arguments in calls]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_set_up_worker) as executor:

        def call_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
            # The first Ctrl-C reaches the workers too, which then finish their steps.
            with interruptible(announce=False, on_sigterm=_terminate_workers) as interrupted:
                futures = [executor.submit(function, *arguments) for arguments in calls]
                try:
                    return [future.result() for future in futures]
                except BrokenProcessPool as error:
                    if interrupted:
                        raise StoppedByUser("stopped; the last finished steps are saved") from None
                    raise AtodError(
                        f"One of {jobs} processes was killed, most likely because memory ran out. "
                        "What was saved is kept, and the same command goes on from there: give it "
                        "fewer jobs, or the runs a smaller train.tokens_per_microbatch."
                    ) from error

        try:
            yield call_all
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def _terminate_workers() -> None:
    """Pass SIGTERM on to the workers, which then finish their steps."""
    for worker in multiprocessing.active_children():
        worker.terminate()


def _set_up_worker() -> None:
    """Ends the worker with its parent, however that ends, and keeps its progress in plain lines.

    Several progress bars would overwrite each other.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    plain_lines()
    transformers.utils.logging.disable_progress_bar()


# -- checks ---------------------------------------------------------------------------------------


def _check_settings(config: RunConfig) -> None:
    if config.study.jobs < 1:
        raise AtodError(f"study.jobs must be at least 1, not {config.study.jobs}.")
    check_settings(config)
    if config.model.dtype == "bfloat16" and not config.model.lora_rank:
        raise AtodError(
            "model.dtype=bfloat16 rounds away the small updates of a student whose weights are "
            "all trained. Use --model.dtype mixed, or adapters (--model.lora-rank 16)."
        )
    algorithm = config.algorithm
    try:
        for method in config.study.methods or (algorithm.method,):
            exact = has_exact_signal(replace(algorithm, method=method))
            if exact and is_url(config.model.teacher):
                raise ValueError("opd_signal=exact takes a teacher in this process, not a server")
    except ValueError as error:
        raise AtodError(f"algorithm: {error}.") from error


def _find_models(config: RunConfig, wants_teacher: bool) -> None:
    """Looks for models that have a name or a URL before minutes are spent on making others."""
    model = config.model
    names = {model.student, model.teacher} if wants_teacher else {model.student}
    servers = {name for name in names if is_url(name)}
    presets = names & set(MODEL_SHAPES)
    saved = names - servers - presets
    for name in sorted(servers):
        describe(connect(name))
    for name in sorted(presets):
        check_config(llama_config(MODEL_SHAPES[name], vocabulary=1), name, model.max_context)
    for name in sorted(saved):
        read_shape(name, model.max_context)
        if presets and not has_word_vocabulary(name):
            raise AtodError(
                f"{min(presets)} is made with the words of demonstrations as tokens, {name} has "
                "other tokens, and student and teacher must share theirs. Give --model.student "
                "and --model.teacher models of one family, or train without a teacher (method "
                "grpo)."
            )


def _check_folder(out: Path) -> None:
    """Tries to write before minutes are spent on what could not be kept."""
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise AtodError(
            f"The folder {out} cannot be written ({error.strerror}); {ANOTHER_FOLDER}."
        ) from error


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process, however it ends."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AtodError(
            f"Another process is making runs in {out}: wait for it, or {ANOTHER_FOLDER}."
        ) from error
    except NotImplementedError:
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()
