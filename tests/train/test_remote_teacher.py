"""Teachers behind a URL: a real server of ours, and answers as vLLM and SGLang publish them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_teacher import FakeTeacher, served
from test_policy import TINY, make_policy, random_batch

from atod_gym.errors import AtodError, ServerError
from atod_train.batch import make_batch
from atod_train.models.from_scratch import build_policy
from atod_train.models.policy import Policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.teachers import remote as remote_teacher
from atod_train.teachers import vocabulary
from atod_train.teachers.local import LocalTeacher
from atod_train.teachers.remote import RemoteTeacher

STUDENT = make_policy(0)
EOS = str(STUDENT.tokenizer.eos_token)


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


# -- our own server ------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_those_of_the_same_teacher_here(url: str, teacher: Policy) -> None:
    remote = RemoteTeacher(url, STUDENT, max_context=TINY.max_positions)
    assert remote.name == "teacher"
    local = LocalTeacher(teacher, STUDENT)
    for seed in range(4):
        batch = random_batch(sequences=7, turns=4, seed=seed)
        found, expected = remote.score(batch), local.score(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found[~batch.completion_mask] == 0).all()


def test_unpacked_rows_and_rows_without_tokens(url: str, teacher: Policy) -> None:
    def turn(index: int, *ids: int) -> Turn:
        tokens = TokenizedTurn((8, 9 + index), ids, (0.0,) * len(ids), "stop", index > 0)
        return Turn(index, (), "", "", 0.0, True, tokens)

    def record(*turns: Turn) -> Trajectory:
        return Trajectory(0, "t", "k", turns, True, False, "terminated", True, 1.0)

    records = [record(turn(0, 10, 11, 4), turn(1), turn(2, 12, 4)), record(turn(0))]
    for pack in (True, False):
        batch = make_batch(records, 0, pack=pack)
        found = RemoteTeacher(url, STUDENT).score(batch)
        torch.testing.assert_close(
            found, LocalTeacher(teacher, STUDENT).score(batch), rtol=1e-5, atol=1e-5
        )


def test_long_and_short_prompts_in_several_requests(
    url: str, teacher: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_teacher, "_TOKENS_PER_REQUEST", 100)
    monkeypatch.setattr(remote_teacher, "_PROMPTS_PER_REQUEST", 3)
    batch = random_batch(sequences=23, turns=5, seed=7)
    found, expected = RemoteTeacher(url, STUDENT).score(batch), LocalTeacher(teacher, STUDENT)
    torch.testing.assert_close(found, expected.score(batch), rtol=1e-5, atol=1e-5)


def _with_tokens(policy: Policy, *tokens: str) -> Policy:
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.add_tokens(list(tokens))
    return replace(policy, tokenizer=tokenizer)


WORDS = " ".join(f"w{i}" for i in range(90))
VOCABULARIES = {
    "the same": (STUDENT, True),
    "one word is another": (
        build_policy(TINY, build_word_tokenizer(["take mug from lamp"]), 0),
        False,
    ),
    "more words": (build_policy(TINY, build_word_tokenizer([WORDS]), 0), False),
    "one token more": (_with_tokens(STUDENT, "<think>"), False),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies_are_compared_alike_here_and_behind_a_url(
    name: str, url: str, teacher: Policy
) -> None:
    student, is_shared = VOCABULARIES[name]
    messages = []
    for make in (
        lambda: LocalTeacher(teacher, student),
        lambda: RemoteTeacher(url, student),
    ):
        if is_shared:
            make()
            continue
        with pytest.raises(
            AtodError, match=r"do not share a vocabulary.*same model family"
        ) as found:
            make()
        messages.append(str(found.value).replace(f"teacher at {url}", teacher.name))
    assert len(set(messages)) <= 1


@pytest.mark.slow
def test_a_teacher_with_more_tokens_and_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = _with_tokens(make_policy(1), "[PAD]")
    larger.model.resize_token_embeddings(len(larger.tokenizer), mean_resizing=False)
    larger.save(tmp_path / "larger")
    batch = random_batch()
    expected = LocalTeacher(larger, STUDENT).score(batch)
    with served(tmp_path / "larger", "--token-env", "WORD", WORD="sesame") as (address, _):
        with pytest.raises(ServerError, match="401"):
            RemoteTeacher(address, STUDENT)
        monkeypatch.setenv("ATOD_TEACHER_TOKEN", "sesame")
        found = RemoteTeacher(address, STUDENT).score(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # Two that have a token more each, but not the same one.
        with pytest.raises(AtodError, match=r"is '<think>' for the student and '\[PAD\]' for the"):
            RemoteTeacher(address, _with_tokens(STUDENT, "<think>"))


def test_too_short_a_context_is_refused(url: str) -> None:
    with pytest.raises(AtodError, match=r"at most 128 tokens.*--model\.max-context 128"):
        RemoteTeacher(url, STUDENT, max_context=129)
    # vLLM and SGLang want room for one token behind the prompt.
    for answer, models in DIALECTS:
        with FakeTeacher(answer, models) as fake:
            RemoteTeacher(fake.url, STUDENT, max_context=4095)
            with pytest.raises(AtodError, match=r"at most 4095 tokens.*can have 4096"):
                RemoteTeacher(fake.url, STUDENT, max_context=4096)


def test_a_sequence_of_full_length_is_scored(url: str, teacher: Policy) -> None:
    ids = tuple(8 + i % 90 for i in range(TINY.max_positions))
    tokens = TokenizedTurn(ids[:1], ids[1:], (0.0,) * (len(ids) - 1), "stop", False)
    turn = Turn(0, (), "", "", 0.0, True, tokens)
    record = Trajectory(0, "t", "k", (turn,), True, False, "terminated", True, 1.0)
    batch = make_batch([record], 0)
    found = RemoteTeacher(url, STUDENT, max_context=len(ids)).score(batch)
    expected = LocalTeacher(teacher, STUDENT).score(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters_beside_their_base_are_refused() -> None:
    adapter = {"id": "tuned", "object": "model", "root": "/a", "parent": "big"}
    other_name = {**VLLM_MODELS[0], "id": "large", "root": "/m"}
    with FakeTeacher(vllm_answer, [{**VLLM_MODELS[0], "root": "/m"}, other_name]) as fake:
        assert RemoteTeacher(fake.url, STUDENT, max_context=4095).name == "big"
        fake.models.append(adapter)
        with pytest.raises(AtodError, match=r"several models .big, large, tuned.*Merge"):
            RemoteTeacher(fake.url, STUDENT)


@pytest.mark.slow
def test_a_server_that_is_restarted_is_waited_for(
    teacher: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher.save(tmp_path / "t")
    batch = random_batch(sequences=30)
    monkeypatch.setattr(remote_teacher, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(remote_teacher, "_PROMPTS_PER_REQUEST", 2)
    with served(tmp_path / "t") as (address, process):
        remote = RemoteTeacher(address, STUDENT)
        process.kill()
        process.wait()
        with monkeypatch.context() as patch:
            patch.setattr(remote_teacher, "PATIENCE", 1.0)
            with pytest.raises(ServerError, match=r"too long .more than 1 s.*refused.*serve-teach"):
                remote.score(batch)
        capsys.readouterr()
        with ThreadPoolExecutor(1) as thread:
            scores = thread.submit(remote.score, batch)
            with served(tmp_path / "t", port=int(address.rpartition(":")[2])):
                found = scores.result(timeout=60)
    expected = LocalTeacher(teacher, STUDENT).score(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    [line] = re.findall("waiting.*", capsys.readouterr().err)
    assert re.match(rf"waiting until \d\d:\d\d:\d\d for the teacher's server: POST {address}", line)


# -- answers as vLLM and SGLang publish them -----------------------------------------------------


def vllm_answer(path: str, body: dict[str, Any]) -> Any:
    """The form of vLLM's answers; log-prob of a token: minus its id over 100."""
    if path == "/detokenize":
        return {"prompt": STUDENT.tokenizer.decode(body["tokens"])}
    assert path == "/v1/completions"
    assert (body["prompt_logprobs"], body["max_tokens"], body["model"]) == (0, 1, "big")
    assert "echo" not in body
    choices = []
    for index, ids in enumerate(body["prompt"]):
        entries: list[Any] = [None]
        for token in ids[1:]:
            text = STUDENT.tokenizer.decode([token])
            entries.append(
                {
                    # The most likely token may come next to the prompt's.
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


def _sglang(path: str, body: dict[str, Any]) -> Any:
    """The form of SGLang's answers; log-prob of a token: minus its id over 100."""
    if path == "/detokenize":
        return {"text": STUDENT.tokenizer.decode(body["tokens"])}
    assert path == "/generate"
    assert body["return_logprob"] is True
    ids, first = body["input_ids"], body["logprob_start_len"]
    entries = [[-i / 100, i, None] for i in ids[first:]]
    entries[0][0] = None
    return {
        "text": "", "output_ids": [], "meta_info": {
            "id": "5d4f", "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids), "weight_version": "default", "completion_tokens": 0,
            "input_token_logprobs": entries, "output_token_logprobs": [], "e2e_latency": 0.01,
        },
    }  # fmt: skip


def expected_scores(batch: Any) -> torch.Tensor:
    return torch.where(batch.completion_mask, -batch.completion_ids / 100, 0.0)


VLLM_MODELS = [{"id": "big", "object": "model", "owned_by": "vllm", "max_model_len": 4096}]
SGLANG_MODELS = [{**VLLM_MODELS[0], "owned_by": "sglang"}]
DIALECTS = ((vllm_answer, VLLM_MODELS), (_sglang, SGLANG_MODELS))


def test_published_form_of_completions() -> None:
    batch = random_batch(sequences=9, seed=3)
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT, max_context=4095)
        fake.posts.clear()
        torch.testing.assert_close(remote.score(batch), expected_scores(batch))
        assert [len(body["prompt"]) for _, body in fake.posts] == [9]


def test_published_form_of_sglang() -> None:
    batch = random_batch(sequences=5, seed=3)
    with FakeTeacher(_sglang, SGLANG_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.posts.clear()
        torch.testing.assert_close(remote.score(batch), expected_scores(batch))
        # Prompts before the first completion are not scored.
        first = {int(batch.start[batch.sequence_index == s].min()) for s in range(5)}
        assert {body["logprob_start_len"] + 1 for _, body in fake.posts} == first
        assert len(fake.posts) == 5


def test_after_a_refusal_the_rest_is_not_tried() -> None:
    with FakeTeacher(_sglang, SGLANG_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.posts.clear()
        fake.mishaps.extend([400] * 200)
        with pytest.raises(ServerError, match="400"):
            remote.score(random_batch(sequences=40))
        assert len(fake.posts) <= 8


def test_a_server_without_the_endpoint_is_named() -> None:
    def absent(path: str, body: Any) -> Any:
        return 404, {"detail": "Not Found"}

    for models in (VLLM_MODELS, SGLANG_MODELS):
        with (
            FakeTeacher(absent, models) as fake,
            pytest.raises(ServerError, match=r"404 .*right URL.*serve-teacher"),
        ):
            RemoteTeacher(fake.url, STUDENT)


@pytest.mark.parametrize("models", [3, "big", None, [], [3], [{"object": "model"}]])
def test_an_unusable_list_of_models(models: Any) -> None:
    with (
        FakeTeacher(vllm_answer, {} if models is None else models) as fake,
        pytest.raises(AtodError, match="lists no model"),
    ):
        RemoteTeacher(fake.url, STUDENT)


@pytest.mark.parametrize("models", [VLLM_MODELS, SGLANG_MODELS])
def test_an_endpoint_without_logprobs_is_refused(models: Any) -> None:
    def silent(path: str, body: Any) -> Any:
        if path == "/detokenize":
            return 404, {"detail": "Not Found"}
        if path == "/generate":
            return {"text": "x", "meta_info": {"prompt_tokens": 3}}
        return {"choices": [{"index": i, "text": "x"} for i in range(len(body["prompt"]))]}

    with (
        FakeTeacher(silent, models) as fake,
        pytest.raises(ServerError, match=r"no usable log-probs.*serve-teacher"),
    ):
        RemoteTeacher(fake.url, STUDENT)


@pytest.mark.parametrize("absent", [(404, {"detail": "Not Found"}), (501, {}), {"tokens": []}])
def test_an_endpoint_without_texts_gives_a_warning(absent: Any) -> None:
    def wordless(path: str, body: Any) -> Any:
        return absent if path == "/detokenize" else _sglang(path, body)

    with (
        FakeTeacher(wordless, SGLANG_MODELS) as fake,
        pytest.warns(UserWarning, match="could not be compared"),
    ):
        RemoteTeacher(fake.url, STUDENT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("mug", "cup"), "1 of .* is 'mug' for the student and 'cup' for"),
        (lambda text: text.replace(EOS, ""), f"1 of .* is '{EOS}' for the student and none for"),
        # Versions of tokenizers differ in the spaces around tokens.
        (lambda text: f" {text} ", ""),
        (lambda text: text.replace(" ", "  "), ""),
    ],
)
@pytest.mark.parametrize(("answer", "models"), DIALECTS)
def test_texts_of_ids_are_compared(
    change: Callable[[str], str], message: str, answer: Any, models: Any
) -> None:
    def changed(path: str, body: Any) -> Any:
        found = answer(path, body)
        return {k: change(v) for k, v in found.items()} if path == "/detokenize" else found

    with FakeTeacher(changed, models) as fake:
        if not message:
            RemoteTeacher(fake.url, STUDENT)
            return
        with pytest.raises(AtodError, match=message):
            RemoteTeacher(fake.url, STUDENT)


@pytest.mark.slow
def test_one_of_many_texts_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_IDS_AT_ONCE", 100)
    words = build_word_tokenizer([" ".join(f"w{i}" for i in range(3000))])
    student = build_policy(TINY, words, 0)

    def answer(path: str, body: Any) -> Any:
        if path == "/detokenize":
            return {"prompt": str(words.decode(body["tokens"])).replace("w2001", "v2001")}
        return vllm_answer(path, body)

    with (
        FakeTeacher(answer, VLLM_MODELS) as fake,
        pytest.raises(AtodError, match=r": 1 of 3\d\d\d .*'w2001' for .* and 'v2001' for"),
    ):
        RemoteTeacher(fake.url, student)


def test_of_many_differing_texts_some_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_MOST_ALONE", 20)

    def answer(path: str, body: Any) -> Any:
        return {"prompt": "x"} if path == "/detokenize" else vllm_answer(path, body)

    with FakeTeacher(answer, VLLM_MODELS) as fake:
        with pytest.raises(AtodError, match=r"\d of \d\d tokens"):
            RemoteTeacher(fake.url, STUDENT)
        alone = [body["tokens"][0] for path, body in fake.posts if len(body.get("tokens", "")) == 1]
        added = STUDENT.tokenizer.added_tokens_decoder
        assert added.keys() <= set(alone)
        assert len(alone) <= 21 + len(added)


@pytest.mark.parametrize("lowest", [float("-inf"), -9999.0, -1e300])
def test_impossible_tokens_have_finite_logprobs(lowest: float) -> None:
    def answer(path: str, body: Any) -> Any:
        found = _sglang(path, body)
        found["meta_info"]["input_token_logprobs"][-1][0] = lowest
        return found

    with FakeTeacher(_sglang, SGLANG_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.answer = answer
        batch = random_batch(sequences=2, seed=4)
        assert remote.score(batch).min() == -9999.0


def _broken(how: str) -> Any:
    def answer(path: str, body: Any) -> Any:
        found = vllm_answer(path, body)
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
    with FakeTeacher(vllm_answer, VLLM_MODELS) as fake:
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
    with FakeTeacher(_sglang, SGLANG_MODELS) as fake:
        remote = RemoteTeacher(fake.url, STUDENT)
        fake.answer = lambda path, body: {"text": "", "meta_info": meta}
        with pytest.raises(ServerError, match=f"{fake.url}/generate.*no usable"):
            remote.score(random_batch(seed=5))


def test_wrong_urls_are_named() -> None:
    with pytest.raises(AtodError, match="looks like http"):
        RemoteTeacher("ftp://x", STUDENT)
