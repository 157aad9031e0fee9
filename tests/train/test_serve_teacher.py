"""The teacher's server: what it answers, what it refuses, and a run that learns from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from curl_lines import curl_lines, listed_paths
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_fuzz import fuzz_api
from served_teacher import served
from test_policy import make_policy
from test_trainer import CONFIG
from test_trainer import _numbers as numbers

from atod_train import doctor
from atod_train.cli import main
from atod_train.config import StartConfig, StudyConfig
from atod_train.files import read_json
from atod_train.models.policy import build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.study import run_study
from atod_train.teachers.server import ServedTeacher, create_app
from atod_train.training.supervised import demonstrate, demonstration_texts

TEACHER = make_policy(1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "teacher"
    TEACHER.save(folder)
    with served(folder, "--max-context", "100", "--tokens-per-microbatch", "64") as (address, _):
        yield address


def _expected(ids: list[int]) -> list[float]:
    logits = TEACHER.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found: list[float] = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def _complete(url: str, **body: Any) -> requests.Response:
    body = {"prompt_logprobs": 0, "max_tokens": 1, **body}
    return requests.post(f"{url}/v1/completions", json=body, timeout=60)


def test_completions(url: str) -> None:
    prompts = [[8, 9, 10], [11], [12, 9, 8, 10, 30]]
    answer = _complete(url, prompt=prompts, model="teacher").json()
    assert answer["usage"]["prompt_tokens"] == 9
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for token, logprob, entry in zip(ids[1:], _expected(ids), others, strict=True):
            assert list(entry) == [str(token)]
            assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-5)
            text = TEACHER.tokenizer.decode([token])
            assert entry[str(token)]["decoded_token"] == text
    [one] = _complete(url, prompt=prompts[0]).json()["choices"]
    for alone, among in zip(
        one["prompt_logprobs"][1:], answer["choices"][0]["prompt_logprobs"][1:], strict=True
    ):
        assert list(alone) == list(among)
        for token, entry in alone.items():
            # What else is in a batch may change the last digit.
            assert entry == {**among[token], "logprob": pytest.approx(among[token]["logprob"])}
    text = _complete(url, prompt="take mug").json()["choices"][0]["prompt_logprobs"]
    assert [next(iter(e.values()))["decoded_token"] for e in text[1:]] == ["mug"]


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_likely_tokens_beside_the_prompts_own(top: int, url: str) -> None:
    prompts = [[8, 9, 10], [11], [12, 9, 8, 10, 30] * 18]
    answer = _complete(url, prompt=prompts, prompt_logprobs=top).json()
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        with torch.no_grad():
            logits = TEACHER.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for own, scores, entry in zip(ids[1:], logits, choice["prompt_logprobs"][1:], strict=True):
            best = scores.topk(top)
            assert next(iter(entry)) == str(own)
            assert entry.keys() == {str(own), *map(str, best.indices.tolist())}
            for token, said in entry.items():
                assert said["logprob"] == pytest.approx(float(scores[int(token)]), abs=1e-5)
                assert said["rank"] == 1 + int((scores > scores[int(token)]).sum())
                assert said["decoded_token"] == TEACHER.tokenizer.decode([int(token)])


def test_prompts_of_one_token(url: str) -> None:
    choices = _complete(url, prompt=[[8], [9]]).json()["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [[None], [None]]


@pytest.mark.parametrize("start", [-1, 0, 2, 4, 50])
def test_generate(start: int, url: str) -> None:
    ids = [12, 9, 8, 10, 30]
    body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": start,
            "sampling_params": {"max_new_tokens": 0}}  # fmt: skip
    one = requests.post(f"{url}/generate", json=body, timeout=60).json()
    begin = 4 if start in (-1, 50) else start
    first, *others = one["meta_info"]["input_token_logprobs"]
    assert first == [None, ids[begin], None]
    assert [entry[1] for entry in others] == ids[begin + 1 :]
    assert [entry[0] for entry in others] == pytest.approx(_expected(ids)[begin:], abs=1e-5)
    two = requests.post(f"{url}/generate", json={**body, "input_ids": [ids, ids]}, timeout=60)
    assert two.json() == [one, one]
    each = {**body, "input_ids": [ids, ids], "logprob_start_len": [3, start]}
    first, second = requests.post(f"{url}/generate", json=each, timeout=60).json()
    assert [entry[1] for entry in first["meta_info"]["input_token_logprobs"]] == ids[3:]
    assert second == one


def test_who_it_is(url: str) -> None:
    [model] = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    # A prompt of 100 tokens and the one that could follow it.
    assert (model["id"], model["max_model_len"]) == ("teacher", 101)
    assert _complete(url, prompt=[8] * 100).status_code == 200
    assert requests.get(f"{url}/get_model_info", timeout=60).json()["model_path"] == "teacher"
    assert doctor.reach(url) == doctor.Finding("ok", f"{url}: teacher")


def test_doctor_takes_a_url_as_teacher(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--student", "micro", "--teacher", url]) == 0
    assert f"{url}: teacher" in capsys.readouterr().out


def test_many_clients_at_once(url: str) -> None:
    prompts = [[8 + i % 7, 9, 10 + i % 5, 30] for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda ids: _complete(url, prompt=ids).json(), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        found = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], entries, strict=True)]
        assert found == pytest.approx(_expected(ids), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": [1], "model": "gpt"}, 404, "has the model 'teacher' only"),
        ({"prompt": [1], "prompt_logprobs": None}, 422, "prompt_logprobs 0 to 20"),
        ({"prompt": [1], "prompt_logprobs": 21}, 422, "prompt_logprobs 0 to 20"),
        ({"prompt": [1], "prompt_logprobs": -1}, 422, "prompt_logprobs 0 to 20"),
        ({"prompt": [1], "prompt_logprobs": True}, 422, "$.prompt_logprobs"),
        ({"prompt": [1], "max_tokens": -5}, 422, "max_tokens 0 or 1"),
        ({"prompt": [1], "n": 2}, 422, "n 1"),
        ({"prompt": [1], "echo": True}, 422, "echo is not offered"),
        ({"prompt": [1], "logprobs": 3}, 422, "logprobs is not offered"),
        ({"prompt": [1], "max_tokens": 5}, 422, "max_tokens 0 or 1"),
        ({"prompt": [1], "max_tokens": None}, 422, "max_tokens 0 or 1"),
        ({"prompt": [1], "max_tokens": "1"}, 422, "$.max_tokens"),
        ({"prompt": [1], "stream": True}, 422, "stream is not offered"),
        ({}, 422, "`prompt`"),
        ({"prompt": []}, 422, "1 to 1024"),
        ({"prompt": [[]]}, 422, "not empty"),
        ({"prompt": [[1], [1.5]]}, 422, "$.prompt[1][0]"),
        ({"prompt": [True]}, 422, "$.prompt[0]"),
        ({"prompt": [1, "x"]}, 422, "text or a list"),
        ({"prompt": [1], "truncate_prompt_tokens": 1}, 422, "truncate_prompt_tokens is not"),
        ({"prompt": [[1, 10_000]]}, 422, "10000 is out of vocabulary"),
        ({"prompt": [-1]}, 422, "out of vocabulary"),
        ({"prompt": [1] * 101}, 422, "101 tokens; at most 100"),
        ({"prompt": ""}, 422, "not empty"),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, message: str, url: str) -> None:
    answer = _complete(url, **body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


SCORED = {"input_ids": [1], "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}


def test_what_generate_refuses(url: str) -> None:
    for body, message in (
        ({"input_ids": [1], "return_logprob": True}, "max_new_tokens 0 or 1"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}, "Send return_logprob"),
        ({"sampling_params": 3}, "$.sampling_params"),
        ({**SCORED, "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens 0 or 1"),
        ({**SCORED, "top_logprobs_num": 2}, "top_logprobs_num is not offered"),
        ({**SCORED, "logprob_start_len": [0, 0]}, "one number, or one each"),
        ({**SCORED, "logprob_start_len": [0.5]}, "$.logprob_start_len[0]"),
    ):
        answer = requests.post(f"{url}/generate", json=body, timeout=60)
        assert answer.status_code == 422
        assert message in answer.json()["error"]["message"]
    assert requests.post(f"{url}/generate", data=b"{", timeout=60).status_code == 422
    assert requests.get(f"{url}/v1/nothing", timeout=60).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "model", "max_tokens", "prompt_logprobs", "n", "stream", "input_ids", "text",
         "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "echo",
         "logprobs")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(["v1/completions", "generate"]), data=st.data())
def test_no_body_breaks_it(path: str, data: st.DataObject, url: str) -> None:
    valid: dict[str, Any] = {"prompt": [8, 9], "max_tokens": 1, "prompt_logprobs": 0,
                             "input_ids": [8, 9], "return_logprob": True,
                             "sampling_params": {"max_new_tokens": 0}}  # fmt: skip
    changes = data.draw(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
    body = data.draw(st.just({**valid, **changes}) | JSON)
    # `requests` itself would refuse to send infinite numbers.
    content = json.dumps(body).encode("ascii")
    assert requests.post(f"{url}/{path}", data=content, timeout=60).status_code in (200, 404, 422)


def test_it_answers_as_it_says() -> None:
    scored = {
        "POST /v1/completions": {"prompt": [[8, 9, 10], [11]], "max_tokens": 1},
        "POST /generate": {**SCORED, "input_ids": [8, 9]},
    }
    places = cycle(range(2))

    def prepare(case: Any) -> None:
        """Makes every second request one that can be scored."""
        wanted = scored.get(case.operation.label)
        if wanted is not None and next(places):
            case.body = {**wanted, "prompt_logprobs": 2}

    app = create_app(ServedTeacher(TEACHER, 100, 64))
    # What only the model can refuse is no part of the schema, such as ids out of its vocabulary.
    seen = fuzz_api(app, 15, prepare, are_schemas_exact=False)
    for label in scored:
        statuses = {status for found, status in seen if found == label}
        assert {200, 422} <= statuses <= {200, 404, 422}
    assert seen["GET /v1/models", 200] == seen["GET /health", 200] == 1


def test_the_guide_names_the_endpoints_and_its_calls_work(url: str) -> None:
    described = set(requests.get(f"{url}/openapi.json", timeout=60).json()["paths"])
    assert listed_paths("Teacher") == described - {"/", "/health", "/metrics", "/openapi.json"}
    for method, path, body in curl_lines("Teacher"):
        assert requests.request(method, f"{url}{path}", data=body, timeout=60).status_code == 200


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main(["serve-teacher", str(tmp_path / "absent")]) == 2
    assert "Cannot load a causal language model" in capsys.readouterr().err
    TEACHER.save(tmp_path / "t")
    port = url.rpartition(":")[2]
    assert main(["serve-teacher", str(tmp_path / "t"), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_missing_libraries_are_named() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from atod_train.cli import main; sys.exit(main(['serve-teacher', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'atod-gym[servers]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("api", ["completions", "sglang"])
def test_a_run_is_that_of_the_same_teacher_here(api: str, tmp_path: Path) -> None:
    os.environ["ATOD_CACHE"] = str(tmp_path / "cache")
    pool = EnvPool(CONFIG.env, "train")
    tokenizer = build_word_tokenizer(demonstration_texts(demonstrate(pool, 10, 0.0, 0)))
    for seed, role in enumerate(("student", "teacher")):
        build_policy("micro", tokenizer, seed).save(tmp_path / role)
    model = replace(CONFIG.model, student=str(tmp_path / "student"), teacher_api=api)  # type: ignore[arg-type]
    train = replace(CONFIG.train, steps=2, eval_every=0)
    teacher = replace(model, teacher=str(tmp_path / "teacher"))
    here = replace(CONFIG, model=teacher, start=StartConfig(), train=train)
    run_study(here, tmp_path / "here")
    with served(tmp_path / "teacher") as (address, _):
        run_study(replace(here, model=replace(model, teacher=address)), tmp_path / "there")
    found, expected = (numbers(tmp_path / name / "atod-seed0") for name in ("there", "here"))
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            assert value == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name
    # A server that comes back at another address goes on with the run.
    summary = tmp_path / "there" / "atod-seed0" / "summary.json"
    summary.unlink()
    with served(tmp_path / "teacher") as (moved, _):
        assert moved != address
        model = replace(model, teacher=moved)
        longer = replace(here, model=model, train=replace(train, steps=3))
        run_study(replace(longer, study=StudyConfig(resume=True)), tmp_path / "there")
    assert len(numbers(tmp_path / "there" / "atod-seed0")) == 3
    manifest = read_json(tmp_path / "there" / "atod-seed0" / "manifest.json")
    assert manifest["parameters"]["teacher"] is None
