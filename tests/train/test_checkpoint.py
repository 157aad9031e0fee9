"""Checkpoints survive kills, full disks and damage, and resume bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from atod_gym.errors import AtodError
from atod_train.training.checkpoint import (
    CheckpointError,
    CheckpointState,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    model_fingerprint,
    model_signature,
    prune_checkpoints,
    save_checkpoint,
)
from atod_train.training.training_state import (
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    restore_rng_state,
    rng_state,
)


def make_state(step: int = 1) -> CheckpointState:
    tensors = {
        "model.weight": torch.full((3, 4), float(step)),
        "model.half": torch.arange(5, dtype=torch.bfloat16),
        "optimizer.weight.step": torch.tensor(float(step)),
        "rng.default": torch.arange(10, dtype=torch.uint8),
    }
    return CheckpointState(tensors, {"global_step": step, "best": None, "seed": 2**100})


def test_a_saved_checkpoint_comes_back_bit_for_bit(tmp_path):
    folder = checkpoint_folder(tmp_path, 1)
    save_checkpoint(folder, make_state())
    loaded = load_checkpoint(folder)
    assert loaded.metadata == make_state().metadata
    assert loaded.tensors.keys() == make_state().tensors.keys()
    for name, tensor in make_state().tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_saving_again_replaces_and_leaves_no_strays(tmp_path):
    folder = tmp_path / "checkpoints" / "best"
    save_checkpoint(folder, make_state(1))
    (folder / "tensors.partial").write_bytes(b"left by a kill")
    (folder / "tensors-0123.safetensors").write_bytes(b"left by a kill")
    save_checkpoint(folder, make_state(2))
    assert load_checkpoint(folder).metadata["global_step"] == 2
    assert len(list(folder.iterdir())) == 2


def test_tied_views_and_transposed_tensors_can_be_saved(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"model.a": weight, "model.b": weight, "model.c": weight.T, "model.d": weight[1]}
    save_checkpoint(tmp_path / "x", CheckpointState(tensors))
    loaded = load_checkpoint(tmp_path / "x").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("metadata", [{"best": float("nan")}, {"path": Path("x")}])
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_checkpoint(tmp_path / "x", CheckpointState({}, metadata))
    assert not (tmp_path / "x").exists()


def test_latest_and_prune_pass_over_leftovers(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        save_checkpoint(checkpoint_folder(tmp_path, step), make_state(step))
    save_checkpoint(tmp_path / "checkpoints" / "best", make_state(10))
    unfinished = checkpoint_folder(tmp_path, 20)
    unfinished.mkdir()
    (unfinished / "tensors.partial").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 15)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_checkpoint(unfinished)

    deleted = prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in deleted} == {"step-000005", "step-000020"}
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"best", "step-000010", "step-000015"}
    with pytest.raises(CheckpointError, match="at least one"):
        prune_checkpoints(tmp_path, keep=0)


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 3)


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_tensors(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def alter_metadata(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"global_step": 2', '"global_step": 3'))


def tear_json(folder: Path) -> None:
    os.truncate(folder / "checkpoint.json", 40)


def change_format(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def drop_key(folder: Path) -> None:
    path = folder / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["tensors_sha256"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, remove_tensors, alter_metadata, tear_json, change_format, drop_key],
)
def test_a_damaged_checkpoint_is_refused_and_the_good_one_named(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(checkpoint_folder(tmp_path, step), make_state(step))
    damage(checkpoint_folder(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"Resume from .*step-000001 instead"):
        load_checkpoint(checkpoint_folder(tmp_path, 2))
    truncate(checkpoint_folder(tmp_path, 1))
    with pytest.raises(CheckpointError, match="No intact checkpoint"):
        load_checkpoint(checkpoint_folder(tmp_path, 2))


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path):
    save_checkpoint(tmp_path / "x", CheckpointState(model_tensors(nn.Linear(3, 4))))
    same, other = nn.Linear(3, 4), nn.Linear(3, 5)
    assert load_checkpoint(tmp_path / "x", model=model_tensors(same)).tensors
    assert load_checkpoint(tmp_path / "x", model=same.state_dict()).tensors
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x", model=model_tensors(other))
    assert "weight: saved float32[4, 3], model float32[5, 3]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"extra: saved absent, model int64\[\]"):
        load_checkpoint(tmp_path / "x", model={**same.state_dict(), "extra": torch.tensor(1)})
    assert model_fingerprint(same.state_dict()) != model_fingerprint(other.state_dict())
    assert model_signature({"optimizer.a.step": torch.tensor(1.0)}) == {}


SAVE_FOREVER = """
    import sys
    from pathlib import Path
    import torch
    from atod_train.training.checkpoint import CheckpointState, checkpoint_folder, save_checkpoint

    torch.set_num_threads(1)
    run_dir, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        tensors = {"model.weight": torch.full((500_000,), float(step))}
        state = CheckpointState(tensors, {"global_step": step})
        save_checkpoint(checkpoint_folder(run_dir, step % 3), state)
        save_checkpoint(run_dir / "checkpoints" / "best", state)
        print(step, flush=True)
