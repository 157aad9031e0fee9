"""Several processes train as one does: same gradients, same runs, same checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_together
from test_policy import make_policy, random_batch
from test_trainer import CONFIG as SINGLE
from test_trainer import _numbers as numbers

from atod_gym.errors import InvalidSettingError
from atod_train import distributed
from atod_train.batch import share_of_sequences
from atod_train.config import RunConfig
from atod_train.distributed import Processes, join_processes
from atod_train.files import read_json
from atod_train.reports.metrics import read_evaluations
from atod_train.studies.study import train_one
from atod_train.training.checkpoint import load_latest

HERE = Path(__file__).parent
# Three groups for two processes.
CONFIG = replace(
    SINGLE,
    train=replace(SINGLE.train, tasks_per_step=3, steps=4, eval_every=2),
)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def with_steps(steps: int) -> RunConfig:
    return replace(CONFIG, train=replace(CONFIG.train, steps=steps))


def together(*arguments: str, count: int = 2, **environment: str) -> None:
    """Runs train_together.py in several processes."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", *command, str(HERE / "train_together.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ATOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    train_one(with_steps(4), out)
    return out / "atod-seed0"


def assert_close(run: Path, other: Path) -> None:
    """The same steps but for rounding, and the same evaluations."""
    for row, wanted in zip(numbers(run), numbers(other), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            assert value == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), (row["step"], name)
    # Each of the pieces was evaluated at its end.
    assert [e for e in read_evaluations(run) if e.step in (0, 4)] == [
        e for e in read_evaluations(other) if e.step in (0, 4)
    ]
    (ours, _), (theirs, _) = load_latest(run), load_latest(other)
    assert ours is not None
    assert theirs is not None
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        # AdamW turns the sign of a gradient that is nearly zero into a whole step.
        torch.testing.assert_close(tensor, theirs.tensors[name], rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sharded"), [(2, True), (3, False)], ids=["two-sharded", "three"]
)
def test_an_update_is_that_of_one_process(count: int, sharded: bool, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "start")
    together("update", str(tmp_path), count=count, **(SHARDED if sharded else {}))
    record = read_json(tmp_path / "processes.json")
    assert record["count"] == count
    assert [i for share in record["shares"] for i in share] == list(range(5))
    found: dict[str, Any] = torch.load(tmp_path / "found.pt")
    for signal in ("sampled", "exact"):
        expected = train_together.gradients_of_an_update(Processes(), signal)
        assert found[signal].keys() == expected.keys()
        assert any(name.startswith("1/") for name in expected)
        for name, tensor in expected.items():
            close = {"rtol": 1e-2, "atol": 2e-3} if "/" in name else {"rtol": 1e-4, "atol": 1e-5}
            if name.startswith("0/"):
                close = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(found[signal][name], tensor, **close, msg=f"{signal} {name}")
    alone = train_together.adapters_after_three_updates(Processes(), tmp_path / "start")
    torch.testing.assert_close(found["adapters"], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(whole_run: Path, tmp_path: Path) -> None:
    together("run", str(tmp_path), "2")
    run = tmp_path / "atod-seed0"
    assert read_json(run / "manifest.json")["processes"] == 2
    (run / "summary.json").unlink()
    # Sharded from here on, then alone: checkpoints do not depend on the number of processes.
    together("run", str(tmp_path), "3", **SHARDED)
    (run / "summary.json").unlink()
    train_one(with_steps(4), tmp_path, resume=True)
    assert_close(run, whole_run)
    assert (tmp_path / "report.html").is_file()


def test_shares_cover_everything_once() -> None:
    for count in range(1, 6):
        for items in range(12):
            shares = [Processes(index, count).share(items) for index in range(count)]
            assert [i for share in shares for i in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged() -> None:
    alone = Processes()
    assert alone.is_main
    assert alone.gather([1, 2]) == [1, 2]
    assert not alone.any(False)
    tensor = torch.ones(2)
    alone.add([tensor])
    alone.same([tensor])
    alone.wait()
    assert tensor.tolist() == [1.0, 1.0]


def test_tensors_are_exchanged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        sizes.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "_BUCKET", 10)
    shapes = [(2, 3), (4,), (1,), (30,), (2,), ()]
    tensors = [torch.ones(shape) for shape in shapes] + [torch.ones(3, dtype=torch.float64)]
    Processes(0, 2).add([*tensors, tensors[0].T])
    assert sizes == [10, 1, 30, 3, 3, 6]
    assert all((tensor == 2).all() for tensor in tensors[1:])
    assert (tensors[0] == 4).all()


@pytest.mark.parametrize(
    ("device", "environment", "message"),
    [
        ("cuda:0", {}, "each take a GPU of their own"),
        ("cpu", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
        ("cpu", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
        ("cpu", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ("cpu", {**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_settings_that_several_processes_cannot_use(
    device: str, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettingError, match=message):
        join_processes(device)


def test_teachers_of_several_processes_are_not_all_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert join_processes("cuda:0", "cuda:1") == Processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSettingError, match="would all be on that GPU"):
        join_processes("auto", "cuda:1")


def test_groups_stay_together_where_there_are_enough() -> None:
    """Sequences of a group share prefixes, which are computed once in a process."""
    batch = random_batch(sequences=12)
    for groups, whole in ((6, True), (2, False)):
        group_index = torch.arange(12) * groups // 12
        grouped = replace(batch, group_index=group_index)
        shares = [share_of_sequences(grouped, index, 2) for index in range(2)]
        assert sorted(torch.cat(shares).tolist()) == list(range(12))
        owners = [set(group_index[share].tolist()) for share in shares]
        assert (not owners[0] & owners[1]) == whole
        tokens = [int(batch.attention_mask[share].sum()) for share in shares]
        assert max(tokens) < 1.5 * min(tokens)
