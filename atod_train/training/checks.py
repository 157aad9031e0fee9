"""Refuse settings out of range before any work, and numbers that are not finite in a step."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.algorithm.atod import clipped_policy_loss, loss_normalizer
from atod_train.algorithm.methods import compute_advantages, has_exact_signal
from atod_train.batch import make_batch
from atod_train.config import AlgorithmConfig, RunConfig, is_url
from atod_train.models.pretrained import pick_device
from atod_train.records import TokenizedTurn, TokenScores, Trajectory, Turn
from atod_train.training.checkpoint import CheckpointError, check_finite, model_tensors

_AT_LEAST = {
    "env.max_turns": 1,
    "env.eval_tasks": 0,
    "env.history_window": 0,
    "env.invalid_action_penalty": 0,
    "model.lora_rank": 0,
    "model.max_context": 2,
    "start.demonstrations": 1,
    "start.epochs": 0,
    "start.lr": 0,
    "start.observation_weight": 0,
    "algorithm.kappa": 0,
    "algorithm.rho": 0,
    "algorithm.clip": 0,
    "train.steps": 1,
    "train.tasks_per_step": 1,
    "train.group_size": 1,
    "train.minibatches": 1,
    "train.max_completion_tokens": 1,
    "train.tokens_per_microbatch": 1,
    "train.eval_every": 0,
    "train.save_every": 1,
    "train.seed": 0,
}
_ABOVE_ZERO = {"train.lr", "env.success_reward"}
_MAY_BE_INFINITE = {"algorithm.clip"}
_SKIPPED_IN_A_ROW = 5


# -- settings --------------------------------------------------------------------------------------


def check_settings(config: RunConfig) -> None:
    """Refuse numbers out of range, absent devices, settings that exclude each other, and others.

    Raises:
        InvalidSettingError: names the setting, its value, and what to change.
    """
    for section in ("env", "model", "start", "algorithm", "train"):
        for name, value in asdict(getattr(config, section)).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not isinstance(number, bool):
                    _check_number(f"{section}.{name}", number)
    _check_device(config.model.device)
    if config.model.teacher_device:
        _check_device(config.model.teacher_device)
    _try_algorithm(config.algorithm)
    if config.model.dtype == "bfloat16" and not config.model.lora_rank:
        raise InvalidSettingError(
            "model.dtype=bfloat16 rounds away the small updates of a student whose weights are "
            "all trained. Use --model.dtype mixed, or adapters (--model.lora-rank 16)."
        )
    if has_exact_signal(config.algorithm) and is_url(config.model.teacher):
        raise InvalidSettingError(
            f"algorithm.opd_signal={config.algorithm.opd_signal} needs a teacher in this process, "
            f"not the server {config.model.teacher}."
        )


def _check_device(name: str) -> None:
    kind, _, index = name.partition(":")
    is_gpu = kind == "cuda" and (not index or index.isdecimal())
    # A GPU is only counted: touching it would take its memory in processes that do not use it.
    if name != "auto" and not (is_gpu and int(index or 0) < torch.cuda.device_count()):
        pick_device(name)


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) and not (value == math.inf and name in _MAY_BE_INFINITE):
        raise InvalidSettingError(f"{name} must be finite, not {value}.")
    if value < _AT_LEAST.get(name, -math.inf):
        raise InvalidSettingError(f"{name} must be at least {_AT_LEAST[name]}, not {value}.")
    if name in _ABOVE_ZERO and value <= 0:
        raise InvalidSettingError(f"{name} must be above 0, not {value}.")


def _try_algorithm(settings: AlgorithmConfig) -> None:
    """Compute the loss of two made-up trajectories: what raises now would raise in step 1."""
    logprobs = torch.tensor([[-0.5], [-1.0], [-0.2], [-2.0], [-0.1], [-0.7]])
    tokens = TokenizedTurn((0,), (0,), (0.0,), "stop", extends_previous=False)
    turns = [
        tuple(Turn(index, (), "", "", reward, True, tokens) for index, reward in enumerate(rewards))
        for rewards in ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    ]
    batch = make_batch(
        [Trajectory(0, "", "", played, True, False, "terminated", True, 1.0) for played in turns], 0
    )
    mask = batch.completion_mask
    try:
        scores = TokenScores(
            logprobs=logprobs,
            reference_logprobs=logprobs - 0.3,
            divergences=torch.full(logprobs.shape, 0.1) if has_exact_signal(settings) else None,
        )
        advantages = compute_advantages(batch, scores, settings, 1)
        normalizer = loss_normalizer(mask, settings.aggregation, batch.trajectory_index)
        clipped_policy_loss(
            logprobs, logprobs, advantages.values, mask, clip_low=settings.clip[0],
            clip_high=settings.clip[1], dual_clip=settings.clip[2], normalizer=normalizer,
        )  # fmt: skip
    except ValueError as error:
        raise InvalidSettingError(f"algorithm: {error}.") from error


# -- numbers ---------------------------------------------------------------------------------------


class DivergedError(AtodError):
    """Gradients, weights or log-probs are not finite."""


def check_scores(scores: TokenScores, mask: Tensor, step: int) -> None:
    """Refuse log-probs that are not finite before anything is computed from them.

    Args:
        scores: of the student and its teacher, [R, T] each.
        mask: [R, T] bool, sampled tokens.
        step: for the message.

    Raises:
        DivergedError: names the model.
    """
    student = "Lower train.lr in a new run (--out), or use --model.dtype float32."
    teacher = (
        "It cannot score what the student sampled: check its weights and that its vocabulary is "
        "the student's."
    )
    for name, model, advice in (
        ("logprobs", "student", student),
        ("entropies", "student", student),
        ("reference_logprobs", "teacher", teacher),
        ("divergences", "teacher", teacher),
    ):
        values = getattr(scores, name)
        if values is not None and not values[mask].isfinite().all():
            raise DivergedError(f"Step {step}: {name} of the {model} are not finite. {advice}")


def check_weights(model: nn.Module, step: int, saved_step: int) -> None:
    """Refuse weights that are not finite after an update.

    Raises:
        DivergedError: one is; nothing of the step is saved.
    """
    try:
        check_finite(model_tensors(model), f"Step {step} left broken weights")
    except CheckpointError as error:
        raise DivergedError(
            f"{error}. Lower train.lr in a new run (--out). {_kept(saved_step)}".rstrip()
        ) from error


def check_skipped(in_a_row: int, step: int, saved_step: int) -> None:
    """Refuse to continue after several updates in a row without a finite gradient.

    Raises:
        DivergedError: there were.
    """
    if in_a_row >= _SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"The gradients of {in_a_row} updates up to step {step} were not finite. Lower "
            "train.lr, or use --model.dtype float32, in a new run (--out). "
            f"{_kept(saved_step)}".rstrip()
        )


def _kept(step: int) -> str:
    return f"The checkpoint of step {step} is kept." if step else ""
