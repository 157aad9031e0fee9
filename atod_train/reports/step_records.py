"""The metrics of a step, and a few of its trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from atod_gym.errors import InvalidSettingError
from atod_gym.types import Message
from atod_train.algorithm.atod import masked
from atod_train.algorithm.methods import Advantages, solved_groups
from atod_train.models.dialogue import DialogueEncoder
from atod_train.records import Batch, TokenScores, Trajectory
from atod_train.reports.metrics import TrajectoryRecord, TurnDisplay

_SHOWN_TRAJECTORIES = 2
_RENDERED_TRAJECTORIES = 16
_SHOWN_REASONS = 5
"""Most frequent reasons of invalid turns in a step."""


def batch_metrics(
    batch: Batch, trajectories: Sequence[Trajectory], scores: TokenScores, advantages: Advantages
) -> dict[str, float]:
    """Return the metrics that follow from rollout and advantages; keys as in `metrics`."""
    mask = batch.completion_mask
    tokens = mask.sum().clamp(min=1)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]

    reasons = Counter(turn.invalid_reason for turn in turns if turn.invalid_reason)
    verbs = sum((trajectory.verbs for trajectory in trajectories), Counter())
    per_episode = {
        f"actions/{verb}": count / len(trajectories) for verb, count in sorted(verbs.items())
    }

    def token_mean(values: Tensor) -> float:
        return float(masked(values.abs(), mask).sum() / tokens)

    return {
        "kappa": advantages.kappa,
        "rho": advantages.rho,
        "opd_signal": token_mean(advantages.opd_term),
        "rl_signal": token_mean(advantages.rl_term),
        "turn_weight": float(advantages.turn_weights.mean()),
        "disagreement": float(advantages.disagreement.mean()),
        "uncertainty": float(advantages.uncertainty.mean()),
        **({} if scores.entropies is None else {"entropy": token_mean(scores.entropies)}),
        "train_success": sum(t.success for t in trajectories) / len(trajectories),
        "solved_groups": solved_groups(trajectories),
        "train_score": sum(t.score for t in trajectories) / len(trajectories),
        "return": float(batch.returns.mean()),
        "turns": len(turns) / len(trajectories),
        "invalid_share": sum(not turn.is_action_valid for turn in turns) / len(turns),
        **{f"invalid/{reason}": count for reason, count in reasons.most_common(_SHOWN_REASONS)},
        "rollout/logprob_drift": token_mean(batch.sampling_logprobs - scores.logprobs),
        "completions_cut": sum(t.tokens.finish_reason == "length" for t in turns) / len(turns),
        "rollout/truncated_prompts": sum(turn.turns_left_out > 0 for turn in turns) / len(turns),
        **per_episode,
    }


def rendering_drift(
    trajectories: Sequence[Trajectory],
    dialogue: DialogueEncoder,
    limit: int = _RENDERED_TRAJECTORIES,
) -> float | None:
    """Return the share of dialogues that would be trained on other ids if encoded from text.

    The chat template's rendering of the whole dialogue, encoded again, is compared with the ids
    that were sampled. This trainer uses the sampled ids, so a difference does no harm here. It
    measures the error of trainers that keep text and encode it again (huggingface/trl #5224;
    #6250 repairs such dialogues afterwards). Differences come from completions sampled in another
    segmentation than the tokenizer's, from completions that are no valid UTF-8, and from templates
    that strip thoughts or spaces.

    Args:
        trajectories: of a step; those that left out turns are skipped.
        dialogue: encodes in chat style.
        limit: number of trajectories to compare, spread over all of them.

    Returns:
        None if there was no dialogue to compare, as always in window style.

    Raises:
        InvalidSettingError: a limit below 1.
    """
    if limit < 1:
        raise InvalidSettingError(f"limit must be >= 1, not {limit}.")
    if dialogue.style != "chat":
        return None
    whole = [
        record
        for record in trajectories
        if record.turns and all(turn.tokens.extends_previous for turn in record.turns[1:])
    ]
    # Neighbours belong to one task, so every n-th is taken.
    chosen = whole[:: -(-len(whole) // limit) or 1]
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


def trajectories_to_show(
    step: int,
    batch: Batch,
    trajectories: Sequence[Trajectory],
    advantages: Advantages,
    has_teacher: bool,
) -> list[TrajectoryRecord]:
    """Return a solved and a failed trajectory, if there are both."""
    solved = [i for i, t in enumerate(trajectories) if t.success]
    failed = [i for i, t in enumerate(trajectories) if not t.success]
    records = []
    for number in (*solved[:1], *failed[:1], *solved[1:])[:_SHOWN_TRAJECTORIES]:
        rows = (batch.trajectory_index == number).nonzero().squeeze(1).tolist()
        turns = []
        for row, turn in zip(rows, trajectories[number].turns, strict=True):
            display = TurnDisplay(
                text="\n".join(m.content for m in turn.prompt if m.role == "user"),
                completion=turn.completion,
                action=turn.action,
                valid=turn.is_action_valid,
                reward=turn.reward,
                uncertainty=float(advantages.uncertainty[row]),
            )
            if has_teacher:
                display = replace(
                    display,
                    disagreement=float(advantages.disagreement[row]),
                    weight=float(advantages.turn_weights[row]),
                )
            turns.append(display)
        record = trajectories[number]
        records.append(TrajectoryRecord(step, record.task_id, record.success, tuple(turns)))
    return records
