"""Teachers behind a URL that are away, restarted, told to end, or wrong about prefixes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from threading import Event
from typing import Any

import pytest
import torch
from served_teacher import FakeTeacher
from test_policy import random_batch
from test_remote_teacher import STUDENT, VLLM_MODELS, expected_scores, vllm_answer

from atod_gym.errors import AtodError, ServerError
from atod_train.teachers import remote as remote_teacher
from atod_train.teachers.remote import RemoteTeacher


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_teacher, "PATIENCE", 2.0)
    monkeypatch.setattr(remote_teacher, "FIRST_PAUSE", 0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("status", "times"), [(408, 3), (429, 3), (500, 3), (503, 7)])
def test_a_busy_server_is_retried(status: int, times: int) -> None:
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.mishaps.extend([status] * times)
        batch = random_batch()
        torch.testing.assert_close(remote.score(batch), expected_scores(batch))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_server_that_refuses_is_not_retried(status: int) -> None:
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        asked = len(fake.posts)
        fake.mishaps.extend([status] * 2)
        with pytest.raises(ServerError, match=str(status)):
            remote.score(random_batch())
        assert len(fake.posts) == asked + 1


@pytest.mark.slow
def test_the_wait_that_a_server_requests_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        pauses.append(seconds)

    monkeypatch.setattr(remote_teacher.time, "sleep", sleep)
    monkeypatch.setattr(remote_teacher.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote_teacher, "_LONGEST_SLEEP", 1e9)
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.mishaps.extend([429] * 9)
        remote.score(random_batch())
        assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 30]
        # An answer ends an outage, and the next one begins with a short pause.
        pauses.clear()
        fake.retry_after = "7"
        fake.mishaps.extend([429] * 4)
        remote.score(random_batch())
        assert pauses == [7, 7, 7, 8]
        for far in ("3600", formatdate(time.time() + 3600, usegmt=True)):
            fake.retry_after = far
            fake.mishaps.append(429)
            with pytest.raises(ServerError, match="429"):
                remote.score(random_batch())
        for unusable in ("soon", "9" * 5000, "-1"):
            fake.retry_after = unusable
            fake.mishaps.append(429)
            remote.score(random_batch())


@pytest.mark.slow
def test_a_server_that_accepts_a_request_and_never_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_teacher, "_SLOW", 0.2)
    monkeypatch.setattr(remote_teacher, "FIRST_PAUSE", 0.1)
    hangs = [True]

    def answer(path: str, body: Any) -> Any:
        if hangs.pop() if hangs else False:
            time.sleep(1.5)
        return vllm_answer(path, body)

    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, timeout=0.7)
        fake.answer = answer
        batch = random_batch()
        torch.testing.assert_close(remote.score(batch), expected_scores(batch))
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"waiting until [\d:]+ for an answer of the teacher's .* {fake.url}", line)


@pytest.mark.slow
def test_a_server_that_ends_with_a_request_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM after SIGTERM: connections are refused, and open requests are never answered."""
    monkeypatch.setattr(remote_teacher, "_PROBE", 0.2)
    monkeypatch.setattr(remote_teacher, "PATIENCE", 0.5)
    is_asked, is_over = Event(), Event()

    def silent(path: str, body: Any) -> Any:
        is_asked.set()
        is_over.wait(60)
        return vllm_answer(path, body)

    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake, ThreadPoolExecutor(1) as thread:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.answer = silent
        scores = thread.submit(remote.score, random_batch())
        is_asked.wait(60)
        time.sleep(0.5)  # one that is only slow is waited for
        assert not scores.done()
        fake.__exit__()
        try:
            with pytest.raises(ServerError, match=r"away for too long.*refused"):
                scores.result(timeout=30)
        finally:
            is_over.set()


def test_a_prefix_cache_that_gives_wrong_logprobs_is_refused() -> None:
    cached = set[tuple[int, ...]]()

    def forgetful(path: str, body: Any) -> Any:
        found = vllm_answer(path, body)
        for choice in found.get("choices", []):
            ids = body["prompt"][choice["index"]]
            if tuple(ids[:64]) in cached:
                for entry in choice["prompt_logprobs"][1:256]:
                    entry.update((token, {"logprob": 0.0}) for token in entry)
            cached.add(tuple(ids[:64]))
        return found

    with (
        FakeTeacher(forgetful, VLLM_MODELS) as fake,
        pytest.raises(AtodError, match=r"other log-probs.*--no-enable-prefix-caching"),
    ):
        RemoteTeacher(fake.url, STUDENT)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_another_model_after_a_restart_is_refused() -> None:
    def another(path: str, body: Any) -> Any:
        found = vllm_answer(path, body)
        for choice in found["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                for value in entry.values():
                    value["logprob"] -= 0.5
        return found

    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote, batch = RemoteTeacher(fake.url, STUDENT), random_batch()
        fake.mishaps.append(500)
        remote.score(batch)
        fake.mishaps.append(500)
        fake.answer = another
        with pytest.raises(AtodError, match=r"0\.5 nats.*restart, with the model that this run"):
            remote.score(batch)


def test_a_signal_ends_the_waiting() -> None:
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.mishaps.extend([500] * 100)
        remote.interrupted = interrupted = list[object]()
        with ThreadPoolExecutor(1) as thread:
            scores = thread.submit(remote.score, random_batch())
            while len(fake.mishaps) == 100:
                time.sleep(0.01)
            interrupted.append("SIGTERM")
            with pytest.raises(ServerError, match=r"stopped while .* was away.*500"):
                scores.result(timeout=5)
