"""Our rollouts against calling `generate` for each turn from scratch, same model and episodes.

    python tests/benchmarks/rollout.py --model smollm2 --style chat

Generated houses; every completion has the same number of tokens, so that all sides do equal work:

    ours      batched over the active episodes, the cache outlives the turn, prompts are shared
    unshared  the same, but each episode of a group computes its first prompt, and in window style
              each turn its whole prompt
    batched   `generate` on all active episodes, whole prompts, padded on the left
    single    `generate` on one episode after the other

A turn of each form is played before it is measured, so that nothing is loaded while the time runs.
On a busy machine look at the processor's seconds, with --threads 1.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from atod_gym.wrappers import agent_env, make_env
from atod_train.config import EnvConfig, parse_prompt_style
from atod_train.models import generation
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.progress import PhaseTimes
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Episode
from atod_train.rollout.rollout import collect
from atod_train.training.supervised import demonstrate, demonstration_texts


class Stopwatch:
    """Seconds and tokens by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.fed = 0  # tokens of prompts that went through the model

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begun

        return timed


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Times the parts of our generation, and counts the tokens that are fed."""
    timed = watch.around("prefill", Generator._prefill)

    def prefill(self: Generator, episodes: list[Any]) -> Tensor:
        watch.fed += sum(len(e.ids) - e.cached for e in set(self._leaders(episodes)))
        return timed(self, episodes)

    with (
        mock.patch.object(Generator, "_prefill", prefill),
        mock.patch.object(Generator, "_sample", watch.around("sampling", Generator._sample)),
        mock.patch.object(Generator, "prompt", watch.around("generation", Generator.prompt)),
        mock.patch.object(Episode, "next_prompt", watch.around("prompts", Episode.next_prompt)),
    ):
        yield


@contextmanager
def unshared() -> Iterator[None]:
    """Our generation as it would be if prompts shared nothing."""
    with (
        mock.patch.object(generation, "common_prefix", return_value=0),
        mock.patch.object(Generator, "_leaders", lambda self, episodes: episodes),
    ):
        yield


def ours(policy: Policy, pool: EnvPool, options: argparse.Namespace) -> tuple[int, str]:
    """Completion tokens, and where the time went."""
    dialogue = DialogueEncoder(policy.tokenizer, options.style)
    dialogue.stop_ids = frozenset()
    generator = Generator(policy, dialogue, max_completion_tokens=options.max_completion_tokens)
    tasks = pool.task_ids[: options.episodes // options.group_size]
    watch, times = Stopwatch(), PhaseTimes()
    with watched(watch):
        records = collect(
            pool,
            generator,
            tasks,
            group_size=options.group_size,
            turn_limit=options.turns,
            times=times,
        )
    turns = [turn for record in records for turn in record.turns]
    whole = 0
    for record in records:
        context = 0
        for turn in record.turns:
            tokens = turn.tokens
            context = context if tokens.extends_previous else 0
            context += len(tokens.prompt_ids)
            whole += context
            context += len(tokens.completion_ids)
    parts = watch.seconds
    parts["decode"] = parts["generation"] - parts["prefill"] - parts["sampling"]
    parts["environment"] = times.take()["seconds/environment"]
    names = ("prompts", "prefill", "decode", "sampling", "environment")
    shares = ", ".join(f"{name} {parts[name]:.2f}" for name in names)
    sampled = sum(len(turn.tokens.completion_ids) for turn in turns)
    text = (
        f"{shares} s; the prompts have {whole} tokens, of which {watch.fed} were computed "
        "(without padding)"
    )
    return sampled, text


def _single(config: EnvConfig) -> Any:
    env = make_env(config.id, config.max_turns, data=config.data, **config.options)
    return agent_env(
        env,
        profile=config.parse_profile,
        style=parse_prompt_style(config.prompt_style)[0],
        show_admissible=False,
    )


def theirs(policy: Policy, pool: EnvPool, options: argparse.Namespace, at_once: int) -> int:
    """`generate` from scratch at each turn, for at most `at_once` episodes together."""
    tokenizer, length = policy.tokenizer, options.max_completion_tokens
    tokenizer.padding_side = "left"
    tasks = [t for t in pool.task_ids for _ in range(options.group_size)][: options.episodes]
    sampled = 0
    for begin in range(0, len(tasks), at_once):
        part = tasks[begin : begin + at_once]
        envs = [_single(pool.config) for _ in part]
        prompts = [env.reset(options={"task_id": t})[0] for env, t in zip(envs, part, strict=True)]
        active = list(range(len(part)))
        for _ in range(options.turns):
            inputs = tokenizer.apply_chat_template(
                [list(prompts[row]) for row in active],
                add_generation_prompt=True,
                tokenize=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(policy.device)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                output = policy.model.generate(
                    **inputs,
                    do_sample=True,
                    top_k=0,  # the model's own distribution, as ours
                    top_p=1.0,
                    temperature=1.0,
                    max_new_tokens=length,
                    min_new_tokens=length,
                    pad_token_id=policy.pad_id,
                    eos_token_id=None,
                )
            completions = output[:, inputs["input_ids"].shape[1] :]
            sampled += completions.numel()
            still = []
            for row, ids in zip(active, completions, strict=True):
                text = tokenizer.decode(ids)
                prompts[row], _, terminated, truncated, _ = envs[row].step(text)
                if not (terminated or truncated):
                    still.append(row)
            active = still
            if not active:
                break
    tokenizer.padding_side = "right"
    return sampled


def load(options: argparse.Namespace, pool: EnvPool) -> Policy:
    """A saved model, or a preset with random weights and the words of the houses."""
    if options.model not in MODEL_SHAPES:
        return load_policy(options.model, device=options.device)
    words = demonstration_texts(demonstrate(pool, 50, 0.0, 0))
    return build_policy(options.model, build_word_tokenizer(words), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a preset")
    parser.add_argument("--style", choices=("chat", "window"), default="chat")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--max-completion-tokens", type=int, default=12, help="of every turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--single", type=int, default=2, help="episodes for the single form")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = EnvConfig(
        data="generated",
        options={"house_size": "tiny"},
        max_turns=max(20, options.turns),
        prompt_style=options.style,
        show_admissible=options.style == "window",
    )
    pool = EnvPool(config, "train")
    policy = load(options, pool)
    single = argparse.Namespace(**{**vars(options), "episodes": options.single})
    forms: dict[str, Callable[[argparse.Namespace], tuple[int, str]]] = {
        "ours": lambda chosen: ours(policy, pool, chosen),
        "unshared": unshared()(lambda chosen: ours(policy, pool, chosen)),
        "batched": lambda chosen: (theirs(policy, pool, chosen, chosen.episodes), ""),
        "single": lambda chosen: (theirs(policy, pool, chosen, 1), ""),
    }
    rows = {}
    for name, form in forms.items():
        chosen = single if name == "single" else options
        form(argparse.Namespace(**{**vars(chosen), "turns": 1}))
        begun, begun_processor = time.perf_counter(), time.process_time()
        sampled, text = form(chosen)
        seconds = time.perf_counter() - begun
        rows[name] = (seconds, time.process_time() - begun_processor, sampled, text)
    print(
        f"{options.model}, {options.style} style, {options.episodes} episodes in groups of "
        f"{options.group_size}, {options.turns} turns of {options.max_completion_tokens} tokens, "
        f"{options.threads} threads"
    )
    print(f"{'':10}{'seconds':>9}{'tokens':>9}{'tokens/s':>10}{'ours is':>9}", end="")
    print(f"{'processor s':>13}{'tokens/s':>10}{'ours is':>9}")
    our_seconds, our_processor, our_tokens, _ = rows["ours"]
    for name, (seconds, processor, sampled, _) in rows.items():
        rate, processor_rate = sampled / seconds, sampled / processor
        ratio, processor_ratio = our_tokens / our_seconds / rate, our_tokens / our_processor
        print(f"{name:10}{seconds:9.2f}{sampled:9}{rate:10.1f}{ratio:8.1f}x", end="")
        print(f"{processor:13.2f}{processor_rate:10.1f}{processor_ratio / processor_rate:8.1f}x")
    for name in ("ours", "unshared"):
        print(f"{name}: {rows[name][3]}")


if __name__ == "__main__":
    main()
