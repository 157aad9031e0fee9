"""The teacher's server: what it answers, what it refuses, and a run that learns from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from curl_lines import curl_lines, listed_paths
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_fuzz import fuzz_api
from served_teacher import served
from starlette.testclient import TestClient
from test_policy import make_policy
from test_trainer import CONFIG
from test_trainer import _numbers as numbers

from atod_gym.errors import ServerError
from atod_train import doctor
from atod_train.algorithm.atod import MIN_DISAGREEMENT
from atod_train.algorithm.methods import LOW_PRECISION_DISAGREEMENT
from atod_train.cli import main
from atod_train.config import StartConfig
from atod_train.files import read_json
from atod_train.models.from_scratch import build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.study import train_one
from atod_train.teachers import remote, server
from atod_train.teachers.server import ServedTeacher, create_app
from atod_train.training.checkpoint import load_latest
from atod_train.training.supervised import demonstrate, demonstration_texts
from atod_train.training.trainer import Trainer

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


@pytest.mark.slow
def test_completions(url: str) -> None:
    prompts = [[8, 9, 10], [11], [12, 9, 8, 10, 30], [8, 9, 10]]
    answer = _complete(url, prompt=prompts, model="teacher", temperature=1.0).json()
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for token, logprob, entry in zip(ids[1:], _expected(ids), others, strict=True):
            assert entry == {str(token): {"logprob": pytest.approx(logprob, abs=1e-5)}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_rounding_follows_the_precision_that_the_server_states(
    dtype: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: the server of others, such as vLLM; its precision is not known."""
    get = remote.JsonClient.get

    def answer(client: Any, path: str) -> Any:
        found = get(client, path)
        if path == "/health":
            assert found["dtype"] == "float32"  # of a processor
            return found | {"dtype": dtype}
        return found

    monkeypatch.setattr(remote.JsonClient, "get", answer)
    student = make_policy(0)
    teacher = remote.RemoteTeacher(url, student)
    asked = SimpleNamespace(student=student, teacher=teacher)
    expected = MIN_DISAGREEMENT if dtype == "float32" else LOW_PRECISION_DISAGREEMENT
    assert Trainer._rounding(asked) == expected  # type: ignore[arg-type]
    asked.student = replace(student, autocast_dtype=torch.bfloat16)
    assert Trainer._rounding(asked) == LOW_PRECISION_DISAGREEMENT  # type: ignore[arg-type]


