"""A language model with its tokenizer: hidden states, logits, and saving."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from atod_gym.errors import AtodError
from atod_train.files import replacing_folder
from atod_train.models.lora import merged_weights

NO_LIMIT = 2**30
"""`Policy.max_positions` of a model without a limit."""

Computation = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer.

    The record is frozen; training changes the model's parameters.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    autocast_dtype: torch.dtype | None = None
    """Lower precision of the decoder layers (`torch.bfloat16`); None: as stored."""
    gradient_checkpointing: bool = False
    """Recompute the decoder layers in the backward pass instead of keeping their results."""
    forward_within: Callable[[Computation], dict[str, Tensor]] | None = None
    """Run a computation as one forward pass of `model`, for models whose weights are gathered for
    it (FSDP). None: call it directly."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._embedding().device

    @property
    def layer_dtype(self) -> torch.dtype:
        """Precision of the decoder layers."""
        return self.autocast_dtype or self.model.dtype

    @property
    def pad_id(self) -> int:
        """Id for padding; any id is valid, since padding is never attended to or predicted."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    @property
    def max_positions(self) -> int:
        """Longest sequence of the model in tokens; `NO_LIMIT` if its configuration has none."""
        return max_positions(self.model.config) or NO_LIMIT

    @cached_property
    def vocabulary(self) -> int:
        """Size of the output distribution: the tokenizer's ids without padded rows."""
        added = max(self.tokenizer.added_tokens_decoder, default=-1)
        return min(self.embedding_rows, max(self.tokenizer.vocab_size, added + 1))

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding: the vocabulary, possibly padded."""
        return len(self._embedding())

    def hidden_states(
        self, input_ids: Tensor, *, cache: Cache | None = None, **inputs: Any
    ) -> Tensor:
        """Return the last hidden states [s, l, width] of the decoder.

        Args:
            input_ids: [s, l] int64 on the model's device. Without further inputs attention is
                causal and sequences are right-padded, so that no mask is needed.
            cache: Keys and values so far; the new ones are added.
            **inputs: Further inputs of the transformers model (mask, positions).
        """
        inputs["use_cache"] = cache is not None
        if cache is not None:
            kind: Any = type(self.model.base_model)
            inputs[_cache_argument(kind)] = cache
        with self.precision():
            hidden: Tensor = self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits [.., vocabulary] float32 from hidden states [.., width].

        Padded rows of the embedding, which belong to no token, are not in the distribution. The
        weights of a bfloat16 model are converted: its product would be rounded to 8 bits, more
        than student and teacher may differ by.
        """
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        # On a processor, converting for each token would take as long as the product.
        is_kept = head.weight.dtype != torch.float32 and self.device.type == "cpu"
        weight = self._head_weight if is_kept else head.weight.float()
        with self.precision(enabled=False):
            logits = torch.nn.functional.linear(
                hidden.float(), weight, None if bias is None else bias.float()
            )
        return logits[..., : self.vocabulary]

    @cached_property
    def _head_weight(self) -> Tensor:
        """Return the weights of a bfloat16 output layer in float32; they are never trained."""
        with torch.inference_mode(False):  # kept for backward passes, too
            return self.model.get_output_embeddings().weight.detach().float()

    def precision(self, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which the layers run in `autocast_dtype`."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled)

    def save(self, path: str | Path, card: str = "") -> None:
        """Write model, configuration and tokenizer as a folder for `from_pretrained`.

        Adapters are merged into the saved weights; the policy itself keeps them separate.
        The folder appears when it is complete. An existing folder is replaced; if its configuration
        is the same, it has a complete model at every moment. `card` is the text of its README.md.

        Raises:
            AtodError: a weight is NaN or infinite, or the weights cannot be written; the existing
                files are then unchanged.
        """
        weights = merged_weights(self.model)
        for name, weight in (weights or self.model.state_dict()).items():
            if weight.is_floating_point() and not bool(weight.isfinite().all()):
                raise AtodError(
                    f"Model {self.name} is not saved: {name} has NaN or infinity. Lower train.lr."
                )
        try:
            with replacing_folder(Path(path), "config.json", last="*.safetensors") as partial:
                # One file of weights: it is replaced as a whole.
                self.model.save_pretrained(partial, state_dict=weights, max_shard_size="10TB")
                self.tokenizer.save_pretrained(partial)
                # safetensors makes files that only their owner can read.
                for weights_file in partial.glob("*.safetensors"):
                    weights_file.chmod((partial / "config.json").stat().st_mode)
                if card:
                    (partial / "README.md").write_text(card, encoding="utf-8")
        except SafetensorError as error:
            raise AtodError(
                f"The model {path} could not be written ({error}). Free disk space; the model "
                "saved before is unchanged."
            ) from error

    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight


def max_positions(config: Any) -> int | None:
    """Return the longest sequence of a transformers configuration; None: it has no limit.

    longrope has other frequencies beyond its original length, which all rows of a batch would get
    with the longest: sequences end there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # also of layers
    name = "original_max_position_embeddings"
    lengths = [
        getattr(config, "max_position_embeddings", None),
        *(
            p.get(name, getattr(config, name, None))
            for p in parts
            if p.get("rope_type") == "longrope"
        ),
    ]
    return min((int(length) for length in lengths if length is not None), default=None)


@cache
def _cache_argument(kind: Any) -> str:
    """Return the name of a model's cache argument, which depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of minus infinity where a bool mask hides something, else 0."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))
