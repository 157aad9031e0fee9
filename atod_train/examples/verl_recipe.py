"""The published runs as a recipe for verl: write its files, print the command, check it.

    pip install 'atod-gym[train,verl,servers]' 'verl[vllm]' && atod-data get alfworld
    python -m atod_train.examples.verl_recipe alfworld --student .. --teacher .. --gpus 8

The settings are those of the preset of that name. Nothing is trained here, and no GPU is needed.
Without verl the files of tasks are not written and the settings are printed unchecked. verl
multiplies the size of a mini-batch by the size of a group: 32 x 8 = 256 turn rows, as published.
Checkpoints stay in --out; the same command continues there.
"""

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

from atod_train.presets import PRESETS
from atod_train.reports.evaluations import temperature_of


def quoted(path: str | Path) -> str:
    """Return a path as Hydra reads it, for the shell; commas and `=` are syntax of Hydra."""
    text = str(path)
    if not re.fullmatch(r"[\w/+.%*@?|: -]+", text, re.ASCII):
        text = "'" + text.replace("'", r"\'") + "'"
    return shlex.quote(text)


parser = argparse.ArgumentParser()
parser.add_argument("run", choices=("alfworld", "webshop", "searchqa"))
for name in ("student", "teacher"):
    parser.add_argument(f"--{name}", required=True, help="folder or hub name")
parser.add_argument("--gpus", type=int, default=8, help="GPUs of this machine; published: 8")
parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
parser.add_argument("--eval-every", type=int, help="steps between evaluations; published: 5")
parser.add_argument("--data", default="official")
parser.add_argument("--out", type=Path, default=Path("runs/verl-atod"))
options = parser.parse_args()
preset = PRESETS[options.run].config
env, train, method = replace(preset.env, data=options.data), preset.train, preset.algorithm
episodes, [mode] = train.tasks_per_step * train.group_size, env.eval_modes
if options.gpus < 1 or episodes % options.gpus:
    parser.error(f"--gpus must divide the {episodes} episodes of a step, not {options.gpus}")
out, heat = options.out.resolve(), temperature_of(mode)
splits = ("train", *env.eval_splits)
files = [out / f"{split}.parquet" for split in splits]
mini_batch = int(train.minibatches.removeprefix("rows:")) // train.group_size
out.mkdir(parents=True, exist_ok=True)
loop = {
    "name": "atod",
    "_target_": "atod_train.adapters.verl.ATODAgentLoop",
    "max_completion_tokens": train.max_completion_tokens,
    "env": asdict(env),
}
(out / "loop.yaml").write_text(json.dumps([loop], indent=1))  # JSON is YAML
rollout, actor, atod = "actor_rollout_ref.rollout", "actor_rollout_ref.actor", "trainer.v1.atod"
train_file, val_file, loop_file, checkpoints, student, teacher = map(
    quoted, (*files, out / "loop.yaml", out / "checkpoints", options.student, options.teacher)
)
overrides = shlex.split(f"""data.train_files={train_file} data.val_files={val_file}
 data.train_batch_size={train.tasks_per_step} data.val_max_samples={env.eval_tasks}
 data.max_prompt_length={preset.model.max_context - train.max_completion_tokens}
 data.max_response_length={train.max_completion_tokens} data.seed={train.seed}
 actor_rollout_ref.model.path={student} {rollout}.name=vllm {rollout}.n={train.group_size}
 {rollout}.tensor_model_parallel_size=1
 {rollout}.agent.agent_loop_config_path={loop_file} {rollout}.temperature=1.0
 {rollout}.val_kwargs.do_sample={heat > 0} {rollout}.val_kwargs.temperature={heat}
 {actor}.ppo_mini_batch_size={mini_batch} {actor}.use_dynamic_bsz=True {actor}.optim.lr={train.lr}
 {actor}.optim.lr_warmup_steps_ratio={train.lr_warmup} {actor}.optim.weight_decay=0.01
 {actor}.grad_clip=1.0 {actor}.clip_ratio_low={method.clip[0]} {actor}.clip_ratio={method.clip[0]}
 {actor}.clip_ratio_high={method.clip[1]} {actor}.clip_ratio_c={method.clip[2]}
 {actor}.entropy_coeff={method.entropy_bonus} {actor}.use_kl_loss=True
 {actor}.kl_loss_coef=0.0 {actor}.loss_agg_mode={method.aggregation} algorithm.adv_estimator=grpo
 trainer.nnodes=1 trainer.n_gpus_per_node={options.gpus} trainer.total_training_steps={train.steps}
 trainer.save_freq={options.save_every} trainer.max_actor_ckpt_to_keep=2
 trainer.default_local_dir={checkpoints} trainer.resume_mode=auto
 trainer.test_freq={options.eval_every or train.eval_every} trainer.val_before_train=True
 trainer.logger=[console] trainer.v1.trainer_mode=atod +{atod}.teacher={teacher}
 +{atod}.schedule={method.schedule}""")
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
for split, file in zip(splits, files, strict=True):
    rows = write_tasks(file, env.id, split=split, data=env.data, **env.options)
    print(f"{split}: {rows} tasks", file=sys.stderr)
