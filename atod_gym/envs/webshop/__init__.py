"""WebShop: the environment, its settings and a scripted expert."""

from atod_gym.envs.webshop.env import WebShopEnv

__all__ = ["WebShopEnv"]
