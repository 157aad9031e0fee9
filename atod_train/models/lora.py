"""Add low-rank adapters (LoRA, arXiv:2106.09685) to a model with peft.

The model keeps its class, so that other code needs no changes; only the adapters
are trained.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from atod_gym.errors import AtodError, MissingExtraError

_BASE, _ADAPTER = ".base_layer.", ".lora_"
_MOST = 0.9
"""A warning is given below this share of the decoder's matrices."""


def add_adapters(model: PreTrainedModel, rank: int, dtype: torch.dtype) -> None:
    """Freeze a model and add adapters to all linear layers of its decoder.

    An adapter adds `2 B A x`; B is zero at first, so the model is unchanged. A has the same random
    values each time, so that runs can be repeated. Adapters are float32 on weights of any
    precision: in bfloat16 small steps of the optimiser would be rounded away.

    Args:
        model: it is changed in place.
        rank: rows of A.
        dtype: precision of the decoder's layers. Frozen matrices are stored in it, since
            autocast would convert them for each token.

    Raises:
        MissingExtraError: peft is not installed.
        AtodError: peft cannot adapt the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("Adapters need peft: pip install 'atod-gym[llm]'.") from None
    decoder, embedding = model.base_model, model.get_input_embeddings()
    # Not "all-linear": peft would adapt fused experts in a form that cannot be merged here.
    linear = [name for name, m in decoder.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(settings, decoder)
    except ValueError as error:
        raise AtodError(f"peft cannot adapt this model: {error}. Use lora_rank=0.") from error
    adapted = total = 0
    for name, weight in decoder.named_parameters():
        if _ADAPTER in name:
            weight.data = weight.data.float()
        elif weight.ndim > 1 and weight is not embedding.weight:
            total += weight.numel()
            adapted += weight.numel() if _BASE in name else 0
    for module in decoder.modules():
        # Embedding look-ups use the stored precision.
        if not isinstance(module, nn.Embedding):
            for weight in module.parameters(recurse=False):
                if weight.ndim > 1 and not weight.requires_grad:
                    weight.data = weight.data.to(dtype)
    if adapted < _MOST * total:
        # The experts of a mixture are one tensor, which gets no adapter.
        warnings.warn(
            f"Adapters train {adapted / total:.0%} of the decoder's matrices; the rest, such as "
            "fused experts, stays frozen.",
            stacklevel=2,
        )


def merged_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return the state of a model with its adapters merged; None if it has none.

    The model is not changed: merging and unmerging would change the last bits.
    """
    adapted: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    if not adapted:
        return None
    weights = {
        name.replace(_BASE, "."): tensor.detach()
        for name, tensor in model.state_dict().items()
        if _ADAPTER not in name
    }
    for name, module in adapted.items():
        weight = weights[f"{name}.weight"]
        delta: Tensor = module.get_delta_weight("default").detach()
        weights[f"{name}.weight"] = (weight + delta).to(model.dtype)
    return weights
