"""Score completion tokens: log-probs, entropies, and the divergence from another model.

Log-probs are those at temperature 1. Hidden states exist for one micro-batch, logits for a chunk of
its completion tokens: with a vocabulary of 150,000 the logits of a whole batch would not fit in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atod_gym.errors import AtodError
from atod_train.models.budgets import tokens_at_once
from atod_train.models.fast.llama import group_positions, is_llama_on_cpu, last_layer_at
from atod_train.models.fast.prefix_trees import PrefixTrees, crossover_of, split_microbatches
from atod_train.models.policy import Policy
from atod_train.records import Batch, TokenScores

LOGITS_PER_CHUNK = 2**26
"""Maximum number of logits at a time; 256 MiB in float32."""

_LEAST_LOGPROB = -50.0
"""Log-prob of an excluded token: finite, and negligible compared with any other."""


@dataclass(frozen=True)
class Reference:
    """A frozen model whose distributions are compared with the student's, token by token."""

    policy: Policy
    """Scores the same ids; it may be on another device."""
    top_k: int = 0
    """Compare the student's most likely tokens one by one and all others as one token; 0: compare
    the whole vocabulary."""


@torch.no_grad()
def score_completions(
    policy: Policy,
    batch: Batch,
    tokens_per_microbatch: int = 16384,
    *,
    with_entropy: bool = False,
    reference: Reference | None = None,
) -> TokenScores:
    """Score a batch without gradient, on the model's device; arguments of `score_microbatches`."""
    found: dict[str, Tensor] = {}
    whole = replace(batch, rows=torch.arange(len(batch.rows)))
    for part, scores in score_microbatches(
        policy, whole, tokens_per_microbatch, with_entropy=with_entropy, reference=reference
    ):
        rows = part.rows.to(policy.device)
        for name, values in vars(scores).items():
            if values is not None:
                empty = values.new_zeros(batch.completion_ids.shape)
                found.setdefault(name, empty).index_copy_(0, rows, values)
    return TokenScores(**found)


def score_microbatches(
    policy: Policy,
    batch: Batch,
    tokens_per_microbatch: int = 16384,
    *,
    with_entropy: bool = False,
    reference: Reference | None = None,
) -> Iterator[tuple[Batch, TokenScores]]:
    """Score a batch part by part; differentiable scores: call backward before the next part.

    Args:
        policy: The model.
        batch: Packed or unpacked batch, on any device.
        tokens_per_microbatch: Padded tokens of one forward pass; 0: `tokens_at_once`.
        with_entropy: Compute entropies.
        reference: Compute its log-probs and the divergences from it.

    Yields:
        Parts that together contain every row once, and the scores of their rows.

    Raises:
        AtodError: A sequence is longer than the model's positions.
    """
    longest = batch.input_ids.shape[1]
    if longest > policy.max_positions:
        raise AtodError(
            f"A sequence of {longest} tokens is longer than the {policy.max_positions} positions "
            f"of model {policy.name}. Lower max_context."
        )
    crossover = crossover_of(policy.model)
    budget = tokens_per_microbatch or tokens_at_once(policy)
    for part, trees in split_microbatches(batch, budget, crossover):
        # transformers recomputes layers in training mode only.
        policy.model.train(policy.gradient_checkpointing and torch.is_grad_enabled())
        try:
            scores = _score(policy, part, trees, with_entropy, reference)
        finally:
            policy.model.eval()
        yield part, TokenScores(**scores)


def _score(
    policy: Policy,
    part: Batch,
    trees: PrefixTrees | None,
    with_entropy: bool,
    reference: Reference | None,
) -> dict[str, Tensor]:
    """Return the scores of one micro-batch under the names of `TokenScores`, [r, T] each."""

    def compute() -> dict[str, Tensor]:
        # Selected before the move: on a GPU the host would wait for the number of tokens.
        targets = part.completion_ids[part.completion_mask].to(policy.device)
        mask = part.completion_mask.to(policy.device)
        theirs = None
        if reference is not None:
            with torch.no_grad():
                theirs = _states_before_completions(reference.policy, part, trees)
        ours = _states_before_completions(policy, part, trees)
        at_once = max(1, LOGITS_PER_CHUNK // policy.embedding_rows)
        chunks = ours.split(at_once)
        others = [None] * len(chunks) if theirs is None else theirs.split(at_once)
        found = []
        for chunk in zip(chunks, others, targets.split(at_once), strict=True):
            arguments = (policy, reference, *chunk, with_entropy)
            if len(chunks) > 1 and torch.is_grad_enabled():
                # The backward pass recomputes the logits instead of keeping them.
                found.append(checkpoint(_score_chunk, *arguments, use_reentrant=False))
            else:
                found.append(_score_chunk(*arguments))
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=policy.device)
        return {
            name: empty.masked_scatter(mask, torch.cat([each[name] for each in found]))
            for name in found[0]
        }

    return policy.forward_within(compute) if policy.forward_within else compute()


