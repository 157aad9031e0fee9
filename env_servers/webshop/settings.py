"""Define the settings of a shop; `atod-serve webshop` has an option for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from env_servers.options import option

Splits = Literal["original", "verl-agent"]
TextStyle = Literal["text", "text_rich"]
NounTagger = Literal["auto", "spacy", "words"]
_CHOICES = {"splits": Splits, "text_style": TextStyle, "noun_tagger": NounTagger}


@dataclass(frozen=True, slots=True)
class ShopSettings:
    """The settings of one shop; two shops with equal settings and data are equal."""

    data: str = option("generated", "generated, or a folder with files in the official format")
    products: int = option(1000, "number of products of the generated shop", least=1)
    goal_seed: int = option(233, "seed of prices, price limits and the order of the goals")
    human_goals: bool = option(False, "human instructions instead of synthetic ones")
    show_attributes: bool = option(False, "add a fourth sub page, Attributes, to item pages")
    splits: str = option("original", "original (test, dev, train) or verl-agent (val, train)")
    text_style: str = option("text", "text or text_rich, the original's observation modes")
    noun_tagger: str = option(
        "auto", "spacy, words or auto: spaCy if it and its model are installed, else words"
    )

    def __post_init__(self) -> None:
        """Refuse invalid values.

        Raises:
            ValueError: names the setting and its possible values.
        """
        for name, choices in _CHOICES.items():
            value: Any = getattr(self, name)
            if value not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"unknown {name} {value!r}; known: {known}")
        for name in ("goal_seed", "products"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, not {value!r}")
        if self.products < 1:
            raise ValueError(f"products must be at least 1, not {self.products}")
        if not self.data:
            raise ValueError('data must be "generated" or the path of a folder')
