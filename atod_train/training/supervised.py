"""Supervised starts: expert episodes, models trained on them, and their evaluations.

Any environment whose class has `expert()` can be demonstrated; one that has `demonstrator()`, which
may know more of a task than an agent, is demonstrated by that. An expert with an attribute
`max_turns` has failed in an episode that is longer. Episodes contain random actions now and then
(of those that were admissible at some turn), so that a model sees how to recover; only the expert's
own turns are trained.

What was trained is cached by a hash of everything that it depends on. The evaluations of start and
teacher, which the runs of a folder share, are kept in it with what they depend on:

    evaluations/<student or teacher>-<split>-<mode>.json
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.batch import length_buckets, make_batch
from atod_train.config import Precision, RunConfig
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.files import read_json, write_json
from atod_train.memory import memory_errors
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.policy import Policy
from atod_train.models.pretrained import (
    LoadOptions,
    cache_folder,
    is_mixed,
    load_policy,
    pick_device,
)
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.progress import progress
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn
from atod_train.reports.evaluations import (
    EvaluatedModel,
    Evaluation,
    EvaluationMode,
    EvaluationResult,
)
from atod_train.reports.run_folder import RunFolderError
from atod_train.reports.statistics import InvalidCountsError
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import seed_for, tasks_for_step
from atod_train.training.checks import DivergedError
from atod_train.training.muon import Muon

_WARM_UP = 0.05
_EXPERT_TOKENS = 180
"""Tokens of completions that an update should hold, more or less: short episodes need more."""
_SCORED_WORDS = 4096
"""With a larger vocabulary so few of the environment's tokens are scored that it costs no more."""


def demonstrate(pool: EnvPool, count: int, noise: float, seed: int) -> list[Trajectory]:
    """Expert episodes on `count` tasks, each again once all were played; failures are left out.

    Args:
        pool: environments of the training split.
        count: episodes.
        noise: probability that a turn plays a random action instead.
        seed: seed of tasks and noise.

    Raises:
        AtodError: the environment has no scripted expert.
    """
    rng = np.random.default_rng(seed_for(seed, 0, "demonstrations"))
    episodes = []
    with progress(count, "demonstrations") as advance:
        for task_id in tasks_for_step(pool.task_ids, 1, count, seed):
            episode = _demonstrate_one(pool, task_id, noise, rng)
            if episode:
                episodes.append(episode)
            advance()
    if not episodes:
        raise AtodError(
            "The scripted expert solved no task: give it more turns (env.max_turns), and where it "
            "has to find something, more results (env.options.topk)."
        )
    return episodes


def _demonstrate_one(
    pool: EnvPool, task_id: str, noise: float, rng: np.random.Generator
) -> Trajectory | None:
    [episode] = pool.start([task_id])
    expert = episode.expert()
    limit = getattr(expert, "max_turns", math.inf)
    action: str | None = None
    seen: list[str] = []
    while episode.stop_reason is None and len(episode.turns) < limit:
        seen.extend(episode.actions)
        observation = episode.observation
        chosen = expert.act(observation["text"], observation["admissible_actions"], action)
        by_expert = not (seen and rng.random() < noise)
        action = chosen if by_expert else seen[int(rng.integers(len(seen)))]
        pool.play([episode], [episode.dialogue.format(action)])
        episode.turns[-1] = replace(episode.turns[-1], is_trained=by_expert)
    return episode.trajectory() if episode.info["success"] else None


def demonstration_texts(demonstrations: Iterable[Trajectory]) -> Iterable[str]:
    """All text that demonstrations hold, for building a tokenizer."""
    for demonstration in demonstrations:
        for turn in demonstration.turns:
            yield turn.completion
            for message in turn.prompt:
                yield message.content


