"""Load or train student and teacher of a run, and evaluate them.

A model trained here is cached under a hash of everything that it depends on. Evaluations of start
and teacher, which the runs of a folder share, are stored in it with their dependencies:

    evaluations/<student or teacher>-<split>-<mode>.json
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from atod_gym.errors import AtodError
from atod_train.config import Precision, RunConfig, parse_prompt_style, parse_sampler
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.files import read_json, without_infinities, write_json
from atod_train.memory import memory_errors
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.policy import Policy
from atod_train.models.pretrained import (
    SHIPPED,
    cache_folder,
    frozen_precision,
    is_mixed,
    load_policy,
    pick_device,
)
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Trajectory
from atod_train.reports.evaluations import (
    EvaluatedModel,
    Evaluation,
    EvaluationResult,
)
from atod_train.reports.run_folder import RunFolderError
from atod_train.reports.statistics import InvalidCountsError
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.supervised import (
    demonstrate,
    demonstration_texts,
    shortened,
    tokenize,
    train_on_demonstrations,
)

_RECIPE = 6
"""Raise it when the generation of demonstrations or starts changes, so that caches expire."""

NOISE = 0.2
"""Probability of a random action instead of the expert's."""

_TINY_BYTES = 20_000_000
"""Size of the weights from which on one thread computes slower than several."""

_threads_before: list[int] = []
"""Number of threads before `choose_threads` lowered it; empty if it did not."""


# -- models ----------------------------------------------------------------------------------------


def policy_of(config: RunConfig, role: EvaluatedModel, pool: EnvPool) -> Policy:
    """Load the teacher or the student's start; train and cache it first if it does not exist.

    It is the same for every method and seed. `pool` has the environments of the training split.

    Raises:
        AtodError: the model cannot be loaded or trained, or memory runs out.
    """
    name, epochs, _ = _origin(config, role)
    choose_threads(config)
    label = f"{role} ({Path(name).name})"
    path: str | Path = name
    if epochs:
        path = cache_folder() / _identity(config, role, pool)
        if not (path / "config.json").is_file():
            advice = "Lower --train.tokens-per-microbatch or model.max_context."
            with memory_errors(f"training the {role}'s start", advice):
                _train(config, role, pool, label).save(path)
    with memory_errors(f"loading the {role}", "Use a smaller model, or another --model.device."):
        return _load(path, config, role, label)


def choose_threads(config: RunConfig) -> None:
    """Use one thread if all models are tiny: more threads only wait for each other.

    Larger models use the original number; OMP_NUM_THREADS has priority if it is set.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    is_tiny = all(map(_is_tiny, (config.model.student, config.model.teacher)))
    if is_tiny and not _threads_before:
        _threads_before.append(torch.get_num_threads())
        torch.set_num_threads(1)
    elif not is_tiny and _threads_before:
        torch.set_num_threads(_threads_before.pop())


def _is_tiny(name: str) -> bool:
    """Whether a model, by its name or the size of its files, is as small as those made here."""
    if name in MODEL_SHAPES or name in SHIPPED:
        return True
    sizes = [file.stat().st_size for file in Path(name).glob("*.safetensors")]
    return 0 < sum(sizes) <= _TINY_BYTES


def _origin(config: RunConfig, role: EvaluatedModel) -> tuple[str, float, int]:
    """Return a model's name, its passes over the demonstrations, and the seed of its training."""
    if role == "student":
        return config.model.student, config.start.epochs[0], 1
    return config.model.teacher, config.start.epochs[1], 0


def _load(path: str | Path, config: RunConfig, role: EvaluatedModel, label: str) -> Policy:
    model = config.model
    if role == "student":
        return load_policy(
            path,
            device=model.devices[0],
            dtype=model.dtype,
            lora_rank=model.lora_rank,
            gradient_checkpointing=model.gradient_checkpointing,
            name=label,
        )
    device = model.devices[1]
    frozen = frozen_precision(model.dtype, device)
    return load_policy(path, device=device, dtype=frozen, name=label)


def _identity(config: RunConfig, role: EvaluatedModel, pool: EnvPool) -> str:
    """Return the identity of a model: its files, or its name in the cache if it is trained here."""
    name, epochs, seed = _origin(config, role)
    if not epochs:
        return _files(name)
    env, model, start = config.env, config.model, config.start
    style, window = parse_prompt_style(env.prompt_style)
    depends: dict[str, object] = {
        "recipe": _RECIPE,
        "env": [env.id, sorted(env.options.items()), env.max_turns, style],
        "prompt": [window, env.show_admissible, env.parse_profile],
        "data": pool.content_hash + pool.code_hash,
        "demonstrations": [start.demonstrations, NOISE],
        "max_context": model.max_context,
        "model": [name, epochs, start.lr, start.observation_weight, seed],
    }
    if name in MODEL_SHAPES:
        depends["shape"] = asdict(MODEL_SHAPES[name])
    else:
        depends["start"] = [_files(name), sorted(env.template_options.items())]
        if model.dtype == "mixed" and is_mixed(model.dtype, pick_device(model.devices[0])):
            depends["dtype"] = model.dtype
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return f"{Path(name).name}-{digest[:20]}"


