"""Teachers on a real vLLM server: their log-probs are those of the same model here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served_vllm import ServedVllm, free_port, served_vllm

from atod_gym.errors import AtodError, ServerError
from atod_train.batch import make_batch
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn
from atod_train.teachers import remote as remote_teacher
from atod_train.teachers.local import LocalTeacher
from atod_train.teachers.remote import RemoteTeacher

KEY = ("--api-key", "sesame")
CHUNKS = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--max-model-len", "512", *KEY)
"""Prompts are computed in chunks, and with the following the cache holds two of them."""
FEW_BLOCKS = ("--num-gpu-blocks-override", "5")
WHOLE = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill", *KEY)
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def student(smollm2_folder: Path) -> Policy:
    return load_policy(smollm2_folder, device="cpu", dtype="float32")


def _record(*turns: tuple[tuple[int, ...], tuple[int, ...]]) -> Trajectory:
    """A trajectory of (prompt, completion) pairs; the second prompt continues the first pair."""
    played = [
        Turn(index, (), "", "", 0.0, True,
             TokenizedTurn(prompt, ids, (0.0,) * len(ids), "stop", index > 0))
        for index, (prompt, ids) in enumerate(turns)
    ]  # fmt: skip
    return Trajectory(0, "t", "k", tuple(played), True, False, "terminated", True, 1.0)


def _ids(length: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, 49152, (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Six dialogues with one beginning, as a group of episodes has it."""
    generator = torch.Generator().manual_seed(0)
    task = _ids(150, generator)
    records = []
    for _ in range(6):
        later = [(_ids(20, generator), _ids(12, generator)) for _ in range(2)]
        records.append(_record((task, _ids(12, generator)), *later))
    return make_batch(records, 0)


@pytest.fixture(scope="module")
def expected(student: Policy, batch: Batch) -> torch.Tensor:
    return LocalTeacher(student, student).score(batch)


def test_scores_are_those_of_the_same_model_here(
    vllm_server: ServedVllm,
    student: Policy,
    batch: Batch,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_teacher, "_PROMPTS_PER_REQUEST", 2)
    remote = RemoteTeacher(vllm_server.url, student, max_context=2047)
    # The second time, prefixes are in the cache; requests of two threads are mixed.
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(lambda _: remote.score(batch), range(2)):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_the_longest_prompt_is_one_token_shorter_than_the_context(
    vllm_server: ServedVllm, student: Policy
) -> None:
    with pytest.raises(AtodError, match="at most 2047 tokens, the student's can have 2048"):
        RemoteTeacher(vllm_server.url, student, max_context=2048)
    remote = RemoteTeacher(vllm_server.url, student, max_context=2047)
    ids = tuple(range(100, 2147))
    assert (remote.score(make_batch([_record((ids[:2000], ids[2000:]))], 0)) < 0).all()
    with pytest.raises(ServerError, match=r"400.*|maximum context"):
        remote.score(make_batch([_record((ids[:2000], (*ids[2000:], 5)))], 0))


def test_the_vocabulary_is_compared(vllm_server: ServedVllm, student: Policy) -> None:
    tokenizer = student.tokenizer.__class__.from_pretrained(student.tokenizer.name_or_path)
    tokenizer.add_tokens(["<thought>"])
    with pytest.raises(AtodError, match=r"1 of 49153 tokens.*<thought>"):
        RemoteTeacher(vllm_server.url, replace(student, tokenizer=tokenizer))


def test_chunks_a_crash_and_a_restart_in_the_middle_of_a_step(
    smollm2_folder: Path,
    student: Policy,
    batch: Batch,
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_teacher, "_PROMPTS_PER_REQUEST", 1)
    monkeypatch.setattr(remote_teacher, "_PROBE", 1.0)
    monkeypatch.setenv(remote_teacher.TOKEN_VARIABLE, "sesame")
    port, threads = free_port(), ThreadPoolExecutor(1)
    with served_vllm(
        smollm2_folder, tmp_path / "chunks.log", *CHUNKS, *FEW_BLOCKS, port=port
    ) as server:
        remote = RemoteTeacher(server.url, student, max_context=511)
        torch.testing.assert_close(remote.score(batch), expected, rtol=0, atol=TOLERANCE)
        scores = threads.submit(lambda: [remote.score(batch) for _ in range(3)][-1])
        time.sleep(0.5)
        server.kill()
    # The same model with other flags: the rest of the step has the same log-probs.
    with served_vllm(smollm2_folder, tmp_path / "whole.log", *WHOLE, port=port) as server:
        torch.testing.assert_close(scores.result(120), expected, rtol=0, atol=TOLERANCE)
        # Told to end, vLLM refuses connections and does not answer what is open.
        scores = threads.submit(lambda: [remote.score(batch) for _ in range(99)][-1])
        time.sleep(0.5)
        monkeypatch.setattr(remote_teacher, "PATIENCE", 2.0)
        server.process.terminate()
        with pytest.raises(ServerError, match="away for too long"):
            scores.result(60)
