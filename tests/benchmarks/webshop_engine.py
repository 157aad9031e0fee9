"""Steps per second of the shop in one process, over random valid episodes.

    python tests/benchmarks/webshop_engine.py [--data FOLDER] [--seconds 10]

As in the measurement of the original: resets count, and the list of clickables is read at each
step. Prints the total, and the median time of a step by what it did. Steps per second of processor
time are what counts on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict

from measured_server import resident

from env_servers.webshop.episode import Episode
from env_servers.webshop.pages import BACK, BUY, NEXT, PREVIOUS, SUB_PAGES
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

MAX_STEPS = 15


def action_for(episode: Episode, rng: random.Random) -> tuple[str, str]:
    """A random valid action, and what kind it is."""
    page = episode.page
    if page.has_search_bar:
        words = page.instruction.split()
        start = rng.randrange(len(words))
        return f"search[{' '.join(words[start : start + rng.randint(2, 8)])}]", "search"
    name = rng.choice(page.clickables)
    kinds = {BACK: "back to search", BUY: "buy", NEXT: "next page", PREVIOUS: "previous"}
    other = "product" if page.kind == "results" else "option"
    return f"click[{name}]", kinds.get(name, "sub page" if name in SUB_PAGES else other)


def play(shop: Shop, seconds: float, seed: int) -> tuple[int, int, float]:
    """Plays without looking at the clock between steps: episodes, steps, seconds."""
    rng = random.Random(seed)
    episodes = steps = 0
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        episode = Episode(shop, shop.goals[rng.randrange(len(shop.goals))], str(episodes))
        episodes += 1
        for _ in range(MAX_STEPS):
            outcome = episode.step(action_for(episode, rng)[0])
            steps += 1
            if outcome.over:
                break
    return episodes, steps, now - begun


def times_by_kind(shop: Shop, steps: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each of many steps, by kind."""
    rng = random.Random(seed)
    times: dict[str, list[float]] = defaultdict(list)
    while steps > 0:
        begun = time.perf_counter()
        episode = Episode(shop, shop.goals[rng.randrange(len(shop.goals))], "0")
        times["reset"].append(time.perf_counter() - begun)
        for _ in range(MAX_STEPS):
            action, kind = action_for(episode, rng)
            begun = time.perf_counter()
            outcome = episode.step(action)
            times[kind].append(time.perf_counter() - begun)
            steps -= 1
            if outcome.over:
                break
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="generated", help="generated, or an official folder")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--text-style", default="text")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    shop = Shop.open(
        ShopSettings(data=arguments.data, text_style=arguments.text_style, noun_tagger="words")
    )
    print(f"{shop.name}: open in {time.perf_counter() - begun:.2f} s, {len(shop.goals):,} goals")
    for note in ("first", "warm"):
        used = time.process_time()
        episodes, steps, seconds = play(shop, arguments.seconds, seed=1)
        used = time.process_time() - used
        print(
            f"{note}: {steps / seconds:,.0f} steps/s, {steps / used:,.0f} per second of processor "
            f"time ({episodes:,} episodes, {steps:,} steps)"
        )
    for kind, times in sorted(times_by_kind(shop, 100_000, seed=2).items()):
        median = 1e6 * statistics.median(times)
        share = 1e6 * sum(times) / len(times)
        print(f"  {kind:<15} median {median:7.1f} us, mean {share:7.1f} us, {len(times):,} times")
    print(f"peak resident memory {resident('VmHWM') / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
