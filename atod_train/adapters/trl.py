"""TRL: our turn protocol as its rollout function, and ATOD's objective inside its GRPO trainer.

`Rollouts` is what `GRPOTrainer(rollout_func=...)` takes: episodes of any environment, token for
token as our own trainer plays them, sampled by whatever TRL samples with. In chat style an episode
is one row, the environment's tokens masked out, and plain `GRPOTrainer` trains on it. In window
style every turn is a row of its own, which takes `ATODTrainer`. That adds the teacher's part to
TRL's advantages (Eq. 8), with schedule and T-DUR, also to episodes played with
`environment_factory`; with kappa = 0 and rho = 1 it is TRL's GRPO. Tested with TRL 1.16.

Differences to our trainer: the return's part is TRL's, whose group normalisation adds 1e-4 to the
standard deviation where ours adds 1e-6; loss and clipping are TRL's (`delta=3.0` is the dual clip,
`loss_type="dapo"` or `"bnpo"` the token mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_gym.types import Message
from atod_train.atod import (
    Schedule,
    atod_advantages,
    sampled_log_ratio,
    turn_statistics,
    turn_weights,
)
from atod_train.config import EnvConfig
from atod_train.dialogue import DialogueEncoder
from atod_train.episode_prompts import next_prompt
from atod_train.rollout import EnvPool, new_messages, prefetch_resets, prefetch_steps
from atod_train.teacher import require_same_vocabulary
from atod_train.types import FinishReason

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from trl import GRPOTrainer
    from trl.models import prepare_deepspeed, prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, pad
except ImportError as error:
    raise MissingExtraError(
        f"The adapter for TRL needs packages that are not installed ({error.name}): "
        "pip install 'atod[train,trl]'"
    ) from error

Weights = Literal["soft_or", "uniform", "disagreement", "uncertainty"]
TURN_ROWS = "turn_rows"
"""The column of a rollout's output that holds an episode's turns in window style."""


@dataclass
class _Episode:
    env: Any
    messages: tuple[Message, ...]
    info: dict[str, Any]
    prompts: list[list[int]] = field(default_factory=list)
    """What was fed before each completion: all of it at first and in window style, else what is
    new."""
    completions: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    episode_return: float = 0.0
    over: bool = False

    @property
    def length(self) -> int:
        return sum(map(len, self.prompts)) + sum(map(len, self.completions))


class Rollouts:
    """A rollout function for TRL: plays one episode for every prompt, which names the task.

    Args:
        env: which environment, its prompts and rewards; the same settings as for our trainer.
        split: the split that the data set's tasks belong to, see
            `atod_gym.adapters.trl.task_dataset(..., tools=False)`.

    TRL's `max_completion_length` limits the tokens of a turn, not of an episode; an episode ends
    where its next turn would not fit the model's positions.
    """

    def __init__(self, env: EnvConfig, split: str = "train") -> None:
        self.config = env
        self.split = split
        self._pool: EnvPool | None = None
        self._dialogue: DialogueEncoder | None = None

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Plays the tasks.

        Args:
            prompts: task ids, one for each episode.
            trainer: samples the completions.

        Returns:
            `prompt_ids`, `completion_ids`, `logprobs` and `env_mask` (1 on sampled tokens) for
            each episode; `episode_return`, `success`, `score` and `turns`; in window style
            `turn_rows`.

        Raises:
            InvalidSettingError: window style with a trainer that knows no turn rows.
            AtodError: as environments do; no first prompt fits the model.
        """
        is_window = self.config.prompt_style == "window"
        if is_window and not isinstance(trainer, ATODTrainer):
            raise InvalidSettingError(
                "In window style every turn is a row of its own, which GRPOTrainer cannot take: "
                "use ATODTrainer (without a teacher it is GRPO), or prompt_style='chat'."
            )
        if self._pool is None or self._dialogue is None:
            self._pool = EnvPool(self.config, self.split)
            self._dialogue = DialogueEncoder(
                trainer.processing_class, self.config.prompt_style, self.config.template_options
            )
        episodes = []
        envs = self._pool.take(len(prompts))
        prefetch_resets(envs, prompts)
        for env, task_id in zip(envs, prompts, strict=True):
            messages, info = env.reset(options={"task_id": task_id})
            episodes.append(_Episode(env, new_messages(messages), info))
        while active := [episode for episode in episodes if not episode.over]:
            self._play_turn(active, trainer, self._dialogue)
        if not any(episode.completions for episode in episodes):
            raise AtodError("No first prompt fits the model; use shorter prompts.")
        end = self._dialogue.end_of_turn_id
        columns = [_row(episode, is_window, end) for episode in episodes]
        output: dict[str, Any] = {name: [c[name] for c in columns] for name in columns[0]}
        if any(logprobs is None for logprobs in output["logprobs"]):
            output["logprobs"] = None
        return output

    def _play_turn(
        self, active: Sequence[_Episode], trainer: GRPOTrainer, dialogue: DialogueEncoder
    ) -> None:
        room = _Room(
            dialogue,
            trainer.max_completion_length,
            int(trainer.model.config.get_text_config().max_position_embeddings),
        )
        playing, fed = [], []
        for episode in active:
            ids = self._next_ids(episode, room)
            held = 0 if dialogue.style == "window" else episode.length
            if held + len(ids) + room.max_completion_tokens > room.max_context:
                episode.over = True
                continue
            before = [] if dialogue.style == "window" else _whole(episode)
            episode.prompts.append(ids)
            playing.append(episode)
            fed.append(before + ids)
        if not playing:
            return
        completions, logprobs = trainer._generate_single_turn(fed, None, {}, 1)
        texts = [dialogue.decode(ids) for ids in completions]
        prefetch_steps([episode.env for episode in playing], texts)
        for i, (episode, ids) in enumerate(zip(playing, completions, strict=True)):
            episode.completions.append(ids)
            if logprobs is not None:
                episode.logprobs.append(logprobs[i])
            episode.finish_reason = "stop" if ids[-1] in dialogue.stop_ids else "length"
            messages, reward, terminated, truncated, info = episode.env.step(texts[i])
            penalty = self.config.invalid_action_penalty if info["parse_error"] else 0.0
            episode.episode_return += float(reward) * self.config.success_reward - penalty
            episode.messages, episode.info = new_messages(messages), info
            episode.over = terminated or truncated

    def _next_ids(self, episode: _Episode, room: _Room) -> list[int]:
        if room.dialogue.style == "window":
            return list(next_prompt(episode.env, episode.messages, (), room, 0).ids)
        if not episode.prompts:
            return room.dialogue.first(episode.messages)
        return room.dialogue.continuation(episode.messages, episode.finish_reason)


