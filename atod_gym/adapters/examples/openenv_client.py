"""Play episodes at an OpenEnv server of this package with the environment's scripted expert.

    pip install 'atod-gym[openenv,servers]'
    python -m atod_gym.adapters.openenv --env-id atod/WebShop-v0 --split test --port 8000 &
    python -m atod_gym.adapters.examples.openenv_client --url http://127.0.0.1:8000 --expert webshop

The expert takes the place of a policy: it receives observations and returns actions.
"""

from __future__ import annotations

import argparse
from typing import Any

from atod_gym.adapters.openenv import AtodClient
from atod_gym.envs.alfworld.expert import ScriptedExpert
from atod_gym.envs.search_qa.expert import ScriptedSearcher
from atod_gym.envs.webshop.expert import ScriptedShopper

EXPERTS = {"alfworld": ScriptedExpert, "webshop": ScriptedShopper, "search_qa": ScriptedSearcher}


def play(client: Any, expert: Any, seed: int) -> Any:
    """Play one episode; return its last step."""
    result = client.reset(seed=seed)
    observation, action = result.observation, None
    expert.reset(observation.instruction, observation.text)
    while not result.done:
        action = expert.act(observation.text, observation.admissible_actions, action)
        result = client.step(action)
        observation = result.observation
        print(f"  {action!r}: {observation.text[:60]!r}")
    return result


def main() -> None:
    """Print every turn and the end of every episode."""
    parser = argparse.ArgumentParser(description="Play at an OpenEnv server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--expert", choices=EXPERTS, required=True)
    parser.add_argument("--episodes", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    with AtodClient(base_url=options.url).sync() as client:
        for seed in range(options.episodes):
            result = play(client, EXPERTS[options.expert](), seed)
            state = client.state()
            print(
                f"{state.task_id}: reward {result.reward:g}, score {result.metadata['score']:g}, "
                f"{state.step_count} turns"
            )


if __name__ == "__main__":
    main()
