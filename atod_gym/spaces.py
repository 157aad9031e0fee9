"""Spaces for text: any Unicode string, and the turn-structured observation made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

MAX_TEXT_LENGTH = 1_000_000
"""Default bound on the length of a text, in code points; far above any environment's texts."""

MAX_ACTION_LENGTH = 10_000
"""Bound on the length of an admissible action, in code points."""

MAX_TURNS = 1_000_000_000
"""Largest turn limit of an environment, and bound on `turn_index` where it has none."""

_REPLACEMENT = "\ufffd"
# Samples mix characters that are easy and hard for tokenizers, parsers and terminals. Lone
# surrogates belong to the space but are not sampled: UTF-8 cannot print or write them.
_SAMPLE_ALPHABET = (
    "".join(map(chr, range(32, 127))) + "\n\tàßñøĞλЖאع中日本語한🙂🛋️\u200d\u0301" + _REPLACEMENT
)
_SAMPLE_LENGTH = 32


class UnicodeText(spaces.Text):
    """All strings of at most `max_length` code points, of any code points.

    `gymnasium.spaces.Text` lists its characters and refuses a plain English sentence by default;
    this subclass checks the length only. Samples are short (32 code points at most) and drawn with
    `np_random`. `flatten` gives character numbers as for `Text`; a character outside the sampled
    alphabet becomes U+FFFD there. Vector environments batch a text into a tuple of strings;
    `AsyncVectorEnv` needs `shared_memory=False`.
    """

    def __init__(self, max_length: int = MAX_TEXT_LENGTH) -> None:
        super().__init__(max_length, min_length=0, charset=_SAMPLE_ALPHABET)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Draw a short random text.

        Raises:
            ValueError: if a mask or probability is given; this space supports neither.
        """
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText takes neither mask nor probability when sampling")
        length = int(self.np_random.integers(min(self.max_length, _SAMPLE_LENGTH) + 1))
        picks = self.np_random.integers(len(self.character_list), size=length)
        return "".join([self.character_list[pick] for pick in picks])

    def contains(self, x: Any) -> bool:
        """Return whether `x` is a `str` that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def character_index(self, char: str) -> np.int32:
        """Return the number of a character for `flatten`; that of U+FFFD for an unlisted one."""
        return super().character_index(char if char in self.character_set else _REPLACEMENT)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash(self.max_length)

    def __repr__(self) -> str:
        return f"UnicodeText({self.min_length}, {self.max_length})"


def turn_observation_space(max_turns: int | None = None) -> spaces.Dict:
    """Return the space of `TurnObservation`.

    Args:
        max_turns: turn limit of the environment; `turn_index` runs from 0 to it, inclusive.
            None: `MAX_TURNS`.

    Returns:
        A Dict of `admissible_actions` (tuple of texts), `instruction`, `text`, `turn_index`.
    """
    return spaces.Dict(
        {
            "instruction": UnicodeText(),
            "text": UnicodeText(),
            "admissible_actions": spaces.Sequence(UnicodeText(MAX_ACTION_LENGTH)),
            "turn_index": spaces.Discrete((max_turns or MAX_TURNS) + 1),
        }
    )
