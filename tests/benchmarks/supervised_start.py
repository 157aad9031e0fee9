"""Processor seconds of an update of a supervised start where the vocabulary is large.

In turns, in one process, on the same episodes of a WebShop catalogue: a share of the environment's
tokens scored for all of them, against all of them scored.

    OMP_NUM_THREADS=1 python tests/benchmarks/supervised_start.py [--data <folder>]
"""

from __future__ import annotations

import argparse
from functools import partial
from unittest import mock

import torch
from training_step import compared

from atod_train.config import EnvConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.rollout.env_pool import EnvPool
from atod_train.training import supervised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="generated", help="the folder of the official files")
    parser.add_argument("--demonstrations", type=int, default=3000)
    parser.add_argument("--model", default="mini", choices=MODEL_SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = EnvPool(EnvConfig(id="atod/WebShop-v0", data=options.data, max_turns=15), "train")
    shown = supervised.demonstrate(pool, options.demonstrations, 0.2, seed=0)
    pool.close()
    tokenizer = build_word_tokenizer(supervised.demonstration_texts(shown))
    model = build_policy(options.model, tokenizer, seed=0)
    dialogue = DialogueEncoder(tokenizer)
    taught = [supervised.tokenize(episode, dialogue) for episode in shown[:4]]
    optimizers = supervised._supervised_optimizers(model, (6e-3, 3.6e-3))
    generator = torch.Generator()

    def supervise() -> None:
        supervised._supervised_update(model, taught, optimizers, 0.03, 2048, generator)

    everything = partial(mock.patch.object, supervised, "_SCORED_WORDS", len(tokenizer))
    ours, theirs = compared(supervise, everything, options.rounds)
    tokens = sum(
        len(turn.tokens.prompt_ids) + len(turn.tokens.completion_ids)
        for episode in taught
        for turn in episode.turns
        if turn.tokens
    )
    print(f"{options.model}: 4 episodes, {tokens} tokens, {len(tokenizer)} words; one thread")
    print(f"ours {ours:.2f} s, all scored {theirs:.2f} s, ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
