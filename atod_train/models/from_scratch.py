"""Make decoders with random weights, for models that are trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from atod_gym.errors import InvalidSettingError
from atod_train.models.policy import Policy


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
        seed: Seed of the weights; the global random state is not changed.
        name: Name for reports; by default the preset's name, or "custom".

    Raises:
        InvalidSettingError: No preset of that name.
    """
    if isinstance(shape, str):
        if shape not in MODEL_SHAPES:
            raise InvalidSettingError(
                f"Unknown model preset {shape!r}. Use one of {', '.join(MODEL_SHAPES)}, or the "
                "path of a saved model with load_policy."
            )
        name, shape = name or shape, MODEL_SHAPES[shape]
    config = llama_config(shape, len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Policy(model=model.eval(), tokenizer=tokenizer, name=name or "custom")


def llama_config(shape: ModelShape, vocabulary: int) -> LlamaConfig:
    """Return the architecture of a decoder that is trained from scratch."""
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
