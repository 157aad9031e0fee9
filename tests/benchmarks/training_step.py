"""Processor seconds of the parts of a training step, with and without what makes them short.

In turns, in one process, on the same episodes:

- a rollout without padding against one with it;
- scoring and update with the last layer computed only where its states are wanted, against all of
  it everywhere;
- an update of a supervised start with our Muon, against `torch.optim.Muon`.

    OMP_NUM_THREADS=1 python tests/benchmarks/training_step.py [--data <json_2.1.1>]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest import mock

import torch

from atod_train.batch import make_batch
from atod_train.config import EnvConfig
from atod_train.models import generation, scores
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.generation import Generator
from atod_train.models.scores import score_completions, score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect
from atod_train.training import supervised

LR = (3e-3, 1.8e-2)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, for one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def compared(
    work: Callable[[], object], other: Callable[[], AbstractContextManager[object]], rounds: int
) -> list[float]:
    """Medians of a piece of work, as it is and with something replaced."""
    times: tuple[list[float], list[float]] = ([], [])
    work()
    for _ in range(rounds):
        times[0].append(seconds(work))
        with other():
            times[1].append(seconds(work))
    return [statistics.median(part) for part in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="generated", help="official games: the folder json_2.1.1")
    parser.add_argument("--demonstrations", type=int, default=200)
    parser.add_argument("--model", default="mini", choices=MODEL_SHAPES)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = EnvPool(EnvConfig(data=options.data, max_turns=20), "train")
    shown = supervised.demonstrate(pool, options.demonstrations, 0.2, seed=0)
    tokenizer = build_word_tokenizer(supervised.demonstration_texts(shown))
    model = build_policy(options.model, tokenizer, seed=0)
    dialogue = DialogueEncoder(tokenizer)
    taught = [supervised.tokenize(episode, dialogue) for episode in shown]
    # A model that knows a little, so that episodes are as long as in training.
    supervised.train_on_demonstrations(
        model, taught, epochs=2.0, lr=LR, seed=0, tokens_per_microbatch=2048
    )

    def play() -> list[Trajectory]:
        generator = Generator(model, dialogue, max_completion_tokens=10)
        tasks = pool.task_ids[: options.tasks]
        return collect(pool, generator, tasks, group_size=options.group_size, turn_limit=20)

    batch = make_batch(play(), model.pad_id)

    def update() -> None:
        model.model.zero_grad()
        for _, found in score_microbatches(model, batch, 2048):
            found.logprobs.sum().backward()

    optimizers: dict[type, list[torch.optim.Optimizer]] = {}

    def supervise() -> None:
        kind = supervised.Muon
        if kind not in optimizers:
            optimizers[kind] = supervised._supervised_optimizers(model, LR)
        supervised._supervised_update(
            model, taught[:4], optimizers[kind], 0.3, 2048, torch.Generator()
        )

    @contextmanager
    def everything() -> Iterator[None]:
        no = mock.Mock(return_value=False)
        with (
            mock.patch.object(scores, "is_llama_on_cpu", no),
            mock.patch.object(generation, "can_be_packed", no),
        ):
            yield

    other_muon = partial(mock.patch.object, supervised, "Muon", torch.optim.Muon)
    tokens = int(batch.attention_mask.sum())
    print(
        f"{options.model}: {len(batch.input_ids)} episodes, {tokens} tokens, "
        f"{int(batch.completion_mask.sum())} of them sampled; one thread\n"
    )
    print("| part | ours, s | without, s | ratio |\n|---|---|---|---|")
    for name, work, patch in (
        ("rollout", play, everything),
        ("scoring", lambda: score_completions(model, batch, 2048), everything),
        ("update", update, everything),
        ("update of a supervised start", supervise, other_muon),
    ):
        ours, theirs = compared(work, patch, options.rounds)
        print(f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
