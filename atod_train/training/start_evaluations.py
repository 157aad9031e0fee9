"""The evaluations of the start and the teacher, which the runs of a folder share, kept as files.

    evaluations/<student or teacher>-<split>-<mode>.json

Each is written as soon as it is made, with what it depends on; one of other settings is made again.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.progress import progress
from atod_train.reports.metrics import EvaluatedModel, Evaluation
from atod_train.reports.run_folder import RunFolderError, read_json, write_json
from atod_train.reports.statistics import EvaluationMode, EvaluationResult, InvalidCountsError
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.starts import Starts

MODES: tuple[EvaluationMode, ...] = ("greedy", "sampled")
"""How completions are chosen."""


def evaluate_start(
    config: RunConfig, role: EvaluatedModel, split: str, folder: Path, processes: Processes
) -> list[Evaluation]:
    """The start or the teacher on one split in every mode; what is kept is not made again.

    Args:
        config: what all runs share; without `study.resume` nothing is taken from the folder.
        role: which model.
        split: of the environment.
        folder: that of the runs.
        processes: share the tasks; the main one writes.

    Raises:
        AtodError: as `evaluate`.
        RunFolderError: a file is broken.
    """
    with closing(EnvPool(config.env, "train")) as train_pool:
        starts = Starts(config, train_pool)
        settings = _settings(config, starts.identity(role))
        paths = {mode: folder / "evaluations" / f"{role}-{split}-{mode}.json" for mode in MODES}
        # Processes that train together find the same: the main one writes when all have evaluated.
        kept = {mode: _kept(path, settings) for mode, path in paths.items() if config.study.resume}
        results = {mode: result for mode, result in kept.items() if result is not None}
        missing = [mode for mode in MODES if mode not in results]
        if missing:
            policy = starts.policy(role)
            with (
                closing(EnvPool(config.env, split)) as pool,
                progress(len(missing), f"evaluating the {role} on {split}") as advance,
            ):
                for mode in missing:
                    results[mode] = evaluate(policy, pool, config, mode, processes)
                    if processes.is_main:
                        record = {"settings": settings, "result": results[mode].to_json()}
                        write_json(paths[mode], record)
                    advance()
    return [Evaluation(0, role, results[mode]) for mode in MODES]


def _settings(config: RunConfig, identity: str) -> dict[str, Any]:
    """What an evaluation depends on, as JSON has it; devices and a teacher's URL may change."""
    settings = {
        "made_from": identity,
        "env": asdict(config.env),
        "dtype": config.model.dtype,
        "max_context": config.model.max_context,
        "max_completion_tokens": config.train.max_completion_tokens,
        "seed": config.train.seed,
    }
    value: dict[str, Any] = json.loads(json.dumps(settings))
    return value


def _kept(path: Path, settings: dict[str, Any]) -> EvaluationResult | None:
    """The result of a file with these settings; None: there is none."""
    record = read_json(path)
    if not record or record.get("settings") != settings:
        return None
    try:
        return EvaluationResult.from_json(record["result"])
    except (KeyError, TypeError, InvalidCountsError) as error:
        raise RunFolderError(f"{path} holds no evaluation ({error}); remove it") from error
