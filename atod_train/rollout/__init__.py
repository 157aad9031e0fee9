"""Rollouts: episodes of the policy in the environments, recorded token by token."""