def _files(name: str) -> str:
    """Return a loaded model's name and a hash of its files; of the hub: its commit.

    Large files, which are weights, count by size and time: reading gigabytes would take long.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    folder = Path(name)
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json")
        return f"{name} {Path(config).parent.name if isinstance(config, str) else ''}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".md":
            stat = file.stat()
            is_small = stat.st_size <= _TINY_BYTES
            digest.update(f"{file.name} {stat.st_size} {is_small or stat.st_mtime_ns}".encode())
            digest.update(file.read_bytes() if is_small else b"")
    return f"{folder.resolve()} {digest.hexdigest()}"


def _train(config: RunConfig, role: EvaluatedModel, pool: EnvPool, label: str) -> Policy:
    """Train a model on demonstrations."""
    name, epochs, seed = _origin(config, role)
    episodes = demonstrate(pool, config.start.demonstrations, NOISE, seed=0)
    if name in MODEL_SHAPES:
        tokenizer = build_word_tokenizer(demonstration_texts(episodes))
        policy = build_policy(name, tokenizer, seed, name=label)
    else:
        # In both cases the trained weights are float32.
        dtype: Precision = "mixed" if config.model.dtype == "mixed" else "auto"
        policy = load_policy(name, device=config.model.devices[0], dtype=dtype, name=label)
    imitate(policy, episodes, config, epochs, seed)
    return policy


def imitate(
    policy: Policy, episodes: Sequence[Trajectory], config: RunConfig, epochs: float, seed: int
) -> None:
    """Train a model on demonstrations, with the prompts and learning rates of a run.

    Turns beyond `model.max_context` or the model's positions are left out.

    Raises:
        AtodError: no demonstration has a turn that fits.
    """
    env, start = config.env, config.start
    dialogue = DialogueEncoder(policy.tokenizer, env.prompt_style, env.template_options)
    limit = min(config.model.max_context, policy.max_positions)
    fitting = [shortened(tokenize(episode, dialogue), limit) for episode in episodes]
    cut = sum(len(a.turns) < len(b.turns) for a, b in zip(fitting, episodes, strict=True))
    if not any(episode.turns for episode in fitting):
        raise AtodError(
            f"No demonstration fits the {limit} tokens that {policy.name} can have. Raise "
            "model.max_context, or choose a model with more positions."
        )
    if cut:
        shown = f"{cut:,} of {len(episodes):,} demonstrations are cut at {limit} tokens"
        print(f"{shown} (model.max_context, or the model's positions)", file=sys.stderr)
    train_on_demonstrations(
        policy,
        [episode for episode in fitting if episode.turns],
        epochs=epochs,
        lr=start.lr,
        seed=seed,
        observation_weight=start.observation_weight,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
    )


# -- evaluations -----------------------------------------------------------------------------------


def evaluate_start(
    config: RunConfig, role: EvaluatedModel, split: str, folder: Path, processes: Processes
) -> list[Evaluation]:
    """Evaluate the start or the teacher on one split in every mode; stored results are reused.

    Ranks share the tasks; rank 0 writes to the folder of the runs.

    Raises:
        AtodError: as `evaluate`.
        RunFolderError: a file is damaged.
    """
    advice = "Lower model.max_context, or use a smaller model."
    engine = config.model.sampler if role == "student" else "plain"
    found: list[Evaluation] = []
    policy: Policy | None = None
    with (
        closing(EnvPool(config.env, "train")) as train_pool,
        closing(EnvPool(config.env, split)) as pool,
        memory_errors(f"evaluating the {role}", advice),
    ):
        # The dependencies of an evaluation; devices and a teacher's URL may change.
        settings = without_infinities(
            {
                "made_from": _identity(config, role, train_pool),
                "tasks": pool.content_hash + pool.code_hash,
                "env": asdict(config.env),
                "dtype": config.model.dtype,
                "max_context": config.model.max_context,
                "max_completion_tokens": config.train.max_completion_tokens,
                "seed": config.train.seed,
                **({} if engine == "plain" else {"sampler": parse_sampler(engine)[0]}),
            }
        )
        for mode in config.env.eval_modes:
            path = folder / "evaluations" / f"{role}-{split}-{mode.replace(':', '-')}.json"
            record = read_json(path)
            if record.get("settings") == settings:
                try:
                    result = EvaluationResult.from_json(record.get("result", {}))
                except InvalidCountsError as error:
                    message = f"{path} is not an evaluation ({error}); remove it"
                    raise RunFolderError(message) from error
            else:
                policy = policy or policy_of(config, role, train_pool)
                # All ranks have read the file: each computes a share of the evaluation.
                result = evaluate(policy, pool, config, mode, processes, engine)
                if processes.is_main:
                    write_json(path, {"settings": settings, "result": result.to_json()})
            found.append(Evaluation(0, role, result))
    return found
