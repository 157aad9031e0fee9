r"""ATOD in one file: rollout, scores, advantages and update, read from top to bottom.

The whole method (arXiv:2606.27814) on Gymnasium, a transformers model and PyTorch. Of this project
it uses the environments and the formulas of `atod_train.algorithm.atod`, nothing else. It is the
reference to read and to change; `atod-train` computes the same step (a test compares them) with
many more features: other methods, checkpoints, several processes, packed sequences, reports.

    python -m atod_train.examples.atod_one_file --student FOLDER --teacher FOLDER \
        --env-id atod/ALFWorld-v0 --data generated --steps 20

One training row is one turn, as in the released code: the prompt holds the task, the last turns and
the present observation (window style), and the completion is what is trained.

    N trajectories, G of each task; R turn rows; T tokens of the longest completion

Differences from `atod-train --env.prompt-style window`: completions are sampled by `generate` with
one global random stream; an episode whose prompt does not fit `max_context` ends, where the package
first leaves out the history; mini-batches hold turn rows, not whole trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import atod_gym  # noqa: F401 - registers the environments
from atod_gym.tasks import spread
from atod_gym.wrappers import agent_env
from atod_train.algorithm.atod import (
    Schedule,
    atod_advantages,
    clipped_policy_loss,
    group_advantages,
    loss_normalizer,
    masked,
    sampled_log_ratio,
    segment_sum,
    turn_statistics,
    turn_weights,
)

# -- 1. settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Settings; the defaults of the algorithm are the paper's."""

    student: str
    """Folder or hub name of a causal language model with a chat template; it is trained."""
    teacher: str
    """Folder or hub name of a model with the same vocabulary; it stays as it is."""
    out: str = "runs/one-file"
    """Folder that gets the trained model."""
    device: str = "cpu"
    """A torch device, such as cuda."""
    seed: int = 0
    """Of tasks, samples and mini-batches."""

    env_id: str = "atod/ALFWorld-v0"
    """Gymnasium id."""
    data: str = "generated"
    """auto, official, generated, or a path to data."""
    eval_split: str = "valid_seen"
    """Split of the evaluation: valid_seen, dev or test, depending on the environment."""
    eval_tasks: int = 32
    """Tasks of an evaluation (greedy), spread evenly over the split."""
    eval_every: int = 10
    """Steps between evaluations."""
    max_turns: int = 20
    """Turn limit of an episode."""
    history_window: int = 2
    """Past turns in a prompt."""
    show_admissible: bool = True
    """Whether prompts list the admissible actions."""
    parse_profile: Literal["tags", "react", "plain", "compat"] = "tags"
    """Parsing of completions; plain: the completion is the action."""
    invalid_action_penalty: float = 0.01
    """Subtracted from the reward of a turn whose completion does not parse."""

    steps: int = 150
    """Optimiser cycles."""
    tasks_per_step: int = 16
    """Tasks of a step."""
    group_size: int = 8
    """G: trajectories of each task."""
    minibatches: int = 4
    """Optimiser updates per step."""
    rows_per_pass: int = 16
    """Turn rows that go through a model at once; lower it if memory runs out."""
    lr: float = 1e-6
    """Learning rate of AdamW; small models from scratch want 3e-4."""
    max_completion_tokens: int = 512
    """Longest completion."""
    max_context: int = 4096
    """Longest prompt with its completion, in tokens."""

    kappa: tuple[float, float] = (1.0, 0.1)
    """Coefficient of the teacher: first and last."""
    rho: tuple[float, float] = (1.0, 2.0)
    """Coefficient of the reward: first and last."""
    anneal_steps: int = 80
    """Steps from the first to the last coefficients."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy of the student's next-token distribution."""


# -- 2. rollout: prompt -> completion -> env.step, until every episode has ended -------------------


@dataclass(frozen=True)
class Row:
    """One turn as it is trained: the exact tokens, and what the environment paid."""

    trajectory: int
    """0..N-1; trajectories of one task are neighbours."""
    turn: int
    prompt_ids: list[int]
    completion_ids: list[int]
    reward: float
    """Scaled, penalty subtracted."""


