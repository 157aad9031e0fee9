"""Write and read the records of a training run: metrics per step, evaluations, trajectories.

Keys of metrics.jsonl. Only `step` is required. A step without a quantity leaves it out: opd_signal,
turn_weight and disagreement where the teacher is not scored. A number that is not finite is written
as null. Shares and rates are 0..1.

    step                  1-based optimiser cycle
    kappa, rho            coefficients of the distillation and the reward term
    anneal_progress       of a schedule that follows the run, 0 to 1
    teacher_success       of schedule gap: success of the teacher, measured before the run
    opd_signal            mean over tokens of |kappa * w * delta|
    rl_signal             mean over tokens of |rho * A|
    turn_weight           mean turn weight w
    disagreement          mean over turns of d = mean |lp_S - lp_T|
    uncertainty           mean over turns of h = mean -lp_S
    train_success         share of the step's trajectories that reached the goal
    solved_groups         share of its groups with a trajectory that reached the goal
    train_score           mean of the benchmark's score over the trajectories
    return                mean return of a trajectory
    turns                 mean turns of a trajectory
    invalid_share         share of turns whose action was not valid
    invalid/<reason>      share of turns that were not valid for that reason; the most frequent ones
    completions_cut       share of turns whose completion reached train.max_completion_tokens
    skipped_updates       updates of the step that were skipped: their gradient was not finite
    actions/<verb>        mean valid actions of a trajectory that begin with that word
    rollout/logprob_drift      mean |sampling_logprobs - old_logprobs| per token, in nats
    rollout/truncated_prompts  share of turns whose prompt leaves out earlier turns to fit
    rollout/rendering_drift    share of sampled dialogues whose text, encoded again, gives other
                          ids than were sampled (`step_records.rendering_drift`)
    entropy               mean entropy of the policy per token before the update, in nats
    clip_fraction         share of tokens whose ratio was clipped
    approx_kl             mean over tokens of ratio - 1 - log ratio, in nats: change of a token's
                          policy by the updates before its own
    loss, grad_norm       of the policy update, mean over its minibatches
    tokens                completion tokens of the step
    tokens_per_second     of its wall time, without evaluations and checkpoints
    seconds/<phase>       seconds spent: environment, generation, teacher, update, other, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atod_train.files import read_json_lines, without_infinities, write_text
from atod_train.reports.evaluations import Evaluation, EvaluationResult
from atod_train.reports.rows import FORMAT
from atod_train.reports.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    TRAJECTORIES_FILE,
    RunFolderError,
)


def _read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, each with the step it belongs to."""
    return read_json_lines(path, integer="step")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return a dict for each step of a run in order; keys as in the module's docstring.

    Raises:
        FileError: a line other than a torn last one is broken.
    """
    return list(_read_steps(run_dir / METRICS_FILE))


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """Return the evaluations of a run in the order written; empty if there is none."""
    return [
        Evaluation(
            record["step"], record.get("model", "student"), EvaluationResult.from_json(record)
        )
        for record in _read_steps(run_dir / EVALUATIONS_FILE)
    ]


def read_trajectories(run_dir: Path) -> list[dict[str, Any]]:
    """Return the recorded trajectories in the order written; other formats are left out.

    Each is a row as in `rows`, with its `step` and without `sequences`.
    """
    rows = _read_steps(run_dir / TRAJECTORIES_FILE)
    return [row for row in rows if row.get("format") == FORMAT]


class MetricsWriter:
    """Append to the JSON-lines files of a run, and send their numbers to its loggers.

    On resume every record after the resumed step is removed first, so that no step occurs
    twice. A killed process loses at most the line that it was writing.

    Args:
        run_dir: the run folder; made if absent.
        resume_step: the last step of the resumed checkpoint, 0 to repeat all steps of a
            run killed before its first checkpoint; None: a new run. Records of step 0, such as
            the evaluation of the start, are kept.

    Attributes:
        log: called with each step and its numbers by name.

    Raises:
        RunFolderError: a file of the run is damaged, or a new run finds the metrics of an old one.
        OSError: in every method, if a file cannot be written; names the file or the folder.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        self.run_dir = run_dir
        self.log: Callable[[int, Mapping[str, float]], object] = lambda step, numbers: None
        self._last_step = resume_step or 0
        if resume_step is None and read_metrics(run_dir):
            raise RunFolderError(
                f"{run_dir} already holds the metrics of a run: resume it, or choose a new folder"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EVALUATIONS_FILE, TRAJECTORIES_FILE):
            path = run_dir / name
            if path.is_file():  # a torn line is left out, too
                kept = [record for record in _read_steps(path) if record["step"] <= self._last_step]
                write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        """Append the metrics of one step; `step` must be larger than the last.

        Raises:
            RunFolderError: `step` is missing or not larger than the last one written.
        """
        step = metrics.get("step")
        if not isinstance(step, int) or step <= self._last_step:
            raise RunFolderError(f"step {step} cannot follow step {self._last_step} in the metrics")
        self._last_step = step
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, (int, float))
        }
        self._append(METRICS_FILE, metrics)
        self.log(step, numbers)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Append an evaluation, with the result of every task."""
        step, model, result = evaluation.step, evaluation.model, evaluation.result
        self._append(EVALUATIONS_FILE, {"step": step, "model": model, **result.to_json()})
        numbers = {
            "success": result.success_rate,
            "score": result.mean_score,
            "turns": result.mean_turns,
            "invalid_share": result.invalid_share,
        }
        name = f"evaluation/{model}/{result.split}/{result.mode}"
        self.log(step, {f"{name}/{key}": value for key, value in numbers.items()})

    def write_trajectory(self, step: int, row: Mapping[str, Any]) -> None:
        """Append a trajectory of a step: its row without the token sequences."""
        self._append(TRAJECTORIES_FILE, {"step": step, **row})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            with (self.run_dir / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_infinities(record)) + "\n")
        except OSError as error:  # that of a full disk names no file
            if error.filename is not None:
                raise
            reason = error.strerror or str(error)
            raise OSError(error.errno, reason, str(self.run_dir)) from error
