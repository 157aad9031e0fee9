"""Train models on demonstrations, which are episodes of experts.

Some turns play a random action instead of the expert's (one that was admissible at some turn), so
that the data contains recoveries; only the expert's own turns are trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.batch import length_buckets, make_batch
from atod_train.models.budgets import tokens_at_once
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.policy import Policy
from atod_train.progress import progress
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Episode
from atod_train.rollout.rollout import seed_for, tasks_for_step
from atod_train.training.checks import DivergedError

_WARM_UP = 0.05
"""Share of the updates in which the learning rate rises."""
_EXPERT_TOKENS = 180
"""Approximate completion tokens of an update; short episodes are combined."""
_SCORED_WORDS = 4096
"""With a larger vocabulary, fewer observation tokens are scored, at the same cost."""


class Expert(Protocol):
    """Solves an environment's tasks, for demonstrations and as an agent of `atod-eval`.

    Models that are made from scratch learn from its episodes before the run; language models do not
    need one. An environment's method `expert()` returns a new one for each episode, with the
    observations of an agent. Demonstrations prefer a method `demonstrator()`, whose expert may
    have the solution. Not all of its episodes need to succeed: failed ones are left out.

    An optional attribute `max_turns` is the number of turns after which it has failed.
    """

    def reset(self, instruction: str, text: str) -> None:
        """Begin an episode.

        Args:
            instruction: the task in one sentence; empty if the environment gives none.
            text: the first observation.
        """

    def act(self, text: str, admissible_actions: tuple[str, ...], last_action: str | None) -> str:
        """Return the next action.

        Args:
            text: the current observation.
            admissible_actions: the actions that are possible now; empty without a list.
            last_action: the action executed in the last turn, None in the first. In demonstrations
                it is sometimes a random action instead of the expert's: continue from there.
        """


def expert_of(episode: Episode) -> Expert:
    """Return an expert that has received the first observation of an episode.

    Raises:
        AtodError: the environment has none.
    """
    env = episode.env.unwrapped
    make = getattr(env, "demonstrator", None) or getattr(env, "expert", None)
    if make is None:
        raise AtodError(
            f"{type(env).__name__} has no expert() and no demonstrator(), so there are no "
            "demonstrations: start from language models, see `Expert`."
        )
    expert: Expert = make()
    expert.reset(episode.observation["instruction"], episode.observation["text"])
    return expert


def demonstrate(pool: EnvPool, count: int, noise: float, seed: int) -> list[Trajectory]:
    """Play `count` expert episodes, and return those that succeed; tasks repeat in passes.

    `noise` is the probability that a turn plays a random action instead.

    Raises:
        AtodError: the environment has no scripted expert, or it solved no task.
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
            "The scripted expert solved no task: raise env.max_turns or, if it searches, the "
            "number of results of a search (env.options topk)."
        )
    return episodes


def _demonstrate_one(
    pool: EnvPool, task_id: str, noise: float, rng: np.random.Generator
) -> Trajectory | None:
    [episode] = pool.start([task_id])
    expert = expert_of(episode)
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
    """Yield all texts of demonstrations, for building a tokenizer."""
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


def shortened(demonstration: Trajectory, limit: int) -> Trajectory:
    """Return a demonstration with tokens up to the first turn that ends beyond `limit` tokens."""
    length, fitting = 0, []
    for turn in demonstration.turns:
        tokens = turn.tokens
        length = length * tokens.extends_previous + len(tokens.prompt_ids + tokens.completion_ids)
        if length > limit:
            break
        fitting.append(turn)
    return replace(demonstration, turns=tuple(fitting))


def train_on_demonstrations(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    *,
    epochs: float,
    lr: tuple[float, float],
    seed: int,
    observation_weight: float = 0.3,
    tokens_per_microbatch: int = 16384,
) -> list[float]:
    """Train a model by cross-entropy on expert turns and, with less weight, on observations.

    The learning rate warms up, then decays to a tenth along a cosine. With a large vocabulary only
    a random share of the observation tokens is scored, each with a larger weight, because the
    logits of all of them would dominate the cost.

    Args:
        policy: the model; it is changed.
        trajectories: as returned by `tokenize`.
        epochs: passes over them; may be a fraction.
        lr: highest learning rates of AdamW and Muon; 0 for Muon: AdamW trains all weights.
        seed: of the order of episodes.
        observation_weight: loss weight of an observation token; an expert token has 1.
        tokens_per_microbatch: padded tokens of one forward pass; 0: `tokens_at_once`.

    Returns:
        Mean loss per token of each update, in nats.

    Raises:
        DivergedError: a gradient or a loss is not finite.
    """
    episodes = _episodes_per_update(trajectories)
    updates = max(1, round(epochs * len(trajectories) / episodes))
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
                    group["lr"] = optimizer.defaults["lr"] * warm * decay
            part = tasks_for_step(trajectories, update + 1, episodes, seed)
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
    """Return the power of two of episodes with about `_EXPERT_TOKENS` completion tokens."""
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
    """Make one update; return the loss, or a gradient norm that is not finite without an update."""
    batch = make_batch(trajectories, policy.pad_id)
    share = min(1.0, _SCORED_WORDS / policy.model.config.vocab_size)
    weights = _token_weights(batch, trajectories, observation_weight, share, generator)
    total = 0.0
    policy.model.zero_grad(set_to_none=True)
    budget = budget or tokens_at_once(policy)
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
    """Return Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in policy.model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix and lr[1] else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=lr[0], betas=(0.9, 0.95), weight_decay=0.01)
    return [Muon(matrices, lr=lr[1], weight_decay=0.01), adamw] if matrices else [adamw]


def _token_weights(
    batch: Batch,
    trajectories: Sequence[Trajectory],
    observation_weight: float,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Return [S, L] float32: 1 for expert tokens, less for observations, 0 for random actions.

    A random `share` of the observation tokens keeps a weight, divided by `share`, so that the
    expected weight is unchanged.
    """
    weights = batch.attention_mask * observation_weight
    weights = weights * (torch.rand(weights.shape, generator=generator) < share) / share
    rows = zip(
        batch.sequence_index.tolist(),
        batch.start.tolist(),
        batch.completion_mask.sum(dim=1).tolist(),
        (turn.is_trained for t in trajectories for turn in t.turns),
        strict=True,
    )
    for sequence, start, length, is_trained in rows:
        weights[sequence, start : start + length] = float(is_trained)
    return weights


class Muon(torch.optim.Muon):
    """Muon in float32, for processors without bfloat16 units.

    `torch.optim.Muon` orthogonalises in bfloat16. A processor that emulates it takes 4 (AVX-512) to
    20 times (AVX2) longer for that, more than for the forward and backward passes of a small model.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(mean, group["momentum"]), group)
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalized(matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return a matrix with the same singular vectors and singular values of about one.

    Values that were not tiny end between about 0.5 and 1.5. Settings are those of the optimizer.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.mT if is_tall else matrix
    found = found / found.norm().clamp(min=settings["eps"])
    a, b, c = settings["ns_coefficients"]
    for _ in range(settings["ns_steps"]):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found