def tokenize(demonstration: Trajectory, dialogue: DialogueEncoder) -> Trajectory:
    """Return a demonstration with the tokens of its prompts and completions."""
    turns: list[Turn] = []
    for turn in demonstration.turns:
        extends = dialogue.style == "chat" and turn.index > 0
        prompt = (
            dialogue.continuation(turn.prompt, "stop") if extends else dialogue.first(turn.prompt)
        )
        completion = tuple(dialogue.completion(turn.completion))
        tokens = TokenizedTurn(
            prompt_ids=tuple(prompt),
            completion_ids=completion,
            sampling_logprobs=(0.0,) * len(completion),
            finish_reason="stop",
            extends_previous=extends,
        )
        turns.append(replace(turn, tokens=tokens))
    return replace(demonstration, turns=tuple(turns))


def train_on_demonstrations(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    *,
    epochs: float,
    lr: tuple[float, float],
    seed: int,
    episodes_per_update: int = 0,
    observation_weight: float = 0.3,
    tokens_per_microbatch: int = 16384,
) -> list[float]:
    """Cross-entropy on the expert's turns and, with less weight, on what the environment says.

    The learning rate warms up, then decays to a tenth along a cosine. With a large vocabulary a
    random share of the environment's tokens stands for all of them, each with so much more weight:
    the logits of the others, which would be most of the work, are never computed.

    Args:
        policy: the model; it is changed.
        trajectories: from `tokenize`.
        epochs: passes over them; may be a fraction.
        lr: highest learning rates of AdamW and of Muon; 0 for Muon: AdamW trains all weights.
        seed: order of episodes.
        episodes_per_update: trajectories of an optimiser update; 0: the power of two that comes
            closest to 180 completion tokens.
        observation_weight: weight of a token of the environment; one of the expert's has 1.
        tokens_per_microbatch: padded tokens that go through the model at once.

    Returns:
        Mean loss per token of each update, in nats.

    Raises:
        DivergedError: a gradient or a loss is not finite.
    """
    episodes_per_update = episodes_per_update or _episodes_per_update(trajectories)
    updates = max(1, round(epochs * len(trajectories) / episodes_per_update))
    optimizers = _supervised_optimizers(policy, lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    policy.model.train()
    with progress(updates, f"supervised start of {policy.name}") as advance:
        for update in range(updates):
            warm = min(1.0, (update + 1) / max(1.0, _WARM_UP * updates))
            decay = 0.55 + 0.45 * math.cos(math.pi * update / updates)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * warm * decay
            part = tasks_for_step(trajectories, update + 1, episodes_per_update, seed)
            loss = _supervised_update(
                policy, part, optimizers, observation_weight, tokens_per_microbatch, generator
            )
            if not math.isfinite(loss):
                raise DivergedError(
                    f"The supervised start of {policy.name} diverged in update {update + 1} of "
                    f"{updates}. Lower start.lr, now {lr[0]:g} (AdamW) and {lr[1]:g} (Muon)."
                )
            losses.append(loss)
            advance(note=f"loss {loss:.3f}")
    policy.model.eval()
    return losses


def _episodes_per_update(trajectories: Sequence[Trajectory]) -> int:
    """The power of two of episodes that hold about `_EXPERT_TOKENS` completion tokens."""
    tokens = sum(len(turn.tokens.completion_ids) for t in trajectories for turn in t.turns)
    wanted = _EXPERT_TOKENS * len(trajectories) / max(1, tokens)
    return 2 ** max(0, round(math.log2(wanted)))


def _supervised_update(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    optimizers: Sequence[torch.optim.Optimizer],
    observation_weight: float,
    budget: int,
    generator: torch.Generator,
) -> float:
    batch = make_batch(trajectories, policy.pad_id)
    share = min(1.0, _SCORED_WORDS / policy.model.config.vocab_size)
    weights = _token_weights(batch, trajectories, observation_weight, share, generator)
    total = 0.0
    policy.model.zero_grad(set_to_none=True)
    for bucket in length_buckets(batch.attention_mask.sum(dim=1), budget):
        longest = int(batch.attention_mask[bucket].sum(dim=1).max())
        ids = batch.input_ids[bucket, :longest].to(policy.device)
        weight = weights[bucket, 1:longest].to(policy.device)
        hidden = policy.hidden_states(ids[:, :-1]).flatten(0, 1)
        weight, targets = weight.flatten(), ids[:, 1:].flatten()
        if share < 1.0:
            scored = weight.nonzero().flatten()
            hidden, weight, targets = hidden[scored], weight[scored], targets[scored]
        losses = torch.nn.functional.cross_entropy(policy.logits(hidden), targets, reduction="none")
        loss = (losses * weight).sum() / float(weights.sum())
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0))
    if not math.isfinite(norm):
        return norm
    for optimizer in optimizers:
        optimizer.step()
    return total


