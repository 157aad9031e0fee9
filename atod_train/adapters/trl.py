"""TRL: our turn protocol as its rollout function, and ATOD's objective inside its GRPO trainer.

`Rollouts` is what `GRPOTrainer(rollout_func=...)` takes: episodes of any environment, token for
token as our own trainer plays them, sampled by whatever TRL samples with. In chat style an episode
is one row, the environment's tokens masked out, and plain `GRPOTrainer` trains on it. In window
style every turn is a row of its own, which takes `ATODTrainer`. That adds the teacher's part to
TRL's advantages (Eq. 8), with schedule and T-DUR, also to episodes played with
`environment_factory`; with kappa = 0 and rho = 1 it is TRL's GRPO. Tested with TRL 1.16.

With `use_vllm=True` episodes are sampled by vLLM, in both modes of TRL, and
`vllm_importance_sampling_correction` applies to turn rows as it does to episodes. Its default mode,
`sequence_mask`, drops rows whose log-probs differ by more than log 3 in sum, which long episodes
soon do: prefer `token_truncate`. `vllm_enable_sleep_mode` sleeps after every turn, not after the
rollout, and loads all weights again.

Differences to our trainer: the return's part is TRL's, whose group normalisation adds 1e-4 to the
standard deviation where ours adds 1e-6; loss and clipping are TRL's (`delta=3.0` is the dual clip,
`loss_type="dapo"` or `"bnpo"` the token mean).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.adapters.objective import Variant, mixed_advantages
from atod_train.adapters.token_rows import RowTokens, TokenPlayer, outcome, rows_of
from atod_train.algorithm.atod import Schedule
from atod_train.config import EnvConfig, parse_prompt_style
from atod_train.models.dialogue import DialogueEncoder
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Limits
from atod_train.teachers.vocabulary import require_same_vocabulary

try:
    from accelerate.utils import broadcast_object_list
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from trl import GRPOTrainer
    from trl.models import prepare_deepspeed, prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, pad
except ImportError as error:
    raise MissingExtraError(
        f"The adapter for TRL needs packages that are not installed ({error.name}): "
        "pip install 'atod-gym[train,trl]'"
    ) from error

TURN_ROWS = "turn_rows"
"""The column of a rollout's output that holds an episode's turns in window style."""


class Rollouts:
    """A rollout function for TRL: plays one episode for every prompt, which names the task.

    Args:
        env: which environment, its prompts and rewards; the same settings as for our trainer.
        split: the split that the data set's tasks belong to, see
            `atod_gym.adapters.trl.task_dataset(..., tools=False)`.

    TRL's `max_completion_length` limits the tokens of a turn, not of an episode; an episode ends
    where its next turn would not fit the model's positions, or the longest sequence of vLLM.
    """

    def __init__(self, env: EnvConfig, split: str = "train") -> None:
        self.config = env
        self.split = split
        self._player: TokenPlayer | None = None

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Play the tasks that prompts name, one for each episode; the trainer samples completions.

        Returns:
            `prompt_ids`, `completion_ids`, `logprobs` and `env_mask` (1 on sampled tokens) for
            each episode; `episode_return`, `success`, `score` and `turns`; in window style
            `turn_rows`.

        Raises:
            InvalidSettingError: window style with a trainer that knows no turn rows, or with a
                penalty on the distance from a reference model.
            AtodError: as environments do; no first prompt fits the model.
        """
        is_window = parse_prompt_style(self.config.prompt_style)[0] == "window"
        if is_window and not isinstance(trainer, ATODTrainer):
            raise InvalidSettingError(
                "In window style every turn is a row of its own, which GRPOTrainer cannot take: "
                "use ATODTrainer (without a teacher it is GRPO), or prompt_style='chat'."
            )
        if is_window and trainer.beta != 0.0:
            raise InvalidSettingError(
                f"In window style beta must be 0.0, not {trainer.beta}: TRL scores its reference "
                "model on whole episodes."
            )
        if self._player is None:
            style, options = self.config.prompt_style, self.config.template_options
            encoder = DialogueEncoder(trainer.processing_class, style, options)
            limits = Limits(trainer.max_completion_length, _context(trainer), can_restart=False)
            self._player = TokenPlayer(EnvPool(self.config, self.split), encoder, limits)
        player = self._player
        episodes = player.pool.start(prompts)
        while True:
            active = [episode for episode in episodes if episode.stop_reason is None]
            asked = [(episode, player.next_prompt(episode)) for episode in active]
            playing = [(episode, ids) for episode, ids in asked if ids is not None]
            count = _prompts_of_a_turn(trainer, len(playing))
            if not count:
                break
            fillers = [[player.encoder.end_of_turn_id]] * (count - len(playing))
            sampled = trainer._generate_single_turn(
                [*(ids for _, ids in playing), *fillers], None, {}, 1
            )
            own = [values and values[: len(playing)] for values in sampled]
            player.play([episode for episode, _ in playing], *own)
        if not any(episode.turns for episode in episodes):
            raise AtodError("No first prompt fits the model; use shorter prompts.")
        records = [episode.trajectory() for episode in episodes]
        outcomes = [outcome(record) for record in records]
        rows = [rows_of(record, player.encoder.end_of_turn_id) for record in records]
        first = [turns[0] for turns in rows]
        has_logprobs = all(row.logprobs is not None for row in first if any(row.mask))
        logprobs = [row.logprobs or [0.0] * len(row.mask) for row in first]
        return {
            "prompt_ids": [row.prompt_ids for row in first],
            "completion_ids": [row.response_ids for row in first],
            "env_mask": [row.mask for row in first],
            "logprobs": logprobs if has_logprobs else None,
            "episode_return": [record.episode_return for record in records],
            **{name: [each[name] for each in outcomes] for name in outcomes[0]},
            **({TURN_ROWS: rows} if is_window else {}),
        }


