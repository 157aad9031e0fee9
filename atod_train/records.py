"""Define the records that rollout, algorithm and update exchange.

Text lives in `Turn`, tokens in `TokenizedTurn`, tensors in `Batch`. Shapes use these letters:
R turn rows, T tokens of the longest completion, S packed sequences, L tokens of the longest
sequence, N trajectories, G trajectories per group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from atod_gym.parsing import action_verb
from atod_gym.types import Message

if TYPE_CHECKING:  # agents that play by text do not need torch
    from torch import Tensor

FinishReason = Literal["stop", "length", "action"]
"""Why sampling ended: the end-of-turn token was sampled, the token limit was reached, or the action
was complete, see `atod_gym.parsing.CompletionFormat.end_of_action`."""

StopReason = Literal["terminated", "turn_limit", "context_limit", "refused"]
"""Why an episode ended: by the task, by the turn limit, because a prompt without earlier
turns exceeds the context, or because an endpoint refuses the prompt."""

USUAL_ENDS: tuple[StopReason, ...] = ("terminated", "turn_limit")
"""Other episodes were cut off and count as failed, whatever the environment reports."""


@dataclass(frozen=True, slots=True)
class TokenizedTurn:
    """The exact tokens of one turn, as given to and sampled by the model; never re-encoded."""

    prompt_ids: tuple[int, ...]
    """If `extends_previous`: only the tokens after the previous turn's completion; else all."""
    completion_ids: tuple[int, ...]
    """As sampled, with the end-of-turn token if it was sampled."""
    sampling_logprobs: tuple[float, ...]
    """One per completion token, at the sampling temperature."""
    finish_reason: FinishReason
    extends_previous: bool
    """The prompt is the previous turn's prompt and completion, then `prompt_ids`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: prompt -> completion -> env.step."""

    index: int
    prompt: tuple[Message, ...]
    """The messages that are new in this turn (all of them in window style)."""
    completion: str
    action: str
    reward: float
    """Environment reward of this turn, after scaling and invalid-action penalty."""
    is_action_valid: bool
    """Strict validity: the completion parsed and the action was admissible."""
    tokens: TokenizedTurn
    penalty: float = 0.0
    """Invalid-action penalty, already subtracted from `reward`."""
    invalid_reason: str = ""
    """Why the action was not valid, see `atod_gym.parsing.invalid_reason`; empty if it was."""
    turns_left_out: int = 0
    """Number of earlier turns that were left out because they did not fit; also in turns that
    continue a prompt without them."""
    is_trained: bool = True
    """False: a random action in a demonstration, which is played but not trained."""

    @property
    def verb(self) -> str:
        """The first word of the action, such as `go`, `click` or `search`; "" for none."""
        return action_verb(self.action)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode."""

    group_id: int
    task_id: str
    task_type: str
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    stop_reason: StopReason
    success: bool
    """Whether the environment reports it at one of the `USUAL_ENDS`."""
    score: float

    @property
    def episode_return(self) -> float:
        """Sum of the turns' rewards, penalties included."""
        return sum(turn.reward for turn in self.turns)

    @property
    def verbs(self) -> Counter[str]:
        """Number of valid actions by verb."""
        return Counter(turn.verb for turn in self.turns if turn.is_action_valid)


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories as tensors: packed sequences for the model, turn rows for the algorithm.

    Completion token `t` of turn row `r` is at `input_ids[sequence_index[r], start[r] + t]`;
    the model predicts it from the position before. A mini-batch or micro-batch is a batch, too: it
    has T, N and the tensors over trajectories of the whole.
    """

    input_ids: Tensor
    """[S, L] int64, right-padded."""
    attention_mask: Tensor
    """[S, L] bool, False on padding."""
    completion_ids: Tensor
    """[R, T] int64, right-padded."""
    completion_mask: Tensor
    """[R, T] bool, True exactly on sampled tokens."""
    sampling_logprobs: Tensor
    """[R, T] float32, 0 on padding."""
    sequence_index: Tensor
    """[R] int64: the packed sequence of this turn."""
    start: Tensor
    """[R] int64: position of the first completion token in that sequence (>= 1)."""
    trajectory_index: Tensor
    """[R] int64: the trajectory (0..N-1) of this turn."""
    turn_index: Tensor
    """[R] int64: position of the turn in its trajectory."""
    turn_penalties: Tensor
    """[R] float32: penalty of each turn, already subtracted from its reward (>= 0)."""
    group_index: Tensor
    """[N] int64: group of each trajectory."""
    returns: Tensor
    """[N] float32: sum of turn rewards of each trajectory."""
    rows: Tensor
    """[R] int64, ascending: row of each turn in the batch that this one is a part of (0..R-1 if it
    is complete). `whole[rows]` slices any [R, T] tensor of the whole batch alike."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of the completion tokens of R turn rows; each [R, T] float32, nats, 0 on padding.

    None: not requested.
    """

    logprobs: Tensor
    """Of the sampled tokens, at temperature 1; before the update: `old_logprobs`."""
    entropies: Tensor | None = None
    """Of the distributions that the tokens were sampled from."""
    reference_logprobs: Tensor | None = None
    """Of the sampled tokens under the teacher; never differentiable."""
    divergences: Tensor | None = None
    """Reverse KL of the distributions from the teacher's, see `models.scores.reverse_kl`."""
