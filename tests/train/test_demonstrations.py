"""Demonstrations of real questions, and what a supervised start scores of a large vocabulary."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch

from atod_gym.types import Message
from atod_train.batch import make_batch
from atod_train.config import EnvConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.policy import Policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.rollout.env_pool import EnvPool
from atod_train.training import supervised
from atod_train.training.supervised import (
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)

NO_TOKENS = TokenizedTurn((), (), (), "stop", extends_previous=False)
PAGE = "a long page of many words that are never sampled but whose reading teaches to read"


@pytest.fixture(scope="module")
def taught() -> tuple[Policy, list[Trajectory]]:
    """A model, and eight episodes of an expert's turn and a random one."""
    episodes = []
    for word in ("mug", "pen", "lamp", "vase", "bowl", "knife", "book", "apple"):
        played = ((f"{PAGE} {word}", f"take {word}"), (PAGE, "look"))
        turns = tuple(
            Turn(
                i, (Message("user", text),), action, action, 0.0, True, NO_TOKENS, is_trained=not i
            )
            for i, (text, action) in enumerate(played)
        )
        episodes.append(Trajectory(0, "", "", turns, True, False, "terminated", True, 1.0))
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    shape = ModelShape(layers=1, width=32, heads=2, mlp_width=64, max_positions=128)
    trajectories = [tokenize(episode, DialogueEncoder(tokenizer)) for episode in episodes]
    return build_policy(shape, tokenizer, seed=0), trajectories


@pytest.mark.slow
def test_a_share_of_the_observations_weighs_as_much_as_all(
    taught: tuple[Policy, list[Trajectory]],
) -> None:
    policy, trajectories = taught
    batch = make_batch(trajectories, policy.pad_id)
    generator = torch.Generator().manual_seed(0)
    full = supervised._token_weights(batch, trajectories, 0.3, 1.0, generator)
    observed = full == torch.tensor(0.3)
    draws = torch.stack(
        [supervised._token_weights(batch, trajectories, 0.3, 0.25, generator) for _ in range(2000)]
    )
    assert torch.equal(draws[:, ~observed], full[~observed].expand(2000, -1))
    assert draws[:, observed].unique().tolist() == [0.0, pytest.approx(1.2)]
    # Of 2,000 draws, each with variance 0.3^2 (1 / 0.25 - 1), five standard errors.
    error = 5 * 0.3 * 3**0.5 / 2000**0.5
    assert (draws.mean(dim=0) - full)[observed].abs().max() < error


@pytest.mark.slow
def test_only_scored_positions_get_logits(
    taught: tuple[Policy, list[Trajectory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, trajectories = taught
    rows: list[int] = []
    logits = Policy.logits

    def counted(self: Policy, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(Policy, "logits", counted)
    train = train_on_demonstrations
    first = train(policy, trajectories, epochs=1, lr=(0.0, 0.0), seed=0)
    everything = sum(rows)
    rows.clear()
    monkeypatch.setattr(supervised, "_SCORED_WORDS", policy.model.config.vocab_size / 4)
    again = [train(policy, trajectories, epochs=1, lr=(0.0, 0.0), seed=s) for s in range(100)]
    assert sum(rows) / 100 < 0.4 * everything
    # An untrained model finds all tokens about equally surprising.
    assert sum(map(sum, again)) / 100 == pytest.approx(sum(first), rel=0.02)


def test_real_questions_are_demonstrated_where_a_passage_holds_the_answer(tmp_path: Path) -> None:
    questions = [
        {"question": "who wrote the hobbit", "answer": ["Tolkien", "J. R. R. Tolkien"]},
        {"question": "when was the hobbit written", "answer": "1937"},  # no passage says it
    ]
    passages = [{"id": "1", "contents": '"The Hobbit"\nThe Hobbit is a book by J. R. R. Tolkien.'}]
    for name, rows in (("nq_train", questions), ("corpus", passages)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = EnvConfig(id="atod/SearchQA-v0", data=str(tmp_path), max_turns=3)
    with closing(EnvPool(config, "train")) as pool:
        [shown] = supervised.demonstrate(pool, 2, 0.2, seed=0)
    assert [turn.completion for turn in shown.turns] == [
        "search[hobbit]",
        "answer[Tolkien]",
    ]
    assert "a book by J. R. R. Tolkien" in shown.turns[1].prompt[-1].content
