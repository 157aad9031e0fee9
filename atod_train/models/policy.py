"""A language model with its tokenizer: making, loading, saving, and log-probs of completions.

Everything that trains uses the log-probs at temperature 1. Logits are computed only where a
completion token was sampled, and only a chunk of them exists at a time: with a vocabulary of
150,000 the logits of a whole batch would not fit anywhere.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.models.fast.llama import is_llama_on_cpu, last_layer_at, take
from atod_train.models.fast.prefix_trees import Part, can_take_trees, crossover_of, parts
from atod_train.models.lora import merged_weights
from atod_train.models.scores import MicroBatch, score_tokens
from atod_train.records import Batch, TokenScores

LOGITS_PER_CHUNK = 2**26
"""Logits that exist at once; 256 MiB in float32."""

NO_LIMIT = 2**30
"""`Policy.max_positions` of a model without a limit."""

_CACHE_ARGUMENTS: dict[type, str] = {}

Computation = Callable[[], dict[str, Tensor]]


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
    "mini": ModelShape(layers=2, width=128, heads=2, mlp_width=256),
    "tiny": ModelShape(layers=4, width=128, heads=2, mlp_width=352),
    "small": ModelShape(layers=6, width=224, heads=7, mlp_width=608),
}
"""Without the embedding (`width` for each word): 0.01, 0.33, 0.8 and 3.7 M parameters."""


@dataclass(frozen=True)
class Reference:
    """A frozen model with which distributions are compared, token by token.

    Attributes:
        policy: scores the same ids; it may be on another device.
        top_k: compare the student's most likely tokens and all others together as one; 0: compare
            the whole vocabulary.
    """

    policy: Policy
    top_k: int = 0


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
    forward_within: Callable[[Computation], dict[str, Tensor]] | None = None
    """Runs a computation as one forward pass of `model`; for models whose weights are gathered at
    that moment."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._embedding().device

    @property
    def layer_dtype(self) -> torch.dtype:
        """Precision that the decoder layers run in."""
        return self.autocast_dtype or self.model.dtype

    @property
    def pad_id(self) -> int:
        """Id for padding; any id serves, since padding is never attended to nor predicted."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model is made for, in tokens; very large without a limit."""
        return max_positions(self.model.config) or NO_LIMIT

    @cached_property
    def vocabulary(self) -> int:
        """Size of the output distribution: the tokenizer's ids; rows padded beyond them are cut."""
        added = max(self.tokenizer.added_tokens_decoder, default=-1)
        return min(self.embedding_rows, max(self.tokenizer.vocab_size, added + 1))

    @property
    def crossover(self) -> int:
        """See `prefix_trees.joined`."""
        return crossover_of(self.model.config) if can_take_trees(self.model) else 0

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding: the vocabulary, perhaps padded."""
        return len(self._embedding())

    def hidden_states(
        self, input_ids: Tensor, *, cache: Cache | None = None, **inputs: Any
    ) -> Tensor:
        """Last hidden states of the decoder.

        Args:
            input_ids: [s, l] int64 on the model's device. With no further inputs attention is
                causal and sequences are taken as right-padded, so that no mask is needed.
            cache: Keys and values so far; the new ones are added.
            **inputs: Further inputs of the transformers model (mask, positions).

        Returns:
            [s, l, width].
        """
        inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs[_cache_argument(self.model.base_model)] = cache
        with self.precision():
            output = self.model.base_model(input_ids=input_ids, **inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def states_at(self, input_ids: Tensor, wanted: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states at some positions; where it is possible only those are computed.

        Args:
            input_ids: [s, l], see `hidden_states`.
            wanted: [s, w] int64, positions in `input_ids`.
            **inputs: see `hidden_states`.

        Returns:
            [s, w, width].
        """
        # Layers that are computed again in the backward pass would then be computed in full.
        if is_llama_on_cpu(self.model) and not self.gradient_checkpointing:
            with last_layer_at(self.model, wanted):
                return self.hidden_states(input_ids, **inputs)
        return take(self.hidden_states(input_ids, **inputs), wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [.., vocabulary] float32 from hidden states [.., width].

        Ids that the tokenizer does not have, of padded embeddings, are no part of the distribution.
        """
        head = self.model.get_output_embeddings()
        with self.precision(enabled=False):
            logits: Tensor = head(hidden.to(head.weight.dtype))
        return logits[..., : self.vocabulary].float()

    def completion_logprobs(self, batch: Batch, tokens_per_microbatch: int = 16384) -> Tensor:
        """Return the log-probs of the completion tokens at temperature 1, without gradient.

        Args:
            batch: Packed or unpacked batch, on any device.
            tokens_per_microbatch: Padded tokens that go through the model at once.

        Returns:
            [R, T] float32 on the model's device, 0 on padding.
        """
        return self.score(batch, tokens_per_microbatch).logprobs

    @torch.no_grad()
    def score(
        self,
        batch: Batch,
        tokens_per_microbatch: int = 16384,
        *,
        with_entropy: bool = False,
        reference: Reference | None = None,
    ) -> TokenScores:
        """All that is asked of a batch in one forward pass, without gradient.

        Args:
            batch: Packed or unpacked batch, on any device.
            tokens_per_microbatch: Padded tokens that go through the model at once.
            with_entropy: Give entropies.
            reference: Give its log-probs and the divergences from it.

        Returns:
            Scores of the rows 0..R-1, on the model's device.
        """
        found: dict[str, Tensor] = {}
        for part in self.parts(batch, tokens_per_microbatch):
            rows = part.rows.to(self.device)
            for name, values in vars(self._score(part, with_entropy, reference)).items():
                if values is not None:
                    whole = found.setdefault(name, values.new_zeros(batch.completion_ids.shape))
                    whole.index_copy_(0, rows, values)
        return TokenScores(**found)

    def microbatches(
        self,
        batch: Batch,
        tokens_per_microbatch: int = 16384,
        *,
        with_entropy: bool = False,
        reference: Reference | None = None,
    ) -> Iterator[MicroBatch]:
        """Differentiable scores of a batch, part by part: call backward on each before the next.

        Args:
            batch: Packed or unpacked batch, on any device.
            tokens_per_microbatch: Padded tokens that go through the model at once.
            with_entropy: Give entropies.
            reference: Give its log-probs and the divergences from it.

        Yields:
            Parts whose rows together are 0..R-1, each row once.
        """
        for part in self.parts(batch, tokens_per_microbatch):
            with torch.enable_grad(), self._recomputing():
                scores = self._score(part, with_entropy, reference)
            yield MicroBatch(rows=part.rows, **vars(scores))

    def save(self, path: str | Path, card: str = "") -> None:
        """Write model, configuration and tokenizer as a folder that `from_pretrained` reads.

        Adapters are merged into the weights that they adapt; the policy itself keeps them apart.
        The folder appears under its name only when it is complete. One of that name is replaced,
        and holds a whole model at every moment if its configuration is the same.

        Args:
            path: of the folder.
            card: text of its README.md; empty: none.

        Raises:
            AtodError: a weight is NaN or infinite, or the weights cannot be written; what was
                there stays.
        """
        weights = merged_weights(self.model)
        for name, weight in (weights or self.model.state_dict()).items():
            if weight.is_floating_point() and not bool(weight.isfinite().all()):
                raise AtodError(
                    f"Model {self.name} is not saved: {name} holds NaN or infinity. Lower train.lr."
                )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            # One file of weights: it is replaced as a whole.
            self.model.save_pretrained(partial, state_dict=weights, max_shard_size="10TB")
            self.tokenizer.save_pretrained(partial)
            if card:
                (partial / "README.md").write_text(card, encoding="utf-8")
            _put_in_place(partial, target)
        except SafetensorError as error:
            raise AtodError(
                f"The model {target} could not be written ({error}). Free disk space; what was "
                "saved before is untouched."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

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

    def precision(self, enabled: bool = True) -> AbstractContextManager[Any]:
        """Within it the layers run in `autocast_dtype`; weights are converted once."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled)

    def parts(self, batch: Batch, tokens_per_microbatch: int) -> Iterator[Part]:
        """What goes through the model one after the other, see `prefix_trees.parts`."""
        longest = batch.input_ids.shape[1]
        if longest > self.max_positions:
            raise AtodError(
                f"A sequence of {longest} tokens is longer than the {self.max_positions} positions "
                f"of model {self.name}. Lower max_context."
            )
        return parts(batch, tokens_per_microbatch, self.crossover)

    def _score(
        self, part: Part, with_entropy: bool, reference: Reference | None = None
    ) -> TokenScores:
        """Scores of one micro-batch."""
        run = self.forward_within or (lambda computation: computation())
        return TokenScores(**run(lambda: self._score_here(part, with_entropy, reference)))

    def _score_here(
        self, part: Part, with_entropy: bool, reference: Reference | None
    ) -> dict[str, Tensor]:
        batch = part.batch
        mask = batch.completion_mask.to(self.device)
        targets = batch.completion_ids.to(self.device)[mask]
        theirs = None
        if reference is not None:
            with torch.no_grad():
                theirs = reference.policy._states_before_completions(part)
        scores = score_tokens(
            (self._states_before_completions(part), theirs),
            (self.logits, reference.policy.logits if reference else None),
            targets,
            with_entropy=with_entropy,
            top_k=reference.top_k if reference else 0,
            rows_at_once=max(1, LOGITS_PER_CHUNK // self.embedding_rows),
        )
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=self.device)
        return {name: empty.masked_scatter(mask, values) for name, values in scores.items()}

    def _states_before_completions(self, part: Part) -> Tensor:
        """What the output layer sees where completion tokens are predicted.

        Returns:
            [m, width] for the m sampled tokens of the part, row after row, on the model's device.
        """
        ids, wanted, row, column = (tensor.to(self.device) for tensor in part.layout())
        inputs = part.trees.inputs(self.layer_dtype, self.device) if part.trees else {}
        return self.states_at(ids, wanted, **inputs)[row, column]


def _put_in_place(made: Path, target: Path) -> None:
    """Give a finished folder of a model its name, which another may have."""
    config = "config.json"
    if (target / config).is_file() and (
        (target / config).read_bytes() != (made / config).read_bytes()
    ):
        # Files of two models must not be mixed.
        previous = made.with_name(f"{made.name}-previous")
        target.rename(previous)
        made.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
        return
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        names = {file.name for file in made.iterdir()}
        for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
            os.replace(made / name, target / name)
        for file in target.iterdir():
            if file.name not in names and file.is_file():
                file.unlink()


def max_positions(config: Any) -> int | None:
    """Return the longest sequence of a transformers configuration; None: it names no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def _cache_argument(model: torch.nn.Module) -> str:
    """What a model calls its cache: older versions of transformers have another name for it."""
    kind = type(model)
    if kind not in _CACHE_ARGUMENTS:
        is_new = "cache" in inspect.signature(model.forward).parameters
        _CACHE_ARGUMENTS[kind] = "cache" if is_new else "past_key_values"
    return _CACHE_ARGUMENTS[kind]


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