@dataclass(frozen=True)
class _Room:
    """What prompts are fitted into, see `next_prompt`."""

    dialogue: DialogueEncoder
    max_completion_tokens: int
    max_context: int

    def fits(self, row: int, new_ids: Sequence[int]) -> bool:
        return len(new_ids) + self.max_completion_tokens <= self.max_context


def _whole(episode: _Episode) -> list[int]:
    """Everything that a dialogue holds so far."""
    parts = zip(episode.prompts, episode.completions, strict=True)
    return [token for prompt, completion in parts for token in (*prompt, *completion)]


def _row(episode: _Episode, is_window: bool, filler: int) -> dict[str, Any]:
    """The columns of one episode; TRL wants a completion even of one that could not begin."""
    info = episode.info
    row: dict[str, Any] = {
        "episode_return": episode.episode_return,
        "success": float(info["success"]),
        "score": float(info["score"]),
        "turns": len(episode.completions),
    }
    if not episode.completions:
        row |= {"prompt_ids": [filler], "completion_ids": [filler], "env_mask": [0]}
        return row | {"logprobs": [0.0], **({TURN_ROWS: []} if is_window else {})}
    prompts, completions = episode.prompts, episode.completions
    logprobs: list[list[float]] = episode.logprobs or [[] for _ in completions]
    if is_window:
        row[TURN_ROWS] = list(zip(prompts, completions, logprobs, strict=True))
        prompts, completions, logprobs = prompts[:1], completions[:1], logprobs[:1]
    ids, mask, scores = [], [], []
    for prompt, completion, sampled in zip([[], *prompts[1:]], completions, logprobs, strict=True):
        ids += [*prompt, *completion]
        mask += [0] * len(prompt) + [1] * len(completion)
        scores += [*([0.0] * len(prompt)), *sampled]
    row |= {"prompt_ids": prompts[0], "completion_ids": ids, "env_mask": mask}
    return row | {"logprobs": scores if episode.logprobs else None}


