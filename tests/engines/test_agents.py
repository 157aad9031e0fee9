"""`atod-eval --agent chat` against a real vLLM server; grammars of the server force the replies."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from served_vllm import ServedVllm, served_vllm

from atod_gym.parsing import CompletionFormat
from atod_train.evaluation.agents import Completion, EpisodeStopped
from atod_train.evaluation.chat import ChatEndpoint
from atod_train.evaluation.eval_cli import main
from atod_train.evaluation.eval_options import ChatSettings, Sampling
from atod_train.evaluation.eval_records import EpisodeRecord, EvaluationFolder

TAGS = CompletionFormat("tags")
ALFWORLD = ("atod/ALFWorld-v0", "--split", "valid_seen", "--option", "house_size=tiny")
HOME = ("--hide-admissible", "--max-turns", "2")
CONTEXT = 2048


@pytest.fixture(scope="module")
def thinking(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that gives thoughts next to the text; the last test of this file ends it."""
    with served_vllm(
        smollm2_folder,
        tmp_path_factory.mktemp("thinking") / "server.log",
        *("--reasoning-parser", "qwen3"),
        *("--structured-outputs-config", '{"enable_in_reasoning": true}'),
    ) as served:
        yield served


def forced(text: str, **more: Any) -> str:
    """Fields of a request that make the model say this text."""
    return json.dumps({"structured_outputs": {"regex": re.escape(text)}, **more})


def evaluate(served: ServedVllm, out: Path, *options: str) -> int:
    return main(
        [
            *options, "--agent", "chat", "--model", "smollm2", "--base-url", f"{served.url}/v1",
            "--data", "generated", "--temperature", "0", "--transcripts", "--out", str(out),
        ]
    )  # fmt: skip


def episodes(out: Path) -> list[dict[str, Any]]:
    lines = (out / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def task(episode: dict[str, Any]) -> str:
    return str(episode["task_id"])


def totals(out: Path) -> Any:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))["totals"]


def counted(served: ServedVllm) -> tuple[int, ...]:
    """What the server has counted: tokens of prompts and of completions."""
    text = requests.get(f"{served.url}/metrics", timeout=60).text
    names = ("prompt_tokens_total", "generation_tokens_total")
    found = [re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE) for name in names]
    return tuple(int(float(match[1])) for match in found if match)


def ask(
    served: ServedVllm, words: int = 1, max_tokens: int | None = None, **more: Any
) -> Completion:
    async def run() -> Completion:
        url = f"{served.url}/v1"
        endpoint = ChatEndpoint(ChatSettings("smollm2", url, **more), Sampling(0.0, max_tokens))
        try:
            return await endpoint.complete([{"role": "user", "content": "one " * words}], TAGS)
        finally:
            await endpoint.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("env", "reply", "turns"),
    [
        ((*ALFWORLD, *HOME), "<think>I look.</think><action>look</action>", 2),
        (("atod/WebShop-v0", "--split", "test", "--max-turns", "2"),
         "<action>search[red cup]</action>", 2),
        (("atod/SearchQA-v0", "--split", "dev"), "<answer>Paris</answer>", 1),
    ],
)  # fmt: skip
def test_every_environment_is_played(
    vllm_server: ServedVllm, tmp_path: Path, env: tuple[str, ...], reply: str, turns: int
) -> None:
    before = counted(vllm_server)
    # The stop strings of the environment's tags end a model that would play on.
    options = ("--tasks", "3", "--concurrency", "3", "--extra-body", forced(f"{reply} And on"))
    assert evaluate(vllm_server, tmp_path, *env, *options) == 0
    played = episodes(tmp_path)
    assert [episode["turns"] for episode in played] == [turns] * 3
    said = [turn for episode in played for turn in episode["transcript"]]
    assert {turn["completion"] for turn in said} == {reply}
    assert not any(turn["parse_error"] for turn in said)
    sums = totals(tmp_path)
    after = (sums["prompt_tokens"], sums["completion_tokens"])
    assert tuple(b - a for a, b in zip(before, counted(vllm_server), strict=True)) == after


