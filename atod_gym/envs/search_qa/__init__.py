"""Search-QA: questions to answer after searching in many passages."""

from atod_gym.envs.search_qa.env import SearchQAEnv

__all__ = ["SearchQAEnv"]
