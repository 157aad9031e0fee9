"""Steps of ATOD inside TRL, sampled by the real vLLM on a processor; writes down what they held.

Three things differ from TRL on a GPU. Its colocated engine is written into by `load_weights`, which
the packed weights of a processor do not allow ('Parameter' object has no attribute
'weight_loader'): here `reload_weights` does it, with the output layer, which is tied. TRL lets vLLM
choose the precision, bfloat16: here it is float32, so that a wrong weight shows. And the weights of
a server travel by NCCL: here they stay, so only the first step is right.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from atod_gym.adapters.trl import task_dataset
from atod_train.adapters.trl import ATODTrainer, Rollouts, episode_returns
from atod_train.algorithm.atod import Schedule
from atod_train.config import EnvConfig


def variety(completions: Sequence[Any], **columns: object) -> list[float]:
    """A reward that differs within groups, so that the weights change."""
    return [float(len(set(str(completion)))) for completion in completions]


def reload_weights(self: VLLMGeneration) -> None:
    weights = dict(self._iter_named_params())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
    self.llm.reset_prefix_cache()


folder, mode, style, steps, longest = sys.argv[1:]
rank = PartialState(cpu=True).process_index
settings: dict[str, Any] = {"vllm_mode": "colocate", "vllm_max_model_length": int(longest)}
if mode == "colocate":
    VLLMGeneration.sync_weights = reload_weights
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM, enforce_eager=True, dtype="float32"
    )
else:
    settings = {"vllm_mode": "server", "vllm_server_base_url": mode}
    VLLMClient.init_communicator = VLLMClient.update_named_params = lambda *_, **__: None
env = EnvConfig(
    data="generated", options={"house_size": "tiny"}, prompt_style=style,
    max_turns=3 + rank,  # processes whose episodes differ in length
)  # fmt: skip
rollouts = Rollouts(env)
trainer = ATODTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained(folder),
    teacher=folder,
    schedule=Schedule(anneal_steps=4),
    reward_funcs=[episode_returns, variety],
    rollout_func=rollouts,
    train_dataset=task_dataset(env.id, tools=False, data=env.data, **env.options),
    args=GRPOConfig(
        output_dir=str(Path.cwd() / "out"), max_steps=int(steps), use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=1, loss_type="dapo", beta=0.0,
        per_device_train_batch_size=2, num_generations=2, max_completion_length=24,
        learning_rate=1e-4, use_vllm=True, vllm_importance_sampling_mode="token_mask", **settings,
    ),
)  # fmt: skip
found: list[dict[str, Any]] = []
score = trainer._generate_and_score_completions


def kept(inputs: Any) -> Any:
    output = score(inputs)
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    found.append({
        "rows": len(mask),
        "ratio": float((output["importance_sampling_ratio"][mask] - 1.0).abs().max()),
        "longest": int((output["prompt_mask"].sum(1) + output["completion_mask"].sum(1)).max()),
        "turns": [float(row["turns"]) for row in inputs],
    })  # fmt: skip
    return output


trainer._generate_and_score_completions = kept
trainer.train()
logged = [row for row in trainer.state.log_history if "atod/log_ratio" in row]
for step, row in zip(found, logged, strict=True):
    step["drift"] = row["sampling/sampling_logp_difference/mean"]
    step["log_ratio"] = row["atod/log_ratio"]
Path(f"steps-{rank}.json").write_text(json.dumps(found))