"""


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

        folders = [checkpoint_folder(tmp_path, i) for i in range(3)]
        states = [load_checkpoint(f) for f in [*folders, tmp_path / "checkpoints" / "best"]]
        for state in states:
            saved_step = state.metadata["global_step"]
            assert torch.equal(state.tensors["model.weight"], torch.full((500_000,), saved_step))
        # What was announced is on disk, and at most the save under way is newer.
        assert states[-1].metadata["global_step"] in (step, step + 1)


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import torch
    from atod_train.training.checkpoint import CheckpointError, CheckpointState, save_checkpoint

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    folder = Path(sys.argv[1])
    try:
        save_checkpoint(folder, CheckpointState({"model.w": torch.zeros(1_000_000)}))
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_gives_advice_and_leaves_nothing_half_written(tmp_path, existed):
    folder = checkpoint_folder(tmp_path, 2)
    if existed:
        save_checkpoint(folder, make_state(2))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "could not be written" in result.stdout
    assert "Free disk space" in result.stdout
    assert folder.exists() == existed
    if existed:
        assert load_checkpoint(folder).metadata["global_step"] == 2
        assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="choose a folder that can be written") as caught:
        save_checkpoint(tmp_path / "file" / "step-000001", make_state())
    assert isinstance(caught.value, AtodError)


def make_training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    return model, optimizer, torch.Generator().manual_seed(seed)


def train(model, optimizer, generator, numpy_generator, steps: int) -> None:
    for _ in range(steps):
        inputs = torch.randn(8, 6, generator=generator)
        targets = torch.from_numpy(numpy_generator.normal(size=(8, 2))).float()
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("bit_generator", [np.random.PCG64, np.random.MT19937])
def test_three_and_three_steps_equal_six_bit_for_bit(tmp_path, bit_generator):
    model, optimizer, generator = make_training(1)
    numpy_generator = np.random.Generator(bit_generator(1))
    train(model, optimizer, generator, numpy_generator, 6)
    straight = {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    next_draws = torch.rand(3), numpy_generator.random(3)

    model, optimizer, generator = make_training(1)
    numpy_generator = np.random.Generator(bit_generator(1))
    train(model, optimizer, generator, numpy_generator, 3)
    tensors, states = rng_state({"rollout": generator}, {"tasks": numpy_generator})
    tensors |= {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    save_checkpoint(tmp_path / "x", CheckpointState(tensors, {"numpy": states}))

    model, optimizer, generator = make_training(99)
    numpy_generator = np.random.Generator(bit_generator(99))
    state = load_checkpoint(tmp_path / "x", model=model_tensors(model))
    restore_model(model, state.tensors)
    restore_optimizer(optimizer, model, state.tensors)
    restore_rng_state(
        state.tensors, state.metadata["numpy"], {"rollout": generator}, {"tasks": numpy_generator}
    )
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(model, optimizer, generator, numpy_generator, 3)
    resumed = {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    assert any(name.endswith(".step") and tensor == 6 for name, tensor in resumed.items())
    assert torch.equal(torch.rand(3), next_draws[0])
    assert np.array_equal(numpy_generator.random(3), next_draws[1])
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())


def test_optimizer_and_random_states_of_other_makings_are_refused():
    model, optimizer, generator = make_training(1)
    with pytest.raises(CheckpointError, match=r"'9\.weight'"):
        restore_optimizer(optimizer, model, {"optimizer.9.weight.exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="the model does not name"):
        optimizer_tensors(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), model)
    tensors, states = rng_state({}, {"tasks": np.random.default_rng(0)})
    with pytest.raises(CheckpointError, match="random generator"):
        restore_rng_state(tensors, states, {"rollout": generator})
    mersenne = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(CheckpointError, match="random generator"):
        restore_rng_state(tensors, states, {}, {"tasks": mersenne})
