"""Check a model before a run.

`check_config` reads the configuration only, so that a model is refused within the first second.
`check_model` compares sampling and scoring with plain forward passes on a few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from atod_gym.errors import AtodError
from atod_train.models.decoding import Feed, KVCache, padded_logits
from atod_train.models.fast.llama import can_be_packed, packed_logits
from atod_train.models.fast.prefix_trees import crossover_of, lay_out
from atod_train.models.policy import Policy, max_positions


def check_config(config: PretrainedConfig, name: str, max_context: int = 0) -> None:
    """Refuse a model, by its configuration, that would be sampled or scored incorrectly.

    Args:
        config: of the model.
        name: for the message.
        max_context: longest sequence in tokens; 0: any length that the model supports.

    Raises:
        AtodError: layers without full attention, an attention window or positions shorter than
            `max_context`, positions as an attention bias, attention that transformers does not
            compute with scaled_dot_product_attention, quantised weights, a language model inside a
            larger one, or none.
    """
    # A model with its own code is not in the mapping; loading checks it.
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "use_sliding_window", True) else []
    others = sorted({*kinds} - {"full_attention", "sliding_attention"})
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    quantised = getattr(config, "quantization_config", None) or {}
    why = ""
    if config.get_text_config() is not config:
        why = "contains its language model inside a larger one, with images or sound"
    elif others:
        why = f"has layers of type {', '.join(others)}; sampling here needs full attention in all"
    elif getattr(config, "is_encoder_decoder", False):
        why = "has an encoder; sampling here needs a decoder alone"
    elif architecture is None and not hasattr(config, "auto_map"):
        why = "is not a causal language model that transformers supports"
    elif "quant_method" in quantised:
        why = (
            f"has quantised weights ({quantised['quant_method']}), which cannot be used here: give "
            "the original model, or serve a teacher with vLLM (--model.teacher http://..)"
        )
    elif getattr(config, "alibi", False):
        why = "has positions as an attention bias (ALiBi), which the masks used here would replace"
    elif not getattr(architecture, "_supports_sdpa", True):
        why = "is computed without scaled_dot_product_attention, which sampling and scoring need"
    elif window and (not max_context or window < max_context):
        why = (
            f"attends to the last {window} tokens only, while sampling here attends to all: "
            f"log-probs are right with --model.max-context {window} or less, but not beyond"
        )
    if why:
        raise AtodError(f"Model {name} ({config.model_type}) {why}. Use another model.")
    positions = max_positions(config)
    if positions is not None and max_context > positions:
        raise AtodError(
            f"model.max_context={max_context} is more than the {positions} positions of model "
            f"{name}. Use --model.max-context {positions} or less."
        )


@torch.no_grad()
def check_model(policy: Policy, *, samples: bool = True) -> None:
    """Refuse a model whose sampling or scoring differs from plain forward passes.

    Args:
        policy: the model.
        samples: False: the model only scores texts.

    Raises:
        AtodError: the model attends to later tokens, changes its logits after the output layer,
            gives other log-probs with a cache or with shared prefixes, or cannot be run.
    """
    label = f"Model {policy.name} ({policy.model.config.model_type})"
    try:
        difference = _difference(policy, samples)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AtodError(f"{label} cannot be used here: {reason}. Use another model.") from error
    if difference:
        raise AtodError(f"{label} {difference}. Use another model.")


def _difference(policy: Policy, samples: bool) -> str:
    """Return how the numbers of a model differ from plain forward passes; empty: they are equal."""
    ids = (torch.arange(12) * 7 % policy.vocabulary).to(policy.device)[None]
    states = policy.hidden_states(ids)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % policy.vocabulary
    changed = policy.hidden_states(other)
    if not torch.allclose(changed[:, :-1], states[:, :-1], rtol=1e-4, atol=1e-5):
        return "attends to later tokens (an encoder), so it cannot generate"
    with policy.precision():
        plain = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    plain = plain[:, : policy.vocabulary].log_softmax(-1)
    # Nats that count as rounding, for tokens that are not nearly impossible.
    tolerance = 1e-3 if policy.layer_dtype == torch.float32 else 0.5

    def differ(logits: Tensor, expected: Tensor) -> bool:
        found = (logits.log_softmax(-1) - expected).abs()
        return float(found[expected > -20].max()) > tolerance

    if differ(policy.logits(states)[0], plain):
        return (
            "changes its logits after the output layer (soft-capping or scaling), which completion "
            "log-probs do not follow"
        )
    tokens = ids[0].tolist()
    if samples:
        cache = KVCache(2, policy.device)
        cache.reserve(len(tokens))
        next_logits = packed_logits if can_be_packed(policy) else padded_logits
        # Two rows of different lengths are fed, then one token each.
        prompts = [Feed(0, 0, tokens[:7]), Feed(1, 0, tokens[:4])]
        following = [Feed(0, 7, tokens[7:8]), Feed(1, 4, tokens[4:5])]
        with policy.precision():
            fed = [next_logits(policy, cache, feeds) for feeds in (prompts, following)]
        if differ(torch.cat(fed), plain[[6, 3, 7, 4]]):
            return (
                "gives other log-probs when its keys and values are cached, so samples could not "
                "be scored"
            )
    if crossover_of(policy.model):
        trees = lay_out([[tokens[:9], [*tokens[:6], *tokens[9:]]]], 12)
        inputs: Any = trees.inputs(policy.layer_dtype, policy.device)
        joined = policy.logits(policy.hidden_states(trees.ids.to(policy.device), **inputs))[0]
        if differ(joined[trees.column[0, :9].to(policy.device)], plain[:9]):
            return (
                "does not follow an attention mask, so sequences with a shared prefix could not be "
                "scored"
            )
    return ""
