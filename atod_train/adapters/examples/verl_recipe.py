"""The published ALFWorld runs as a recipe for verl: writes files, checks, prints the command.

    pip install 'atod[train,verl,alfworld]' 'verl[vllm]' && atod-data get alfworld
    python -m atod_train.adapters.examples.verl_recipe --student Qwen/Qwen3-0.6B --teacher <folder>

Nothing is trained here, and no GPU is needed. verl multiplies the size of a mini-batch by the size
of a group: 32 x 8 = 256 turn rows, as published.
"""

import argparse
import shlex
from pathlib import Path

from hydra import compose, initialize_config_module
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from atod_gym.adapters.verl import write_tasks

parser = argparse.ArgumentParser()
parser.add_argument("--student", required=True)
parser.add_argument("--teacher", required=True)
parser.add_argument("--data", default="official")
parser.add_argument("--out", type=Path, default=Path("runs/verl-atod"))
parser.add_argument("--gpus", type=int, default=8)
options = parser.parse_args()

out = options.out.resolve()
out.mkdir(parents=True, exist_ok=True)
for split in ("train", "valid_unseen"):
    count = write_tasks(
        out / f"{split}.parquet", "atod/ALFWorld-v0", split=split, data=options.data
    )
    print(f"{split}: {count} tasks")
(out / "agent_loop.yaml").write_text(
    f"""- name: atod
  _target_: atod_train.adapters.verl.ATODAgentLoop
  max_completion_tokens: 512
  env: {{id: atod/ALFWorld-v0, data: {options.data}, prompt_style: window, history_window: 2,
        show_admissible: true, parse_profile: compat, max_turns: 50}}
"""
)
rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
overrides = f"""data.train_files={out}/train.parquet data.val_files={out}/valid_unseen.parquet
 data.train_batch_size=16 data.max_prompt_length=2048 data.max_response_length=512
 actor_rollout_ref.model.path={options.student} {rollout}.name=vllm {rollout}.n=8
 {rollout}.temperature=1.0 {rollout}.top_p=1.0 {rollout}.val_kwargs.temperature=0.4
 {rollout}.val_kwargs.do_sample=True {rollout}.agent.agent_loop_config_path={out}/agent_loop.yaml
 {actor}.ppo_mini_batch_size=32 {actor}.use_dynamic_bsz=True {actor}.optim.lr=1e-6
 {actor}.optim.weight_decay=0.01 {actor}.grad_clip=1.0 {actor}.clip_ratio=0.2
 {actor}.clip_ratio_c=3.0 {actor}.loss_agg_mode=token-mean {actor}.entropy_coeff=0.0
 {actor}.use_kl_loss=True {actor}.kl_loss_coef=0.0 algorithm.adv_estimator=grpo
 trainer.total_training_steps=150 trainer.n_gpus_per_node={options.gpus}
 trainer.v1.trainer_mode=atod +trainer.v1.atod.teacher={options.teacher}
 +trainer.v1.atod.anneal_steps=80""".split()
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=overrides)
validate_config(config, need_reference_policy(config), need_critic(config))
print("export VERL_USE_EXTERNAL_MODULES=atod_train.adapters.verl")
print("python -m verl.trainer.main_ppo", shlex.join(overrides))
