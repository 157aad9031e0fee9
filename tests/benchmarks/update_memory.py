"""Peak memory and speed of an update: ours against full logits padded to the longest row.

    python tests/benchmarks/update_memory.py --model smollm2

All forms compute the loss and the gradients of the same trajectories with the same model, each in a
process of its own, so that the peak is its own:

    naive     one row per turn, rows padded to the longest, logits of all positions, log_softmax
    unpacked  one row per turn; rows sorted by length, logits at completion tokens only, in chunks;
              beginnings that rows have in common are computed for each of them
    packed    the same, and a dialogue is one sequence (the trainer's form in chat style)
    lean      the same, and layers are computed again in the backward pass (gradient checkpointing)

A micro-batch holds the same number of padded tokens in all forms. On a busy machine look at the
processor's seconds, with --threads 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measured_server import resident
from torch import Tensor

from atod_train.algorithm.atod import clipped_policy_loss, loss_normalizer
from atod_train.batch import make_batch
from atod_train.models import scores as scores_module
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn

FORMS = ("naive", "unpacked", "packed", "lean")


def dialogues(count: int, turns: int, vocabulary: int) -> list[Trajectory]:
    """Dialogues of random tokens: a long first prompt, short replies, completions of 8 to 40."""
    random = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=random))
        return tuple(torch.randint(5, vocabulary, (length,), generator=random).tolist())

    records = []
    for number in range(count):
        played = []
        for index in range(int(torch.randint(turns // 2, turns + 1, (), generator=random))):
            completion = ids(8, 41)
            prompt = ids(20, 60) if index else ids(120, 250)
            tokens = TokenizedTurn(prompt, completion, (0.0,) * len(completion), "stop", index > 0)
            played.append(Turn(index, (), "", "", 0.0, True, tokens))
        records.append(
            Trajectory(number, "t", "k", tuple(played), True, False, "terminated", True, 1.0)
        )
    return records


def lean_update(policy: Policy, batch: Batch, advantages: Tensor, budget: int) -> None:
    """The trainer's forward and backward passes."""
    normalizer = loss_normalizer(batch.completion_mask)
    for part, scores in score_microbatches(policy, batch, budget):
        loss, _ = clipped_policy_loss(
            scores.logprobs,
            scores.logprobs.detach(),
            advantages[part.rows].to(policy.device),
            part.completion_mask.to(policy.device),
            normalizer=normalizer[part.rows].to(policy.device),
        )
        loss.backward()


def naive_update(policy: Policy, batch: Batch, advantages: Tensor, budget: int) -> None:
    """Rows of one length, logits and log-probs of every position."""
    normalizer = loss_normalizer(batch.completion_mask)
    device = policy.device
    length = batch.input_ids.shape[1]
    positions = torch.arange(batch.completion_ids.shape[1])
    for rows in torch.arange(len(batch.start)).split(max(1, budget // length)):
        ids = batch.input_ids[batch.sequence_index[rows]].to(device)
        logits = policy.model(input_ids=ids, use_cache=False).logits.float()
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = batch.completion_mask[rows].to(device)
        place = (batch.start[rows][:, None] + positions - 1).clamp(max=length - 2).to(device)
        chosen = logprobs.gather(1, place)
        loss, _ = clipped_policy_loss(
            chosen,
            chosen.detach(),
            advantages[rows].to(device),
            mask,
            normalizer=normalizer[rows].to(device),
        )
        loss.backward()


def load(options: argparse.Namespace) -> Policy:
    """A saved model, or a preset with random weights and 2,000 words."""
    again = options.form == "lean"
    with tempfile.TemporaryDirectory() as folder:
        name = options.model
        if name in MODEL_SHAPES:
            words = build_word_tokenizer([" ".join(f"w{number}" for number in range(1900))])
            build_policy(name, words, 0).save(folder)
            name = folder
        return load_policy(
            name, device=options.device, dtype=options.dtype, gradient_checkpointing=again
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one form in this process."""
    torch.set_num_threads(options.threads)
    policy = load(options)
    records = dialogues(options.trajectories, options.turns, len(policy.tokenizer))
    batch = make_batch(records, policy.pad_id, pack=options.form in ("packed", "lean"))
    random = torch.Generator().manual_seed(1)
    advantages = torch.randn(batch.completion_ids.shape, generator=random)
    if options.form == "unpacked":
        scores_module.crossover_of = lambda _: 0
    for weight in policy.model.parameters():
        weight.grad = torch.zeros_like(weight)
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):  # else the peak of loading counts, too
            Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    begun, begun_processor = time.perf_counter(), time.process_time()
    update = naive_update if options.form == "naive" else lean_update
    update(policy, batch, advantages, options.budget)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    processor = time.process_time() - begun_processor
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    torch.save([weight.grad.cpu() for weight in policy.model.parameters()], options.gradients)
    return {
        "peak": peak - before,
        "model": before,
        "seconds": seconds,
        "processor": processor,
        "completion_tokens": int(batch.completion_mask.sum()),
        "tokens": int(batch.attention_mask.sum()),
    }


def largest_difference(one: Path, other: Path) -> float:
    """The largest relative difference of a weight's gradients."""
    pairs = zip(torch.load(one), torch.load(other), strict=True)
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def main() -> None:
    """Measures each form in a process of its own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a preset")
    parser.add_argument("--trajectories", type=int, default=6)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2048, help="padded tokens of a micro-batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "mixed"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
            command += ["--gradients", f"{folder}/{form}.pt"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[form] = json.loads(done.stdout.splitlines()[-1])
        difference = max(
            largest_difference(Path(folder, "naive.pt"), Path(folder, f"{form}.pt"))
            for form in FORMS[1:]
        )
    print(
        f"{'':10}{'peak MB':>10}{'seconds':>10}{'completion tokens/s':>21}{'memory':>9}{'time':>7}"
        f"{'processor s':>13}{'time':>7}"
    )
    naive = found["naive"]
    for form, row in found.items():
        rate = row["completion_tokens"] / row["seconds"]
        print(
            f"{form:10}{row['peak'] / 1e6:10.0f}{row['seconds']:10.1f}{rate:21.1f}"
            f"{naive['peak'] / row['peak']:8.1f}x{naive['seconds'] / row['seconds']:6.1f}x"
            f"{row['processor']:13.1f}{naive['processor'] / row['processor']:6.1f}x"
        )
    print(
        f"{options.model}, {options.device}, {options.dtype}: {naive['completion_tokens']} tokens "
        f"sampled, {naive['tokens']} in rows, {found['packed']['tokens']} packed; model and "
        f"gradients {naive['model'] / 1e6:.0f} MB; gradients differ by at most {difference:.1e}"
    )


if __name__ == "__main__":
    main()
