r"""ATOD inside TRL: one optimiser step of a tiny random model on generated houses, CPU, seconds.

    pip install 'atod-gym[train,trl]' && python -m atod_train.examples.trl_atod

With a model of your own, on a CPU too: --model <folder or hub name> --teacher <folder or hub name>
With the published settings of ALFWorld: --published --data official (or --published webshop, ..)
Sampled by vLLM: --vllm colocate, with the share of a GPU's memory colocate:0.4, or --vllm <URL> of
a server, which has GPUs of its own:

    VLLM_SERVER_DEV_MODE=1 vllm serve <model> --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs --max-logprobs -1

On several GPUs: accelerate launch --num_processes 4 -m atod_train.examples.trl_atod ..
"""

import argparse
import importlib.util
import os
import re
from dataclasses import replace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from atod_gym.adapters.trl import task_dataset
from atod_train.adapters.trl import ATODTrainer, Rollouts, episode_returns
from atod_train.algorithm.atod import Schedule
from atod_train.algorithm.schedules import schedule_of
from atod_train.config import EnvConfig
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.presets import PRESETS

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="the student: folder or hub name; default: a random tiny model")
parser.add_argument("--teacher", help="the same vocabulary; default: another random one, or none")
parser.add_argument("--style", choices=("chat", "window"), default="chat")
parser.add_argument(
    "--published", nargs="?", const="alfworld", choices=("alfworld", "webshop", "searchqa"),
    help="settings of a published run, as the preset of that name has them; default: alfworld",
)  # fmt: skip
parser.add_argument("--data", default="generated", help="official, generated or a path")
parser.add_argument("--steps", type=int, help="optimiser steps; default: 1, as published 150")
parser.add_argument("--vllm", help="colocate, colocate:SHARE or URL; default: transformers samples")
parser.add_argument("--out", default="runs/trl-atod")
options = parser.parse_args()
vllm, _, share = (options.vllm or "").partition(":")
if options.vllm and not re.fullmatch(r"colocate(:(0?\.\d+|1))?|https?://.+", options.vllm):
    parser.error(f"--vllm is colocate, colocate:0.4 or a URL, not {options.vllm!r}")
if vllm and not options.model:
    parser.error("--vllm reads the model from a folder or the hub: name it with --model")
if vllm and importlib.util.find_spec("vllm") is None:
    parser.error("--vllm needs vLLM, also to ask a server: pip install 'trl[vllm]'")

student: Any
if options.model:
    student, teacher = AutoModelForCausalLM.from_pretrained(options.model), options.teacher
    tokenizer = AutoTokenizer.from_pretrained(options.model)
else:
    tokenizer = build_word_tokenizer(["go to desk 1", "take mug 1 from desk 1", "open drawer 1"])
    shape = ModelShape(layers=2, width=32, heads=2, mlp_width=64, max_positions=1024)
    student, teacher = (build_policy(shape, tokenizer, seed).model for seed in (0, 1))
house = {"house_size": "tiny"} if options.data == "generated" else {}
env = EnvConfig(data=options.data, options=dict(house), prompt_style=options.style, max_turns=5)
sizes: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 16,
    "learning_rate": 1e-4,
}  # fmt: skip
steps, schedule = options.steps or 1, Schedule(anneal_steps=1)
if options.published:
    preset = PRESETS[options.published].config
    train, steps = preset.train, options.steps or preset.train.steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if train.tasks_per_step % processes:
        parser.error(f"{processes} processes cannot share {train.tasks_per_step} tasks of a step")
    env, schedule = replace(preset.env, data=options.data), schedule_of(preset.algorithm)
    sizes = {
        "per_device_train_batch_size": train.group_size,
        "gradient_accumulation_steps": train.tasks_per_step // processes,
        "num_generations": train.group_size, "max_completion_length": train.max_completion_tokens,
        "learning_rate": train.lr, "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": round(train.lr_warmup * steps), "weight_decay": 0.01,
    }  # fmt: skip
if vllm:
    # TRL's default drops an episode whose log-probs differ by more than log 3 in sum.
    sizes |= {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
    if vllm != "colocate":
        sizes |= {"vllm_mode": "server", "vllm_server_base_url": options.vllm}
    elif share:
        sizes |= {"vllm_gpu_memory_utilization": float(share)}
trainer = ATODTrainer(
    model=student,
    processing_class=tokenizer,
    teacher=teacher,
    schedule=schedule,
    reward_funcs=episode_returns,
    rollout_func=Rollouts(env),
    train_dataset=task_dataset(env.id, tools=False, data=env.data, **env.options),
    args=GRPOConfig(
        output_dir=options.out, max_steps=steps, use_cpu=not torch.cuda.is_available(),
        report_to="none", loss_type="dapo", delta=3.0, logging_steps=1, beta=0.0, **sizes,
    ),
)  # fmt: skip
trainer.train()
step = next(row for row in trainer.state.log_history if "atod/kappa" in row)
names = ("reward", "atod/kappa", "atod/rho", "atod/log_ratio")
print({name: step[name] for name in names if name in step})