def episode_returns(*, episode_return: Sequence[float], **columns: object) -> list[float]:
    """The reward function that goes with `Rollouts`: what the environment gave."""
    return list(episode_return)


class ATODTrainer(GRPOTrainer):
    """TRL's GRPO trainer with ATOD's advantages: kappa w_k delta_t + rho A (Eq. 8).

    Args:
        *args: those of `GRPOTrainer`.
        teacher: the model that scores the student's tokens, as a model, folder or hub name; None:
            no teacher's part, whatever kappa is.
        schedule: kappa and rho over the optimiser steps; the paper's by default.
        weights: T-DUR's variant; `uniform` is none.
        min_turns: guard of T-DUR: shorter episodes have weight 1.
        min_disagreement: guard of T-DUR, in nats per token.
        **kwargs: those of `GRPOTrainer`.

    Raises:
        AtodError: The tokenizers of student and teacher differ.
        InvalidSettingError: Liger's loss is on, which takes one advantage per row.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | None = None,
        schedule: Schedule | None = None,
        weights: Weights = "soft_or",
        min_turns: int = 3,
        min_disagreement: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "use_liger_kernel", False):
            raise InvalidSettingError("ATODTrainer needs use_liger_kernel=False.")
        self.schedule = schedule or Schedule()
        self.weights = weights
        self.min_turns = min_turns
        self.min_disagreement = min_disagreement
        self.teacher = None if teacher is None else self._prepared(teacher)

    def _prepared(self, teacher: PreTrainedModel | str) -> Any:
        name = teacher if isinstance(teacher, str) else str(teacher.config._name_or_path)
        model: Any = teacher
        if isinstance(teacher, str):
            ours, theirs = self.processing_class.get_vocab(), AutoTokenizer.from_pretrained(teacher)
            student = str(self.model.config._name_or_path)
            require_same_vocabulary(ours, theirs.get_vocab(), student, name)
            model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
        model.requires_grad_(False).eval()
        disable_dropout_in_model(model)
        add_fused_lm_head(model, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        episode = torch.arange(len(inputs), device=output["prompt_ids"].device)
        if TURN_ROWS in inputs[0]:
            output, episode = self._with_turn_rows(output, [row[TURN_ROWS] for row in inputs])
        if self.model.training:
            output["advantages"] = self._mixed(output, episode)
        return output

    def _with_turn_rows(
        self, output: dict[str, Any], episodes: Sequence[Sequence[tuple[Any, ...]]]
    ) -> tuple[dict[str, Any], Tensor]:
        """Replaces the rows of episodes by those of their turns; gives each row's episode."""
        if self.beta != 0.0 or (self.use_vllm and self.vllm_importance_sampling_correction):
            raise InvalidSettingError(
                "In window style set beta=0.0 and vllm_importance_sampling_correction=False: TRL "
                "computes both for whole episodes."
            )
        device = output["prompt_ids"].device
        rows = [(i, *turn) for i, turns in enumerate(episodes) for turn in turns]
        # Later the rows are divided into this many equal parts, and what is left over is dropped.
        parts = self.args.steps_per_generation if self.model.training else 1
        blank = (0, [self._tokenizer.pad_token_id], [self._tokenizer.pad_token_id], [0.0])
        sampled = [1] * len(rows) + [0] * (-len(rows) % parts)
        rows += [blank] * (len(sampled) - len(rows))

        def padded(rows: list[list[Any]], value: float, side: str) -> Tensor:
            tensors = [torch.tensor(row) for row in rows]
            return pad(tensors, padding_value=value, padding_side=side).to(device)

        filler = self._tokenizer.pad_token_id
        prompts, completions = [row[1] for row in rows], [row[2] for row in rows]
        ones = [[one] * len(ids) for one, ids in zip(sampled, completions, strict=True)]
        episode = torch.tensor([row[0] for row in rows], device=device)
        expanded = {
            "prompt_ids": padded(prompts, filler, "left"),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, "left"),
            "completion_ids": padded(completions, filler, "right"),
            "completion_mask": padded([[1] * len(ids) for ids in completions], 0, "right"),
            "tool_mask": padded(ones, 0, "right"),
            "advantages": output["advantages"][episode],
        }
        tokens = expanded["tool_mask"].sum()
        expanded["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if "old_per_token_logps" in output:
            expanded["old_per_token_logps"] = self._scores(self.model, expanded)
        return expanded, episode

    @torch.no_grad()
    def _scores(self, model: Any, rows: dict[str, Any]) -> Tensor:
        """Log-probs [B, T] of the completion tokens."""
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        attention = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        size = self.args.per_device_train_batch_size
        logprobs, _, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, rows["completion_ids"].shape[1], batch_size=size
        )
        return logprobs

    def _mixed(self, rows: dict[str, Any], episode: Tensor) -> Tensor:
        """ATOD's advantages [B, T] of rows that belong to `episode` [B]."""
        kappa, rho = self.schedule.coefficients(self.state.global_step + 1)
        mask = rows["completion_mask"].bool()
        if "tool_mask" in rows:
            mask &= rows["tool_mask"].bool()
        metrics = self._metrics["train"]
        metrics["atod/kappa"].append(kappa)
        metrics["atod/rho"].append(rho)
        if self.teacher is None or kappa == 0.0:
            return rho * rows["advantages"].unsqueeze(-1).expand(mask.shape)
        old = rows.get("old_per_token_logps")
        old = self._scores(self.model, rows) if old is None else old
        teacher = self._scores(self.teacher, rows)
        log_ratio = sampled_log_ratio(old, teacher, mask)
        weights = self._token_weights(old, teacher, mask, episode)
        tokens = mask.sum().clamp(min=1)
        metrics["atod/log_ratio"].append((log_ratio.abs().sum() / tokens).item())
        metrics["atod/weight"].append((weights.sum() / tokens).item())
        return atod_advantages(log_ratio, weights, rows["advantages"], kappa, rho, mask)

    def _token_weights(self, old: Tensor, teacher: Tensor, mask: Tensor, episode: Tensor) -> Tensor:
        """T-DUR's weight of every token [B, T]; a turn is a run of sampled tokens in a row."""
        before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
        number = (mask & ~before).cumsum(1) * mask
        turns = number.amax(1)
        row = torch.repeat_interleave(turns)
        first = (turns.cumsum(0) - turns)[row]
        turn = torch.arange(len(row), device=row.device) - first + 1
        turn_mask = number[row] == turn.unsqueeze(1)
        disagreement, uncertainty = turn_statistics(old[row], teacher[row], turn_mask)
        weights = turn_weights(
            disagreement,
            uncertainty,
            min_turns=self.min_turns,
            min_disagreement=self.min_disagreement,
            variant=self.weights,
            trajectory_index=episode[row],
        )
        return torch.zeros_like(old).index_add_(0, row, turn_mask * weights.unsqueeze(1))
