"""Teachers on a real vLLM server: their log-probs are those of the same model here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from served_vllm import ServedVllm

from atod_train.batch import make_batch
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn
from atod_train.teachers.local import LocalTeacher
from atod_train.teachers.remote import RemoteTeacher


@pytest.fixture(scope="module")
def student(smollm2_folder: Path) -> Policy:
    return load_policy(smollm2_folder, device="cpu", dtype="float32")


def dialogues(count: int, turns: int = 3, seed: int = 0) -> Batch:
    """Dialogues that begin alike: prefixes as a group of episodes repeats them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 49152, (length,), generator=generator).tolist())

    task, records = ids(150), []
    for _ in range(count):
        played = [
            Turn(index, (), "", "", 0.0, True,
                 TokenizedTurn(ids(20) if index else task, ids(12), (0.0,) * 12, "stop", index > 0))
            for index in range(turns)
        ]  # fmt: skip
        ends = (True, False, "terminated", True, 1.0)
        records.append(Trajectory(0, "t", "k", tuple(played), *ends))
    return make_batch(records, 0)


def test_scores_are_those_of_the_same_model_here(vllm_server: ServedVllm, student: Policy) -> None:
    remote = RemoteTeacher(vllm_server.url, student, max_context=2047)
    batch = dialogues(4)
    expected = LocalTeacher(student, student).score(batch)
    # The second time prefixes could come from the cache.
    for _ in range(2):
        torch.testing.assert_close(remote.score(batch), expected, rtol=0, atol=1e-3)
