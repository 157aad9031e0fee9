"""The processes that train one model together, one for each GPU; usually there is only one.

`torchrun` or `accelerate launch` starts them; accelerate finds each one's device and connects them.
A step's episodes are shared by whole groups and gathered; the forward and backward passes are
shared by sequences. What is computed from all of them (advantages, metrics) is computed alike in
each process, so that a step does not depend on how many there are, but for rounding.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from atod_gym.errors import InvalidSettingError, MissingExtraError

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=12)
"""One process may make a start, or evaluate a long tail of episodes, while the others wait."""


@dataclass(frozen=True)
class Sharding:
    """How weights are divided up for training (FSDP2), as accelerate was configured."""

    reshard_after_forward: bool = True
    """Gather a layer's weights a second time for the backward pass instead of keeping them."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; all methods are to be called by all of them alike."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Where tensors are when they are exchanged."""
    sharding: Sharding | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and prints."""
        return self.index == 0

    def share(self, count: int) -> range:
        """Which of `count` things this process takes: consecutive ones, sizes differing by one."""
        return range(self.index * count // self.count, (self.index + 1) * count // self.count)

    def gather(self, items: Sequence[_T]) -> list[_T]:
        """Everybody's items, those of the first process first."""
        if self.count == 1:
            return list(items)
        parts: list[list[_T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes; shapes and types must agree."""
        if self.count == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            dist.all_reduce(shared)
            tensor.copy_(shared)

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by that of the main process."""
        if self.count == 1:
            return
        for tensor in tensors:
            shared = tensor.to(self.device)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)

    def any(self, flag: bool) -> bool:
        """Whether it is true in at least one process."""
        return any(self.gather([flag]))

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather([])


def join_processes(device: str, teacher_device: str = "") -> Processes:
    """Find the other processes, if the environment says that there are any.

    Args:
        device: as the setting `model.device`: auto or cpu where there are several processes.
        teacher_device: as the setting `model.teacher_device`: no GPU where there are several.

    Raises:
        InvalidSettingError: a device, or a way of sharding, that several processes cannot use.
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
            f"model.teacher_device={teacher_device!r}: the teachers of several processes would all "
            "be on that GPU. Leave it empty (each teacher is beside its student), or use cpu, or a "
            "teacher's server (--model.teacher http://..)."
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{name}"):
            raise InvalidSettingError(
                f"accelerate is configured for {name}. Use data parallel or FSDP version 2."
            )
    sharding = _sharding()
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


def is_main_process() -> bool:
    """Whether this process prints; also before it has joined others."""
    return int(os.environ.get("RANK", "0")) == 0


def end_process(code: int) -> int:
    """Ends this process with an exit code if it trains with others; else returns the code.

    Torch's communication is not taken down: with weights divided over processes that has been seen
    to abort (SIGABRT, now and then, on CPUs), so that torchrun called a run failed that was
    finished and saved. Exit handlers are run as ever.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _sharding() -> Sharding | None:
    """What `accelerate launch --use_fsdp` or `accelerate config` put into the environment."""
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
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "1")
    return Sharding(reshard)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")
