"""The models that a run begins with: made from scratch or loaded, perhaps shown the task first.

What was trained on demonstrations is cached by a hash of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import asdict, replace
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
from atod_train.training.demonstrations import (
    Demonstration,
    demonstrate,
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)

_RECIPE = 5
"""Raised whenever the way of making demonstrations or starts changes, so that caches expire."""

NOISE = 0.2
"""Probability of a random action in place of the expert's, to show how to recover."""


class Starts:
    """Makes or loads the student and the teacher of a run, or takes them from the cache.

    Args:
        config: the run's settings.
        pool: environments of the training split.

    Raises:
        InvalidSettingError: a negative turn limit of the expert.
    """

    def __init__(self, config: RunConfig, pool: EnvPool) -> None:
        turns = config.model.demonstration_turns
        if turns < 0:
            raise InvalidSettingError(f"model.demonstration_turns must be >= 0, not {turns}.")
        self._config = config
        self._pool = pool
        self._demonstrations: list[Demonstration] | None = None

    def policy(self, role: EvaluatedModel) -> Policy:
        """The teacher, or the student's start; the same for every method and seed."""
        name, epochs, seed = self._made_from(role)
        if self._config.train.threads:
            torch.set_num_threads(self._config.train.threads)
        label = f"{role} ({Path(name).name})"
        if not self._is_made(name, epochs):
            return load_policy(name, self._options(role), name=label)
        path = cache_folder() / self._key(name, epochs, seed)
        if not (path / "config.json").is_file():
            self._make(name, epochs, seed, label).save(path)
        return load_policy(path, self._options(role), name=label)

    def identity(self, role: EvaluatedModel) -> str:
        """What tells a model apart from another: a hash of all that it was made from, or a name."""
        name, epochs, seed = self._made_from(role)
        return self._key(name, epochs, seed) if self._is_made(name, epochs) else _identity(name)

    def _made_from(self, role: EvaluatedModel) -> tuple[str, float, int]:
        """Name, passes over the demonstrations and seed."""
        model = self._config.model
        if role == "student":
            return model.student, model.student_epochs, 1
        return model.teacher, model.teacher_epochs, 0

    def _is_made(self, name: str, epochs: float) -> bool:
        """Whether a model was trained on demonstrations here."""
        return name in MODEL_SHAPES or bool(self._config.model.show_task and epochs)

    @property
    def _turns(self) -> int:
        """Turn limit of the demonstrations."""
        return self._config.model.demonstration_turns or self._config.env.max_turns

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
        env, model = self._config.env, self._config.model
        depends: dict[str, object] = {
            "recipe": _RECIPE,
            "env": [env.id, sorted(env.options.items()), self._turns, env.prompt_style],
            "prompt": [env.history_window, env.show_admissible, env.parse_profile],
            "data": self._pool.content_hash,
            "demonstrations": [model.demonstrations, NOISE],
            "updates": [model.episodes_per_update, model.observation_weight],
            "model": [name, epochs, model.supervised_lr, seed],
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
            limited = replace(self._pool.config, max_turns=self._turns)
            with closing(EnvPool(limited, self._pool.split)) as pool:
                self._demonstrations = demonstrate(pool, config.model.demonstrations, NOISE, seed=0)
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
            lr=config.model.supervised_lr,
            seed=seed,
            episodes_per_update=config.model.episodes_per_update,
            observation_weight=config.model.observation_weight,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
        )
        return policy


def _identity(name: str) -> str:
    """What tells a language model apart from another of the same name: its newest weights file."""
    times = [file.stat().st_mtime_ns for file in Path(name).glob("*.safetensors")]
    return f"{Path(name).resolve() if times else name} {max(times, default=0)}"
