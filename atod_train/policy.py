"""A language model with its tokenizer: making, loading, saving, and log-probs of completions.

Everything that trains uses the log-probs at temperature 1. Logits are computed only where a
completion token was sampled, and only a chunk of them exists at a time: with a vocabulary of
150,000 the logits of a whole batch would not fit anywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.batching import Minibatch, length_buckets, select_sequences
from atod_train.lora import merged_weights
from atod_train.types import Batch

LOGITS_PER_CHUNK = 2**26
"""Logits that exist at once; 256 MiB in float32."""


@dataclass(frozen=True)
class ModelShape:
    """The size of a decoder that is trained from scratch."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    max_positions: int = 4096


MODEL_SHAPES = {
    "micro": ModelShape(layers=1, width=32, heads=2, mlp_width=64),
    "mini": ModelShape(layers=2, width=128, heads=4, mlp_width=256),
    "tiny": ModelShape(layers=4, width=128, heads=4, mlp_width=352),
    "small": ModelShape(layers=6, width=224, heads=7, mlp_width=608),
}
"""Without the embedding (`width` for each word): 0.01, 0.33, 0.8 and 3.7 M parameters."""


@dataclass(frozen=True)
class MicroBatch:
    """Scores of some turn rows, with the graph that leads to the parameters."""

    rows: Tensor
    """[r] int64: rows of the batch that was given."""
    logprobs: Tensor
    """[r, T] float32, differentiable, 0 on padding."""
    entropies: Tensor
    """[r, T] float32, differentiable, 0 on padding: entropy of each token's distribution, nats."""


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer.

    The record itself is frozen; the model's parameters are what training changes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    autocast_dtype: torch.dtype | None = None
    """Run the decoder layers in this lower precision (`torch.bfloat16`); None: as stored."""
    gradient_checkpointing: bool = False
    """Compute the decoder layers again in the backward pass instead of keeping what they gave."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._embedding().device

    @property
    def pad_id(self) -> int:
        """Id for padding; any id serves, since padding is never attended to nor predicted."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model is made for, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def embedding_rows(self) -> int:
        """Size of the output distribution: the vocabulary, perhaps padded."""
        return len(self._embedding())

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states of the decoder.

        Args:
            input_ids: [s, l] int64 on the model's device. With no further inputs attention is
                causal and sequences are taken as right-padded, so that no mask is needed.
            **inputs: Further inputs of the transformers model (mask, positions, cache).

        Returns:
            [s, l, width].
        """
        inputs.setdefault("use_cache", False)
        with self._precision():
            output = self.model.base_model(input_ids=input_ids, **inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [.., vocabulary] float32 from hidden states [.., width]."""
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden.to(head.weight.dtype))
        return logits.float()

    def completion_logprobs(
        self, batch: Batch, tokens_per_microbatch: int = 16384, requires_grad: bool = False
    ) -> Tensor:
        """Log-probs of the completion tokens at temperature 1.

        Args:
            batch: Packed or unpacked batch, on any device.
            tokens_per_microbatch: Padded tokens that go through the model at once.
            requires_grad: Keep the graph of the whole batch; for updates `microbatches` needs
                less memory.

        Returns:
            [R, T] float32 on the model's device, 0 on padding.
        """
        shape = batch.completion_ids.shape
        scored = torch.zeros(shape, dtype=torch.float32, device=self.device)
        with torch.set_grad_enabled(requires_grad):
            for part in self._parts(batch, tokens_per_microbatch):
                logprobs, _ = self._score(part.batch, with_entropy=False)
                scored = scored.index_copy(0, part.rows.to(self.device), logprobs)
        return scored

    def microbatches(
        self, batch: Batch, tokens_per_microbatch: int = 16384
    ) -> Iterator[MicroBatch]:
        """Differentiable scores of a batch, part by part: call backward on each before the next.

        Args:
            batch: Packed or unpacked batch, on any device.
            tokens_per_microbatch: Padded tokens that go through the model at once.

        Yields:
            Parts whose rows together are 0..R-1, each row once.
        """
        for part in self._parts(batch, tokens_per_microbatch):
            with torch.enable_grad(), self._recomputing():
                logprobs, entropies = self._score(part.batch, with_entropy=True)
            yield MicroBatch(rows=part.rows, logprobs=logprobs, entropies=entropies)

    def save(self, path: str | Path) -> None:
        """Write model, configuration and tokenizer as a folder that `from_pretrained` reads.

        Adapters are merged into the weights that they adapt; the policy itself keeps them apart.
        The folder appears under its name only when it is complete; one of that name is replaced.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        previous = target.with_name(f".{target.name}.previous-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self.model.save_pretrained(partial, state_dict=merged_weights(self.model))
            self.tokenizer.save_pretrained(partial)
            if target.exists():
                target.rename(previous)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)

    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Lets transformers checkpoint its layers, which it does in training mode only."""
        self.model.train(self.gradient_checkpointing)
        try:
            yield
        finally:
            self.model.eval()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _parts(self, batch: Batch, tokens_per_microbatch: int) -> Iterator[Minibatch]:
        longest = batch.input_ids.shape[1]
        if longest > self.max_positions:
            raise AtodError(
                f"A sequence of {longest} tokens is longer than the {self.max_positions} positions "
                f"of model {self.name}. Lower max_context."
            )
        for sequences in length_buckets(batch.attention_mask.sum(dim=1), tokens_per_microbatch):
            yield select_sequences(batch, sequences)

    def _score(self, batch: Batch, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [r, T] of one micro-batch; entropies are 0 if unasked."""
        device = self.device
        mask = batch.completion_mask.to(device)
        row, column = mask.nonzero(as_tuple=True)
        # The token at position p is predicted from position p - 1.
        position = batch.start.to(device)[row] + column - 1
        flat = batch.sequence_index.to(device)[row] * batch.input_ids.shape[1] + position
        hidden = self.hidden_states(batch.input_ids.to(device))
        hidden = hidden.flatten(0, 1).index_select(0, flat)
        targets = batch.completion_ids.to(device)[row, column]
        logprobs, entropies = self._chunked_scores(hidden, targets, with_entropy)
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=device)
        return (
            empty.masked_scatter(mask, logprobs),
            empty.masked_scatter(mask, entropies) if with_entropy else empty,
        )

    def _chunked_scores(
        self, hidden: Tensor, targets: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [m] of `targets` [m] given `hidden` [m, width]."""
        rows = max(1, LOGITS_PER_CHUNK // self.embedding_rows)
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if len(chunks) <= 1 or not torch.is_grad_enabled():
            scores = [self._scores(*chunk, with_entropy) for chunk in chunks]
        else:
            # Logits are computed again in the backward pass instead of being kept.
            scores = [
                checkpoint(self._scores, *chunk, with_entropy, use_reentrant=False)
                for chunk in chunks
            ]
        return torch.cat([s[0] for s in scores]), torch.cat([s[1] for s in scores])

    def _scores(self, hidden: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden)
        log_total = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
        if not with_entropy:
            return logprobs, torch.zeros_like(logprobs)
        probabilities = (logits - log_total[:, None]).exp()
        return logprobs, log_total - (probabilities * logits).sum(dim=-1)


def build_policy(
    shape: ModelShape | str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    name: str | None = None,
) -> Policy:
    """Make a decoder with random weights (Llama architecture, tied embeddings, rotary positions).

    Args:
        shape: A `ModelShape`, or the name of a preset of `MODEL_SHAPES`.
        tokenizer: Its vocabulary sets the size of the embedding.
        seed: Seed of the weights; the global random state is left as it was.
        name: Name for reports; by default the preset's name, or "custom".

    Raises:
        InvalidSettingError: No preset of that name.
    """
    label = shape if isinstance(shape, str) else "custom"
    if isinstance(shape, str):
        if shape not in MODEL_SHAPES:
            raise InvalidSettingError(
                f"There is no model preset {shape!r}. Use one of {', '.join(MODEL_SHAPES)}, or the "
                "path of a saved model with load_policy."
            )
        shape = MODEL_SHAPES[shape]
    config = llama_config(shape, vocabulary=len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Policy(model=model.eval(), tokenizer=tokenizer, name=name or label)


def llama_config(shape: ModelShape, vocabulary: int) -> LlamaConfig:
    """The architecture of a decoder that is trained from scratch."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
