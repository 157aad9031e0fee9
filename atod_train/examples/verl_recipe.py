"""The published runs as a recipe for verl: write its files, print the command, check it.

    pip install 'atod-gym[train,verl,servers]' 'verl[vllm]' && atod-data get alfworld
    python -m atod_train.examples.verl_recipe alfworld --student .. --teacher .. --gpus 8

Nothing is trained here, and no GPU is needed. Without verl the files of tasks are not written and
the settings are printed unchecked. verl multiplies the size of a mini-batch by the size of a group:
32 x 8 = 256 turn rows, as published. Checkpoints stay in --out; the same command continues there.
"""

import argparse
import shlex
import sys
from pathlib import Path

# id, splits, turns, window, prompt tokens, tasks, mini-batch, penalty, reward, validation T
RUNS = {
    "alfworld": ("ALFWorld", "train", "valid_unseen", 50, 2, 2048, 16, 32, 0.1, 10, 0.4),
    "webshop": ("WebShop", "train", "dev", 15, 2, 4096, 16, 8, 0.1, 10, 0.4),
    "searchqa": ("SearchQA", "train", "test", 4, 4, 4096, 128, 32, 0.01, 1, 0.0),
}
parser = argparse.ArgumentParser()
parser.add_argument("run", choices=RUNS)
for name in ("student", "teacher"):
    parser.add_argument(f"--{name}", required=True, help="folder or hub name")
parser.add_argument("--gpus", type=int, default=8, help="GPUs of this machine; published: 8")
parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
parser.add_argument("--eval-every", type=int, default=5, help="steps between evaluations")
parser.add_argument("--data", default="official")
parser.add_argument("--out", type=Path, default=Path("runs/verl-atod"))
options = parser.parse_args()
name, train, test, turns, window, tokens, tasks, mini, penalty, reward, heat = RUNS[options.run]
if options.gpus < 1 or tasks * 8 % options.gpus:
    parser.error(f"--gpus must divide the {tasks * 8} episodes of a step, not {options.gpus}")
out, data, env_id = options.out.resolve(), options.data, f"atod/{name}-v0"
out.mkdir(parents=True, exist_ok=True)
(out / "loop.yaml").write_text(f"""- name: atod
  _target_: atod_train.adapters.verl.ATODAgentLoop
  env: {{id: {env_id}, data: {data}, prompt_style: window, history_window: {window},
        show_admissible: true, parse_profile: compat, max_turns: {turns},
        invalid_action_penalty: {penalty}, success_reward: {reward}}}
""")
rollout, actor, atod = "actor_rollout_ref.rollout", "actor_rollout_ref.actor", "trainer.v1.atod"
overrides = f"""data.train_files={out}/{train}.parquet data.val_files={out}/{test}.parquet
 data.train_batch_size={tasks} data.max_prompt_length={tokens} data.max_response_length=512
 actor_rollout_ref.model.path={options.student} {rollout}.name=vllm {rollout}.n=8
 {rollout}.tensor_model_parallel_size=1
 {rollout}.agent.agent_loop_config_path={out}/loop.yaml {rollout}.temperature=1.0
 {rollout}.val_kwargs.do_sample={heat > 0} {rollout}.val_kwargs.temperature={heat}
 {actor}.ppo_mini_batch_size={mini} {actor}.use_dynamic_bsz=True {actor}.optim.lr=1e-6
 {actor}.optim.weight_decay=0.01 {actor}.grad_clip=1.0 {actor}.clip_ratio=0.2
 {actor}.clip_ratio_c=3.0 {actor}.entropy_coeff=0.001 {actor}.use_kl_loss=True
 {actor}.kl_loss_coef=0.0 {actor}.loss_agg_mode=token-mean algorithm.adv_estimator=grpo
 trainer.nnodes=1 trainer.n_gpus_per_node={options.gpus} trainer.total_training_steps=150
 trainer.save_freq={options.save_every} trainer.max_actor_ckpt_to_keep=2
 trainer.default_local_dir={out}/checkpoints trainer.resume_mode=auto
 trainer.test_freq={options.eval_every} trainer.val_before_train=True trainer.logger=[console]
 trainer.v1.trainer_mode=atod +{atod}.teacher={options.teacher}
 +{atod}.schedule=linear:80""".split()
print("VERL_USE_EXTERNAL_MODULES=atod_train.adapters.verl", end=" ")
print("python -m verl.trainer.main_ppo", shlex.join(overrides))
try:
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from atod_gym.adapters.verl import write_tasks
except ImportError as error:
    parser.exit(0, f"not checked, and no tasks written: {error.name} is not installed\n")
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=overrides)
validate_config(config, need_reference_policy(config), need_critic(config))
for split in (train, test):
    rows = write_tasks(out / f"{split}.parquet", env_id, split=split, data=data)
    print(f"{split}: {rows} tasks", file=sys.stderr)
