"""Record the inputs of a run that are not settings, and compare them when it is resumed.

They are the tasks, the ids of a prompt, the weights that are frozen below adapters, and the
teacher. They are stored in the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atod_gym.types import Message
from atod_train.batch import make_batch
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.policy import Policy
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.reports.run_folder import RunFolderError
from atod_train.rollout.env_pool import EnvPool
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.teachers.remote import MOST_ROUNDING

_PROBE = "You are in a room. You see a desk 1, a drawer 2 and a mug 3. go to desk 1"
_SAMPLED_WEIGHTS = 1024
"""Number of weights of each tensor for its fingerprint."""


def hidden_inputs(
    student: Policy, teacher: Teacher | None, dialogue: DialogueEncoder, pools: Sequence[EnvPool]
) -> dict[str, Any]:
    """Return the inputs of a run that begins with these models, prompts and splits; JSON values.

    A teacher's server is asked for log-probs.

    Returns:
        data: split -> content hash of its tasks. prompt: hash of the ids of a fixed prompt. frozen:
        fingerprint of the student's weights that are not trained; None: all are trained. teacher:
        its fingerprint; of a server: log-probs of some fixed tokens, nats; None: no teacher.
    """
    ids = dialogue.first((Message("user", _PROBE),))
    is_frozen = any(not weight.requires_grad for weight in student.model.parameters())
    return {
        "data": {pool.split: pool.content_hash for pool in pools},
        "prompt": hashlib.sha256(str(list(ids)).encode()).hexdigest(),
        "frozen": fingerprint(student.model, frozen=True) if is_frozen else None,
        "teacher": _identity(teacher, student),
    }


def check_inputs(inputs: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Compare inputs with a run's manifest (empty if it has none), to continue it.

    Raises:
        RunFolderError: other tasks, frozen weights, teacher or tokenizer.
    """
    before: Mapping[str, Any] = manifest.get("inputs", inputs)
    for split, tasks in inputs["data"].items():
        if tasks != (old := before["data"].get(split, tasks)):
            raise RunFolderError(
                f"The tasks of split {split} are not those that this run began with (content hash "
                f"{old[:12]}, now {tasks[:12]}). Resume with the same data (--env.data), or start "
                "a new run."
            )
    for name, what in (
        ("teacher", "The teacher is not the one"),
        ("frozen", "The frozen weights of the student are not those"),
    ):
        if _is_other(before[name], inputs[name]):
            raise RunFolderError(
                f"{what} that this run began with: it is another model. Resume with the same "
                "models, or start a new run."
            )
    if before["prompt"] != inputs["prompt"]:
        raise RunFolderError(
            "The chat template gives other prompts than this run began with: the tokenizer was "
            "changed. Resume with the same model folder, or start a new run."
        )


def fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """Return a hash of some weights of every tensor of a model.

    It covers their bfloat16 values, so that it is independent of precision and device. `frozen`
    leaves out the trained weights.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not (frozen and weight.requires_grad):
            values = weight.detach().flatten()
            values = values[:: max(1, len(values) // _SAMPLED_WEIGHTS)].to(torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(values.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _identity(teacher: Teacher | None, student: Policy) -> str | list[float] | None:
    """Return the identity of a teacher: a hash of its weights, or log-probs from a server."""
    if teacher is None:
        return None
    if isinstance(teacher, LocalTeacher):
        return fingerprint(teacher.policy.model)
    first, *ids = student.tokenizer(_PROBE, add_special_tokens=False).input_ids
    tokens = TokenizedTurn((first,), tuple(ids), (0.0,) * len(ids), "stop", False)
    turn = Turn(0, (), _PROBE, "", 0.0, True, tokens)
    record = Trajectory(0, "", "", (turn,), True, False, "terminated", False, 0.0)
    logprobs: Tensor = teacher.score(make_batch([record], student.pad_id))
    return [round(value, 4) for value in logprobs.flatten().tolist()]


def _is_other(old: Any, new: Any) -> bool:
    """Return whether two identities differ; None (no identity) differs from none."""
    if isinstance(old, list) and isinstance(new, list):
        apart = [abs(a - b) for a, b in zip(old, new, strict=False)]
        return len(old) != len(new) or sum(apart) > MOST_ROUNDING * len(apart)
    return None not in (old, new) and old != new
