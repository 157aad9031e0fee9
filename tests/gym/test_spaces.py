from __future__ import annotations

import json
import pickle

import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_space_limit
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from atod_gym.spaces import UnicodeText, turn_observation_space

any_text = st.text(st.characters(exclude_categories=()), max_size=50)


@given(any_text)
def test_any_text_is_contained_and_survives_json(text: str) -> None:
    space = UnicodeText()
    assert text in space
    encoded = json.loads(json.dumps(space.to_jsonable([text])))
    assert space.from_jsonable(encoded) == [text]


@pytest.mark.parametrize("value", [None, 1, b"look", ["look"], 1.5])
def test_other_types_are_not_contained(value: object) -> None:
    assert value not in UnicodeText()


def test_the_bound_is_inclusive_and_in_code_points() -> None:
    space = UnicodeText(3)
    assert ["a" * n in space for n in range(5)] == [True, True, True, True, False]
    assert "🙂🙂🙂" in space
    assert "\ud800\udfff" in space


def test_samples_lie_in_the_space_and_follow_the_seed() -> None:
    for space in (UnicodeText(), UnicodeText(5), UnicodeText(0)):
        space.seed(7)
        first = [space.sample() for _ in range(50)]
        space.seed(7)
        assert first == [space.sample() for _ in range(50)]
        assert all(text in space for text in first)
        "".join(first).encode()


def test_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="mask"):
        UnicodeText().sample(mask=3)


def test_equality_copy_and_text() -> None:
    assert UnicodeText(5) == UnicodeText(5) != UnicodeText(6)
    assert hash(UnicodeText(5)) == hash(UnicodeText(5))
    assert UnicodeText(5) != spaces.Text(5)
    assert pickle.loads(pickle.dumps(UnicodeText(5))) == UnicodeText(5)
    assert repr(UnicodeText(5)) == "UnicodeText(0, 5)"


def test_flattening_keeps_characters_of_the_alphabet() -> None:
    space = UnicodeText(20)
    assert isinstance(space, spaces.Text)
    for text, back in (("", ""), ("Go to desk 1!", "Go to desk 1!"), ("日本 ξ", "日本 \ufffd")):
        flat = spaces.utils.flatten(space, text)
        assert flat in spaces.utils.flatten_space(space)
        assert spaces.utils.unflatten(space, flat) == back


def test_observation_space_takes_plain_values() -> None:
    space = turn_observation_space(50)
    observation = {
        "instruction": "put a mug on the desk",
        "text": "You are\n…",
        "admissible_actions": ("look", "inventory"),
        "turn_index": 50,
    }
    assert observation in space
    assert {**observation, "admissible_actions": ()} in space
    assert {**observation, "turn_index": 51} not in space
    assert {**observation, "admissible_actions": ["look"]} not in space
    check_space_limit(space, "observation")


def test_observations_can_be_batched_and_taken_apart() -> None:
    space = turn_observation_space(3)
    space.seed(1)
    items = [space.sample() for _ in range(3)]
    empty = create_empty_array(space, n=3)
    batch = concatenate(space, items, empty)
    assert batch in batch_space(space, 3)
    assert list(iterate(batch_space(space, 3), batch)) == items
