"""Steps per second of the vector environments of each id, all in one run.

    python tests/benchmarks/vector_envs.py --envs 64 --seconds 5

For each id and number of environments: the native vector environment (`gymnasium.make_vec(id, n)`),
Gymnasium's `SyncVectorEnv` and `AsyncVectorEnv` (with `shared_memory=False`, a process for each
environment). All play the same seeded random policy on the same data, with autoreset. One single
environment is measured for comparison. A step is one action of one environment.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

import atod_gym

WORDS = ("red shoes", "wooden chair", "mill", "lake", "green tea", "cotton shirt", "bridge", "town")


def random_action(rng: np.random.Generator, listed: Sequence[str]) -> str:
    """A listed action at random; a search where none is listed or a placeholder was drawn."""
    action = listed[int(rng.integers(len(listed)))] if listed else "search[<query>]"
    if action == "search[<query>]":
        return f"search[{WORDS[int(rng.integers(len(WORDS)))]}]"
    return action


def vector_speed(envs: Any, seconds: float) -> float:
    """Steps per second of a vector environment, after one second of warming up."""
    rng = np.random.default_rng(0)
    observation, _ = envs.reset(seed=0)
    steps, begun = 0, time.perf_counter()
    warm = begun + 1.0
    while (now := time.perf_counter()) < warm + seconds:
        if now >= warm and begun < warm:
            steps, begun = 0, now
        actions = tuple(
            [random_action(rng, listed) for listed in observation["admissible_actions"]]
        )
        observation, *_ = envs.step(actions)
        steps += len(actions)
    return steps / (time.perf_counter() - begun)


def single_speed(env: Any, seconds: float) -> float:
    """Steps per second of one environment."""
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        observation, _, terminated, truncated, _ = env.step(
            random_action(rng, observation["admissible_actions"])
        )
        steps += 1
        if terminated or truncated:
            observation, _ = env.reset()
    return steps / (time.perf_counter() - begun)


def main() -> None:
    """Prints one line for each id and number of environments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ids", nargs="+", default=list(atod_gym.ENV_IDS))
    parser.add_argument("--envs", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--data", default="generated")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--without-async", action="store_true")
    options = parser.parse_args()
    modes: dict[str, dict[str, Any]] = {"native": {}, "sync": {"vectorization_mode": "sync"}}
    if not options.without_async:
        modes["async"] = {"vectorization_mode": "async", "vector_kwargs": {"shared_memory": False}}
    print(
        f"{'id':18} {'envs':>5} {'single':>9} "
        + " ".join(f"{m:>9}" for m in modes)
        + "  native/sync"
    )
    for env_id in options.ids:
        env = gymnasium.make(env_id, data=options.data)
        single = single_speed(env, options.seconds)
        for count in options.envs:
            speeds = []
            for settings in modes.values():
                envs = gymnasium.make_vec(env_id, count, data=options.data, **settings)
                speeds.append(vector_speed(envs, options.seconds))
                envs.close()
            figures = " ".join(f"{speed:9,.0f}" for speed in speeds)
            ratio = speeds[0] / speeds[1]
            print(f"{env_id:18} {count:5} {single:9,.0f} {figures}  {ratio:.2f}", flush=True)
        env.close()


if __name__ == "__main__":
    main()
