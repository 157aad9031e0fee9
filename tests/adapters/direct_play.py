"""Playing without an adapter, to compare with, and settings that keep the environments small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

import atod_gym
from atod_gym.adapters.made_env import made_env

SMALL: dict[str, dict[str, Any]] = {
    "atod/ALFWorld-v0": {"data": "generated", "house_size": "tiny", "max_turns": 12},
    "atod/WebShop-v0": {"data": "generated", "products": 60},
    "atod/SearchQA-v0": {"data": "generated", "entities": 60},
}
assert tuple(SMALL) == atod_gym.ENV_IDS


def some_task_ids(env_id: str, number: int) -> tuple[str, ...]:
    """Task ids from all over the split."""
    env = gymnasium.make(env_id, **SMALL[env_id])
    task_ids: tuple[str, ...] = env.get_wrapper_attr("task_ids")
    env.close()
    return task_ids[:: len(task_ids) // number][:number]


def play_completions(
    env_id: str,
    task_id: str,
    model: Callable[[list[dict[str, str]]], str],
    **prompt_options: Any,
) -> dict[str, Any]:
    """An episode with a function for a model: its prompts, completions, rewards and end."""
    env = made_env(env_id, SMALL[env_id], prompt_options)
    messages, info = env.reset(options={"task_id": task_id})
    played: dict[str, Any] = {"prompts": [], "completions": [], "rewards": [], "infos": []}
    terminated = truncated = False
    while not (terminated or truncated):
        played["prompts"].append(messages[-1]["content"])
        played["completions"].append(model([dict(message) for message in messages]))
        messages, reward, terminated, truncated, info = env.step(played["completions"][-1])
        played["rewards"].append(float(reward))
        played["infos"].append(info)
    env.close()
    return {**played, "end": "terminated" if terminated else "truncated"}


def expert_actions(env_id: str, task_id: str) -> tuple[str, list[str], float]:
    """The instruction of a task, what the scripted expert does, and what that earns."""
    env = gymnasium.make(env_id, **SMALL[env_id])
    observation, _ = env.reset(options={"task_id": task_id})
    expert = env.get_wrapper_attr("expert")()
    instruction: str = observation["instruction"]
    expert.reset(instruction, observation["text"])
    actions: list[str] = []
    total, over = 0.0, False
    while not over:
        last = actions[-1] if actions else None
        actions.append(expert.act(observation["text"], observation["admissible_actions"], last))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        total, over = total + float(reward), terminated or truncated
    env.close()
    return instruction, actions, total
