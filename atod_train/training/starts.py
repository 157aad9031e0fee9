"""The models that a run begins with: made from scratch or loaded, perhaps shown the task first.

What was trained on demonstrations is cached by a hash of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from atod_gym.errors import InvalidSettingError
from atod_train.config import OFFLOAD, Precision, RunConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.policy import MODEL_SHAPES, Policy, build_policy
from atod_train.models.pretrained import (
    LoadOptions,
    cache_folder,
    is_mixed,
    load_policy,
    pick_device,
)
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.reports.metrics import EvaluatedModel
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.checks import memory_errors
from atod_train.training.demonstrations import (
    Demonstration,
    demonstrate,
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)

_RECIPE = 6
"""Raised whenever the way of making demonstrations or starts changes, so that caches expire."""

NOISE = 0.2
"""Probability of a random action in place of the expert's, to show how to recover."""


class Starts:
    """Makes or loads the student and the teacher of a run, or takes them from the cache.

    Args:
        config: the run's settings.
        pool: environments of the training split.

    Raises:
        InvalidSettingError: a model from scratch has no passes over the demonstrations.
    """

    def __init__(self, config: RunConfig, pool: EnvPool) -> None:
        self._config = config
        self._pool = pool
        self._demonstrations: list[Demonstration] | None = None

    def policy(self, role: EvaluatedModel) -> Policy:
        """The teacher, or the student's start; the same for every method and seed."""
        name, epochs, seed = self._made_from(role)
        choose_threads(self._config)
        label = f"{role} ({Path(name).name})"
        if not self._is_made(name, epochs):
            return load_policy(name, self._options(role), name=label)
        path = cache_folder() / self._key(name, epochs, seed)
        if not (path / "config.json").is_file():
            advice = "Lower --train.tokens-per-microbatch or model.max_context."
            with memory_errors(f"training the {role}'s start", advice):
                self._make(name, epochs, seed, label).save(path)
        return load_policy(path, self._options(role), name=label)

    def identity(self, role: EvaluatedModel) -> str:
        """What tells a model apart from another: a hash of all that it was made from, or a name."""
        name, epochs, seed = self._made_from(role)
        return self._key(name, epochs, seed) if self._is_made(name, epochs) else _identity(name)

    def _made_from(self, role: EvaluatedModel) -> tuple[str, float, int]:
        """Name, passes over the demonstrations and seed."""
        model, epochs = self._config.model, self._config.start.epochs
        if role == "student":
            return model.student, epochs[0], 1
        return model.teacher, epochs[1], 0

    def _is_made(self, name: str, epochs: float) -> bool:
        """Whether a model was trained on demonstrations here."""
        if name in MODEL_SHAPES and not epochs:
            raise InvalidSettingError(
                f"{name} is made from scratch: start.epochs must be above 0 for it."
            )
        return bool(epochs)

    def _options(self, role: EvaluatedModel) -> LoadOptions:
        model = self._config.model
        if role == "student":
            return LoadOptions(
                device=model.device,
                dtype=model.dtype,
                lora_rank=model.lora_rank,
                lora_alpha=model.lora_alpha,
                gradient_checkpointing=model.gradient_checkpointing,
            )
        # One that is offloaded begins where it works.
        elsewhere = model.teacher_device not in ("", OFFLOAD)
        device = model.teacher_device if elsewhere else model.device
        frozen = "bfloat16" if is_mixed(model.dtype, pick_device(device)) else model.dtype
        return LoadOptions(device=device, dtype=frozen)

    def _key(self, name: str, epochs: float, seed: int) -> str:
        env, model, start = self._config.env, self._config.model, self._config.start
        depends: dict[str, object] = {
            "recipe": _RECIPE,
            "env": [env.id, sorted(env.options.items()), env.max_turns, env.prompt_style],
            "prompt": [env.history_window, env.show_admissible, env.parse_profile],
            "data": self._pool.content_hash,
            "demonstrations": [start.demonstrations, NOISE],
            "model": [name, epochs, start.lr, start.observation_weight, seed],
        }
        if name in MODEL_SHAPES:
            depends["shape"] = asdict(MODEL_SHAPES[name])
        else:
            depends["start"] = [_identity(name), sorted(env.template_options.items())]
            if model.dtype == "mixed" and is_mixed(model.dtype, pick_device(model.device)):
                depends["dtype"] = model.dtype
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        return f"{Path(name).name}-{digest[:20]}"

    def _make(self, name: str, epochs: float, seed: int, label: str) -> Policy:
        config = self._config
        if self._demonstrations is None:
            count = config.start.demonstrations
            self._demonstrations = demonstrate(self._pool, count, NOISE, seed=0)
        if name in MODEL_SHAPES:
            tokenizer = build_word_tokenizer(demonstration_texts(self._demonstrations))
            policy = build_policy(name, tokenizer, seed, name=label)
        else:
            # Weights that are trained stay float32 in either.
            dtype: Precision = "mixed" if config.model.dtype == "mixed" else "auto"
            options = LoadOptions(device=config.model.device, dtype=dtype)
            policy = load_policy(name, options, name=label)
        dialogue = DialogueEncoder(
            policy.tokenizer, config.env.prompt_style, config.env.template_options
        )
        trajectories = [tokenize(episode, dialogue) for episode in self._demonstrations]
        train_on_demonstrations(
            policy,
            trajectories,
            epochs=epochs,
            lr=config.start.lr,
            seed=seed,
            observation_weight=config.start.observation_weight,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
        )
        return policy


def choose_threads(config: RunConfig) -> None:
    """Compute with one thread where all models are tiny: more only wait for each other.

    Larger models get torch's choice, and OMP_NUM_THREADS decides where it is set.
    """
    models = {config.model.student, config.model.teacher}
    if "OMP_NUM_THREADS" not in os.environ and models <= set(MODEL_SHAPES):
        torch.set_num_threads(1)


def _identity(name: str) -> str:
    """What tells a language model apart from another of the same name: its newest weights file."""
    times = [file.stat().st_mtime_ns for file in Path(name).glob("*.safetensors")]
    return f"{Path(name).resolve() if times else name} {max(times, default=0)}"
