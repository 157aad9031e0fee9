"""Make the runs of a study: first their shared models, then each run, and the report."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, nullcontext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.algorithm.methods import needs_teacher
from atod_train.config import RunConfig, is_url
from atod_train.distributed import Processes, join_processes
from atod_train.files import locked, read_json
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES
from atod_train.models.policy import Policy
from atod_train.progress import progress, show_progress
from atod_train.reports.answer import answer
from atod_train.reports.evaluations import EvaluatedModel, Evaluation
from atod_train.reports.report import REPORT_FILE, saved_models, write_report
from atod_train.reports.results import RESULTS_FILE, Results, results_of, write_results
from atod_train.reports.run_folder import (
    ANOTHER_FOLDER,
    MANIFEST_FILE,
    RunFolderError,
    check_same_settings,
    is_finished,
)
from atod_train.reports.run_summary import finished_runs
from atod_train.reports.tables import main_table, phase_table
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.checks import check_folder, header, is_taught
from atod_train.studies.file import Run, Study, StudyPart, keep_study, study_of
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.teachers.remote import RemoteTeacher
from atod_train.training.checks import check_settings
from atod_train.training.inputs import check_inputs, hidden_inputs
from atod_train.training.loggers import LogTo, check_loggers
from atod_train.training.starts import evaluate_start, policy_of
from atod_train.training.stopping import StoppedByUser, interruptible
from atod_train.training.trainer import Trainer


def train_one(config: RunConfig, out: Path, resume: bool = False) -> Path:
    """Make one run; see `run_study`."""
    return run_study(study_of(config, out), out, resume)


def run_study(study: Study, out: Path, resume: bool = False) -> Path:
    """Make the start and the teacher of each environment, then the runs, and write the report.

    A run that fails does not stop the others, unless two in a row of one process fail with the same
    error: the others would, too. Errors of shared models and of the system stop the study at once.

    Args:
        study: the runs.
        out: folder of the study.
        resume: continue runs of the folder; those with all their steps are kept.

    Returns:
        Path of report.html.

    Raises:
        AtodError: a setting, file or environment that cannot be used, or a run has failed. Where
            runs have finished, their report is written first.
        StoppedByUser: after Ctrl-C or SIGTERM; the last finished steps are saved.
    """
    for run in study.runs:
        check_settings(run.config)
    processes = join_processes(*study.runs[0].config.model.devices)
    if processes.is_main:
        check_folder(out)
    else:
        show_progress("nothing")
    all_left = [(part, _left(part, resume)) for part in study.parts]
    to_make = [(part, left) for part, left in all_left if left]
    if processes.is_main:
        if to_make:
            check_loggers(study.log)
        for part, left in all_left:
            if kept := len(part.runs) - len(left):
                print(f"{part.name}: finished runs that are kept: {kept}", file=sys.stderr)
            if left:
                print(header(part, left, study.jobs), file=sys.stderr, flush=True)
        out.mkdir(parents=True, exist_ok=True)
    with locked(out, ANOTHER_FOLDER) if processes.is_main else nullcontext():
        # Barrier: every rank must have read the folder before rank 0 writes to it.
        processes.wait()
        whole = keep_study(study, out) if processes.is_main else study
        failed: list[str] = []
        failure: AtodError | None = None
        try:
            # Processes that train together make one run after the other.
            with _workers(study.jobs if processes.count == 1 else 1) as call_all:
                # Models that cannot be used are refused before the first run begins.
                for part, left in to_make:
                    _make_models(part, left, processes, call_all)
                for part, left in to_make:
                    failed += _make_runs(part, left, processes, call_all, LogTo(study.log, out))
            if failed:
                again = shlex.join(["atod-train", "resume", str(out)])
                raise AtodError(f"Failed runs: {'; '.join(failed)}. To try them again: {again}")
        except AtodError as error:
            failure = error
        finally:
            if processes.is_main:
                environments = _write_results(whole, out)
        if processes.is_main and (environments or not failure):
            _report(environments, out)
        if failure:
            raise failure
        processes.wait()
    return out / REPORT_FILE


def report_study(study: Study, out: Path) -> None:
    """Write results and report of the finished runs.

    Raises:
        AtodError: no run has finished.
    """
    environments = _write_results(study, out)
    if not environments:
        raise AtodError(f"No run of this study has all its steps in {out}: there are no results.")
    _report(environments, out)


def _write_results(study: Study, out: Path) -> list[Results]:
    """Write results.json from all finished runs of a folder; return them by environment."""
    environments = []
    for part in study.parts:
        runs, left_out = finished_runs(part.folder, part.settings)
        if runs:
            environments.append(results_of(part.name, runs))
        for line in left_out:
            print(f"not in the results: {line}", file=sys.stderr)
    write_results(out / RESULTS_FILE, environments)
    return environments


def _report(environments: Sequence[Results], out: Path) -> None:
    """Write the report of environments; print their main tables and the answer."""
    are_several = sum(len(results.runs) for results in environments) > 1
    pictures = are_several and all(results.tasks for results in environments)
    report = write_report(out, environments, pictures=pictures)
    for results in (found for found in environments if found.tasks):
        print(f"\n{results.name}")
        for table in (main_table(results), phase_table(results)):
            print(f"\n{table.title}\n{table.text}")
        if found := answer(results):
            print(f"\nAnswer: {found.text}")
            for path in saved_models(results, found)[:1]:
                print(f"\nmodel:   {path}")
    print(f"results: {out / RESULTS_FILE}\nreport:  {report}")


def _left(part: StudyPart, resume: bool) -> list[Run]:
    """Return the runs that are not finished; refuse runs that must not be continued."""
    left = []
    for run in part.runs:
        if run.is_begun and not resume:
            raise RunFolderError(
                f"{run.folder} already contains a run; continue it (--resume), or {ANOTHER_FOLDER}"
            )
        if not is_finished(run.folder, run.config):
            if run.is_begun:
                check_same_settings(run.folder, run.config)
            left.append(run)
    return left


def _make_models(
    part: StudyPart, left: Sequence[Run], processes: Processes, call_all: CallAll
) -> None:
    """Make start and teacher of an environment, and check that the runs can use them."""
    config, model = part.config, part.config.model
    if processes.is_main:
        # Loaded models come first, so that unusable ones are reported early.
        for is_made in (False, True):
            chosen = [r for r in _roles(part) if (getattr(model, r) in MODEL_SHAPES) == is_made]
            call_all(_make_start, [(config, role) for role in chosen])
    processes.wait()
    begun = [run.folder for run in left if run.is_begun]
    # Models made from the same demonstrations share their tokenizer.
    are_made = {model.teacher, model.student} <= MODEL_SHAPES.keys()
    if begun or (is_taught(part) and not are_made):
        call_all(_check_models, [(config, is_taught(part), begun)])


def _make_runs(
    part: StudyPart, left: Sequence[Run], processes: Processes, call_all: CallAll, log: LogTo
) -> list[str]:
    """Evaluate start and teacher of an environment, make the runs, and return the failed ones."""
    splits = part.config.env.eval_splits
    wanted = [
        (part.config, r, split, part.folder, processes) for r in _roles(part) for split in splits
    ]
    known = [evaluation for found in call_all(evaluate_start, wanted) for evaluation in found]
    # A run alone, or one of several processes, which wait for each other, ends the study.
    train = _try_to_train if len(left) > 1 == processes.count else _train
    failed = call_all(train, [(run, known, processes, log) for run in left])
    return list(filter(None, failed))


def _roles(part: StudyPart) -> list[EvaluatedModel]:
    """Return the roles of the models in this process."""
    has_teacher = is_taught(part) and not is_url(part.config.model.teacher)
    return ["teacher", "student"] if has_teacher else ["student"]


# -- parts of the work, each of which can run in its own process -----------------------------------


def _make_start(config: RunConfig, role: EvaluatedModel) -> None:
    """Make a start unless it is cached or a saved model."""
    name = getattr(config.model, role)
    with closing(EnvPool(config.env, "train")) as pool:
        if name in MODEL_SHAPES:
            policy_of(config, role, pool)
        else:
            with progress(1, f"loading {role} ({Path(name).name})") as advance:
                policy_of(config, role, pool)
                advance()


def _check_models(config: RunConfig, has_teacher: bool, begun: Sequence[Path]) -> None:
    """Refuse a teacher that cannot score the student, and runs begun with other models or tasks."""
    with _loaded(config, has_teacher) as (student, teacher, pools):
        dialogue = DialogueEncoder(
            student.tokenizer, config.env.prompt_style, config.env.template_options
        )
        inputs = hidden_inputs(student, teacher, dialogue, pools)
        for folder in begun:
            check_inputs(inputs, read_json(folder / MANIFEST_FILE))


def _train(run: Run, known: Sequence[Evaluation], processes: Processes, log: LogTo) -> None:
    """Make one run, from the start or from its last checkpoint."""
    has_teacher = needs_teacher(run.config.algorithm.method)
    with _loaded(run.config, has_teacher) as (student, teacher, (pool, *eval_pools)):
        trainer = Trainer(
            run.config, run.folder, student, teacher, pool, eval_pools, known, processes,
            run.label, log,
        )  # fmt: skip
        trainer.run()  # runs that must not be continued are refused before any work


_last_error = ""
"""Of the last run of this process, without its folder; empty if it has not failed."""


def _try_to_train(run: Run, *arguments: Any) -> str:
    """Make one run; if it fails, print the error and return the run's name.

    Raises:
        AtodError: it failed as the last run of this process.
    """
    global _last_error
    before, _last_error = _last_error, ""
    try:
        _train(run, *arguments)
    except AtodError as error:
        name = f"{run.label}, seed {run.config.train.seed}"
        _last_error = str(error).replace(str(run.folder), "")
        if _last_error == before:
            message = f"{name} failed like the run before it, so no others were begun: {error}"
            raise AtodError(message) from error
        print(f"atod-train: {name}: {error}", file=sys.stderr, flush=True)
        return name
    return ""


@contextmanager
def _loaded(
    config: RunConfig, has_teacher: bool
) -> Iterator[tuple[Policy, Teacher | None, list[EnvPool]]]:
    """Load the models of a run, and open its environments: for training, then of each split."""
    model = config.model
    with ExitStack() as stack:
        pools = [
            stack.enter_context(closing(EnvPool(config.env, split)))
            for split in ("train", *config.env.eval_splits)
        ]
        student = policy_of(config, "student", pools[0])
        teacher: Teacher | None = None
        if has_teacher and is_url(model.teacher):
            teacher = RemoteTeacher(model.teacher, student, max_context=model.max_context)
        elif has_teacher:
            teacher = LocalTeacher(
                policy_of(config, "teacher", pools[0]),
                student,
                tokens_per_microbatch=config.train.tokens_per_microbatch,
            )
        yield student, teacher, pools


_stopped: Event | None = None
"""In a worker: set when the study has been stopped."""

CallAll = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""Call a function with each of the argument lists, some of them concurrently."""


