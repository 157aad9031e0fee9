"""`atod-train doctor`: what this machine can run, what is missing, and what a run would need.

Nothing is downloaded, started or changed; a model's folder is read for its shape only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM

from atod_gym import ENV_IDS
from atod_gym.errors import AtodError
from atod_train.config import is_url
from atod_train.models.lora import add_adapters
from atod_train.models.policy import LOGITS_PER_CHUNK, MODEL_SHAPES, llama_config
from atod_train.models.pretrained import computes_bfloat16, read_shape

GIGABYTE = 1e9

_WORDS = 2000
"""A typical vocabulary of models that are trained from scratch."""

_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    kind: Literal["ok", "note", "problem"]
    text: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a run keeps on its device, for the models alone and at its fullest moment.

    Attributes:
        student: weights, gradients, and two moments of each trained weight.
        teacher: weights.
        cache: keys and values of all episodes at their longest.
        logits: what exists of them at once, with gradient.
    """

    student: int
    teacher: int
    cache: int
    logits: int

    @property
    def total(self) -> int:
        """All of it; what the layers keep for the backward pass of a micro-batch comes on top."""
        return self.student + self.teacher + self.cache + self.logits


def main(arguments: Sequence[str]) -> int:
    """Prints the findings; 1 if there is a problem among them."""
    parser = argparse.ArgumentParser(
        prog="atod-train doctor", description="What this machine can run, and what is missing."
    )
    parser.add_argument("--student", default="tiny", help="as model.student")
    parser.add_argument("--teacher", default="small", help="as model.teacher; a URL is tried")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=128, help="tasks per step x group size")
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--server", action="append", default=[], help="URL of a server to try")
    chosen = parser.parse_args(arguments)
    findings = [
        *machine(),
        *packages(),
        *data_sets(),
        *(reach(url) for url in chosen.server),
        *([reach(chosen.teacher)] if is_url(chosen.teacher) else []),
        memory_finding(chosen),
    ]
    for finding in findings:
        print(f"{finding.kind:8} {finding.text}")
    return int(any(finding.kind == "problem" for finding in findings))


def machine() -> Iterator[Finding]:
    """Python, torch, processors, memory and devices."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    yield Finding(
        "ok",
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} "
        f"processors, {memory:.0f} GB of memory",
    )
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else "; no bfloat16: use --model.dtype float32"
        size = device.total_memory / GIGABYTE
        yield Finding("ok", f"cuda:{index}: {device.name}, {size:.0f} GB{bf16}")
    if torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        yield Finding("note", f"all GPUs: torchrun --nproc-per-node {count} -m atod_train.cli ..")
    if not torch.cuda.is_available():
        units = "has" if computes_bfloat16() else "has no"
        yield Finding(
            "note",
            "no GPU: models run on the processor in float32 (--model.dtype mixed: this one "
            f"{units} units for bfloat16)",
        )


def packages() -> Iterator[Finding]:
    """For each extra what is missing or of a version that clashes."""
    wanted = [Requirement(line) for line in metadata.requires("atod-gym") or ()]
    extras = metadata.metadata("atod-gym").get_all("Provides-Extra") or []
    for extra in ("", *(name for name in extras if name not in ("all", "dev"))):
        missing, clashes = [], []
        for requirement in wanted:
            marker = requirement.marker
            if (marker is None) != (extra == "") or requirement.name == "atod-gym":
                continue
            if marker is not None and not marker.evaluate({"extra": extra}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                missing.append(requirement.name)
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                clashes.append(f"{requirement.name} {version} (needs {requirement.specifier})")
        label = f"atod-gym[{extra}]" if extra else "atod-gym"
        if clashes:
            yield Finding("problem", f"{label}: {', '.join(clashes)}; pip install -U '{label}'")
        elif missing:
            yield Finding("note", f"{label} lacks {', '.join(missing)}; pip install '{label}'")
        else:
            yield Finding("ok", f"{label} is complete")


def data_sets() -> Iterator[Finding]:
    """What data="auto" would play in each environment."""
    for env_id in ENV_IDS:
        entry = gymnasium.registry[env_id].entry_point
        assert isinstance(entry, str)
        module, _, name = entry.partition(":")
        folder = getattr(importlib.import_module(module), name).found_data()
        if folder is None:
            yield Finding("note", f"{env_id}: no official data found, plays generated tasks")
        else:
            yield Finding("ok", f"{env_id}: data in {folder}")


def reach(url: str) -> Finding:
    """Whether a server answers at /health, and as what."""
    address = f"{url.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            health = json.loads(answer.read())
        service = health["service"]
    except urllib.error.HTTPError as error:
        return Finding("problem", f"{address} answers {error.code} {error.reason}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding(
            "problem", f"{address} does not answer ({error}). To start one: atod-serve --help"
        )
    return Finding("ok", f"{url}: {service}")


def estimate(
    student: str, teacher: str, *, lora_rank: int, episodes: int, max_context: int, on_gpu: bool
) -> Memory:
    """What a run needs, from the shapes of its models alone.

    Args:
        student: as `ModelConfig.student`.
        teacher: as `ModelConfig.teacher`; behind a URL it takes no memory here.
        lora_rank: rank of the student's adapters; 0: none.
        episodes: episodes at once.
        max_context: longest episode in tokens.
        on_gpu: the teacher's weights and the cache are in bfloat16 there.

    Raises:
        AtodError: no such model.
    """
    ours = _shape(student)
    theirs = [] if is_url(teacher) else list(_shape(teacher).parameters())
    if lora_rank:
        add_adapters(ours, lora_rank, 32)
    weights = sum(weight.numel() for weight in ours.parameters())
    trained = sum(weight.numel() for weight in ours.parameters() if weight.requires_grad)
    config = ours.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    half = 2 if on_gpu else 4
    positions = min(max_context, config.max_position_embeddings)
    return Memory(
        student=4 * weights + 12 * trained,
        teacher=half * sum(weight.numel() for weight in theirs),
        cache=half * per_token * positions * episodes,
        logits=3 * 4 * LOGITS_PER_CHUNK,
    )


def memory_finding(chosen: argparse.Namespace) -> Finding:
    """The estimate beside what there is."""
    on_gpu = torch.cuda.is_available()
    label = f"student {chosen.student}, teacher {chosen.teacher}"
    try:
        needed = estimate(
            chosen.student,
            chosen.teacher,
            lora_rank=chosen.lora_rank,
            episodes=chosen.episodes,
            max_context=chosen.max_context,
            on_gpu=on_gpu,
        )
    except AtodError as error:
        return Finding("problem", str(error))
    free = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory()
    parts = ", ".join(
        f"{name} {size / GIGABYTE:.2f}"
        for name, size in (
            ("student with optimiser", needed.student),
            ("teacher", needed.teacher),
            (f"cache of {chosen.episodes} x {chosen.max_context} tokens", needed.cache),
            ("logits", needed.logits),
        )
    )
    text = (
        f"{label}: about {needed.total / GIGABYTE:.1f} GB ({parts}), and what layers keep of a "
        f"micro-batch; {free / GIGABYTE:.1f} GB are free"
    )
    if needed.total <= free:
        return Finding("ok", text)
    return Finding(
        "problem",
        f"{text}. Lower --model.max-context or train.group_size, or use --model.lora-rank 16.",
    )


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if "MemAvailable" in line))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shape(name: str) -> Any:
    """A model of the right shape without weights."""
    config: Any
    if name in MODEL_SHAPES:
        config = llama_config(MODEL_SHAPES[name], vocabulary=_WORDS)
    else:
        config = read_shape(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
