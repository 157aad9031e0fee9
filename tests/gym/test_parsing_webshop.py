"""The `compat` profile against the parser of published WebShop runs."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from atod_gym.parsing import parse_completion


def test_all_recorded_completions(webshop_data: Path) -> None:
    path = webshop_data / "golden" / "va_projection.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) == 13
    for record in records:
        parsed = parse_completion(record["in"], profile="compat", last_characters=20)
        assert (parsed.action, int(parsed.is_valid)) == (record["action"], record["valid"])


def test_a_closing_tag_before_the_opening_one_gives_an_empty_action() -> None:
    completion = "<think></think></action>search[x]<action>"
    parsed = parse_completion(completion, profile="compat", last_characters=20)
    assert (parsed.action, parsed.is_valid) == ("", True)