def _context(trainer: GRPOTrainer) -> int:
    """Return the longest sequence that the sampler takes."""
    longest = int(trainer.model.config.get_text_config().max_position_embeddings)
    if not trainer.use_vllm:
        return longest
    if trainer.vllm_mode == "colocate":
        return min(longest, trainer.vllm_generation.llm.llm_engine.model_config.max_model_len)
    answer: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        client = trainer.vllm_generation.vllm_client
        answer = [client._get(f"{client.base_url}/v1/models")["data"][0]["max_model_len"]]
    return min(longest, broadcast_object_list(answer)[0])


def _prompts_of_a_turn(trainer: GRPOTrainer, playing: int) -> int:
    """Return how many prompts this process asks for, `playing` of them those of episodes.

    Where processes sample together, TRL expects as many prompts from each: one with fewer episodes
    left would be given the completions of another.
    """
    args = trainer.args
    is_alone = args.use_vllm and args.vllm_mode == "colocate"
    if is_alone and args.vllm_tensor_parallel_size == 1 and not args.vllm_enable_sleep_mode:
        return playing
    return _most(trainer, playing)


def _most(trainer: GRPOTrainer, count: int) -> int:
    """Return the largest of all processes' counts."""
    own = torch.tensor([count], device=trainer.accelerator.device)
    return int(trainer.accelerator.gather(own).max())


def episode_returns(*, episode_return: Sequence[float], **columns: object) -> list[float]:
    """Return the environment's rewards: the reward function that `Rollouts` needs."""
    return list(episode_return)