def test_prompts_of_one_token(url: str) -> None:
    choices = _complete(url, prompt=[[8], [9]]).json()["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [[None], [None]]


def test_who_it_is(url: str) -> None:
    [model] = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    # A prompt of 100 tokens and the one that could follow it.
    assert (model["id"], model["max_model_len"]) == ("teacher", 101)
    assert _complete(url, prompt=[[8] * 100]).status_code == 200
    vocabulary = requests.get(f"{url}/vocabulary", timeout=60).json()["ids"]
    assert vocabulary == TEACHER.tokenizer.get_vocab()
    assert doctor.reach(url) == doctor.Finding("ok", f"{url}: teacher")


def test_doctor_takes_a_url_as_teacher(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--student", "micro", "--teacher", url]) == 0
    assert f"teacher teacher on the server {url}\n" in capsys.readouterr().out


def test_many_clients_at_once(url: str) -> None:
    prompts = [[8 + i % 7, 9, 10 + i % 5, 30] for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda ids: _complete(url, prompt=[ids]).json(), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        found = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], entries, strict=True)]
        assert found == pytest.approx(_expected(ids), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": [[1]], "model": "gpt"}, 404, "has the model 'teacher' only"),
        ({"prompt": [[1]], "prompt_logprobs": None}, 422, "$.prompt_logprobs"),
        ({"prompt": [[1]], "prompt_logprobs": 1}, 422, "$.prompt_logprobs"),
        ({"prompt": [[1]], "prompt_logprobs": True}, 422, "$.prompt_logprobs"),
        ({"prompt": [[1]], "max_tokens": 5}, 422, "$.max_tokens"),
        ({"prompt": [[1]], "max_tokens": None}, 422, "$.max_tokens"),
        ({"prompt": [[1]], "max_tokens": "1"}, 422, "$.max_tokens"),
        ({"prompt": [[1]], "n": 2}, 422, "`n`"),
        ({"prompt": [[1]], "echo": True}, 422, "`echo`"),
        ({"prompt": [[1]], "stream": True}, 422, "`stream`"),
        ({"prompt": [[1]], "truncate_prompt_tokens": 1}, 422, "`truncate_prompt_tokens`"),
        ({}, 422, "`prompt`"),
        ({"prompt": "take mug"}, 422, "$.prompt"),
        ({"prompt": []}, 422, "length >= 1"),
        ({"prompt": [[1]] * 1025}, 422, "length <= 1024"),
        ({"prompt": [[]]}, 422, "$.prompt[0]"),
        ({"prompt": [[1], [1.5]]}, 422, "$.prompt[1][0]"),
        ({"prompt": [[True]]}, 422, "$.prompt[0][0]"),
        ({"prompt": [1]}, 422, "$.prompt[0]"),
        ({"prompt": [[-1]]}, 422, "$.prompt[0][0]"),
        ({"prompt": [[10**30]]}, 422, "$.prompt[0][0]"),
        ({"prompt": [[1, 10_000], [2]]}, 422, "10000 is out of vocabulary, which has 109 ids"),
        ({"prompt": [[1] * 101]}, 422, "101 tokens; at most 100"),
        ({"prompt": [[1] * 100, *[[1]] * 1000]}, 413, "1001 prompts, padded to 100 tokens"),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, message: str, url: str) -> None:
    answer = _complete(url, **body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_bodies_that_are_too_large_or_no_json_are_refused(url: str) -> None:
    where = f"{url}/v1/completions"
    assert requests.post(where, data=b"{", timeout=60).status_code == 422
    assert requests.post(where, data=b"[" * 100_000, timeout=60).status_code == 422
    huge = b'{"prompt": [[' + b"1," * 8 * 2**20
    answer = requests.post(where, data=huge, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    long = b'{"prompt_logprobs": 0, "max_tokens": 1, "prompt": [[' + b"1," * 3_000_000 + b"1]]}"
    answer = requests.post(where, data=long, timeout=60)
    assert "3000001 tokens; at most 100" in answer.json()["error"]["message"]
    assert requests.get(f"{url}/v1/nothing", timeout=60).status_code == 404
    foreign = {"Host": "evil.example"}
    assert requests.get(f"{url}/v1/models", headers=foreign, timeout=60).status_code == 403
    foreign = {"Origin": "http://evil.example"}
    assert requests.post(where, headers=foreign, data=b"{}", timeout=60).status_code == 403


def test_a_model_that_fails_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(create_app(ServedTeacher(TEACHER, 100, 64)), base_url="http://localhost")
    body = {"prompt": [[8, 9]], "prompt_logprobs": 0, "max_tokens": 1}

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for scores, status, code in (
        (out_of_memory, 413, "out_of_memory"),
        (lambda *_: [[float("nan")]], 422, "not_a_number"),
    ):
        monkeypatch.setattr(server, "prompt_logprobs", scores)
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    monkeypatch.setattr(server, "prompt_logprobs", lambda *_: [[-math.inf]])
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_logprobs"] == [None, {"9": {"logprob": -9999.0}}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "model", "max_tokens", "prompt_logprobs", "temperature", "n")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_body_breaks_it(data: st.DataObject, url: str) -> None:
    valid: dict[str, Any] = {"prompt": [[8, 9]], "max_tokens": 1, "prompt_logprobs": 0}
    changes = data.draw(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
    body = data.draw(st.just({**valid, **changes}) | JSON)
    # `requests` itself would refuse to send infinite numbers.
    content = json.dumps(body).encode("ascii")
    answer = requests.post(f"{url}/v1/completions", data=content, timeout=60)
    assert answer.status_code in (200, 404, 422)


def test_it_answers_as_it_says() -> None:
    places = cycle(range(2))

    def prepare(case: Any) -> None:
        """Makes every second request one that can be scored."""
        if case.operation.label == label and next(places):
            case.body = {"prompt": [[8, 9, 10], [11]], "max_tokens": 1, "prompt_logprobs": 0}

    label = "POST /v1/completions"
    app = create_app(ServedTeacher(TEACHER, 100, 64))
    # What only the model can refuse is no part of the schema, such as ids out of its vocabulary.
    seen = fuzz_api(app, 15, prepare, are_schemas_exact=False)
    statuses = {status for found, status in seen if found == label}
    assert {200, 422} <= statuses <= {200, 404, 422}
    assert seen["GET /v1/models", 200] == seen["GET /vocabulary", 200] == 1


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
    for option, value in (("--max-context", "-1"), ("--tokens-per-microbatch", "0")):
        assert main(["serve-teacher", str(tmp_path / "t"), option, value]) == 2
        assert f"{option} must be" in capsys.readouterr().err
    port = url.rpartition(":")[2]
    assert main(["serve-teacher", str(tmp_path / "t"), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_libraries_are_named() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from atod_train.cli import main; sys.exit(main(['serve-teacher', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'atod-gym[servers]'" in done.stderr
    assert "Traceback" not in done.stderr


def _kill_after(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    """Kills a server once a run has made some steps."""
    while not (run / "metrics.jsonl").exists() or len(numbers(run)) < step:
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_run_is_that_of_the_same_teacher_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.1)
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    pool = EnvPool(CONFIG.env, "train")
    tokenizer = build_word_tokenizer(demonstration_texts(demonstrate(pool, 10, 0.0, 0)))
    for seed, role in enumerate(("student", "teacher")):
        build_policy("micro", tokenizer, seed).save(tmp_path / role)
    model = replace(CONFIG.model, student=str(tmp_path / "student"))
    train = replace(CONFIG.train, steps=3, eval_every=0)
    teacher = replace(model, teacher=str(tmp_path / "teacher"))
    here = replace(CONFIG, model=teacher, start=StartConfig(), train=train)
    train_one(here, tmp_path / "here")
    run = tmp_path / "there" / "atod-seed0"
    with ThreadPoolExecutor(1) as thread, served(tmp_path / "teacher") as (address, process):

        def restart() -> None:
            _kill_after(1, run, process)
            with served(tmp_path / "teacher", port=int(address.rpartition(":")[2])):
                _kill_after(3, run, process)

        restarting = thread.submit(restart)
        train_one(replace(here, model=replace(model, teacher=address)), tmp_path / "there")
        restarting.result()
    assert "for the teacher's server" in capsys.readouterr().err
    expected = numbers(tmp_path / "here" / "atod-seed0")
    for row, wanted in zip(numbers(run), expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            assert value == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name
    # A run continues with a server that comes back at another address; if that one stays away, the
    # last finished step is saved.
    (run / "summary.json").unlink()
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    with ThreadPoolExecutor(1) as thread, served(tmp_path / "teacher") as (moved, process):
        assert moved != address
        model = replace(model, teacher=moved)
        longer = replace(here, model=model, train=replace(train, steps=500, save_every=500))
        killing = thread.submit(_kill_after, 5, run, process)
        with pytest.raises(ServerError, match="away for too long"):
            train_one(longer, tmp_path / "there", resume=True)
        killing.result()
    saved, _ = load_latest(run)
    assert saved is not None
    assert 5 <= saved.metadata["progress"]["step"] == len(numbers(run)) < 500
    manifest = read_json(run / "manifest.json")
    assert manifest["parameters"]["teacher"] is None
