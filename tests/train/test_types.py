"""Check the properties of the records of turns and trajectories."""

from __future__ import annotations

import pytest

from atod_train.records import TokenizedTurn, Trajectory, Turn

TOKENS = TokenizedTurn((1,), (2,), (-0.5,), "stop", False)


def turn(action: str, *, valid: bool = True, reward: float = 0.0) -> Turn:
    return Turn(0, (), action, action, reward, valid, TOKENS)


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        ("go to desk 1", "go"),
        ("search[red shoes]", "search"),
        ("Answer[1984]", "answer"),
        ("", ""),
        ("[search]", ""),
        ("42", ""),
    ],
)
def test_a_verb_is_the_first_word_of_an_action(action: str, verb: str) -> None:
    assert turn(action).verb == verb


def test_a_trajectory_counts_the_verbs_of_valid_actions_and_sums_rewards() -> None:
    turns = (
        turn("search[a]", reward=-0.5),
        turn("search[b]"),
        turn("search", valid=False),
        turn("answer[c]", reward=10.0),
    )
    record = Trajectory(0, "t", "kind", turns, True, False, "terminated", True, 1.0)
    assert record.verbs == {"search": 2, "answer": 1}
    assert record.episode_return == 9.5
