"""Load recordings of the original text environment, and the official shop to compare with."""

from __future__ import annotations

import json
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop


def golden_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a compressed JSON-lines file of the folder `golden`."""
    with lzma.open(folder / "golden" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@lru_cache(maxsize=16)
def official_shop(folder: Path, **settings: Any) -> Shop:
    """The shop of the official small set; noun-dependent records used the words tagger."""
    return Shop.open(ShopSettings(data=str(folder), noun_tagger="words", **settings))
