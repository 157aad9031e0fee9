"""The two samplers of `model.sampler` on the same episodes: tokens per second and peak memory.

    python tests/benchmarks/sampler.py                       # SmolLM2, on a processor or a GPU
    python tests/benchmarks/sampler.py --turns 20 --tokens 256 --model <folder>    # on a GPU

Generated tasks in three shapes: chats in ALFWorld, windows with the listed actions in ALFWorld, and
windows with the passages of a search in every turn in Search-QA. Every completion has the same
number of tokens, so that both do equal work. The engines take turns, shape by shape, each in a
process of its own. A turn is played before the time runs. Weights change before it, as in training:
vLLM has to copy them and has no prefixes. Memory is the peak of the process on a processor, and
what the device has given away on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from measured_server import resident

from atod_train.config import EnvConfig, ModelConfig, RunConfig, TrainConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.pretrained import load_policy
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, make_sampler

HOUSES = EnvConfig(data="generated", options={"house_size": "tiny"})
SHAPES = {
    "ALFWorld, chat": HOUSES,
    "ALFWorld, window": EnvConfig(
        data="generated", options=HOUSES.options, prompt_style="window", show_admissible=True
    ),
    "Search-QA": EnvConfig(
        id="atod/SearchQA-v0", data="generated", options={"entities": 1000, "topk": 3},
        prompt_style="window:4", max_turns=30,
    ),
}  # fmt: skip


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plays with one engine in one shape; a row for each number of episodes."""
    env = SHAPES[options.shape]
    config = RunConfig(
        env,
        ModelConfig(max_context=options.max_context),
        train=TrainConfig(max_completion_tokens=options.tokens),
    )
    policy = load_policy(options.model, device=options.device)
    dialogue = DialogueEncoder(policy.tokenizer, env.prompt_style)
    pool = EnvPool(env, "train")
    dialogue.stop_ids = frozenset()
    if "Search" in env.id:
        # Which passages are found does not matter, but that there are some.
        dialogue.decode = lambda ids: "search[where the river begins]"  # type: ignore[method-assign]
    sampler = make_sampler(
        policy, dialogue, pool, config, temperature=1.0, seed=0, engine=options.engine
    )

    def play(episodes: int, turns: int) -> int:
        tasks = pool.task_ids[: episodes // options.group_size]
        records = collect(pool, sampler, tasks, group_size=options.group_size, turn_limit=turns)
        return sum(len(t.tokens.completion_ids) for record in records for t in record.turns)

    rows = []
    for episodes in sorted(options.episodes):
        play(episodes, 1)
        with torch.no_grad():
            next(policy.model.parameters()).mul_(1.001)
        begun = time.perf_counter()
        tokens = play(episodes, options.turns)
        seconds = time.perf_counter() - begun
        rows.append(
            {"episodes": episodes, "tokens": tokens, "rate": tokens / seconds, "gb": peak(policy)}
        )
    pool.close()
    return rows


def peak(policy: Any) -> float:
    """Peak memory so far in GB."""
    if policy.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(policy.device)
        return (total - free) / 1e9
    return resident("VmHWM") / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a hub name")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--engines", nargs="+", default=("plain", "vllm:0.1"))
    parser.add_argument("--episodes", nargs="+", type=int, default=(16, 64))
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of every completion")
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of a process that measures
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.model}, groups of {options.group_size}, {options.turns} turns of "
        f"{options.tokens} tokens, {options.threads} threads\n"
    )
    first, second = (name.partition(":")[0] for name in options.engines)
    print(
        f"| shape | episodes | {first}, tokens/s | {second}, tokens/s | ratio | {first}, GB "
        f"| {second}, GB |\n|---|---|---|---|---|---|---|"
    )
    for shape in options.shapes:
        found = [_process(engine, shape, options.threads) for engine in options.engines]
        for ours, theirs in zip(*found, strict=True):
            ratio = theirs["rate"] / ours["rate"]
            rates = f"{ours['rate']:.1f} | {theirs['rate']:.1f} | {ratio:.1f}x"
            memory = f"{ours['gb']:.1f} | {theirs['gb']:.1f}"
            print(f"| {shape} | {ours['episodes']} | {rates} | {memory} |", flush=True)


def _process(engine: str, shape: str, threads: int) -> list[dict[str, Any]]:
    command = [sys.executable, *sys.argv, "--engine", engine, "--shape", shape]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine}, {shape}:\n{done.stderr[-3000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    main()
