"""Compute the metrics of a step, and select a few of its trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from atod_gym.types import Message
from atod_train.algorithm.atod import masked
from atod_train.algorithm.methods import Advantages
from atod_train.models.dialogue import DialogueEncoder
from atod_train.records import Batch, TokenScores, Trajectory
from atod_train.reports.rows import TurnStatistics, to_row

_SHOWN_TRAJECTORIES = 2
_RENDERED_TRAJECTORIES = 16
"""Maximum number of dialogues of a step that are encoded again."""

_SHOWN_REASONS = 5
"""Number of most frequent reasons of invalid turns in a step."""


def batch_metrics(
    batch: Batch, trajectories: Sequence[Trajectory], scores: TokenScores, advantages: Advantages
) -> dict[str, float]:
    """Return the metrics of rollout and advantages; keys as in `metrics`."""
    mask = batch.completion_mask
    tokens = mask.sum().clamp(min=1)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]

    reasons = Counter(turn.invalid_reason for turn in turns if turn.invalid_reason)
    verbs = sum((trajectory.verbs for trajectory in trajectories), Counter())

    def token_mean(values: Tensor) -> float:
        return float(masked(values.abs(), mask).sum() / tokens)

    taught = {
        "opd_signal": token_mean(advantages.opd_term),
        "turn_weight": float(advantages.turn_weights.mean()),
        "disagreement": float(advantages.disagreement.mean()),
    }
    return {
        "kappa": advantages.kappa,
        "rho": advantages.rho,
        **({} if scores.reference_logprobs is None else taught),
        "rl_signal": token_mean(advantages.rl_term),
        "uncertainty": float(advantages.uncertainty.mean()),
        **({} if scores.entropies is None else {"entropy": token_mean(scores.entropies)}),
        "train_success": sum(t.success for t in trajectories) / len(trajectories),
        "solved_groups": solved_groups(trajectories),
        "train_score": sum(t.score for t in trajectories) / len(trajectories),
        "return": float(batch.returns.mean()),
        "turns": len(turns) / len(trajectories),
        "invalid_share": sum(not turn.is_action_valid for turn in turns) / len(turns),
        **{
            f"invalid/{reason}": count / len(turns)
            for reason, count in reasons.most_common(_SHOWN_REASONS)
        },
        "rollout/logprob_drift": token_mean(batch.sampling_logprobs - scores.logprobs),
        "completions_cut": sum(t.tokens.finish_reason == "length" for t in turns) / len(turns),
        "rollout/truncated_prompts": sum(turn.turns_left_out > 0 for turn in turns) / len(turns),
        **{f"actions/{verb}": n / len(trajectories) for verb, n in sorted(verbs.items())},
    }


def solved_groups(trajectories: Sequence[Trajectory]) -> float:
    """Return the share of a step's groups in which a trajectory reached the goal, 0 to 1."""
    groups = {trajectory.group_id for trajectory in trajectories}
    solved = {trajectory.group_id for trajectory in trajectories if trajectory.success}
    return len(solved) / len(groups)


def throughput(tokens: int, seconds: Mapping[str, float]) -> float:
    """Return tokens per second of a step, whose phases are those of `PhaseTimes.take`."""
    apart = ("seconds/evaluation", "seconds/checkpoint")
    return tokens / max(sum(s for phase, s in seconds.items() if phase not in apart), 1e-6)


def rendering_drift(trajectories: Sequence[Trajectory], dialogue: DialogueEncoder) -> float | None:
    """Return the share of dialogues that would be trained on other ids if encoded from text.

    The chat template's rendering of the whole dialogue, encoded again, is compared with the ids
    that were sampled. This trainer uses the sampled ids, so a difference is harmless here. It
    measures the error of trainers that store text and encode it again (huggingface/trl #5224;
    #6250 repairs such dialogues afterwards). Differences come from completions sampled in another
    segmentation than the tokenizer's, from completions that are not valid UTF-8, and from templates
    that strip thoughts or spaces.

    Trajectories that left out turns are skipped; of many, a few are compared, spread over all.

    Returns:
        None if there was no dialogue to compare, as always in window style.
    """
    if dialogue.style != "chat":
        return None
    whole = [
        record
        for record in trajectories
        if record.turns and all(turn.tokens.extends_previous for turn in record.turns[1:])
    ]
    # Neighbours belong to one task, so every n-th is taken.
    chosen = whole[:: -(-len(whole) // _RENDERED_TRAJECTORIES) or 1]
    if not chosen:
        return None
    return sum(not _is_rendered_alike(record, dialogue) for record in chosen) / len(chosen)


def _is_rendered_alike(record: Trajectory, dialogue: DialogueEncoder) -> bool:
    """Return whether the dialogue, rendered from text, begins with the sampled ids."""
    messages: list[Message] = []
    seen: list[int] = []
    for turn in record.turns:
        completion = dialogue.decode(turn.tokens.completion_ids)
        messages += [*turn.prompt, Message("assistant", completion)]
        seen += [*turn.tokens.prompt_ids, *turn.tokens.completion_ids]
    # The template's end is not compared: the end of a turn that was cut, and a line break.
    return dialogue.finished(messages)[: len(seen)] == seen


def rows_to_show(
    batch: Batch, trajectories: Sequence[Trajectory], advantages: Advantages, has_teacher: bool
) -> list[dict[str, Any]]:
    """Return the rows of a solved and a failed trajectory, if both exist, without tokens."""
    solved = [i for i, t in enumerate(trajectories) if t.success]
    failed = [i for i, t in enumerate(trajectories) if not t.success]
    measures = (advantages.disagreement, advantages.uncertainty, advantages.turn_weights)
    rows = []
    for number in (*solved[:1], *failed[:1], *solved[1:])[:_SHOWN_TRAJECTORIES]:
        turns = batch.trajectory_index == number
        found = zip(*(values[turns].tolist() for values in measures), strict=True)
        statistics = [TurnStatistics(*values) for values in found] if has_teacher else None
        rows.append(to_row(trajectories[number], statistics))
        del rows[-1]["sequences"]
    return rows
