"""The processes (ranks) that train one model together, one for each GPU; usually there is one.

`torchrun` or `accelerate launch` starts them; accelerate selects their devices and connects them.
A step's episodes are divided by whole groups and gathered; forward and backward passes are divided
by sequences. Advantages and metrics are computed from the whole batch on every rank, so a step is
independent of the number of processes, except for rounding.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from atod_gym.errors import InvalidSettingError, MissingExtraError

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=12)
"""Timeout of barriers: rank 0 may train a start or evaluate long episodes while others wait."""

_BUCKET = 2**23
"""Numbers that are exchanged at a time: more calls cost latency, larger ones memory."""


@dataclass(frozen=True)
class Processes:
    """One rank of a run; every rank must call each method."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Device of tensors during the exchange."""
    sharding: dict[str, bool] | None = None
    """Keywords of FSDP2's `fully_shard`, as configured in accelerate; None: no sharding."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.index == 0

    def share(self, count: int) -> range:
        """Return this rank's part of `count` items: consecutive; sizes differ by at most one."""
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)

    def gather(self, items: Sequence[_T]) -> list[_T]:
        """Return the items of all ranks, in the order of ranks."""
        if self.count == 1:
            return list(items)
        parts: list[list[_T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, which must agree in shapes and dtypes."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            shared = torch.cat([tensor.to(self.device).flatten() for tensor in bucket])
            dist.all_reduce(shared)
            for tensor, part in zip(bucket, shared.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.count == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one rank."""
        return any(self.gather([flag]))

    def wait(self) -> None:
        """Barrier: return when all ranks have called this."""
        self.gather([])


def join_processes(device: str, teacher_device: str = "auto") -> Processes:
    """Connect this process with the other ranks in the environment variables, if there are any.

    Several ranks need the device auto or cpu, and no separate GPU for the teacher.

    Raises:
        InvalidSettingError: several processes cannot use the device or the kind of sharding.
        MissingExtraError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if device not in ("auto", "cpu"):
        raise InvalidSettingError(
            f"model.device={device!r}: several processes each take a GPU of their own. Use auto, "
            "or cpu, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if teacher_device.startswith("cuda"):
        raise InvalidSettingError(
            f"model.device has {teacher_device!r} for the teacher: the teachers of several "
            "processes would all be on that GPU. Give one device (that of the student), or use "
            "cpu, or a teacher's server (--model.teacher http://..)."
        )
    sharding = _sharding()
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise InvalidSettingError(
                f"accelerate is configured for {name}. Use data parallel or FSDP version 2."
            )
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtraError(
            "Several processes need accelerate: pip install 'atod-gym[llm]'."
        ) from None
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    place = "cpu" if on_cpu else "cuda"
    return Processes(state.process_index, state.num_processes, place, sharding)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of one dtype with about `_BUCKET` numbers together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def end_process(code: int) -> int:
    """End this process with an exit code if it trains with others; else return the code.

    Torch's communication is not shut down: with sharded weights on CPUs that sometimes aborts
    (SIGABRT), and torchrun then reports a finished run as failed. Exit handlers are run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _sharding() -> dict[str, bool] | None:
    """Return the settings of `accelerate launch --use_fsdp` or `accelerate config`."""
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InvalidSettingError(
            "accelerate is configured for FSDP version 1. Use version 2: --fsdp_version 2, or "
            "fsdp_version: 2 in its config file."
        )
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise InvalidSettingError(
            "accelerate is configured to keep weights in the processor's memory, which is not "
            "possible here. Set fsdp_offload_params to false; see --model.gradient-checkpointing."
        )
    # False: keep a layer's weights for the backward pass instead of gathering them again.
    return {"reshard_after_forward": _is_set("FSDP_RESHARD_AFTER_FORWARD", "true")}


def _is_set(name: str, default: str = "") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1", "yes")
