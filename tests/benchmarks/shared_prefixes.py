"""Processor seconds of scoring and update, with beginnings shared by a group and without.

A rollout of Search-QA; then in turns, in one process, on the same episodes:

    OMP_NUM_THREADS=1 python tests/benchmarks/shared_prefixes.py --model <folder> [--data <folder>]

A model that was taught asks alike in a group; smollm2 as it is writes something else each time.
"""

from __future__ import annotations

import argparse
from functools import partial
from unittest import mock

import torch
from training_step import compared

from atod_train.batch import make_batch
from atod_train.config import EnvConfig
from atod_train.models import scores
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.fast.prefix_trees import crossover_of, join_sequences, sequences_of
from atod_train.models.generation import Generator
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_completions, score_microbatches
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect


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
    model = load_policy(options.model, device="cpu", dtype=options.dtype)
    pool = EnvPool(EnvConfig(id="atod/SearchQA-v0", data=options.data, max_turns=3), "train")
    generator = Generator(
        model, DialogueEncoder(model.tokenizer), max_completion_tokens=32, max_context=1024
    )
    tasks = pool.task_ids[: options.tasks]
    trajectories = collect(pool, generator, tasks, group_size=options.group_size, turn_limit=3)
    pool.close()
    batch = make_batch(trajectories, model.pad_id)

    def update() -> None:
        model.model.zero_grad()
        for _, found in score_microbatches(model, batch, 4096):
            found.logprobs.sum().backward()

    sequences = sequences_of(batch)
    trees = join_sequences(sequences, 4096, crossover_of(model.model))
    print(
        f"{options.model}, {options.data}, {options.dtype}: {len(sequences)} dialogues in groups "
        f"of {options.group_size}, {sum(map(len, sequences))} tokens, "
        f"{sum(size for _, size in trees)} of them computed; one thread\n"
    )
    nothing_shared = partial(mock.patch.object, scores, "crossover_of", return_value=0)
    print("| part | ours, s | nothing shared, s | ratio |\n|---|---|---|---|")
    for name, work in (
        ("scoring", lambda: score_completions(model, batch, 4096)),
        ("update", update),
    ):
        ours, apart = compared(work, nothing_shared, options.rounds)
        print(f"| {name} | {ours:.2f} | {apart:.2f} | {apart / ours:.1f} |")


if __name__ == "__main__":
    main()
