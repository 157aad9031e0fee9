"""ATOD inside TRL: tiny models on generated ALFWorld games, one optimiser step, CPU, seconds.

    pip install 'atod-gym[train,trl]' && python -m atod_train.adapters.examples.trl_atod

With real models: --student Qwen/Qwen3-0.6B --teacher <folder> --steps 150
"""

import argparse
import os
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from atod_gym.adapters.trl import task_dataset
from atod_train.adapters.trl import ATODTrainer, Rollouts, episode_returns
from atod_train.algorithm.atod import Schedule
from atod_train.config import EnvConfig
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="folder or hub name; default: a tiny random model")
parser.add_argument("--teacher", help="the same vocabulary as the student's")
parser.add_argument("--style", choices=("chat", "window"), default="chat")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--out", default="runs/trl-atod")
options = parser.parse_args()

student: Any
if options.student:
    student = AutoModelForCausalLM.from_pretrained(options.student)
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    teacher = options.teacher
else:
    tokenizer = build_word_tokenizer(["go to desk 1", "take mug 1 from desk 1", "open drawer 1"])
    shape = ModelShape(layers=2, width=32, heads=2, mlp_width=64, max_positions=1024)
    student, teacher = (build_policy(shape, tokenizer, seed).model for seed in (0, 1))

env = EnvConfig(
    data="generated", options={"house_size": "tiny"}, max_turns=5, prompt_style=options.style
)
trainer = ATODTrainer(
    model=student,
    processing_class=tokenizer,
    teacher=teacher,
    schedule=Schedule(anneal_steps=max(1, options.steps * 8 // 15)),
    reward_funcs=episode_returns,
    rollout_func=Rollouts(env),
    train_dataset=task_dataset(env.id, tools=False, data="generated", house_size="tiny"),
    args=GRPOConfig(
        output_dir=options.out, max_steps=options.steps, use_cpu=not options.student,
        report_to="none", per_device_train_batch_size=8, num_generations=4,
        max_completion_length=16, loss_type="dapo", delta=3.0, learning_rate=1e-4, logging_steps=1,
    ),
)  # fmt: skip
trainer.train()
step = next(row for row in trainer.state.log_history if "atod/kappa" in row)
print({name: step[name] for name in ("reward", "atod/kappa", "atod/rho", "atod/log_ratio")})