@contextmanager
def _workers(jobs: int) -> Iterator[CallAll]:
    """Yield a function that calls in this process if `jobs` is 1, else in that many processes."""
    if jobs == 1:
        yield lambda function, calls: [function(*arguments) for arguments in calls]
        return
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()

    def stop(number: int) -> None:
        # Workers finish their steps. They receive Ctrl-C, too, but not SIGTERM.
        stopped.set()
        if number == signal.SIGTERM:
            for worker in multiprocessing.active_children():
                worker.terminate()

    with ProcessPoolExecutor(jobs, context, _set_up_worker, (stopped,)) as executor:

        def call_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
            with interruptible(announce=False, on_signal=stop) as interrupted:
                # Submitting starts the workers, which must not receive Ctrl-C while they import.
                with _interrupts_blocked():
                    futures = [executor.submit(_call, function, *arguments) for arguments in calls]
                try:
                    for future in as_completed(futures):
                        future.result()  # raises an error at once
                    return [future.result() for future in futures]
                except BrokenProcessPool as error:
                    if interrupted:
                        raise StoppedByUser("stopped; the last finished steps are saved") from None
                    raise AtodError(
                        f"One of {jobs} processes was killed, most likely because memory ran out. "
                        "The saved steps are kept: continue with `atod-train resume`, with fewer "
                        "--jobs or a smaller --train.tokens-per-microbatch."
                    ) from error

        try:
            yield call_all
        except BaseException:
            stopped.set()  # of the calls that workers have been given in advance
            executor.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back, also in processes that are started meanwhile; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker, where Ctrl-C interrupts it but not a worker without work.

    The executor hands calls to its workers in advance: those of a stopped study are refused.
    """
    if _stopped is None or _stopped.is_set():
        raise StoppedByUser("stopped before this run began")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return function(*arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _set_up_worker(stopped: Event) -> None:
    """End the worker with its parent in any case; show lines, since bars would overlap."""
    global _stopped
    _stopped = stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    show_progress("lines")
