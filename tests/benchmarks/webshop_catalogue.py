"""Opens a synthetic catalogue of any size: time, peak memory and room on disk.

    python tests/benchmarks/webshop_catalogue.py --products 50000 [--folder DIR]

Writes files in the official format, about 4.3 KB for a product as in the full official catalogue,
then opens the shop twice, each time in a process of its own with a cache folder of its own, and
deletes everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured_server import resident
from webshop_engine import play

from env_servers.webshop.generator import generate_shop
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

_PATTERNS = 1000
_SYLLABLES = "ba be bi bo da de di do ka ke ki ko la le li lo ma me mi mo na ne ni no ra re ri ro"
_MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def write_files(folder: Path, products: int) -> int:
    """Writes a product file and its attribute file; returns their bytes."""
    rng = random.Random(0)
    shop = generate_shop(seed=0, products=_PATTERNS)
    syllables = _SYLLABLES.split()
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(200_000)]
    # Words as frequent as in text: few very common, many rare.
    text = [words[int(len(words) * rng.random() ** 4)] for _ in range(1_000_000)]
    paths = folder / "items_shuffle.json", folder / "items_ins_v2.json"
    with paths[0].open("w") as items, paths[1].open("w") as entries:
        items.write("[")
        entries.write("{")
        for number in range(products):
            item, entry = variant(shop.items[number % _PATTERNS], number, rng, text)
            separator = ", " if number else ""
            items.write(separator + json.dumps(item))
            pattern = shop.instructions[shop.items[number % _PATTERNS]["asin"]]
            entries.write(f"{separator}{json.dumps(entry)}: {json.dumps(pattern)}")
        items.write("]")
        entries.write("}")
    return sum(path.stat().st_size for path in paths)


def variant(
    item: dict[str, Any], number: int, rng: random.Random, text: list[str]
) -> tuple[dict[str, Any], str]:
    """A product of its own made from a pattern, and its asin."""
    digits = []
    for _ in range(8):
        number, digit = divmod(number, len(_MARKS))
        digits.append(_MARKS[digit])
    asin = "B0" + "".join(digits)

    def some(count: int) -> str:
        start = int((len(text) - count) * rng.random())
        return " ".join(text[start : start + count])

    varied = {
        **item,
        "asin": asin,
        "name": f"{item['name']} {some(6)}",
        "full_description": f"{item['full_description']} {some(40)}",
        "small_description": [f"{bullet} {some(70)}" for bullet in item["small_description"]],
        "images": [f"https://images.example.org/media/I/{asin}-{n}-large.jpg" for n in range(8)],
        "reviews": [],
    }
    return varied, asin


def open_once(folder: str) -> None:
    """Opens the shop and plays; prints a line of figures."""
    begun = time.perf_counter()
    shop = Shop.open(ShopSettings(data=folder, noun_tagger="words"))
    opened = time.perf_counter() - begun
    opened_cpu = time.process_time()
    peak = resident("VmHWM") / 2**20
    begun = time.perf_counter()
    page = shop.search_rows("solar lantern bamboo", "")
    first = time.perf_counter() - begun
    used = time.process_time()
    _, steps, seconds = play(shop, 10.0, seed=1)
    used = time.process_time() - used
    print(
        f"open {opened:.2f} s ({opened_cpu:.2f} s of CPU), {len(shop.goals):,} goals; "
        f"peak resident memory {peak:.0f} MB; first search {1000 * first:.0f} ms "
        f"({len(page)} found); {steps / seconds:,.0f} steps/s, {steps / used:,.0f} per second of "
        "processor time; afterwards "
        f"{resident('VmRSS') / 2**20:.0f} MB resident, {resident('RssAnon') / 2**20:.0f} MB "
        "without mapped files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--products", type=int, default=50_000)
    parser.add_argument("--folder", help="where the files may lie meanwhile")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_once(arguments.open)
        return
    folder = Path(tempfile.mkdtemp(prefix="webshop-", dir=arguments.folder))
    try:
        size = write_files(folder, arguments.products)
        print(f"{arguments.products:,} products, {size / 1e9:.2f} GB of files")
        environment = {**os.environ, "ATOD_CACHE": str(folder / "cache")}
        for note in ("first", "second"):
            print(f"{note} start: ", end="", flush=True)
            command = [sys.executable, __file__, "--open", str(folder)]
            subprocess.run(command, env=environment, check=True)
        files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
        print(f"stored: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
