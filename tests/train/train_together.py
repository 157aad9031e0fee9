"""Run by torchrun: what one of several processes does in test_processes.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import test_processes
import torch
from test_policy import make_policy, random_batch

from atod_train.algorithm.methods import compute_advantages
from atod_train.batch import split_minibatches
from atod_train.config import AlgorithmConfig
from atod_train.distributed import Processes, end_process, join_processes
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_completions
from atod_train.progress import PhaseTimes
from atod_train.studies.study import train_one
from atod_train.teachers.local import LocalTeacher
from atod_train.training.sharding import whole
from atod_train.training.update import Learner, score_batch, update_policy


def gradients_of_an_update(processes: Processes, signal: str) -> dict[str, torch.Tensor]:
    """Gradients of both mini-batches of an update on five episodes, and what it leaves."""
    student, teacher_policy, batch = make_policy(0), make_policy(1), random_batch()
    batch = replace(
        batch,
        returns=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5]),
        group_index=torch.tensor([0, 0, 0, 1, 1]),
    )
    teacher = LocalTeacher(teacher_policy, student)
    algorithm = AlgorithmConfig(opd_signal=signal)  # type: ignore[arg-type]
    config = replace(test_processes.CONFIG, algorithm=algorithm)
    learner = Learner(student, 1e-3, processes)
    found: dict[str, torch.Tensor] = {}
    step = learner._optimizer.step

    def record(*_: Any) -> None:
        part = len({name.partition("/")[0] for name in found})
        for name, weight in learner.policy.model.named_parameters():
            assert weight.grad is not None
            found[f"{part}/{name}"] = whole(weight.grad).clone()
        step()

    learner._optimizer.step = record  # type: ignore[method-assign, assignment]
    scores = score_batch(learner, teacher, batch, config, PhaseTimes())
    advantages = compute_advantages(batch, scores, algorithm, 3)
    order = torch.Generator().manual_seed(5)
    stats = update_policy(learner, teacher, batch, scores, advantages, config, order)
    found["old"] = scores.logprobs
    found["stats"] = torch.tensor([stats[name] for name in sorted(stats)])
    state = learner.tensors()
    found.update({f"state/{name}": tensor.detach().clone() for name, tensor in state.items()})
    return found


def adapters_after_three_updates(processes: Processes, start: Path) -> dict[str, torch.Tensor]:
    """Train adapters on frozen weights with recomputed layers; return the result."""
    student = load_policy(start, lora_rank=4, gradient_checkpointing=True)
    batch = random_batch()
    # Whatever the others begin with, they get the weights of the main process.
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(processes.index)
    learner = Learner(student, 1e-2, processes)
    [whole_batch] = split_minibatches(batch, 1, torch.Generator())
    for _ in range(3):
        for _, scores in learner.microbatches(whole_batch, 60):
            learner.backward(-scores.logprobs.sum())
        learner.step()
    return {"logprobs": score_completions(student, batch).logprobs}


def main() -> None:
    """Writes the gradients of an update, or makes a whole run."""
    torch.set_num_threads(1)
    what, out = sys.argv[1], Path(sys.argv[2])
    if what == "run":
        train_one(test_processes.with_steps(int(sys.argv[3])), out, resume=True)
        end_process(0)
    processes = join_processes("cpu")
    found = {signal: gradients_of_an_update(processes, signal) for signal in ("sampled", "exact")}
    found["adapters"] = adapters_after_three_updates(processes, out / "start")
    shares = processes.gather([list(processes.share(5))])
    if processes.is_main:
        torch.save(found, out / "found.pt")
        text = json.dumps({"count": processes.count, "shares": shares, "any": processes.any(False)})
        (out / "processes.json").write_text(text)
    else:
        processes.any(processes.index == 0)
    end_process(0)


if __name__ == "__main__":
    main()
