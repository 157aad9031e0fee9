"""Checks before any work of a study, and its header."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.algorithm.methods import needs_teacher
from atod_train.config import RunConfig, is_url
from atod_train.models.checks import check_config
from atod_train.models.from_scratch import MODEL_SHAPES, llama_config
from atod_train.models.pretrained import (
    has_word_vocabulary,
    is_mixed,
    read_shape,
)
from atod_train.reports.run_folder import ANOTHER_FOLDER
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.own_env import check_env
from atod_train.studies.file import Run, StudyPart
from atod_train.teachers.remote import connect, describe


def header(part: StudyPart, left: Sequence[Run], jobs: int) -> list[str]:
    """Check what the runs on an environment need, and return lines that describe them.

    Args:
        part: the runs.
        left: those to be made.
        jobs: how many at the same time.

    Raises:
        AtodError: a device, model, server, environment, its data or a split cannot be used.
    """
    config = part.config
    train = config.train
    labels = ", ".join(dict.fromkeys(run.label for run in left))
    seeds = sorted({run.config.train.seed for run in left})
    at_once = f"; {min(jobs, len(left))} runs at a time" if jobs > 1 < len(left) else ""
    devices = _devices(config)
    names = [config.model.student]
    if has_teacher := is_taught(part.runs):
        names.append(config.model.teacher)
    check_env(config.env, next((name for name in names if name in MODEL_SHAPES), ""))
    models = [f"  {role:12} {text}" for role, text in _models(config, has_teacher).items()]
    return [
        f"{part.name} in {part.folder}: {labels}; seed {', '.join(map(str, seeds))}; "
        f"{train.steps} steps of {train.tasks_per_step} tasks x {train.group_size} episodes"
        f"{at_once}",
        f"  environment  {_tasks(config)}",
        *models,
        f"  device       {devices}",
        "  time         known after the first step",
    ]


def is_taught(runs: Sequence[Run]) -> bool:
    """Return whether any run has a teacher."""
    return any(needs_teacher(run.config.algorithm.method) for run in runs)


def _tasks(config: RunConfig) -> str:
    """Return the environment, its data and the number of tasks of each split."""
    sizes, data = [], ""
    for split in dict.fromkeys(("train", *config.env.eval_splits)):
        with closing(EnvPool(config.env, split)) as pool:
            data = pool.data
            sizes.append(f"{split} {len(pool.task_ids):,}")
    return f"{config.env.id}, data {data}; tasks: {', '.join(sizes)}"


def _devices(config: RunConfig) -> str:
    """Return device and precision of the student, and the teacher's device where it is another."""
    model = config.model
    # Devices were checked, and a GPU is not touched here: it would take memory in this process.
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if model.device == "auto" else model.device)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    weights = "bfloat16" if model.dtype == "bfloat16" else "float32"
    layers = ", layers in bfloat16" if is_mixed(model.dtype, device) else ""
    teacher = f"; teacher on {model.teacher_device}" if model.teacher_device else ""
    return f"{device}{name}, weights in {weights}{layers}{teacher}"


def _models(config: RunConfig, has_teacher: bool) -> dict[str, str]:
    """Return a line for each model, by its role; models are described, not loaded."""
    model, epochs = config.model, config.start.epochs
    roles = {"student": (model.student, epochs[0])}
    if has_teacher:
        roles["teacher"] = (model.teacher, epochs[1])
    names = [name for name, _ in roles.values()]
    made = [name for name in names if name in MODEL_SHAPES]
    lines = {}
    for role, (name, passes) in roles.items():
        if is_url(name):
            describe(connect(name))
            lines[role] = f"the server {name}"
        elif name in MODEL_SHAPES:
            if not passes:
                raise InvalidSettingError(
                    f"{name} is made from scratch: start.epochs must be above 0 for it."
                )
            shape: PretrainedConfig = llama_config(MODEL_SHAPES[name], vocabulary=1)
            check_config(shape, name, model.max_context)
            lines[role] = (
                f"{name}, from scratch by {passes:g} passes over {config.start.demonstrations:,} "
                f"demonstrations, {_parameters(shape)} besides its word embeddings"
            )
        else:
            shape = read_shape(name, model.max_context)
            if made and not has_word_vocabulary(name):
                raise AtodError(
                    f"{min(made)} is made with the words of demonstrations as tokens, {name} has "
                    "other tokens, and student and teacher must share theirs. Give --model.student "
                    "and --model.teacher models of one family, or train without a teacher (method "
                    "grpo)."
                )
            lines[role] = f"{name} ({shape.model_type}), {_parameters(shape)}"
            if passes:
                lines[role] += f", after {passes:g} passes over demonstrations"
    if model.lora_rank:
        lines["student"] += f", adapters of rank {model.lora_rank}"
    return lines


def _parameters(shape: PretrainedConfig) -> str:
    """Return the number of weights of a model, which is built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    count = sum(weight.numel() for weight in model.parameters())
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.2f} M parameters"


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written to; it is not made.

    Raises:
        AtodError: it cannot.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise AtodError(f"{there} is a file, not a folder; {ANOTHER_FOLDER}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise AtodError(f"{there} is a folder that you may not write to; {ANOTHER_FOLDER}.")