def _states_before_completions(policy: Policy, part: Batch, trees: PrefixTrees | None) -> Tensor:
    """Return the hidden states [m, width] from which the m completion tokens are predicted."""
    turn, token = part.completion_mask.cpu().nonzero(as_tuple=True)
    row = part.sequence_index.cpu()[turn]
    # The token at position p is predicted from position p - 1.
    position = part.start.cpu()[turn] + token - 1
    ids, inputs = part.input_ids, {}
    if trees is not None:
        ids, row, position = trees.ids, trees.tree[row], trees.column[row, position]
        inputs = trees.inputs(policy.layer_dtype, policy.device)
    ids, row, position = (tensor.to(policy.device) for tensor in (ids, row, position))
    return states_at(policy, ids, row, position, **inputs)


def states_at(
    policy: Policy, input_ids: Tensor, row: Tensor, position: Tensor, **inputs: Any
) -> Tensor:
    """Return the last hidden states [m, width] at rows and columns [m] of `input_ids` [s, l].

    Further inputs as `Policy.hidden_states`.
    """
    # Otherwise layers that the backward pass recomputes would be computed completely.
    if is_llama_on_cpu(policy.model) and not policy.gradient_checkpointing:
        chosen, position = group_positions(row, position, len(input_ids))
        with last_layer_at(policy.model, chosen):
            return policy.hidden_states(input_ids, **inputs)[row, position]
    return policy.hidden_states(input_ids, **inputs)[row, position]


def _score_chunk(
    policy: Policy,
    reference: Reference | None,
    ours: Tensor,
    theirs: Tensor | None,
    targets: Tensor,
    with_entropy: bool,
) -> dict[str, Tensor]:
    """Return the scores [m] of tokens from the hidden states [m, width] before them."""
    logits = policy.logits(ours)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    log_total = logits.logsumexp(dim=-1)
    found = {"logprobs": chosen - log_total}
    if with_entropy:
        probabilities = (logits - log_total[:, None]).exp()
        found["entropies"] = log_total - (probabilities * logits).sum(dim=-1)
    if reference is not None and theirs is not None:
        with torch.no_grad():
            other = reference.policy.logits(theirs).to(logits.device)
            chosen = other.gather(-1, targets[:, None]).squeeze(-1)
            found["reference_logprobs"] = chosen - other.logsumexp(dim=-1)
        found["divergences"] = reverse_kl(logits, other, reference.top_k)
    return found


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 0) -> Tensor:
    """Return KL(p_S || p_T) = sum_v p_S(v) (log p_S(v) - log p_T(v)) of each distribution, in nats.

    delta_t of `atod.py` is an unbiased estimate of its negative, and the gradient of the
    sampled-token loss, averaged over all tokens that the student could have sampled, is that of
    this divergence. It needs the teacher's logits and has no sampling variance.

    Outputs padded to different sizes are compared over their common ids. With `top_k` the
    student's k most likely tokens are compared one by one and all others together as one token,
    which gives a lower bound (the divergence of the coarser distributions); the k are chosen again
    from the given logits.

    Args:
        student_logits: [m, V] float32; the gradient flows through them.
        teacher_logits: [m, V'] float32 on the same device.
        top_k: 0 for the whole vocabulary.
    """
    common = min(student_logits.shape[-1], teacher_logits.shape[-1])
    ours = student_logits[..., :common].log_softmax(dim=-1)
    theirs = teacher_logits[..., :common].log_softmax(dim=-1).detach()
    if not 0 < top_k < common:
        return (ours.exp() * (ours - theirs)).sum(dim=-1)
    ids = ours.topk(top_k, dim=-1).indices
    our_rest, their_rest = _log_rest(ours, ids), _log_rest(theirs, ids)
    ours, theirs = ours.gather(-1, ids), theirs.gather(-1, ids)
    shown = (ours.exp() * (ours - theirs)).sum(dim=-1)
    return shown + our_rest.exp() * (our_rest - their_rest)


def _log_rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability [m] of all tokens except the [m, k] `ids`, from [m, V] log-probs.

    It is a sum, since 1 - p of a small remainder is mostly rounding.
    """
    # Finite for excluded tokens, for gradients without NaN.
    others = logprobs.clamp(min=_LEAST_LOGPROB).scatter(-1, ids, 2 * _LEAST_LOGPROB)
    return others.logsumexp(dim=-1)