class ATODTrainer(GRPOTrainer):
    """TRL's GRPO trainer with ATOD's advantages: kappa w_k delta_t + rho A (Eq. 8).

    Args:
        *args: as of `GRPOTrainer`.
        teacher: the model that scores the student's tokens, as a model, folder or hub name; None:
            no teacher's part, whatever kappa is.
        schedule: kappa and rho over the optimiser steps; the paper's by default. Schedules that
            follow the run, such as adaptive and gap, are those of atod-train alone.
        turn_weights: `soft_or` is T-DUR, `uniform` none; `disagreement` and `uncertainty` are
            its parts.
        **kwargs: as of `GRPOTrainer`.

    Raises:
        AtodError: The tokenizers of student and teacher differ.
        InvalidSettingError: Liger's loss is on, which takes one advantage per row.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | None = None,
        schedule: Schedule | None = None,
        turn_weights: Variant = "soft_or",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "use_liger_kernel", False):
            raise InvalidSettingError("ATODTrainer needs use_liger_kernel=False.")
        self.schedule = schedule or Schedule()
        self.turn_weights = turn_weights
        self.teacher: Any = None if teacher is None else self._prepared(teacher)

    def _prepared(self, teacher: PreTrainedModel | str) -> Any:
        model: Any = teacher
        if isinstance(teacher, str):
            ours, theirs = self.processing_class.get_vocab(), AutoTokenizer.from_pretrained(teacher)
            student = str(self.model.config._name_or_path)
            require_same_vocabulary(ours, theirs.get_vocab(), student, teacher)
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
        self, output: dict[str, Any], episodes: Sequence[Sequence[RowTokens]]
    ) -> tuple[dict[str, Any], Tensor]:
        """Replace the rows of episodes by those of their turns; return each row's episode."""
        device = output["prompt_ids"].device
        turns = [(i, turn) for i, rows in enumerate(episodes) for turn in rows]
        # Later the rows are divided into this many equal parts, and what is left over is dropped.
        # TRL's loss gathers statistics of rows, so each process has as many as every other.
        parts = self.args.steps_per_generation if self.model.training else 1
        most = _most(self, len(turns))
        filler = self._tokenizer.pad_token_id
        missing = most + -most % parts - len(turns)
        turns += [(0, RowTokens([filler], [filler], [0], None))] * missing
        rows = [turn for _, turn in turns]
        episode = torch.tensor([number for number, _ in turns], device=device)

        def padded(rows: Sequence[list[int]], value: int, side: str) -> Tensor:
            return pad([torch.tensor(row) for row in rows], value, side).to(device)

        expanded = {
            "prompt_ids": padded([row.prompt_ids for row in rows], filler, "left"),
            "prompt_mask": padded([[1] * len(row.prompt_ids) for row in rows], 0, "left"),
            "completion_ids": padded([row.response_ids for row in rows], filler, "right"),
            "completion_mask": padded([[1] * len(row.response_ids) for row in rows], 0, "right"),
            "tool_mask": padded([row.mask for row in rows], 0, "right"),
            "advantages": output["advantages"][episode],
        }
        tokens = expanded["tool_mask"].sum()
        expanded["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if "old_per_token_logps" in output:
            expanded["old_per_token_logps"] = self._scores(self.model, expanded)
        if "importance_sampling_ratio" in output:
            sampled = [row.logprobs or [0.0] * len(row.mask) for row in rows]
            expanded["importance_sampling_ratio"] = self._sampling_ratio(
                expanded["old_per_token_logps"],
                pad([torch.tensor(row) for row in sampled], 0.0, "right").to(device),
                (expanded["completion_mask"] * expanded["tool_mask"]).bool(),
            )
        return expanded, episode

    def _sampling_ratio(self, logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
        """Correct for the sampler's distribution as TRL does, from [B, T] to [B, T] or [B, 1]."""
        level, _, form = self.vllm_importance_sampling_mode.partition("_")
        difference = (logprobs - sampled).masked_fill(~mask, 0.0)
        if level == "sequence":
            difference = difference.sum(dim=1, keepdim=True)
        ratio = difference.exp()
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        clipped = ratio.clamp(low or 0.0, math.inf if high is None else high)
        return clipped if form == "truncate" else ratio.masked_fill(ratio != clipped, 0.0)

    @torch.no_grad()
    def _scores(self, model: Any, rows: dict[str, Any]) -> Tensor:
        """Compute the log-probs [B, T] of the completion tokens."""
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        attention = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        size = self.args.per_device_train_batch_size
        logprobs, _, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, rows["completion_ids"].shape[1], batch_size=size
        )
        return logprobs

    def _mixed(self, rows: dict[str, Any], episode: Tensor) -> Tensor:
        """Return ATOD's advantages [B, T] of rows that belong to `episode` [B]."""
        kappa, rho = self.schedule.coefficients(self.state.global_step + 1)
        mask = rows["completion_mask"].bool()
        if "tool_mask" in rows:
            mask &= rows["tool_mask"].bool()
        student = teacher = None
        if self.teacher is not None and kappa != 0.0:
            student = rows.get("old_per_token_logps")
            student = self._scores(self.model, rows) if student is None else student
            teacher = self._scores(self.teacher, rows)
        dtypes = {model.dtype for model in (self.model, self.teacher) if hasattr(model, "dtype")}
        advantages, metrics = mixed_advantages(
            rows["advantages"],
            student,
            teacher,
            mask,
            episode,
            kappa=kappa,
            rho=rho,
            variant=self.turn_weights,
            is_low_precision=self.accelerator.mixed_precision != "no" or dtypes != {torch.float32},
        )
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        return advantages
