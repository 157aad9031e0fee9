"""Checkpoints survive kills, full disks and damage, and resume bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from atod_gym.errors import AtodError
from atod_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    load_latest,
    model_tensors,
    optimizer_tensors,
    prune_checkpoints,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    saved_checkpoints,
)


def make_state(step: int = 1) -> Checkpoint:
    tensors = {
        "model.weight": torch.full((3, 4), float(step)),
        "model.half": torch.arange(5, dtype=torch.bfloat16),
        "optimizer.weight.step": torch.tensor(float(step)),
        "model.counter": torch.arange(10, dtype=torch.uint8),
    }
    return Checkpoint(tensors, {"global_step": step, "best": None, "seed": 2**100})


def test_a_saved_checkpoint_comes_back_bit_for_bit(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, make_state())
    loaded = load_checkpoint(path)
    assert loaded.metadata == make_state().metadata
    assert loaded.tensors.keys() == make_state().tensors.keys()
    for name, tensor in make_state().tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    save_checkpoint(path, make_state(2))
    assert load_checkpoint(path).metadata["global_step"] == 2
    assert list(path.parent.iterdir()) == [path]


def test_transposed_tensors_can_be_saved(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"model.a": weight, "model.b": weight.T, "model.c": weight.clone()[1]}
    save_checkpoint(tmp_path / "x", Checkpoint(tensors))
    loaded = load_checkpoint(tmp_path / "x").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("metadata", [{"best": float("nan")}, {"path": Path("x")}])
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
    with pytest.raises((TypeError, ValueError), match="JSON"):
        save_checkpoint(tmp_path / "x", Checkpoint({}, metadata))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    broken = Checkpoint({"optimizer.w.exp_avg": torch.tensor([0.0, value])})
    path = checkpoint_path(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"not written: optimizer\.w\.exp_avg has NaN"):
        save_checkpoint(path, broken)
    assert not saved_checkpoints(tmp_path)
    save_checkpoint(checkpoint_path(tmp_path, 1), make_state(1))
    save_file(broken.tensors, path, {"atod": "{}"})
    found, passed = load_latest(tmp_path)
    assert found is not None
    assert found.metadata["global_step"] == 1
    assert "cannot be used: optimizer.w.exp_avg has NaN" in passed[0]


def test_latest_and_prune_pass_over_leftovers(tmp_path):
    assert load_latest(tmp_path) == (None, [])
    for step in (5, 10, 15):
        save_checkpoint(checkpoint_path(tmp_path, step), make_state(step))
    other = tmp_path / "checkpoints" / "kept.safetensors"
    save_checkpoint(other, make_state(10))
    stray = tmp_path / "checkpoints" / "step-000020.safetensors.partial"
    stray.write_bytes(b"half")
    found, passed = load_latest(tmp_path)
    assert found is not None
    assert (found.metadata["global_step"], passed) == (15, [])
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in saved_checkpoints(tmp_path)] == [
        "step-000010.safetensors", "step-000015.safetensors"
    ]  # fmt: skip
    assert other.is_file()
    assert not stray.exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def tear_header(path: Path) -> None:
    os.truncate(path, 40)


def other_program(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [truncate, empty, tear_header, other_program])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(checkpoint_path(tmp_path, step), make_state(step))
    damage(checkpoint_path(tmp_path, 2))
    found, passed = load_latest(tmp_path)
    assert found is not None
    assert found.metadata["global_step"] == 1
    assert "step-000002" in passed[0]
    damage(checkpoint_path(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* can be used: .*Remove "):
        load_latest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_with_the_differences():
    saved = model_tensors(nn.Linear(3, 4))
    restore_model(nn.Linear(3, 4), saved)
    with pytest.raises(CheckpointError) as caught:
        restore_model(nn.Linear(3, 5), saved)
    assert "weight: saved torch.float32 [4, 3], model torch.float32 [5, 3]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"bias: saved torch.float32 \[4\], model absent"):
        restore_model(nn.Linear(3, 4, bias=False), saved)
    half = nn.Linear(3, 4).bfloat16()
    with pytest.raises(CheckpointError, match=r"model torch.bfloat16 \[4, 3\]"):
        restore_model(half, saved)


def test_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    model, other = Tied(), Tied()
    tensors = model_tensors(model)
    assert list(tensors) == ["model.embedding.weight"]
    restore_model(other, tensors)
    assert torch.equal(other.head.weight, model.embedding.weight)


SAVE_FOREVER = """
    import sys
    from pathlib import Path
    import torch
    from atod_train.training.checkpoint import Checkpoint, checkpoint_path, save_checkpoint

    torch.set_num_threads(1)
    run_dir, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        tensors = {"model.weight": torch.full((500_000,), float(step))}
        save_checkpoint(checkpoint_path(run_dir, step % 3), Checkpoint(tensors, {"step": step}))
        print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    step = 0
    rng = np.random.default_rng(0)
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for _ in range(4):
            step = int(child.stdout.readline())
        try:  # a moment within the next save
            child.wait(timeout=float(rng.uniform(0.0, 0.03)))
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        lines = child.stdout.read().split()
        child.stdout.close()
        step = int(lines[-1]) if lines else step

        states = [load_checkpoint(checkpoint_path(tmp_path, i)) for i in range(3)]
        for state in states:
            saved = state.metadata["step"]
            assert torch.equal(state.tensors["model.weight"], torch.full((500_000,), saved))
        # What was announced is on disk, and at most the save under way is newer.
        assert max(state.metadata["step"] for state in states) in (step, step + 1)


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import torch
    from atod_train.training.checkpoint import Checkpoint, CheckpointError, save_checkpoint

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(Path(sys.argv[1]), Checkpoint({"model.w": torch.zeros(1_000_000)}))
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_gives_advice_and_leaves_nothing_half_written(tmp_path, existed):
    path = checkpoint_path(tmp_path, 2)
    if existed:
        save_checkpoint(path, make_state(2))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "could not be written" in result.stdout
    assert "Free disk space" in result.stdout
    assert list(path.parent.iterdir()) == [path] * existed
    if existed:
        assert load_checkpoint(path).metadata["global_step"] == 2


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="make the folder writable") as caught:
        save_checkpoint(tmp_path / "file" / "step-000001", make_state())
    assert isinstance(caught.value, AtodError)


def make_training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    return model, optimizer, torch.Generator().manual_seed(seed)


def train(model, optimizer, generator, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(8, 6, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_three_and_three_steps_equal_six_bit_for_bit(tmp_path):
    model, optimizer, generator = make_training(1)
    train(model, optimizer, generator, 6)
    straight = {**model_tensors(model), **optimizer_tensors(optimizer, model)}

    model, optimizer, generator = make_training(1)
    train(model, optimizer, generator, 3)
    tensors = {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    save_checkpoint(tmp_path / "x", Checkpoint(tensors))

    model, optimizer, _ = make_training(99)
    state = load_checkpoint(tmp_path / "x")
    restore_model(model, state.tensors)
    restore_optimizer(optimizer, model, state.tensors)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(model, optimizer, generator, 3)
    resumed = {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    assert any(name.endswith(".step") and tensor == 6 for name, tensor in resumed.items())
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())
