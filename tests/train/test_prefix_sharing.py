"""Prompts share what they have in common: in a group, and from turn to turn in window style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from test_generation import POLICY, continued, make_generator, random_prompts
from transformers import GPT2Config, GPT2LMHeadModel

from atod_gym.prompts import PromptStyle
from atod_train.batch import make_batch
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.fast.llama import packed_logits
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.records import TokenizedTurn, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("feeding")


@pytest.fixture
def fed() -> Iterator[list[int]]:
    """Tokens, padding included, of each pass through the model."""
    counts: list[int] = []
    embedding = POLICY.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, given, result: counts.append(given[0].numel()))
    yield counts
    hook.remove()


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
    padded = 2 * max(len(first), len(other))
    assert fed == [len(first) + len(other) if generator._next_logits is packed_logits else padded]
    records = [
        Trajectory(0, "t", "k", (_turn(0, ids, c, False),), True, False, "terminated", True, 1.0)
        for ids, c in zip(prompts, completions, strict=True)
    ]
    # Each draws from a stream of its own.
    assert len({record.turns[0].tokens.completion_ids for record in records}) > 1
    batch = make_batch(records, 0)
    again = score_completions(POLICY, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_window_prompts_compute_only_tokens_after_the_common_prefix(fed: list[int]) -> None:
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
    again = score_completions(POLICY, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_a_restarted_dialogue_is_a_new_sequence(fed: list[int]) -> None:
    generator = make_generator(style="chat", limit=2, max_context=40)
    generator.start(1)
    first = list(range(20, 40))
    [one] = generator.prompt([first], [0])
    fed.clear()
    ids = [*first[:15], *range(50, 60)]
    [two] = generator.prompt([ids], [0])
    assert fed[0] == 10
    record = Trajectory(
        0, "t", "k", (_turn(0, first, one, False), _turn(1, ids, two, False)), True, False,
        "terminated", True, 1.0,
    )  # fmt: skip
    batch = make_batch([record], 0)
    again = score_completions(POLICY, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_equal_contexts_are_computed_once(fed: list[int]) -> None:
    prompt, same, other = list(range(20, 30)), list(range(30, 35)), list(range(40, 45))
    seen = [[same, other, same], [other, other, same], [same, other, same]]
    generator = make_generator(temperature=0, limit=1)
    generator.start(4)
    # The last one is fed something of its own, and is left out later.
    generator.prompt([prompt, prompt, prompt, other], range(4))
    assert fed == [10 + 5] if generator._next_logits is packed_logits else [2 * 10]
    fed.clear()
    continued(generator, seen[0], [0, 1, 2])
    assert fed == [2 * (1 + 5)]  # beginning with the token that was sampled last
    fed.clear()
    found = [continued(generator, feeds, [2, 1, 0]) for feeds in seen[1:]]
    # Row 1 was fed other tokens before, so that no row shares its position.
    assert fed == [3 * 6, 3 * 6]
    for row, column in ((2, 0), (1, 1), (0, 2)):
        alone = make_generator(temperature=0, limit=1)
        alone.start(1)
        for feed in (prompt, seen[0][row], seen[1][column]):
            [completion] = continued(alone, [feed], [0])
        assert found[0][column].ids == completion.ids
        [completion] = continued(alone, [seen[2][column]], [0])
        assert found[1][column].ids == completion.ids


def test_processes_take_their_own_streams_of_all() -> None:
    prompts = random_prompts(3, seed=1)
    generator = make_generator()
    generator.start(3)
    whole = generator.prompt(prompts, range(3))
    shared = []
    for row in range(3):
        generator = make_generator()
        generator.start(generator.draw_seeds(3)[row : row + 1])
        shared += generator.prompt([prompts[row]], [0])
    assert [c.ids for c in shared] == [c.ids for c in whole]
    # The next rollout continues alike, also if a process had no episode.
    generator.start(generator.draw_seeds(2)[:0])
    again = make_generator()
    again.start(3)
    again.start(2)
    generator.start(1)
    again.start(1)
    assert generator.prompt(prompts[:1], [0]) == again.prompt(prompts[:1], [0])


def test_short_feeds_next_to_long_ones_have_room() -> None:
    generator = make_generator(style="chat", limit=2)
    generator.start(2)
    # One episode nearly fills what the cache has reserved, the other is fed a long prompt then.
    generator.prompt([[30] * 120, [31] * 3], [0, 1])
    assert all(one.ids for one in continued(generator, [[30], [31] * 60], [0, 1]))


GROUPS = [[*range(40, 50)]] * 3 + [[*range(60, 67)]] * 3


def _play_groups(style: PromptStyle, rows: Sequence[int]) -> dict[int, list[Turn]]:
    """Three turns of two groups of three, of which only `rows` are played."""
    generator = make_generator(style=style)
    generator.start(6)
    played: dict[int, list[Turn]] = {row: [] for row in rows}
    for index in range(3):
        # Groups begin alike; in later turns some still share their prompt, and others do not.
        others = random_prompts(6, seed=index)
        prompts = [others[row] if index and row % 2 else GROUPS[row] for row in range(6)]
        for row, completion in zip(
            rows, continued(generator, [prompts[row] for row in rows], rows), strict=True
        ):
            extends = style == "chat" and index > 0
            played[row].append(_turn(index, prompts[row], completion, extends))
    return played


@pytest.mark.parametrize("style", ["chat", "window"])
def test_copied_prompts_serve_whole_completions_and_later_turns(style: PromptStyle) -> None:
    played = _play_groups(style, range(6))
    # Completions of several tokens attend to the copied keys and values.
    assert all(max(len(t.tokens.completion_ids) for t in turns) > 1 for turns in played.values())
    records = [
        Trajectory(0, "t", "k", tuple(turns), True, False, "terminated", True, 1.0)
        for turns in played.values()
    ]
    batch = make_batch(records, 0)
    again = score_completions(POLICY, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("style", ["chat", "window"])
@pytest.mark.parametrize("rows", [[0], [2], [4], [1, 5], [5, 3, 2]])
def test_a_row_of_a_group_does_not_depend_on_the_others(
    style: PromptStyle, rows: Sequence[int]
) -> None:
    together, apart = _play_groups(style, range(6)), _play_groups(style, rows)
    for row in rows:
        for one, other in zip(apart[row], together[row], strict=True):
            assert one.tokens.completion_ids == other.tokens.completion_ids
            torch.testing.assert_close(
                torch.tensor(one.tokens.sampling_logprobs),
                torch.tensor(other.tokens.sampling_logprobs),
                rtol=0,
                atol=1e-4,
            )


def test_groups_are_sampled_reproducibly() -> None:
    assert _play_groups("window", range(6)) == _play_groups("window", range(6))


def test_the_same_prompt_again_draws_further_numbers() -> None:
    prompt = list(range(30, 40))
    generator = make_generator(stop_ids=frozenset())
    generator.start(1)
    assert generator.prompt([prompt], [0]) != generator.prompt([prompt], [0])


def test_padding_may_stand_beyond_learned_positions() -> None:
    config = GPT2Config(
        vocab_size=len(POLICY.tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    policy = Policy(model=GPT2LMHeadModel(config).eval(), tokenizer=POLICY.tokenizer, name="x")
    dialogue = DialogueEncoder(POLICY.tokenizer)
    dialogue.stop_ids = frozenset()
    generator = Generator(policy, dialogue, max_completion_tokens=4)
    generator.start(2)
    prompts = [[[30] * 50, [31] * 3], [[40], [41] * 40]]
    turns: list[list[Turn]] = [[], []]
    for index, fed_now in enumerate(prompts):
        for row, completion in enumerate(continued(generator, fed_now, [0, 1])):
            turns[row].append(_turn(index, fed_now[row], completion, index > 0))
    batch = make_batch(
        [Trajectory(0, "t", "k", tuple(t), True, False, "terminated", True, 1.0) for t in turns], 0
    )
    again = score_completions(policy, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)
