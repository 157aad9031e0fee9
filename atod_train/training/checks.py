"""Refuse settings out of range before any work, and numbers that are not finite in a step."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.algorithm.atod import clipped_policy_loss
from atod_train.algorithm.methods import exact_top_k, needs_teacher
from atod_train.algorithm.schedules import measures_teacher, schedule_of
from atod_train.algorithm.weights import parse_turn_weights
from atod_train.batch import minibatch_count
from atod_train.config import (
    SECTIONS,
    AlgorithmConfig,
    RunConfig,
    is_url,
    parse_prompt_style,
    parse_sampler,
)
from atod_train.models.pretrained import pick_device
from atod_train.models.vllm_sampler import check_vllm
from atod_train.records import TokenScores
from atod_train.reports.evaluations import temperature_of
from atod_train.training.checkpoint import first_not_finite, model_tensors

_AT_LEAST = {
    "env.max_turns": 1,
    "model.max_context": 2,
    "start.demonstrations": 1,
    "algorithm.entropy_bonus": -math.inf,
    "train.steps": 1,
    "train.tasks_per_step": 1,
    "train.group_size": 1,
    "train.max_completion_tokens": 1,
    "train.save_every": 1,
}
"""Minimum of a number; that of others is 0."""
_ABOVE_ZERO = ("train.lr",)
_SKIPPED_IN_A_ROW = 5


# -- settings --------------------------------------------------------------------------------------


def check_settings(config: RunConfig) -> None:
    """Refuse numbers out of range, absent devices, conflicting settings, and others.

    Raises:
        InvalidSettingError: names the setting, its value, and what to change.
    """
    needed = ("student", "teacher") if needs_teacher(config.algorithm.method) else ("student",)
    if missing := [role for role in needed if not getattr(config.model, role)]:
        raise InvalidSettingError(
            f"No {' and no '.join(missing)}: a published preset has no default. Give "
            f"{' and '.join(f'--model.{role} NAME' for role in missing)}: a folder, a name of the "
            "hub, or smollm2."
        )
    for section in SECTIONS:
        for name, value in asdict(getattr(config, section)).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float):
                    _check_number(f"{section}.{name}", number)
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not 1 <= len(config.model.device) <= 2:
        raise InvalidSettingError(
            "model.device must be one device, or two: the student's and the teacher's, not "
            f"{' '.join(config.model.device)!r}."
        )
    for device in config.model.devices:
        # A GPU is only counted: using it would take its memory in processes that do not need it.
        if device not in ("auto", *gpus) and not (device == "cuda" and gpus):
            pick_device(device)
    if parse_sampler(config.model.sampler)[0] == "vllm":
        check_vllm(config.model.devices[0])
    parse_prompt_style(config.env.prompt_style)
    modes = config.env.eval_modes
    if not modes or len({temperature_of(mode) for mode in modes}) < len(modes):
        raise InvalidSettingError(
            f"env.eval_modes must be one or more different modes, not {' '.join(modes)!r}. "
            "For no evaluation leave env.eval_splits empty."
        )
    minibatch_count(config.train.minibatches, rows=1)
    if config.train.lr_warmup > 1:
        raise InvalidSettingError(
            f"train.lr_warmup is a share of train.steps, at most 1, not {config.train.lr_warmup}."
        )
    _check_algorithm(config.algorithm)
    is_compared = config.train.group_size > 1 or config.algorithm.advantage_over == "turns"
    if not (is_compared or needs_teacher(config.algorithm.method)):
        raise InvalidSettingError(
            f"train.group_size=1 leaves method {config.algorithm.method} without a signal: an "
            "episode is compared with the others of its task. Use --train.group-size 2 or more."
        )
    if config.model.dtype == "bfloat16" and not config.model.lora_rank:
        raise InvalidSettingError(
            "model.dtype=bfloat16 rounds away the small updates of a student whose weights are "
            "all trained. Use --model.dtype mixed, or adapters (--model.lora-rank 16)."
        )
    if exact_top_k(config.algorithm) is not None and is_url(config.model.teacher):
        raise InvalidSettingError(
            f"algorithm.opd_signal={config.algorithm.opd_signal} needs a teacher in this process, "
            f"not the server {config.model.teacher}."
        )
    if measures_teacher(config.algorithm) and is_url(config.model.teacher):
        raise InvalidSettingError(
            f"algorithm.schedule=gap lets the teacher play, and the server {config.model.teacher} "
            "only scores tokens. Give the teacher's success on the training tasks, such as "
            "--algorithm.schedule gap:0.62."
        )


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) and (name, value) != ("algorithm.clip", math.inf):
        raise InvalidSettingError(f"{name} must be finite, not {value}.")
    if value < (least := _AT_LEAST.get(name, 0)):
        raise InvalidSettingError(f"{name} must be at least {least}, not {value}.")
    if name in _ABOVE_ZERO and value <= 0:
        raise InvalidSettingError(f"{name} must be above 0, not {value}.")


def _check_algorithm(settings: AlgorithmConfig) -> None:
    """Refuse settings that would raise an error in the first step."""
    zero = torch.zeros(1, 1)
    low, high, dual = settings.clip
    try:
        schedule_of(settings)
        parse_turn_weights(settings.turn_weights)
        exact_top_k(settings)
        clipped_policy_loss(
            zero,
            zero,
            zero,
            zero == 0,
            clip_low=low,
            clip_high=high,
            dual_clip=dual,
            aggregation=settings.aggregation,
            trajectory_index=torch.tensor([0]),
        )
    except ValueError as error:
        raise InvalidSettingError(f"algorithm: {error}.") from error


# -- numbers ---------------------------------------------------------------------------------------


class DivergedError(AtodError):
    """Gradients, weights or log-probs are not finite."""


def check_scores(scores: TokenScores, mask: Tensor, step: int) -> None:
    """Refuse log-probs that are not finite before anything is computed from them.

    Raises:
        DivergedError: names the model.
    """
    for name in ("logprobs", "entropies", "reference_logprobs", "divergences"):
        values = getattr(scores, name)
        if values is not None and not values[mask].isfinite().all():
            raise DivergedError(
                f"Step {step}: {name} of the student are not finite. Lower train.lr in a new run "
                "(--out), or use --model.dtype float32."
                if name in ("logprobs", "entropies")
                else f"Step {step}: {name} of the teacher are not finite. It cannot score what the "
                "student sampled: check its weights and that its vocabulary is the student's."
            )


def check_update(model: nn.Module, skipped_in_a_row: int, step: int, saved_step: int) -> None:
    """Refuse to continue with invalid weights, or after many updates without a finite gradient.

    Raises:
        DivergedError: the step is not saved; the checkpoint of `saved_step` is kept.
    """
    kept = f" The checkpoint of step {saved_step} is kept." if saved_step else ""
    if skipped_in_a_row >= _SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"The gradients of {skipped_in_a_row} updates up to step {step} were not finite. Lower "
            f"train.lr, or use --model.dtype float32, in a new run (--out).{kept}"
        )
    if name := first_not_finite(model_tensors(model)):
        raise DivergedError(
            f"Step {step} left invalid weights: {name} has NaN or infinity. Lower train.lr in a "
            f"new run (--out).{kept}"
        )
