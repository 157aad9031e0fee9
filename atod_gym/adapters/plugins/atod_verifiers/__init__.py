"""The module that `vf-eval atod-verifiers` loads; installed at the top level of site-packages.

verifiers finds a plugin by the name of a top-level module and takes the classes in `__all__`.
"""

from __future__ import annotations

from atod_gym.adapters.verifiers import load_plugin

_plugin = load_plugin()
AtodTaskset = _plugin.taskset
AtodEnv = _plugin.environment
ChatHarness = _plugin.harness

__all__ = ["AtodEnv", "AtodTaskset", "ChatHarness"]
