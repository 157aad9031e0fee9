"""Make the student and the teacher of the quickstart again, and print the hashes of their weights.

Both are decoders of two layers that imitated a scripted expert: the student 120 of its episodes in
10 passes, the teacher 200 others in 8. Weights are the same bits on the same kind of processor;
those of another kind need their hashes in `SHIPPED`. Two minutes:

    python tests/benchmarks/quickstart_models.py atod_train/models/shipped
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from atod_train.models.from_scratch import build_policy
from atod_train.models.pretrained import SHIPPED
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.presets import PRESETS
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.starts import NOISE, imitate
from atod_train.training.supervised import demonstrate, demonstration_texts

EPISODES = 3000
"""Episodes whose words are the vocabulary."""


def make(
    folder: Path,
    episodes: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    epochs: float,
    seed: int,
) -> str:
    """Train a model on episodes, save it, and return the SHA-256 of its weights."""
    policy = build_policy("mini", tokenizer, seed, name=folder.name)
    imitate(policy, episodes, PRESETS["quickstart"].config, epochs, seed)
    policy.save(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="gets a folder for each model")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    with closing(EnvPool(PRESETS["quickstart"].config.env, "train")) as pool:
        episodes = demonstrate(pool, EPISODES, NOISE, seed=0)
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    for name, shown, epochs, seed in (
        ("quickstart-student", episodes[:120], 10, 1),
        ("quickstart-teacher", episodes[-200:], 8, 0),
    ):
        digest = make(folder / name, shown, tokenizer, epochs, seed)
        is_same = SHIPPED[name] == digest
        print(f"{name}: {digest} ({'same as' if is_same else 'differs from'} the shipped one)")


if __name__ == "__main__":
    main()
