"""Assign goals to splits, and make their manifests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from env_servers.webshop.goals import Goal


class Manifest(msgspec.Struct, frozen=True):
    """The tasks of one split, the same on every machine."""

    name: str
    """The shop, such as `webshop/official-1000`."""
    split: str
    task_ids: tuple[str, ...]
    """Sorted, without duplicates."""
    task_types: tuple[str, ...]
    """Of each task."""
    content_hash: str
    """64 hexadecimal digits, see `content_hash`."""


def split_ranges(rule: str, goals: int, official: bool) -> dict[str, range]:
    """Return the indexes of the goals of each split, in the original's order of goals.

    `original`: test 0-499, dev 500-1,499, train from 1,500 on; `verl-agent`: val 0-499, train from
    500 on. With other than official data every split before train has a tenth of the goals.
    """
    names, sizes = {"original": (("test", "dev"), (500, 1000)), "verl-agent": (("val",), (500,))}[
        rule
    ]
    found, start = {}, 0
    for name, size in zip(names, sizes, strict=True):
        end = min(goals, start + (size if official else goals // 10))
        found[name], start = range(start, end), end
    return {**found, "train": range(start, goals)}


def content_hash(tasks: Iterable[tuple[str, Goal]]) -> str:
    """Return the hash of (task id, goal) pairs, sorted by id.

    It is SHA-256 over one line `<task id> <digest>` per task; the digest is SHA-256 over the tuple
    of asin, instruction, options and price_upper as `ascii` writes it.
    """
    total = hashlib.sha256()
    for task_id, goal in tasks:
        content = ascii((goal.asin, goal.instruction, goal.options, goal.price_upper))
        digest = hashlib.sha256(content.encode()).hexdigest()
        total.update(f"{task_id} {digest}\n".encode())
    return total.hexdigest()
