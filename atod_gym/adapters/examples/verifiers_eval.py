r"""Evaluate a chat model on a few tasks through verifiers.

Any server of chat completions works, such as `vllm serve` or `transformers serve` with a small
model on CPU:

    pip install 'atod-gym[verifiers,servers]'
    python -m atod_gym.adapters.examples.verifiers_eval \
        --base-url http://127.0.0.1:8000/v1 --model <its name>
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import verifiers.v1 as vf

from atod_gym.adapters.verifiers import REWARD, load_environment


async def evaluate(env: Any, context: Any) -> list[Any]:
    """Play one episode of every task, all concurrently."""
    async with env.serving():
        slots = [slot for task in env.taskset for slot in env.slots(task)]
        return await asyncio.gather(*(env.run_slot(slot, context) for slot in slots))


def main() -> None:
    """Print a line for each episode, then the success rate."""
    parser = argparse.ArgumentParser(description="Evaluate a chat model through verifiers.")
    parser.add_argument("--base-url", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="name of the model at the server")
    parser.add_argument("--env-id", default="atod/ALFWorld-v0")
    parser.add_argument("--split", help="split of the tasks (default: the environment's)")
    parser.add_argument("--tasks", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--max-turns", type=int, help="turn limit (default: the environment's)")
    options = parser.parse_args()

    env = load_environment(
        options.env_id, split=options.split, tasks=options.tasks, max_turns=options.max_turns
    )
    # The key of the server, if it requires one, is in this environment variable.
    client = vf.EvalClientConfig(base_url=options.base_url, api_key_var="OPENAI_API_KEY")
    context = vf.ModelContext(model=options.model, client=client)
    episodes = asyncio.run(evaluate(env, context))
    for episode in episodes:
        if not episode.ok:
            errors = [e for part in (episode, *episode.traces) for e in part.errors]
            raise SystemExit(f"failed: {[error.message for error in errors]}")
        [trace] = episode.traces
        reward, turns = trace.rewards[REWARD].score, trace.metrics["turns"]
        print(f"{trace.info['atod']['task_id']}: reward {reward:g} after {turns:g} turns")
    wins = sum(episode.traces[0].metrics["success"] for episode in episodes)
    print(f"success: {wins:g} of {len(episodes)}")


if __name__ == "__main__":
    main()
