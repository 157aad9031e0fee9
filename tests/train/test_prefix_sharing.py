"""Prompts share what they have in common: in a group, and from turn to turn in window style."""

from __future__ import annotations

import pytest
import torch
from test_generation import POLICY, make_generator, random_prompts
from torch import Tensor

from atod_train.batching import make_batch
from atod_train.config import PromptStyle
from atod_train.generation import Generator
from atod_train.types import TokenizedTurn, Trajectory, Turn


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens, padding included, of each pass through the model."""
    counts: list[int] = []
    forward = Generator._forward

    def count(self: Generator, first_slot: int, ids: Tensor, *rest: Tensor | int | None) -> Tensor:
        counts.append(ids.numel())
        return forward(self, first_slot, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "_forward", count)
    return counts


def _turn(index: int, prompt: list[int], completion: object, extends: bool) -> Turn:
    tokens = TokenizedTurn(
        tuple(prompt),
        completion.ids,  # type: ignore[attr-defined]
        completion.logprobs,  # type: ignore[attr-defined]
        completion.finish_reason,  # type: ignore[attr-defined]
        extends,
    )
    return Turn(index, (), "", "", 0.0, True, tokens)


@pytest.mark.parametrize("style", ["chat", "window"])
def test_a_group_computes_its_first_prompt_once(style: PromptStyle, fed: list[int]) -> None:
    generator = make_generator(style=style, limit=1)
    first, other = random_prompts(2, seed=3)
    generator.start(7)
    prompts = [first, other, first, first, other, first, first]
    completions = generator.prompt(prompts, range(7))
    assert fed == [2 * max(len(first), len(other))]
    records = [
        Trajectory(0, "t", "k", (_turn(0, ids, c, False),), True, False, "terminated", True, 1.0)
        for ids, c in zip(prompts, completions, strict=True)
    ]
    # Each draws from a stream of its own.
    assert len({record.turns[0].tokens.completion_ids for record in records}) > 1
    batch = make_batch(records, 0)
    again = POLICY.completion_logprobs(batch)
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_window_prompts_compute_what_follows_the_common_part(fed: list[int]) -> None:
    generator = make_generator(style="window", limit=1)
    generator.start(2)
    task = list(range(20, 50))
    prompts = [[*task, *range(60, 70)], [*task, *range(70, 75)]]
    generator.prompt(prompts, [0, 1])
    later = [[*task, *range(80, 90)], [*task, *range(60, 70)]]
    completions = generator.prompt(later, [0, 1])
    assert fed[1] == 2 * 10
    # The same prompt again: only its last token is computed.
    generator.prompt(later, [0, 1])
    assert fed[2] == 2
    # A shorter one, which the cache holds whole.
    generator.prompt([task[:7], task[:9]], [0, 1])
    assert fed[3] == 2
    records = [
        Trajectory(0, "t", "k", (_turn(0, ids, c, False),), True, False, "terminated", True, 1.0)
        for ids, c in zip(later, completions, strict=True)
    ]
    batch = make_batch(records, 0)
    again = POLICY.completion_logprobs(batch)
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_a_restarted_dialogue_is_a_new_sequence(fed: list[int]) -> None:
    generator = make_generator(style="chat", limit=2, max_context=40)
    generator.start(1)
    first = list(range(20, 40))
    [one] = generator.prompt([first], [0])
    assert one is not None
    assert not generator.fits(0, range(30))
    generator.restart(0)
    assert generator.context_length(0) == 0
    assert generator.fits(0, range(30))
    fed.clear()
    ids = [*first[:15], *range(50, 60)]
    [two] = generator.prompt([ids], [0])
    assert two is not None
    assert fed[0] == 10
    assert generator.context_length(0) == len(ids) + len(two.ids)
    record = Trajectory(
        0, "t", "k", (_turn(0, first, one, False), _turn(1, ids, two, False)), True, False,
        "terminated", True, 1.0,
    )  # fmt: skip
    batch = make_batch([record], 0)
    again = POLICY.completion_logprobs(batch)
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_processes_take_their_own_streams_of_all() -> None:
    prompts = random_prompts(3, seed=1)
    generator = make_generator()
    generator.start(3)
    whole = generator.prompt(prompts, range(3))
    shared = []
    for row in range(3):
        generator = make_generator()
        generator.start(1, before=row, after=2 - row)
        shared += generator.prompt([prompts[row]], [0])
    assert [c.ids for c in shared if c] == [c.ids for c in whole if c]
    assert len(shared) == 3


def test_short_feeds_beside_long_ones_have_room() -> None:
    generator = make_generator(style="chat", limit=2)
    generator.start(2)
    # One episode nearly fills what the cache has reserved, the other is fed a long prompt then.
    generator.prompt([[30] * 120, [31] * 3], [0, 1])
    assert all(generator.prompt([[30], [31] * 60], [0, 1]))
