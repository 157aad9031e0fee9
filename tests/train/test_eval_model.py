"""`atod-eval --agent model:FOLDER`: trained folders, play as in training, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from echo_env import ENV_ID

from atod_gym.errors import AtodError
from atod_train.config import EnvConfig, ModelConfig, RunConfig, TrainConfig
from atod_train.evaluation import eval_cli, local_model
from atod_train.evaluation.eval_cli import main
from atod_train.evaluation.evaluate import evaluate
from atod_train.evaluation.local_model import find_model
from atod_train.models import pretrained
from atod_train.models.budgets import episodes_at_once
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import MODEL_SHAPES, ModelShape, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.progress import Advance
from atod_train.reports.run_folder import write_config
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.supervised import (
    demonstrate,
    demonstration_texts,
    tokenize,
    train_on_demonstrations,
)

SHAPE = ModelShape(layers=2, width=64, heads=2, mlp_width=128, max_positions=512)
CONFIG = RunConfig(
    env=EnvConfig(id=ENV_ID, max_turns=2),
    model=ModelConfig(max_context=128),
    train=TrainConfig(max_completion_tokens=6),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose last model solves some tasks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "atod-seed0"
    episodes = demonstrate(EnvPool(CONFIG.env, "train"), 30, 0.0, seed=0)
    tokenizer = build_word_tokenizer(demonstration_texts(episodes))
    policy = build_policy(SHAPE, tokenizer, 0)
    trajectories = [tokenize(episode, DialogueEncoder(tokenizer)) for episode in episodes]
    train_on_demonstrations(policy, trajectories, epochs=100.0, lr=(3e-3, 1.8e-2), seed=0)
    policy.save(folder / "models" / "last")
    write_config(folder, CONFIG)
    return folder


def play(out: Path, agent: str | Path, *options: str) -> int:
    return main(["--agent", f"model:{agent}", "--split", "test", "--out", str(out), *options])


def read(out: Path) -> Any:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_run_is_played_as_in_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(tmp_path, run) == 0
    shown = capsys.readouterr()
    assert f"model {run}/models/last; prompts of its run: chat style, profile plain" in shown.err
    assert f"{ENV_ID}, test (generated data), atod-seed0/last" in shown.out
    pool = EnvPool(CONFIG.env, "test")
    expected = evaluate(load_policy(run / "models" / "last"), pool, CONFIG)
    value = read(tmp_path)
    assert value["tasks"] == json.loads(json.dumps(expected.to_json()["tasks"]))
    assert value["mode"] == "greedy"
    assert value["success_rate"] > 0
    assert "cost" not in shown.out
    assert value["totals"]["cost"] is None
    assert value["totals"]["prompt_tokens"] > value["totals"]["completion_tokens"] > 0
    assert value["settings"]["agent"]["max_context"] == 128
    assert value["settings"]["agent"]["max_completion_tokens"] == 6
    assert value["settings"]["show_admissible"] is False


def test_progress_counts_the_tokens_of_each_turn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []

    @contextmanager
    def recorded(*_: Any, **__: Any) -> Iterator[Advance]:
        yield lambda amount=1, note="", tokens=0: shown.append((amount, tokens))

    monkeypatch.setattr(eval_cli, "progress", recorded)
    assert play(tmp_path, run, "--tasks", "4") == 0
    # Two turns of all four episodes, then their ends.
    assert [amount for amount, _ in shown] == [0, 0, 1, 1, 1, 1]
    assert all(tokens for _, tokens in shown[:2])
    assert sum(tokens for _, tokens in shown) == read(tmp_path)["totals"]["completion_tokens"]


def test_the_best_model_is_preferred_and_a_model_is_of_its_run(run: Path, tmp_path: Path) -> None:
    assert play(tmp_path / "last", run / "models" / "last") == 0
    again = tmp_path / "again"
    load_policy(run / "models" / "last").save(again / "models" / "best")
    load_policy(run / "models" / "last").save(again / "models" / "last")
    write_config(again, CONFIG)
    assert play(tmp_path / "best", again) == 0
    best, last = read(tmp_path / "best"), read(tmp_path / "last")
    assert best["agent"] == "again/best"
    assert best["tasks"] == last["tasks"]
    assert best["settings"]["agent"]["weights"] == last["settings"]["agent"]["weights"]


def test_options_override_the_run(run: Path, tmp_path: Path) -> None:
    options = ("--max-turns", "1", "--max-tokens", "3", "--max-context", "100", "--prompt-style")
    more = ("window:1", "--no-hide-admissible", "--parse-profile", "tags")
    assert play(tmp_path, run, *options, *more, "--tasks", "3") == 0
    settings = read(tmp_path)["settings"]
    assert settings["max_turns"] == 1
    assert settings["prompt_style"] == "window:1"
    assert settings["parse_profile"] == "tags"
    assert settings["show_admissible"] is True
    assert settings["agent"]["max_completion_tokens"] == 3
    assert settings["agent"]["max_context"] == 100


def test_a_model_of_no_run_has_usual_prompts(run: Path, tmp_path: Path) -> None:
    load_policy(run / "models" / "last").save(tmp_path / "model")
    assert play(tmp_path / "out", tmp_path / "model", "--tasks", "2", ENV_ID) == 0
    settings = read(tmp_path / "out")["settings"]
    assert settings["parse_profile"] == "tags"
    assert settings["show_admissible"] is True
    assert settings["agent"]["max_context"] == 512
    assert settings["agent"]["max_completion_tokens"] == 256


def test_sampling_transcripts_and_resume(run: Path, tmp_path: Path) -> None:
    options = ("--temperature", "1.5", "--seed", "3", "--transcripts")
    assert play(tmp_path, run, *options, "--concurrency", "4") == 0
    whole = (tmp_path / "episodes.jsonl").read_text().splitlines()
    first = read(tmp_path)
    assert first["mode"] == "sampled"
    turn = json.loads(whole[0])["transcript"][0]
    assert turn["messages"][-1]["content"].startswith("Your task: say ")
    assert set(turn) == {
        "messages", "completion", "reasoning", "action", "is_action_valid", "parse_error"
    }  # fmt: skip
    (tmp_path / "episodes.jsonl").write_text("\n".join(whole[:7]) + "\n")
    assert play(tmp_path, run, *options, "--resume") == 0
    again = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert again[:7] == whole[:7]
    assert len({json.loads(line)["task_id"] for line in again}) == len(again) == 30
    # The same command with the same seed, in other batches, samples the same episodes.
    assert play(tmp_path / "other", run, *options) == 0
    assert read(tmp_path / "other")["tasks"] == first["tasks"]


def test_other_weights_do_not_continue_a_result(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(run / "models" / "last")
    policy.save(tmp_path / "x" / "models" / "last")
    write_config(tmp_path / "x", CONFIG)
    assert play(tmp_path / "out", tmp_path / "x", "--tasks", "2") == 0
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.01)
    policy.save(tmp_path / "x" / "models" / "last")
    assert play(tmp_path / "out", tmp_path / "x", "--tasks", "2", "--resume") == 2
    assert "was played with weights" in capsys.readouterr().err


def test_a_study_with_one_run_names_its_model(run: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(run, study / "opd-seed0")
    assert find_model(str(study)) == find_model(str(study / "opd-seed0"))
    shutil.copytree(run, study / "atod-seed0")
    with pytest.raises(AtodError, match="it has the runs atod-seed0, opd-seed0: give one of them"):
        find_model(str(study))


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("{tmp}/none", (), "There is no folder"),
        ("{tmp}", (), "neither the folder of a run"),
        ("", (), "There is no folder"),
        ("tiny", (), "is trained from scratch in a run; give the folder"),
        ("{run}", ("--template", "x"), "Cannot read the prompt template"),
        ("{run}", ("--seed", "1"), "--seed of a local model needs --temperature above 0"),
        ("{run}", ("--temperature", "-1"), "--temperature must be >= 0"),
        ("{run}", ("--max-tokens", "0"), "--max-tokens must be >= 1"),
        ("{run}", ("--max-context", "1000"), "more than the 512 positions"),
        ("{run}", ("--max-tokens", "200"), "leaves no room for a prompt"),
        ("{run}", ("--model", "m"), "--model is for --agent chat."),
        ("{run}", ("--device", "cuda:99"), "cannot be used here"),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    agent: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    named = agent.format(tmp=tmp_path, run=run)
    out = tmp_path / "out"
    assert play(out, named, *options) == 2
    shown = capsys.readouterr().err.splitlines()
    [line] = shown
    assert message in line
    assert not out.exists()


def test_a_second_start_is_refused_before_the_model_is_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert play(tmp_path, run, "--tasks", "2") == 0
    capsys.readouterr()
    monkeypatch.setattr(local_model.LocalModel, "load", None)
    assert play(tmp_path, run, "--tasks", "2") == 2
    assert "holds 2 episodes already: continue with --resume" in capsys.readouterr().err


def test_names_of_models_are_those_of_the_loader() -> None:
    assert local_model.SMOLLM2 == pretrained.SMOLLM2
    assert set(local_model._FROM_SCRATCH) == set(MODEL_SHAPES)


def test_the_last_model_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, CONFIG)
    assert play(tmp_path / "out", tmp_path) == 2
    assert "has no models/best or models/last yet" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(tmp_path, run, "--max-context", "8") == 2
    assert "The prompt does not fit --max-context." in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Generator, "prompt", fail)
    assert play(tmp_path, run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Memory ran out while playing (CUDA out of memory). Use a lower --concurrency" in error


def test_an_evaluation_counts_its_tasks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = load_policy(run / "models" / "last")
    capsys.readouterr()
    evaluate(policy, EnvPool(CONFIG.env, "test"), CONFIG)
    assert capsys.readouterr().err.startswith("evaluating last on test, greedy: 30/30, ")


def test_the_batch_follows_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Policy = load_policy(run / "models" / "last")
    # 2 layers of 64 keys and 64 values, 4 bytes each: 1 KiB for a token.
    pages = {"SC_PHYS_PAGES": 2**10 * 128 * 10 * 5, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    assert episodes_at_once(policy, 128) == 10
    assert episodes_at_once(policy, 256) == 5
    assert episodes_at_once(policy, 128, processes=2) == 5
    assert episodes_at_once(policy, 10**6) == 1
    pool = EnvPool(CONFIG.env, "test")
    few = evaluate(policy, pool, replace(CONFIG, model=replace(CONFIG.model, max_context=64)))
    assert len(few.tasks) == 30
