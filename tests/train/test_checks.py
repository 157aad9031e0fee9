"""Settings out of range, memory that runs out, and what a resumed run depends on unseen."""

from __future__ import annotations

import errno
import math
import os
import pickle
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_failures import Failing
from test_policy import make_policy
from test_trainer import CONFIG, _with

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train import cli
from atod_train.config import AlgorithmConfig, Method, RunConfig
from atod_train.files import read_json
from atod_train.memory import OutOfMemory, memory_errors
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_completions
from atod_train.presets import PRESETS
from atod_train.records import Batch
from atod_train.reports.metrics import read_metrics
from atod_train.reports.run_folder import RunFolderError
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.study import train_one
from atod_train.training import starts, trainer
from atod_train.training.checkpoint import saved_checkpoints
from atod_train.training.checks import check_settings
from atod_train.training.inputs import check_inputs, fingerprint, hidden_inputs
from atod_train.training.starts import policy_of


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ATOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def _changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    section, _, setting = name.partition(".")
    part = replace(getattr(config, section), **{setting: value})
    return replace(config, **{section: part})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_range(name: str) -> None:
    config = PRESETS[name].config
    models = replace(config.model, student="smollm2", teacher="smollm2")
    check_settings(replace(config, model=models))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", 0),
        ("train.tasks_per_step", -1),
        ("train.lr", 0.0),
        ("train.save_every", 0),
        ("train.seed", -1),
        ("train.tokens_per_microbatch", -1),
        ("env.max_turns", 0),
        ("env.eval_tasks", -1),
        ("env.prompt_style", "windows"),
        ("env.prompt_style", "chat:2"),
        ("env.prompt_style", "window:"),
        ("env.eval_modes", ()),
        ("env.eval_modes", ("sampled", "sampled:0.4")),
        ("env.eval_modes", ("sampled:0",)),
        ("env.eval_modes", ("beam",)),
        ("train.minibatches", "0"),
        ("train.minibatches", "rows"),
        ("train.minibatches", "turns:256"),
        ("train.lr_warmup", 1.5),
        ("env.invalid_action_penalty", -0.1),
        ("model.lora_rank", -1),
        ("model.max_context", 0),
        ("start.demonstrations", 0),
        ("start.epochs", (1.0, -1.0)),
        ("start.observation_weight", -0.1),
        ("algorithm.kappa", (0.05, 0.1)),
        ("algorithm.rho", (1.0, 0.5)),
        ("algorithm.clip", (0.2, 0.2, 1.0)),
        ("algorithm.turn_weights", "top:2"),
        ("algorithm.opd_signal", "top-k"),
        ("algorithm.clip", (-0.2, 0.2, 3.0)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    section, _, setting = name.partition(".")
    with pytest.raises(InvalidSettingError, match=rf"{section}|{setting}"):
        check_settings(_changed(CONFIG, name, value))


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("over", ["trajectories", "turns"])
def test_a_group_of_one_needs_another_signal(method: Method, over: Any) -> None:
    algorithm = AlgorithmConfig(method=method, advantage_over=over)
    config = _with(replace(CONFIG, algorithm=algorithm), group_size=1)
    if method == "grpo" and over == "trajectories":
        with pytest.raises(InvalidSettingError, match="group_size=1 leaves method grpo without"):
            check_settings(config)
    else:
        check_settings(config)


def _floats() -> list[str]:
    return [
        f"{section.name}.{setting}"
        for section in fields(RunConfig)
        for setting, value in asdict(getattr(CONFIG, section.name)).items()
        if isinstance(value[0] if isinstance(value, tuple) and value else value, float)
    ]


@pytest.mark.parametrize("name", _floats())
def test_no_number_may_be_nan(name: str) -> None:
    section, _, setting = name.partition(".")
    value = getattr(getattr(CONFIG, section), setting)
    broken = tuple(math.nan for _ in value) if isinstance(value, tuple) else math.nan
    with pytest.raises(InvalidSettingError, match=section):
        check_settings(_changed(CONFIG, name, broken))


def test_a_run_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match=r"train\.steps must be at least 1, not 0"):
        train_one(_with(CONFIG, steps=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
)
def test_memory_that_runs_out_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(
            OutOfMemory, match=r"Memory ran out while playing .*\. Use less\.$"
        ) as caught,
        memory_errors("playing", "Use less."),
    ):
        raise error
    assert "GPU 0 has" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), memory_errors("playing", ""):
        raise RuntimeError("something else")