def make_env(args: Args, split: str) -> gym.Env[Any, str]:
    """Make an environment whose observations are messages and whose actions are completions."""
    env = gym.make(
        args.env_id, split=split, data=args.data, max_episode_steps=args.max_turns,
        disable_env_checker=True,
    )  # fmt: skip
    return agent_env(
        env, profile=args.parse_profile, style="window", history_window=args.history_window,
        show_admissible=args.show_admissible,
    )  # fmt: skip


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a completion."""
    eos = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], args: Args, *, greedy: bool
) -> list[list[int]]:
    """Sample a completion for each prompt, at temperature 1 from the whole distribution.

    Returns:
        Token ids, with the end-of-turn token if it came.
    """
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=not greedy, temperature=None if greedy else 1.0, top_p=None if greedy else 1.0,
        top_k=None if greedy else 0, max_new_tokens=args.max_completion_tokens,
        eos_token_id=sorted(stops), pad_token_id=pad,
    )  # fmt: skip
    completions = []
    for start in range(0, len(prompts), args.rows_per_pass):
        part = prompts[start : start + args.rows_per_pass]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        sampled = model.generate(
            ids.to(args.device), attention_mask=mask.to(args.device), generation_config=config
        )
        for row in sampled[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
            completions.append(row[: end + 1])
    return completions


def rollout(
    model: Any, tokenizer: Any, envs: Sequence[gym.Env[Any, str]], tasks: Sequence[str], args: Args,
    *, greedy: bool = False,
) -> tuple[list[Row], list[bool]]:  # fmt: skip
    """Play one episode in each environment, all of them turn by turn.

    Args:
        model: the policy.
        tokenizer: the policy's.
        envs: N environments of `make_env`.
        tasks: N task ids.
        args: the settings.
        greedy: whether the most probable token is taken, not sampled.

    Returns:
        The turn rows in order of trajectory and turn; and [N] whether the task was solved.
    """
    rows: list[list[Row]] = [[] for _ in envs]
    solved = [False] * len(envs)
    prompts: dict[int, list[int]] = {}
    stops = stop_ids(model, tokenizer)

    def show(number: int, messages: Any) -> None:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        if len(ids) + args.max_completion_tokens <= args.max_context:
            prompts[number] = list(ids)

    for number, (env, task) in enumerate(zip(envs, tasks, strict=True)):
        show(number, env.reset(options={"task_id": task})[0])
    while prompts:
        playing, prompts = prompts, {}
        completions = generate(model, tokenizer, [*playing.values()], args, greedy=greedy)
        for (number, prompt_ids), ids in zip(playing.items(), completions, strict=True):
            text = tokenizer.decode(ids[:-1] if ids[-1] in stops else ids)
            messages, reward, terminated, truncated, info = envs[number].step(text)
            penalty = args.invalid_action_penalty if info["parse_error"] else 0.0
            turn = Row(number, len(rows[number]), prompt_ids, ids, float(reward) - penalty)
            rows[number].append(turn)
            solved[number] = bool(info["success"])
            if not (terminated or truncated):
                show(number, messages)
    return [row for trajectory in rows for row in trajectory], solved


# -- 3. scores: log-probabilities of the sampled tokens --------------------------------------------


def score(model: Any, rows: Sequence[Row], width: int, args: Args) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropies where completion tokens were sampled.

    Args:
        model: student or teacher; gradients flow where they are enabled.
        rows: turn rows, as many as one pass can hold.
        width: T.
        args: the device.

    Returns:
        [len(rows), T] each, in nats, 0 after the end of a completion.
    """
    sequences = [row.prompt_ids + row.completion_ids for row in rows]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=args.device)
    mask = torch.tensor(
        [[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=args.device
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    logprobs, entropies = [], []
    for number, row in enumerate(rows):
        start, count = len(row.prompt_ids), len(row.completion_ids)
        # The token at a position is predicted by the position before it.
        distribution = logits[number, start - 1 : start + count - 1].log_softmax(-1)
        target = ids[number, start : start + count, None]
        pad = (0, width - count)
        logprobs.append(torch.nn.functional.pad(distribution.gather(-1, target)[:, 0], pad))
        entropy = -(distribution.exp() * distribution).sum(-1)
        entropies.append(torch.nn.functional.pad(entropy, pad))
    return torch.stack(logprobs), torch.stack(entropies)


@torch.no_grad()
def score_all(model: Any, rows: Sequence[Row], width: int, args: Args) -> Tensor:
    """Compute the log-probabilities of all rows, [R, T], without gradients."""
    parts = [
        score(model, rows[start : start + args.rows_per_pass], width, args)[0]
        for start in range(0, len(rows), args.rows_per_pass)
    ]
    return torch.cat(parts)


# -- 4. one step: scores, advantages (Eq. 8), one pass of clipped updates --------------------------


def train_step(
    student: Any, teacher: Any, optimizer: torch.optim.Optimizer, rows: Sequence[Row], step: int,
    args: Args,
) -> dict[str, float]:  # fmt: skip
    """Update the student with the rows of one rollout.

    Args:
        student: it is changed.
        teacher: frozen.
        optimizer: of the student's parameters.
        rows: of whole groups, in order of trajectory and turn.
        step: counted from 1.
        args: the settings.

    Returns:
        Means over the step.
    """
    width = max(len(row.completion_ids) for row in rows)
    lengths = torch.tensor([len(row.completion_ids) for row in rows], device=args.device)
    mask = torch.arange(width, device=args.device) < lengths[:, None]  # [R, T]
    trajectory = torch.tensor([row.trajectory for row in rows], device=args.device)  # [R]

    old = score_all(student, rows, width, args)
    taught = score_all(teacher, rows, width, args)

    kappa, rho = Schedule(*args.kappa, *args.rho, args.anneal_steps).coefficients(step)
    delta = sampled_log_ratio(old, taught, mask)
    disagreement, uncertainty = turn_statistics(old, taught, mask)
    weights = turn_weights(disagreement, uncertainty, trajectory_index=trajectory)
    returns = segment_sum(torch.tensor([row.reward for row in rows]).to(args.device), trajectory)
    group = torch.arange(len(returns), device=args.device) // args.group_size
    advantage = group_advantages(returns, group_index=group)[trajectory]
    advantages = atod_advantages(delta, weights, advantage, kappa, rho, mask)

    totals = {"loss": 0.0, "clip_fraction": 0.0, "grad_norm": 0.0}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + step))
    for minibatch in order.chunk(args.minibatches):
        minibatch = minibatch.to(args.device)
        normalizer = loss_normalizer(mask[minibatch])
        tokens = mask[minibatch].sum()
        for part in torch.arange(len(minibatch), device=args.device).split(args.rows_per_pass):
            chosen = minibatch[part]
            logprobs, entropies = score(student, [rows[i] for i in chosen.tolist()], width, args)
            loss, stats = clipped_policy_loss(
                logprobs, old[chosen], advantages[chosen], mask[chosen],
                normalizer=normalizer[part],
            )  # fmt: skip
            loss = loss - args.entropy_bonus * masked(entropies, mask[chosen]).sum() / tokens
            loss.backward()
            totals["loss"] += float(loss.detach()) / args.minibatches
            totals["clip_fraction"] += float(stats.clip_fraction * stats.tokens / mask.sum())
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        if not math.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient is not finite; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        totals["grad_norm"] += norm / args.minibatches
    return totals | {
        "kappa": kappa,
        "rho": rho,
        "disagreement": float(disagreement.mean()),
        "turn_weight": float(weights.mean()),
        "return": float(returns.mean()),
    }


# -- 5. the run ------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Train a student and save it."""
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student: Any = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    if AutoTokenizer.from_pretrained(args.teacher).get_vocab() != tokenizer.get_vocab():
        raise SystemExit("student and teacher need the same vocabulary")
    student.to(device=args.device).eval(), teacher.to(device=args.device).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.01)

    count = args.tasks_per_step * args.group_size
    envs = [make_env(args, "train") for _ in range(count)]
    eval_envs = [make_env(args, args.eval_split) for _ in range(args.eval_tasks)]
    all_tasks = envs[0].unwrapped.task_ids  # type: ignore[attr-defined]
    eval_tasks = spread(eval_envs[0].unwrapped.task_ids, args.eval_tasks)  # type: ignore[attr-defined]

    for step in range(1, args.steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)
        drawn = torch.randint(len(all_tasks), (args.tasks_per_step,)).tolist()
        tasks = [all_tasks[number] for number in drawn for _ in range(args.group_size)]
        rows, solved = rollout(student, tokenizer, envs, tasks, args)
        if not rows:
            raise SystemExit("no first prompt fits: raise --max-context")
        metrics = train_step(student, teacher, optimizer, rows, step, args)
        metrics["train_success"] = sum(solved) / len(solved)
        if step % args.eval_every == 0 or step == args.steps:
            played = eval_envs[: len(eval_tasks)]
            _, solved = rollout(student, tokenizer, played, eval_tasks, args, greedy=True)
            metrics[f"{args.eval_split}_success"] = sum(solved) / len(solved)
        print(step, *(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for env in envs + eval_envs:
        env.close()


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
