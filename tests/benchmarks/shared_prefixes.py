"""Processor seconds of scoring and update, with beginnings shared by a group and without.

A rollout of Search-QA; then in turns, in one process, on the same episodes:

    OMP_NUM_THREADS=1 python tests/benchmarks/shared_prefixes.py --model <folder> [--data <folder>]

A model that was taught asks alike in a group; smollm2 as it is writes something else each time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from atod_train import policy
from atod_train.batching import make_batch
from atod_train.config import EnvConfig
from atod_train.dialogue import DialogueEncoder
from atod_train.generation import Generator
from atod_train.prefix_trees import joined
from atod_train.pretrained import LoadOptions, load_policy
from atod_train.rollout import EnvPool, collect


def medians(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds of the processor, as it is and with nothing shared."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for found, crossover in zip(times, (policy.crossover_of, lambda _: 0), strict=True):
            with mock.patch.object(policy, "crossover_of", crossover):
                began = time.process_time()
                work()
                found.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 or a folder")
    parser.add_argument("--data", default="generated", help="generated, official or a folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "mixed"))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_policy(options.model, LoadOptions(device="cpu", dtype=options.dtype))
    pool = EnvPool(EnvConfig(id="atod/SearchQA-v0", data=options.data, max_turns=3), "train")
    generator = Generator(
        model, DialogueEncoder(model.tokenizer), max_completion_tokens=32, max_context=1024
    )
    tasks = pool.task_ids[: options.tasks]
    groups = collect(pool, generator, tasks, group_size=options.group_size, turn_limit=3)
    pool.close()
    batch = make_batch([t for group in groups for t in group.trajectories], model.pad_id)

    def update() -> None:
        model.model.zero_grad()
        for part in model.microbatches(batch, 4096):
            part.logprobs.sum().backward()

    lengths = batch.attention_mask.sum(dim=1).tolist()
    sequences = [row[:n] for row, n in zip(batch.input_ids.tolist(), lengths, strict=True)]
    trees = joined(sequences, 4096, policy.crossover_of(model.model.config))
    print(
        f"{options.model}, {options.data}, {options.dtype}: {len(sequences)} dialogues in groups "
        f"of {options.group_size}, {sum(lengths)} tokens, {sum(size for _, size in trees)} of them "
        "computed; one thread\n"
    )
    print("| part | ours, s | nothing shared, s | ratio |\n|---|---|---|---|")
    for name, work in (("scoring", lambda: model.score(batch, 4096)), ("update", update)):
        ours, apart = medians(work, options.rounds)
        print(f"| {name} | {ours:.2f} | {apart:.2f} | {apart / ours:.1f} |")


if __name__ == "__main__":
    main()
