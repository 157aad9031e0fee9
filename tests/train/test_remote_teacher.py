"""Teachers behind a URL: a real server of ours in both dialects, and answers as published."""

from __future__ import annotations

import copy
import urllib.request
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_teacher import FakeTeacher, served
from test_policy import TINY, make_policy, random_batch

from atod_gym.errors import AtodError, ServerError
from atod_train.batch import make_batch
from atod_train.config import TeacherApi
from atod_train.models.policy import Policy, build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.teachers import remote as remote_teacher
from atod_train.teachers.local import LocalTeacher
from atod_train.teachers.remote import RemoteTeacher

APIS: tuple[TeacherApi, ...] = ("completions", "sglang")
STUDENT = make_policy(0)


@pytest.fixture(scope="module")
def teacher() -> Policy:
    """A teacher whose outputs are padded beyond the vocabulary."""
    policy = make_policy(1)
    policy.model.resize_token_embeddings(128, mean_resizing=False)
    return policy


@pytest.fixture(scope="module")
def url(teacher: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "teacher"
    teacher.save(folder)
    with served(folder) as (address, _):
        yield address


def _prompts_scored(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return int(
        float(next(line.split()[1] for line in lines if line.startswith("teacher_prompts_total")))
    )


# -- our own server ------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_scores_are_those_of_the_same_teacher_here(
    api: TeacherApi, url: str, teacher: Policy
) -> None:
    remote = RemoteTeacher(url, STUDENT, api=api, max_context=TINY.max_positions)
    assert remote.name == "teacher"
    local = LocalTeacher(teacher, STUDENT)
    for seed in range(4):
        batch = random_batch(sequences=7, turns=4, seed=seed)
        found, expected = remote.score(batch), local.score(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found[~batch.completion_mask] == 0).all()


@pytest.mark.parametrize("api", APIS)
def test_unpacked_rows_and_rows_without_tokens(api: TeacherApi, url: str, teacher: Policy) -> None:
    def turn(index: int, *ids: int) -> Turn:
        tokens = TokenizedTurn((8, 9 + index), ids, (0.0,) * len(ids), "stop", index > 0)
        return Turn(index, (), "", "", 0.0, True, tokens)

    def record(*turns: Turn) -> Trajectory:
        return Trajectory(0, "t", "k", turns, True, False, "terminated", True, 1.0)

    records = [record(turn(0, 10, 11, 4), turn(1), turn(2, 12, 4)), record(turn(0))]
    for pack in (True, False):
        batch = make_batch(records, 0, pack=pack)
        found = RemoteTeacher(url, STUDENT, api=api).score(batch)
        torch.testing.assert_close(
            found, LocalTeacher(teacher, STUDENT).score(batch), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("api", APIS)
def test_what_is_known_is_not_asked_again(api: TeacherApi, url: str) -> None:
    remote = RemoteTeacher(url, STUDENT, api=api, requests_at_once=3)
    batch = random_batch(sequences=6, seed=9)
    before = _prompts_scored(url)
    first = remote.score(batch)
    assert _prompts_scored(url) == before + 6
    assert torch.equal(remote.score(batch), first)
    assert _prompts_scored(url) == before + 6
    # The same sequence twice in a batch is one prompt.
    remote.score(make_batch([_copy(1), _copy(1)], 0))
    assert _prompts_scored(url) == before + 7


def _copy(number: int) -> Trajectory:
    tokens = TokenizedTurn((8, 20 + number), (10, 11, 4), (0.0,) * 3, "stop", False)
    turn = Turn(0, (), "", "", 0.0, True, tokens)
    return Trajectory(0, "t", "k", (turn,), True, False, "terminated", True, 1.0)


def test_another_vocabulary_is_refused(url: str) -> None:
    other = build_policy(TINY, build_word_tokenizer(["look lamp with under"]), 0)
    with pytest.raises(AtodError, match=r"do not share a vocabulary.*same model family"):
        RemoteTeacher(url, other)
    # One token more, whose id the server's embedding has as padding only.
    tokenizer = copy.deepcopy(STUDENT.tokenizer)
    tokenizer.add_tokens(["<think>"])
    for api in APIS:
        with pytest.raises(AtodError, match=r"refuses ids .*out of vocabulary"):
            RemoteTeacher(url, replace(STUDENT, tokenizer=tokenizer), api=api)
    # More ids than the server has.
    larger = build_policy(TINY, build_word_tokenizer([" ".join(f"w{i}" for i in range(90))]), 0)
    for api in APIS:
        with pytest.raises(AtodError, match=r"refuses ids .*out of vocabulary"):
            RemoteTeacher(url, larger, api=api)


def test_too_short_a_context_is_refused(url: str) -> None:
    with pytest.raises(AtodError, match=r"at most 128 tokens.*--model\.max-context 128"):
        RemoteTeacher(url, STUDENT, max_context=129)
    # vLLM and SGLang want room for one token behind the prompt.
    for api, answer in zip(APIS, (_vllm, _sglang), strict=True):
        with FakeTeacher(answer, VLLM_MODELS) as fake:
            RemoteTeacher(fake.url, STUDENT, api=api, max_context=4095)
            with pytest.raises(AtodError, match=r"at most 4095 tokens.*can have 4096"):
                RemoteTeacher(fake.url, STUDENT, api=api, max_context=4096)


@pytest.mark.parametrize("api", APIS)
def test_a_sequence_of_full_length_is_scored(api: TeacherApi, url: str, teacher: Policy) -> None:
    ids = tuple(8 + i % 90 for i in range(TINY.max_positions))
    tokens = TokenizedTurn(ids[:1], ids[1:], (0.0,) * (len(ids) - 1), "stop", False)
    turn = Turn(0, (), "", "", 0.0, True, tokens)
    record = Trajectory(0, "t", "k", (turn,), True, False, "terminated", True, 1.0)
    batch = make_batch([record], 0)
    found = RemoteTeacher(url, STUDENT, api=api, max_context=len(ids)).score(batch)
    expected = LocalTeacher(teacher, STUDENT).score(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_length_of_an_adapter_is_that_of_its_base() -> None:
    adapter = {"id": "tuned", "object": "model", "parent": "big", "max_model_len": None}
    with (
        FakeTeacher(_vllm, [*VLLM_MODELS, adapter]) as fake,
        pytest.raises(AtodError, match=r"Teacher tuned .* at most 4095"),
    ):
        RemoteTeacher(fake.url, STUDENT, model="tuned", max_context=4096)


def test_an_unknown_model_is_refused(url: str) -> None:
    with pytest.raises(AtodError, match=r"has no model 'gpt'; it lists teacher"):
        RemoteTeacher(url, STUDENT, model="gpt")


def test_a_token_is_sent(teacher: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher.save(tmp_path / "t")
    with served(tmp_path / "t", "--token-env", "WORD", WORD="sesame") as (address, _):
        with pytest.raises(ServerError, match="401"):
            RemoteTeacher(address, STUDENT)
        monkeypatch.setenv("ATOD_TEACHER_TOKEN", "sesame")
        RemoteTeacher(address, STUDENT)


def test_a_server_that_dies(teacher: Policy, tmp_path: Path) -> None:
    teacher.save(tmp_path / "t")
    with served(tmp_path / "t") as (address, process):
        remote = RemoteTeacher(address, STUDENT)
        process.kill()
        process.wait()
        with pytest.raises(ServerError, match=r"tried 5 times.*serve-teacher"):
            remote.score(random_batch())


# -- answers as vLLM and SGLang publish them -----------------------------------------------------


def _vllm(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The form of vLLM's answers; log-prob of a token: minus its id over 100."""
    assert path == "/v1/completions"
    assert (body["prompt_logprobs"], body["max_tokens"], body["model"]) == (0, 1, "big")
    assert "echo" not in body
    choices = []
    for index, ids in enumerate(body["prompt"]):
        entries: list[Any] = [None]
        for token in ids[1:]:
            text = STUDENT.tokenizer.convert_ids_to_tokens(token)
            entries.append(
                {
                    # The most likely token may stand beside the prompt's.
                    "0": {"logprob": -0.001, "rank": 1, "decoded_token": "<pad>"},
                    str(token): {"logprob": -token / 100, "rank": 7, "decoded_token": text},
                }
            )
        choices.append(
            {"index": index, "text": " x", "logprobs": None, "finish_reason": "length",
             "stop_reason": None, "prompt_logprobs": entries}
        )  # fmt: skip
    return {
        "id": "cmpl-8c16f8", "object": "text_completion", "created": 1772367069, "model": "big",
        "choices": choices[::-1], "usage": {"prompt_tokens": 9, "total_tokens": 10,
        "completion_tokens": 1, "prompt_tokens_details": None}, "kv_transfer_params": None,
    }  # fmt: skip


def _sglang(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The form of SGLang's answers; log-prob of a token: minus its id over 100."""
    assert path == "/generate"
    assert body["return_logprob"] is True
    ids, first = body["input_ids"], body["logprob_start_len"]
    texts = STUDENT.tokenizer.convert_ids_to_tokens(ids)
    entries = [[-i / 100, i, t] for i, t in zip(ids[first:], texts[first:], strict=True)]
    entries[0][0] = None
    return {
        "text": "", "output_ids": [], "meta_info": {
            "id": "5d4f", "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids), "weight_version": "default", "completion_tokens": 0,
            "input_token_logprobs": entries, "output_token_logprobs": [], "e2e_latency": 0.01,
        },
    }  # fmt: skip


def _expected(batch: Any) -> torch.Tensor:
    return torch.where(batch.completion_mask, -batch.completion_ids / 100, 0.0)


VLLM_MODELS = [{"id": "big", "object": "model", "owned_by": "vllm", "max_model_len": 4096}]


def test_published_form_of_completions() -> None:
    batch = random_batch(sequences=9, seed=3)
    with FakeTeacher(_vllm, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, max_context=4095)
        fake.posts.clear()
        torch.testing.assert_close(remote.score(batch), _expected(batch))
        assert [len(body["prompt"]) for _, body in fake.posts] == [9]


def test_published_form_of_sglang() -> None:
    batch = random_batch(sequences=5, seed=3)
    with FakeTeacher(_sglang) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, api="sglang")
        fake.posts.clear()
        torch.testing.assert_close(remote.score(batch), _expected(batch))
        assert not any(body["return_text_in_logprobs"] for _, body in fake.posts)
        # Prompts before the first completion are not scored.
        first = {int(batch.start[batch.sequence_index == s].min()) for s in range(5)}
        assert {body["logprob_start_len"] + 1 for _, body in fake.posts} == first
        assert len(fake.posts) == 5


def test_a_busy_server_is_asked_again() -> None:
    with FakeTeacher(_vllm, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.mishaps.extend([503, 503])
        batch = random_batch()
        torch.testing.assert_close(remote.score(batch), _expected(batch))


def test_what_came_before_a_failure_is_kept() -> None:
    with FakeTeacher(_sglang) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, api="sglang", requests_at_once=1)
        fake.posts.clear()
        fake.mishaps.extend([200, 200, 500])
        batch = random_batch(sequences=4)
        with pytest.raises(ServerError, match="500"):
            remote.score(batch)
        torch.testing.assert_close(remote.score(batch), _expected(batch))
        assert len(fake.posts) == 5


def test_after_a_failure_the_rest_is_not_tried() -> None:
    with FakeTeacher(_sglang) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, api="sglang", requests_at_once=2)
        fake.posts.clear()
        fake.mishaps.extend([503] * 200)
        with pytest.raises(ServerError, match="503"):
            remote.score(random_batch(sequences=24))
        # Five attempts each: those that failed, and those that had begun by then.
        assert len(fake.posts) <= 20


def test_a_server_without_the_endpoint_is_told_from_one_that_refuses_ids() -> None:
    def absent(path: str, body: Any) -> Any:
        return 404, {"detail": "Not Found"}

    with FakeTeacher(absent, VLLM_MODELS) as fake:
        for api in APIS:
            with pytest.raises(ServerError, match=r"404 .*right URL.*must answer /"):
                RemoteTeacher(fake.url, STUDENT, api=api)


def test_the_name_of_an_older_sglang_without_a_list_of_models() -> None:
    with FakeTeacher(_sglang) as fake:
        fake.info = {"model_path": "Qwen/Qwen3-30B-A3B", "is_generation": True}
        assert RemoteTeacher(fake.url, STUDENT, api="sglang").name == "Qwen/Qwen3-30B-A3B"
        assert RemoteTeacher(fake.url, STUDENT, api="sglang", model="big").name == "big"


@pytest.mark.parametrize("models", [3, "big", None, [], [3], [{"object": "model"}]])
def test_an_unusable_list_of_models(models: Any) -> None:
    with (
        FakeTeacher(_vllm, {} if models is None else models) as fake,
        pytest.raises(AtodError, match="it lists none"),
    ):
        RemoteTeacher(fake.url, STUDENT)


@pytest.mark.parametrize("api", APIS)
def test_an_endpoint_without_logprobs_is_refused(api: TeacherApi) -> None:
    def silent(path: str, body: Any) -> dict[str, Any]:
        if path == "/generate":
            return {"text": "x", "meta_info": {"prompt_tokens": 3}}
        return {"choices": [{"index": i, "text": "x"} for i in range(len(body["prompt"]))]}

    with (
        FakeTeacher(silent, VLLM_MODELS) as fake,
        pytest.raises(ServerError, match=r"no usable log-probs.*must answer /"),
    ):
        RemoteTeacher(fake.url, STUDENT, api=api)


def test_an_endpoint_without_texts_gives_a_warning() -> None:
    def wordless(path: str, body: Any) -> dict[str, Any]:
        answer = _sglang(path, body)
        for entry in answer["meta_info"]["input_token_logprobs"]:
            entry[2] = None
        return answer

    with FakeTeacher(wordless) as fake, pytest.warns(UserWarning, match="could not be compared"):
        RemoteTeacher(fake.url, STUDENT, api="sglang")


def _without_texts(ids: Collection[int]) -> Any:
    def answer(path: str, body: Any) -> dict[str, Any]:
        found = _vllm(path, body)
        for choice in found["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                for token, said in entry.items():
                    said["decoded_token"] = "" if int(token) in ids else said["decoded_token"]
        return found

    return answer


def test_servers_may_leave_out_all_special_tokens_but_not_one() -> None:
    added = STUDENT.tokenizer.added_tokens_decoder
    special = [i for i, token in added.items() if token.special]
    assert len(special) > 1
    with FakeTeacher(_without_texts(special), VLLM_MODELS) as fake:
        RemoteTeacher(fake.url, STUDENT)
    for missing in ([special[1]], [len(STUDENT.tokenizer) - 1]):
        with (
            FakeTeacher(_without_texts(missing), VLLM_MODELS) as fake,
            pytest.raises(AtodError, match=rf" 1 of .*{missing[0]} is '' for the teacher"),
        ):
            RemoteTeacher(fake.url, STUDENT)


@pytest.mark.parametrize("lowest", [float("-inf"), -9999.0, -1e300])
def test_impossible_tokens_have_finite_logprobs(lowest: float) -> None:
    def answer(path: str, body: Any) -> Any:
        found = _sglang(path, body)
        found["meta_info"]["input_token_logprobs"][-1][0] = lowest
        return found

    with FakeTeacher(_sglang) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, api="sglang")
        fake.answer = answer
        batch = random_batch(sequences=2, seed=4)
        assert remote.score(batch).min() == -9999.0


def _broken(how: str) -> Any:
    def answer(path: str, body: Any) -> Any:
        found = _vllm(path, body)
        entries = found["choices"][0]["prompt_logprobs"]
        if how == "few choices":
            found["choices"].pop()
        elif how == "few entries":
            entries.pop()
        elif how == "other id":
            entries[-1] = {"0": {"logprob": -1.0}}
        elif how == "null":
            entries[-1] = None
        elif how == "list":
            entries[-1] = [1]
        elif how == "positive":
            for token in entries[-1].values():
                token["logprob"] = 37.0
        elif how == "long number":
            for token in entries[-1].values():
                token["logprob"] = -(10**400)
        elif how == "same index":
            for choice in found["choices"]:
                choice["index"] = 0
        elif how == "not a number":
            for token in entries[-1].values():
                token["logprob"] = float("nan")
        elif how == "text":
            for token in entries[-1].values():
                token["logprob"] = "-1"
        elif how == "no object":
            return [found]
        elif how == "choices":
            found["choices"] = "none"
        return found

    return answer


@pytest.mark.parametrize(
    "how",
    ["few choices", "few entries", "other id", "null", "not a number", "text", "no object",
     "choices", "list", "positive", "long number", "same index"],
)  # fmt: skip
def test_malformed_answers_are_named(how: str) -> None:
    with FakeTeacher(_vllm, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.answer = _broken(how)
        with pytest.raises(ServerError, match=fake.url):
            remote.score(random_batch(seed=5))


@pytest.mark.parametrize(
    "meta",
    ["x", None, [], {}, {"input_token_logprobs": "x"}, {"input_token_logprobs": []},
     {"input_token_logprobs": [[None, 1, None]] * 200},
     {"input_token_logprobs": [[-1.0, 10**6, None]] * 200}, {"input_token_logprobs": [3] * 200}],
)  # fmt: skip
def test_malformed_answers_of_sglang_are_named(meta: Any) -> None:
    with FakeTeacher(_sglang) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, api="sglang")
        fake.answer = lambda path, body: {"text": "", "meta_info": meta}
        with pytest.raises(ServerError, match=f"{fake.url}/generate.*no usable"):
            remote.score(random_batch(seed=5))


def test_old_logprobs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_teacher, "_CACHED_TOKENS", 30)
    with FakeTeacher(_vllm, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        for seed in range(5):
            batch = random_batch(sequences=3, seed=seed)
            torch.testing.assert_close(remote.score(batch), _expected(batch))
            assert remote._known_tokens <= max(30, len(batch.input_ids[0]))
        assert remote._known_tokens == sum(map(len, remote._known.values()))


def test_wrong_urls_are_named() -> None:
    with pytest.raises(AtodError, match="looks like http"):
        RemoteTeacher("ftp://x", STUDENT)
