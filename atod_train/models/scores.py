"""What models say of single tokens: log-probs, entropies, and how far two models are apart.

Everything is computed from hidden states, a piece of them at a time, so that logits never exist for
more tokens than fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atod_train.records import TokenScores

_LEAST_LOGPROB = -50.0
"""What a token counts for that is ruled out: finite, and nothing beside any other."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [m, width] to logits [m, vocabulary] in float32."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch(TokenScores):
    """Scores of some turn rows, with the graph that leads to the parameters."""

    rows: Tensor
    """[r] int64: rows of the batch that was given."""


def score_tokens(
    hidden: tuple[Tensor, Tensor | None],
    heads: tuple[Head, Head | None],
    targets: Tensor,
    *,
    with_entropy: bool,
    top_k: int,
    rows_at_once: int,
) -> dict[str, Tensor]:
    """Scores of m tokens, under the names of `TokenScores`.

    Args:
        hidden: [m, width] where the tokens are predicted, of a model and of the reference or None.
        heads: their output layers.
        targets: [m] int64, the tokens.
        with_entropy: give entropies.
        top_k: see `reverse_kl`.
        rows_at_once: tokens whose logits exist at the same time.

    Returns:
        [m] float32 each; where gradients are on and m exceeds `rows_at_once`, logits are computed
        again in the backward pass instead of being kept.
    """
    ours, theirs = hidden
    pieces = list(ours.split(rows_at_once))
    others = [None] * len(pieces) if theirs is None else list(theirs.split(rows_at_once))
    parts = zip(pieces, others, targets.split(rows_at_once), strict=True)
    found = []
    for piece, other, target in parts:
        arguments = (piece, other, target, heads, with_entropy, top_k)
        if len(pieces) == 1 or not torch.is_grad_enabled():
            found.append(_score_piece(*arguments))
        else:
            found.append(checkpoint(_score_piece, *arguments, use_reentrant=False))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _score_piece(
    ours: Tensor,
    theirs: Tensor | None,
    targets: Tensor,
    heads: tuple[Head, Head | None],
    with_entropy: bool,
    top_k: int,
) -> dict[str, Tensor]:
    logits = heads[0](ours)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    log_total = logits.logsumexp(dim=-1)
    found = {"logprobs": chosen - log_total}
    if with_entropy:
        probabilities = (logits - log_total[:, None]).exp()
        found["entropies"] = log_total - (probabilities * logits).sum(dim=-1)
    if heads[1] is not None and theirs is not None:
        with torch.no_grad():
            other = heads[1](theirs).to(logits.device)
            chosen = other.gather(-1, targets.to(other.device)[:, None]).squeeze(-1)
            found["reference_logprobs"] = chosen - other.logsumexp(dim=-1)
        found["divergences"] = reverse_kl(logits, other, top_k)
    return found


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 0) -> Tensor:
    """KL(p_S || p_T) = sum_v p_S(v) (log p_S(v) - log p_T(v)) of each distribution, in nats.

    delta_t of `atod.py` is an unbiased estimate of its negative, and the gradient of the
    sampled-token loss, averaged over what the student could have sampled, is that of this
    divergence: computing it takes the teacher's logits, and the variance away.

    Outputs padded to different sizes are compared over the ids that both have. With `top_k` the
    student's k most likely tokens are compared one by one and all others together as one token,
    which gives a lower bound (the divergence of the coarser distributions); the k are chosen anew
    from the logits given.

    Args:
        student_logits: [m, V] float32; the gradient flows through them.
        teacher_logits: [m, V'] float32 on the same device.
        top_k: 0 for the whole vocabulary.

    Returns:
        [m], never negative but for rounding.
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
    """Log of the probability that [m, V] log-probs leave beside the [m, k] tokens `ids`; [m].

    Summed up, not as 1 - p: of a small rest that would leave rounding alone.
    """
    # Finite where tokens are ruled out, for gradients without NaN.
    others = logprobs.clamp(min=_LEAST_LOGPROB).scatter(-1, ids, 2 * _LEAST_LOGPROB)
    return others.logsumexp(dim=-1)
