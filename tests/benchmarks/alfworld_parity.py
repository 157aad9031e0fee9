"""Plays games in the native and in the official engine side by side and counts differences.

    python tests/benchmarks/alfworld_parity.py --data <json_2.1.1> --results parity.jsonl

Every validation game and `--train-games` training games (evenly spread, all task types) are
played three times: along the walkthrough, along a random walk with invalid commands mixed in, and
along the scripted expert. After each command the feedback, the admissible commands and `won` are
compared. The official engine needs hours for all of it: each play is appended to the results file,
and a second run continues where the first one stopped. Exit code 1 if there is any difference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atod_gym.envs.alfworld.engine import EngineState
from atod_gym.envs.alfworld.engine.native import NativeEngine
from atod_gym.envs.alfworld.expert import ScriptedExpert
from atod_gym.envs.alfworld.official import OfficialEngine

MODES = ("walkthrough", "random", "expert")
INVALID = (
    "",
    "   ",
    "dance",
    "go to",
    "go to desk 99",
    "take nothing from nowhere",
    "help me",
    "🙂",
)

Chooser = Callable[[EngineState], str | None]


def random_chooser(rng: random.Random, steps: int) -> Chooser:
    """A random walk: a verb, then one of its commands; now and then an invalid command."""
    seen: list[str] = []
    left = iter(range(steps))

    def choose(state: EngineState) -> str | None:
        if next(left, None) is None:
            return None
        draw = rng.random()
        commands = state.admissible_commands
        seen.extend(rng.sample(commands, min(3, len(commands))))
        if draw < 0.1:
            return rng.choice(INVALID)
        if draw < 0.2:
            return rng.choice(seen)  # admissible once, perhaps no more
        verb = rng.choice(sorted({command.split()[0] for command in commands}))
        command = rng.choice([c for c in commands if c.split()[0] == verb])
        return f"  {command} " if draw < 0.25 else command.upper() if draw < 0.28 else command

    return choose


def expert_chooser(start: EngineState) -> Chooser:
    """The scripted expert until it wins, for 50 turns at most."""
    expert = ScriptedExpert()
    expert.reset(start.feedback.rsplit("Your task is to: ", 1)[1], start.feedback)
    last: list[str] = []

    def choose(state: EngineState) -> str | None:
        if state.won or len(last) >= 50:
            return None
        agent_sees = [c for c in state.admissible_commands if c != "help"]
        last.append(expert.act(state.feedback, agent_sees, last[-1] if last else None))
        return last[-1]

    return choose


def chooser_for(mode: str, engine: NativeEngine, steps: int) -> Chooser:
    """The player of a mode; the random walk depends on the game alone."""
    start = engine.reset()
    if mode == "walkthrough":
        left = iter((*engine.walkthrough, "look", "inventory", "help"))
        return lambda state: next(left, None)
    if mode == "random":
        return random_chooser(random.Random(start.feedback), steps)
    return expert_chooser(start)


def compare(native: NativeEngine, official: OfficialEngine, choose: Chooser) -> Iterator[str]:
    """Plays both engines and yields one line per state: empty, or what differs."""
    command: str | None = "reset"
    ours, theirs = native.reset(), official.reset()
    while command is not None:
        different = [name for name in ours._fields if getattr(ours, name) != getattr(theirs, name)]
        details = "; ".join(
            f"{name}: {getattr(ours, name)!r} != {getattr(theirs, name)!r}" for name in different
        )
        yield f"after {command!r}: {details}" if different else ""
        command = choose(ours)
        if command is not None:
            ours, theirs = native.step(command), official.step(command)


def compare_game(
    game: Path | Mapping[str, Any], modes: tuple[str, ...], steps: int
) -> dict[str, list[str]]:
    """Mode -> one line per state compared (empty where equal), for one game file or content."""
    native, official = NativeEngine(game), OfficialEngine(game)
    try:
        return {
            mode: list(compare(native, official, chooser_for(mode, native, steps)))
            for mode in modes
        }
    finally:
        official.close()


def chosen_games(root: Path, train_games: int) -> list[Path]:
    """All validation games, then training games spread evenly over the sorted list."""
    seen, unseen, train = (
        sorted(root.glob(f"{split}/*/*/game.tw-pddl"))
        for split in ("valid_seen", "valid_unseen", "train")
    )
    every = max(1, len(train) // max(1, train_games))
    return [*seen, *unseen, *train[::every][:train_games]]


def main() -> int:
    """Runs what is missing from the results file and prints the totals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder json_2.1.1")
    parser.add_argument("--results", type=Path, default=Path("parity.jsonl"))
    parser.add_argument("--train-games", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25, help="commands of a random walk")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--jobs", type=int, default=1, help="games at the same time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    options = parser.parse_args()
    rows = []
    if options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    done = {(row["game"], row["mode"]) for row in rows}
    games = chosen_games(options.data, options.train_games)
    left = []
    for game in games:
        name = str(game.parent.relative_to(options.data))
        modes = tuple(mode for mode in options.modes if (name, mode) not in done)
        if modes:
            left.append((name, game, modes, options.steps))
    end = time.monotonic() + 60 * options.minutes
    # The official engine slows down with every game that a process has loaded.
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=15) as pool:
        for number, found in enumerate(pool.imap(play_game, left), start=1):
            rows += found
            with options.results.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            if number % 20 == 0:
                print(f"{number} of {len(left)} games", file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
    return summarise(rows, len(games))


def play_game(task: tuple[str, Path, tuple[str, ...], int]) -> list[dict[str, object]]:
    """The rows of the results file for one game."""
    name, game, modes, steps = task
    return [
        {"game": name, "mode": mode, "states": len(lines), "differences": list(filter(None, lines))}
        for mode, lines in compare_game(game, modes, steps).items()
    ]


def summarise(rows: list[dict[str, object]], games: int) -> int:
    """Prints states compared and differences per mode; 1 if anything differs."""
    differences = 0
    for mode in MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        states = sum(int(str(row["states"])) for row in chosen)
        wrong = [f"{row['game']}: {line}" for row in chosen for line in list(row["differences"])]  # type: ignore[call-overload]
        differences += len(wrong)
        print(f"{mode:12} {len(chosen)}/{games} games, {states} states, {len(wrong)} differences")
        for line in wrong[:10]:
            print("   ", line[:400])
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