def _supervised_optimizers(policy: Policy, lr: tuple[float, float]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in policy.model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix and lr[1] else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr[0], betas=(0.9, 0.95), weight_decay=0.01)
    ]
    if matrices:
        optimizers.insert(0, Muon(matrices, lr=lr[1]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _token_weights(
    batch: Batch,
    trajectories: Sequence[Trajectory],
    observation_weight: float,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """[S, L] float32: 1 for the expert's tokens, less for the environment's, 0 for noise.

    Of the environment's tokens a random `share` keeps a weight, so much larger that the expected
    one stays.
    """
    weights = batch.attention_mask * observation_weight
    weights = weights * (torch.rand(weights.shape, generator=generator) < share) / share
    by_expert = [turn.is_trained for t in trajectories for turn in t.turns]
    rows = zip(
        batch.sequence_index.tolist(),
        batch.start.tolist(),
        batch.completion_mask.sum(dim=1).tolist(),
        by_expert,
        strict=True,
    )
    for sequence, start, length, trained in rows:
        weights[sequence, start : start + length] = float(trained)
    return weights


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
        self._demonstrations: list[Trajectory] | None = None

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
                gradient_checkpointing=model.gradient_checkpointing,
            )
        device = model.teacher_device or model.device
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


MODES: tuple[EvaluationMode, ...] = ("greedy", "sampled")
"""How completions are chosen."""


def evaluate_start(
    config: RunConfig, role: EvaluatedModel, split: str, folder: Path, processes: Processes
) -> list[Evaluation]:
    """Evaluate the start or the teacher on one split in every mode; what is kept is not made again.

    Args:
        config: what all runs share.
        role: which model.
        split: of the environment.
        folder: that of the runs.
        processes: share the tasks; the main one writes.

    Raises:
        AtodError: as `evaluate`.
        RunFolderError: a file is broken.
    """
    advice = "Lower model.max_context, or use a smaller model."
    with (
        closing(EnvPool(config.env, "train")) as train_pool,
        closing(EnvPool(config.env, split)) as pool,
        memory_errors(f"evaluating the {role}", advice),
    ):
        starts = Starts(config, train_pool)
        settings = _settings(config, starts.identity(role), pool.content_hash)
        paths = {mode: folder / "evaluations" / f"{role}-{split}-{mode}.json" for mode in MODES}
        # All ranks read the same: rank 0 writes only when all have evaluated.
        kept = {mode: _kept(path, settings) for mode, path in paths.items()}
        results = {mode: result for mode, result in kept.items() if result is not None}
        if missing := [mode for mode in MODES if mode not in results]:
            policy = starts.policy(role)
            for mode in missing:
                results[mode] = evaluate(policy, pool, config, mode, processes)
                if processes.is_main:
                    record = {"settings": settings, "result": results[mode].to_json()}
                    write_json(paths[mode], record)
    return [Evaluation(0, role, results[mode]) for mode in MODES]


def _settings(config: RunConfig, identity: str, tasks: str) -> dict[str, Any]:
    """Return what an evaluation depends on, as JSON; devices and a teacher's URL may change."""
    settings = {
        "made_from": identity,
        "tasks": tasks,
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