@pytest.mark.slow
def test_out_of_memory_in_a_step_names_the_settings_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _with(CONFIG, save_every=100, eval_every=0)
    update = Failing(trainer.update_policy, 3, torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(trainer, "update_policy", update)
    advice = r"weights in step 3 .* --train\.tokens-per-microbatch \(now 2048\)"
    with pytest.raises(OutOfMemory, match=advice):
        train_one(config, tmp_path)
    assert [p.stem for p in saved_checkpoints(tmp_path / "atod-seed0")] == ["step-000002"]
    train_one(_with(config, tokens_per_microbatch=256), tmp_path, resume=True)
    assert len(read_metrics(tmp_path / "atod-seed0")) == 6


def test_a_value_error_of_the_algorithm_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(trainer.compute_advantages, 1, ValueError("returns must be finite"))
    monkeypatch.setattr(trainer, "compute_advantages", failing)
    with pytest.raises(AtodError, match=r"^Step 1: returns must be finite\.$"):
        train_one(CONFIG, tmp_path)


@pytest.mark.slow
def test_completions_that_are_cut_are_counted_and_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_one(_with(CONFIG, steps=3, eval_every=0, max_completion_tokens=1), tmp_path / "cut")
    rows = read_metrics(tmp_path / "cut" / "atod-seed0")
    assert all(row["completions_cut"] > 0.9 for row in rows)
    told = capsys.readouterr().err
    assert told.count("were cut at train.max_completion_tokens=1") == 1
    config = _with(CONFIG, steps=1, eval_every=0, max_completion_tokens=64)
    train_one(config, tmp_path / "whole")
    [row] = read_metrics(tmp_path / "whole" / "atod-seed0")
    assert ("were cut" in capsys.readouterr().err) == (row["completions_cut"] > 0.5)
    assert row["completions_cut"] < 0.9


# -- hidden inputs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A finished run of a saved model with adapters, and its folder."""
    out = tmp_path_factory.mktemp("run")
    with closing(EnvPool(CONFIG.env, "train")) as pool:
        made = policy_of(CONFIG, "student", pool)
    for name in ("student", "teacher"):
        made.save(out / name)
    model = replace(
        CONFIG.model, student=str(out / "student"), teacher=str(out / "teacher"), lora_rank=2
    )
    config = replace(CONFIG, model=model, start=replace(CONFIG.start, epochs=(0.0, 0.0)))
    config = _with(config, steps=1, eval_every=0)
    train_one(config, out / "runs")
    return config, out


def _train_a_little(folder: Path) -> None:
    """Move weights by a thousandth of their size, as fine-tuning does."""
    policy = load_policy(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(1e-3 * float(weight.std()) * torch.randn(weight.shape, generator=generator))
    policy.save(folder)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_another_model_of_the_same_name_is_not_resumed_with(
    role: str, run: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = run
    inputs = read_json(out / "runs" / "atod-seed0" / "manifest.json")["inputs"]
    assert inputs["teacher"]
    assert inputs["frozen"]
    more = _with(config, steps=2)
    kept = load_policy(out / role)
    _train_a_little(out / role)
    # It is refused before minutes of evaluations.
    monkeypatch.setattr(starts, "evaluate", lambda *_: pytest.fail("evaluated first"))
    try:
        with pytest.raises(RunFolderError, match=f"{role}.* it is another model"):
            train_one(more, out / "runs", resume=True)
    finally:
        kept.save(out / role)


def test_other_tasks_are_not_resumed_with(run: tuple[RunConfig, Path]) -> None:
    config, out = run
    manifest = out / "runs" / "atod-seed0" / "manifest.json"
    kept = manifest.read_text()
    for split, tasks in read_json(manifest)["inputs"]["data"].items():
        manifest.write_text(kept.replace(f'"{split}": "{tasks}"', f'"{split}": "{"0" * 64}"'))
        with pytest.raises(RunFolderError, match=f"The tasks of split {split} are not those"):
            train_one(_with(config, steps=2), out / "runs", resume=True)
    manifest.write_text(kept)


def test_a_fingerprint_follows_weights_and_not_their_precision() -> None:
    policy = make_policy()
    found = fingerprint(policy.model)
    assert fingerprint(policy.model.bfloat16()) == found
    trained = policy.model.get_input_embeddings().weight
    with torch.no_grad():
        trained.mul_(1.01)
    assert fingerprint(policy.model) != found
    for weight in policy.model.parameters():
        weight.requires_grad_(weight is trained)
    found = fingerprint(policy.model, frozen=True)
    with torch.no_grad():
        trained.mul_(1.01)
    assert fingerprint(policy.model, frozen=True) == found


def test_a_server_of_another_teacher_is_found_by_its_log_probs() -> None:
    """Its weights are elsewhere, and may be held in another precision."""
    student, another, inputs = make_policy(0), make_policy(2), []
    with torch.no_grad():
        another.model.get_input_embeddings().weight.mul_(50)
    for teacher, error in ((make_policy(1), 0.0), (make_policy(1), 0.03), (another, 0.0)):

        class Served:
            is_float32 = True

            def score(self, batch: Batch) -> torch.Tensor:
                logprobs = score_completions(teacher, batch).logprobs  # noqa: B023
                return logprobs + error  # noqa: B023

        found = hidden_inputs(student, Served(), DialogueEncoder(student.tokenizer), [])
        inputs.append(found)
    manifest = {"inputs": inputs[0]}
    check_inputs(inputs[1], manifest)
    with pytest.raises(RunFolderError, match="teacher is not the one"):
        check_inputs(inputs[2], manifest)


@pytest.mark.slow
@pytest.mark.parametrize("day", ["", "{{ strftime_now('%d') }}", "{{ date_string }}"])
def test_an_edited_template_is_not_resumed_with(
    day: str, run: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, _ = run
    policy = load_policy(config.model.student)
    policy.tokenizer.chat_template = day + str(policy.tokenizer.chat_template)
    policy.save(tmp_path / "model")
    folder = str(tmp_path / "model")
    config = replace(config, model=replace(config.model, student=folder, teacher=folder))
    train_one(config, tmp_path / "runs")
    train_one(_with(config, steps=2), tmp_path / "runs", resume=True)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("go " + template.read_text())
    with pytest.raises(RunFolderError, match="the tokenizer was changed"):
        train_one(_with(config, steps=3), tmp_path / "runs", resume=True)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free space"),
        (PermissionError(errno.EACCES, "Permission denied"), "may write to"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "server is running"),
        (OSError(errno.EIO, "Input/output error"), "file or device"),
    ],
)
def test_errors_of_the_system_are_not_changed(
    error: OSError, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert cli._guarded(work, "the same command") == 2
    told = capsys.readouterr().err
    assert advice in told
    assert ("Free space" in told) == (advice == "Free space")
