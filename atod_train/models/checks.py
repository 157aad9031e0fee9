"""Check a model before a run.

`check_config` reads the configuration alone, so that a model is refused within the first second.
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

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of two log-probs, in nats, that counts as rounding."""


def check_config(config: PretrainedConfig, name: str, max_context: int = 0) -> None:
    """Refuse a model that would be sampled or scored wrongly, by its configuration.

    Args:
        config: of the model.
        name: for the message.
        max_context: longest sequence in tokens; 0: any length that the model takes.

    Raises:
        AtodError: layers without full attention, an attention window or positions shorter than
            `max_context`, positions as an attention bias, attention that transformers does not
            compute with scaled_dot_product_attention, or a language model inside a larger one.
    """
    if config.get_text_config() is not config:
        raise AtodError(
            f"Model {name} ({config.model_type}) holds its language model inside a larger one, "
            "with images or sound. Use a model of text alone."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds - {"sliding_attention"} or getattr(config, "is_encoder_decoder", False):
        what = f"layers of type {', '.join(sorted(kinds))}" if kinds else "an encoder"
        raise AtodError(
            f"Model {name} ({config.model_type}) has {what}; sampling here needs full attention in "
            "every layer. Use another model."
        )
    if getattr(config, "alibi", False):
        raise AtodError(
            f"Model {name} ({config.model_type}) has positions as an attention bias (ALiBi), which "
            "the masks used here would replace. Use another model."
        )
    if not _computes_sdpa(config):
        raise AtodError(
            f"Model {name} ({config.model_type}): transformers computes its attention without "
            "scaled_dot_product_attention, which sampling and scoring here need. Use another model."
        )
    window = attention_window(config)
    if window is not None and (not max_context or window < max_context):
        raise AtodError(
            f"Model {name} ({config.model_type}) attends to the last {window} tokens only, and "
            "sampling here attends to all: log-probs would be wrong beyond the window. Use another "
            f"model, or --model.max-context {window} or less."
        )
    positions = max_positions(config)
    if positions is not None and max_context > positions:
        raise AtodError(
            f"model.max_context={max_context} is more than the {positions} positions of model "
            f"{name}. Use --model.max-context {positions} or less."
        )


def _computes_sdpa(config: PretrainedConfig) -> bool:
    """Return whether transformers has a causal model for a configuration that computes SDPA."""
    try:
        architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return True  # code of its own, which loading checks
    return bool(getattr(architecture, "_supports_sdpa", False))


def attention_window(config: PretrainedConfig) -> int | None:
    """Return the attention window in tokens; None: all layers have full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    if kinds is None and getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window) if window else None


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
    try:
        _check_model(policy, samples)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise AtodError(
            f"Model {policy.name} ({policy.model.config.model_type}) cannot be used here: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Use another "
            "model."
        ) from error


def _check_model(policy: Policy, samples: bool) -> None:
    ids = (torch.arange(12) * 7 % policy.vocabulary).to(policy.device)[None]
    states = policy.hidden_states(ids)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % policy.vocabulary
    changed = policy.hidden_states(other)
    if not torch.allclose(changed[:, :-1], states[:, :-1], rtol=1e-4, atol=1e-5):
        raise AtodError(
            f"Model {policy.name} lets a token see those after it (an encoder), so it cannot "
            "generate. Use a causal language model."
        )
    with policy.precision():
        expected = policy.model(input_ids=ids, use_cache=False).logits.float()
    expected = expected[0, :, : policy.vocabulary].log_softmax(-1)
    tolerance = _TOLERANCE.get(policy.layer_dtype, 0.5)
    if _distance(policy.logits(states)[0], expected) > tolerance:
        raise AtodError(
            f"Model {policy.name} changes its logits after the output layer (soft-capping or "
            "scaling), which completion log-probs do not follow. Use another model."
        )
    tokens = ids[0].tolist()
    # Two rows of different lengths are fed, then one token each.
    feeds = [tokens[:7], tokens[:4]]
    if samples and _distance(_sampled(policy, feeds, tokens), expected[[6, 3, 7, 4]]) > tolerance:
        raise AtodError(
            f"Model {policy.name} ({policy.model.config.model_type}) gives other log-probs when "
            "its keys and values are cached, so samples could not be scored. Use another model."
        )
    if crossover_of(policy.model):
        trees = lay_out([[tokens[:9], [*tokens[:6], *tokens[9:]]]], 12)
        inputs: Any = trees.inputs(policy.layer_dtype, policy.device)
        joined = policy.logits(policy.hidden_states(trees.ids.to(policy.device), **inputs))[0]
        if _distance(joined[trees.column[0, :9].to(policy.device)], expected[:9]) > tolerance:
            raise AtodError(
                f"Model {policy.name} ({policy.model.config.model_type}) does not follow an "
                "attention mask, so sequences with a shared prefix could not be scored. Use "
                "another model."
            )


def _sampled(policy: Policy, feeds: list[list[int]], tokens: list[int]) -> Tensor:
    """Return [2 k, vocabulary]: logits after each row's feed, then after its next token."""
    cache = KVCache(len(feeds), policy.device)
    cache.reserve(len(tokens))
    next_logits = packed_logits if can_be_packed(policy) else padded_logits
    first = [Feed(row, 0, ids) for row, ids in enumerate(feeds)]
    second = [Feed(feed.row, feed.end, [tokens[feed.end]]) for feed in first]
    with policy.precision():
        return torch.cat([next_logits(policy, cache, part) for part in (first, second)])


def _distance(logits: Tensor, logprobs: Tensor) -> float:
    """Return the largest difference in nats, of tokens with a log-prob above -20."""
    found: Any = (logits.float().log_softmax(-1) - logprobs).abs()
    return float(found[logprobs > -20].max())