def test_the_same_model_here_plays_the_same(vllm_server: ServedVllm, tmp_path: Path) -> None:
    options = (*ALFWORLD, *HOME, "--tasks", "2", "--max-tokens", "24")
    assert evaluate(vllm_server, tmp_path / "served", *options) == 0
    here = ("--agent", "smollm2", "--data", "generated", "--transcripts", "--out")
    assert main([*options, *here, str(tmp_path / "here")]) == 0
    played = [episodes(tmp_path / name) for name in ("served", "here")]
    for served, local in zip(*(sorted(part, key=task) for part in played), strict=True):
        assert served["transcript"] == local["transcript"]
        assert served["prompt_tokens"] == local["prompt_tokens"]


def test_a_model_that_never_stops(
    vllm_server: ServedVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = ("--extra-body", '{"ignore_eos": true}')
    options = ("--tasks", "2", "--max-tokens", "8", *endless)
    assert evaluate(vllm_server, tmp_path, *ALFWORLD, *HOME, *options) == 0
    assert totals(tmp_path)["completion_tokens"] == 4 * 8
    assert "completions cut by the limit of 8 tokens (--max-tokens): 4" in capsys.readouterr().out
    # The default limit leaves prompts the whole context.
    said = ask(vllm_server, words=1990, extra_body='{"ignore_eos": true}')
    assert said.is_cut
    assert (said.prompt_tokens or 0) + (said.completion_tokens or 0) == CONTEXT
    with pytest.raises(EpisodeStopped, match="maximum context length is 2048") as stop:
        ask(vllm_server, words=CONTEXT)
    assert stop.value.reason == "context_limit"


def test_reasoning_beside_the_text(thinking: ServedVllm, tmp_path: Path) -> None:
    thought, action = "not <action>go</action>", "<action>look</action>"
    body = forced(f"<think>{thought}</think>{action} And on")
    assert evaluate(thinking, tmp_path, *ALFWORLD, *HOME, "--tasks", "1", "--extra-body", body) == 0
    [episode] = episodes(tmp_path)
    assert episode["invalid_turns"] == 0
    assert 0 < episode["reasoning_tokens"] < episode["completion_tokens"]
    for turn in episode["transcript"]:
        # The stop string in the thought ended no turn.
        assert (turn["reasoning"], turn["completion"]) == (thought, action)
    kept = ask(thinking, extra_body=body, keep_reasoning=True)
    assert kept.text == f"<think>{thought}</think>{action}"
    # The parser takes a text without thoughts for one.
    assert ask(thinking, extra_body=forced(action)).instead == "reasoning alone"
    assert ask(thinking, max_tokens=3).instead == "cut at the limit of tokens"


def test_a_server_that_is_killed(
    thinking: ServedVllm,
    vllm_server: ServedVllm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add = EvaluationFolder.add

    def added(folder: EvaluationFolder, record: EpisodeRecord) -> None:
        add(folder, record)
        if len(folder.records) == 2:
            thinking.kill()

    options = ("--tasks", "6", "--concurrency", "2", "--max-tokens", "8", "--retries", "1")
    with monkeypatch.context() as patched:
        patched.setattr(EvaluationFolder, "add", added)
        assert evaluate(thinking, tmp_path, *ALFWORLD, *HOME, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "That was attempt 2. 2 of 6 tasks are kept in" in error
    assert error.endswith("--resume")
    kept = episodes(tmp_path)
    # Another server continues, since results do not depend on the address.
    assert evaluate(vllm_server, tmp_path, *ALFWORLD, *HOME, *options, "--resume") == 0
    assert episodes(tmp_path)[:2] == kept
    assert len({episode["task_id"] for episode in episodes(tmp_path)}) == 6
