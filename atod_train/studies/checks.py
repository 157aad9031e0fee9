"""Check a study before any work, and describe it in a header."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tokenizers.models import WordLevel
from transformers import PretrainedConfig

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.tasks import spread
from atod_train.algorithm.methods import needs_teacher
from atod_train.config import RunConfig, is_url
from atod_train.models.checks import check_config
from atod_train.models.from_scratch import MODEL_SHAPES, llama_config
from atod_train.models.pretrained import count_parameters, is_mixed, read_shape, read_tokenizer
from atod_train.reports.run_folder import ANOTHER_FOLDER
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.own_env import check_env
from atod_train.studies.file import Run, StudyPart
from atod_train.teachers.remote import connect, describe
from atod_train.teachers.vocabulary import require_same_vocabulary

_SECONDS = 30.0
"""Timeout for a teacher's server."""


def header(part: StudyPart, left: Sequence[Run], jobs: int) -> str:
    """Check the requirements of the runs that are left, and return lines that describe them.

    Raises:
        AtodError: a device, model, server, environment, its data or a split cannot be used.
    """
    config = part.config
    train, labels = config.train, dict.fromkeys(run.label for run in left)
    seeds = sorted({run.config.train.seed for run in left})
    at_once = f"; {min(jobs, len(left))} runs at a time" if jobs > 1 < len(left) else ""
    roles = ("student", "teacher") if is_taught(part) else ("student",)
    names: dict[str, str] = {role: getattr(config.model, role) for role in roles}
    check_env(config.env, next((name for name in names.values() if name in MODEL_SHAPES), ""))
    sizes = {}
    for split in ("train", *config.env.eval_splits):
        with closing(EnvPool(config.env, split)) as pool:
            data, known = pool.data, len(pool.task_ids)
            played = (
                known if split == "train" else len(spread(pool.task_ids, config.env.eval_tasks))
            )
            sizes[split] = f"{split} {'' if played == known else f'{played:,} of '}{known:,}"
    return "\n".join(
        [
            f"{part.name} in {part.folder}: {', '.join(labels)}; seed "
            f"{', '.join(map(str, seeds))}; steps {train.steps}, tasks per step "
            f"{train.tasks_per_step}, episodes per task {train.group_size}{at_once}",
            f"  environment  {config.env.id}, data {data}; tasks: {', '.join(sizes.values())}",
            *(f"  {role:12} {text}" for role, text in _models(config, names).items()),
            f"  device       {_devices(config)}",
            "  time         known after the first step",
        ]
    )


def is_taught(part: StudyPart) -> bool:
    """Return whether any run has a teacher."""
    return any(needs_teacher(run.config.algorithm.method) for run in part.runs)


def _models(config: RunConfig, names: dict[str, str]) -> dict[str, str]:
    """Return a description of each model, by its role."""
    lines = {}
    for (role, name), epochs in zip(names.items(), config.start.epochs, strict=False):
        if name in MODEL_SHAPES and not epochs:
            raise InvalidSettingError(
                f"{name} is made from scratch: start.epochs must be above 0 for it."
            )
        lines[role], _ = describe_model(name, config.model.max_context)
        if epochs and not is_url(name):
            count = f"{config.start.demonstrations:,}"
            lines[role] += f"; trained on {count} demonstrations, epochs {epochs:g}"
    if config.model.lora_rank:
        lines["student"] += f", adapters of rank {config.model.lora_rank}"
    check_vocabularies(list(names.values()))
    return lines


def check_vocabularies(names: Sequence[str]) -> None:
    """Refuse a student and a teacher that do not share their tokens, by their tokenizers.

    Servers are checked when the teacher is loaded.

    Raises:
        AtodError: a token differs, or a model has no tokenizer.
    """
    made = [name for name in names if name in MODEL_SHAPES]
    others = [name for name in dict.fromkeys(names) if name not in made and not is_url(name)]
    tokenizers: list[Any] = [read_tokenizer(name) for name in others]
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in tokenizers]
    if made and others and not isinstance(getattr(backends[0], "model", None), WordLevel):
        raise AtodError(
            f"{made[0]} is made with the words of demonstrations as tokens, {others[0]} has other "
            "tokens, and student and teacher must share theirs. Give --model.student and "
            "--model.teacher models of one family, or train without a teacher (method grpo)."
        )
    if len(others) == 2:
        ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
        require_same_vocabulary(ours, theirs, *others)


def describe_model(name: str, max_context: int) -> tuple[str, int]:
    """Return the kind and size of a model by its configuration, or a server's description of it.

    Returns:
        A text, and the number of parameters in this process.

    Raises:
        AtodError: it cannot be used.
    """
    if is_url(name):
        return f"{describe(connect(name, _SECONDS)).name} on the server {name}", 0
    kind, words = "", ""
    if name in MODEL_SHAPES:
        shape: PretrainedConfig = llama_config(MODEL_SHAPES[name], vocabulary=1)
        check_config(shape, name, max_context)
        kind, words = "from scratch", " besides its word embeddings"
    else:
        shape = read_shape(name, max_context)
        kind = shape.model_type
    count = count_parameters(shape, name)
    millions = count / 1e6
    size = f"{millions / 1e3:.2f} B" if millions >= 1e3 else f"{millions:.2f} M"
    return f"{name} ({kind}), {size} parameters{words}", count


def _devices(config: RunConfig) -> str:
    """Return device and precision of the student, and the teacher's device if it differs."""
    model = config.model
    # Devices were checked. A GPU is not used here: it would allocate memory in this process.
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    ours, theirs = model.devices
    device = torch.device(auto if ours == "auto" else ours)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    weights = "bfloat16" if model.dtype == "bfloat16" else "float32"
    layers = ", layers in bfloat16" if is_mixed(model.dtype, device) else ""
    teacher = f"; teacher on {theirs}" if theirs != ours else ""
    sampler = "" if model.sampler == "plain" else f"; sampled by {model.sampler}"
    return f"{device}{name}, weights in {weights}{layers}{teacher}{sampler}"


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written to; the folder is not made.

    Raises:
        AtodError: the folder cannot be used.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise AtodError(f"{there} is a file, not a folder; {ANOTHER_FOLDER}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise AtodError(f"{there} is a folder that you may not write to; {ANOTHER_FOLDER}.")
