"""`atod-train serve-teacher MODEL`: scores prompts for students on other machines.

It answers in the dialects that `remote_teacher` speaks: vLLM's completions with `prompt_logprobs`
and SGLang's `/generate` with `return_logprob`. Only prompts are scored; nothing is generated beyond
the one token that vLLM's contract asks for, and that one is left out of the answer's text.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from atod_gym.errors import AtodError
from atod_train.policy import Policy
from atod_train.pretrained import LoadOptions, load_policy
from atod_train.types import Batch
from env_servers import process
from env_servers.service import (
    ErrorResponder,
    JsonResponse,
    ServiceError,
    build_application,
    counter,
    metrics_response,
    program_version,
    read_json,
)

_MAX_PROMPTS = 1024
_MAX_BODY = 64 * 2**20


@dataclass(frozen=True)
class ServedTeacher:
    """What is served.

    Attributes:
        policy: the model.
        max_context: longest prompt, in tokens.
        tokens_per_microbatch: padded tokens that go through the model at once.
    """

    policy: Policy
    max_context: int
    tokens_per_microbatch: int


def create_app(teacher: ServedTeacher, token: str | None = None) -> Starlette:
    """The application; with a token, every request must carry it."""
    errors = ErrorResponder()
    return build_application(TeacherApi(teacher, errors).routes(), errors=errors, token=token)


class TeacherApi:
    """The handlers. One request after the other goes through the model, in a thread."""

    def __init__(self, teacher: ServedTeacher, errors: ErrorResponder) -> None:
        self._teacher = teacher
        self._errors = errors
        self._thread = ThreadPoolExecutor(1)
        self._requests = self._prompts = self._tokens = 0
        self._seconds = 0.0

    def routes(self) -> list[Route]:
        """The addresses of the API."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/get_model_info", self.model_info, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: as vLLM, for the log-probs of prompts."""
        body = _object(await read_json(request, _MAX_BODY))
        name = self._teacher.policy.name
        if body.get("model", name) != name:
            raise ServiceError(404, "no_such_model", f"This server has the model {name!r} only.")
        if body.get("prompt_logprobs") not in (0, 1):
            raise ServiceError(
                422, "no_prompt_logprobs", "Send prompt_logprobs 0 or 1: only prompts are scored."
            )
        if _whole_number(body, "max_tokens", 16) > 1 or _whole_number(body, "n", 1) != 1:
            raise ServiceError(422, "no_generation", "Send max_tokens 0 or 1, and n 1.")
        if body.get("stream"):
            raise ServiceError(422, "no_stream", "Answers are not streamed.")
        prompts = self._checked_prompts(body.get("prompt"))
        scored = await self._score(prompts)
        choices = [
            {
                "index": index,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": self._positions(ids, logprobs),
            }
            for index, (ids, logprobs) in enumerate(zip(prompts, scored, strict=True))
        ]
        count = sum(map(len, prompts))
        return JsonResponse(
            {
                "id": f"cmpl-{self._requests}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": name,
                "choices": choices,
                "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
            }
        )

    async def generate(self, request: Request) -> Response:
        """POST /generate: as SGLang, for the log-probs of prompts."""
        body = _object(await read_json(request, _MAX_BODY))
        sampling = _object(body.get("sampling_params") or {})
        if _whole_number(sampling, "max_new_tokens", 128) > 1:
            raise ServiceError(422, "no_generation", "Send sampling_params.max_new_tokens 0 or 1.")
        if body.get("return_logprob") is not True:
            raise ServiceError(422, "no_logprobs", "Send return_logprob: only prompts are scored.")
        given = body.get("input_ids", body.get("text"))
        is_single = isinstance(given, str) or (
            isinstance(given, list) and bool(given) and not isinstance(given[0], list | str)
        )
        prompts = self._checked_prompts(given)
        first = _whole_number(body, "logprob_start_len", -1)
        scored = await self._score(prompts)
        with_texts = body.get("return_text_in_logprobs") is True
        answers = [
            {
                "text": "",
                "meta_info": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": 0,
                    "finish_reason": {"type": "length", "length": 0},
                    "input_token_logprobs": self._entries(ids, logprobs, first, with_texts),
                    "output_token_logprobs": [],
                },
            }
            for ids, logprobs in zip(prompts, scored, strict=True)
        ]
        return JsonResponse(answers[0] if is_single else answers)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        model = {
            "id": self._teacher.policy.name,
            "object": "model",
            "owned_by": "atod",
            "max_model_len": self._teacher.max_context,
        }
        return JsonResponse({"object": "list", "data": [model]})

    async def model_info(self, request: Request) -> Response:
        """GET /get_model_info: as SGLang."""
        return JsonResponse({"model_path": self._teacher.policy.name, "is_generation": True})

    async def health(self, request: Request) -> Response:
        """GET /health: that the server is up, and what it serves."""
        policy = self._teacher.policy
        return JsonResponse(
            {
                "status": "ok",
                "service": "teacher",
                "version": program_version(),
                "pid": os.getpid(),
                "model": policy.name,
                "device": str(policy.device),
                "max_context": self._teacher.max_context,
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: counters in the Prometheus text format."""
        return metrics_response(
            [
                counter("teacher_requests_total", "Requests scored.", self._requests),
                counter("teacher_prompts_total", "Prompts in them.", self._prompts),
                counter("teacher_tokens_total", "Tokens in those.", self._tokens),
                counter("teacher_scoring_seconds_total", "Spent on them.", self._seconds),
                self._errors.metric("teacher_errors_total"),
            ]
        )

    async def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        scored, seconds = await loop.run_in_executor(self._thread, self._score_now, prompts)
        self._requests += 1
        self._prompts += len(prompts)
        self._tokens += sum(map(len, prompts))
        self._seconds += seconds
        return scored

    def _score_now(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[float]], float]:
        begun = time.perf_counter()
        scored = prompt_logprobs(self._teacher.policy, prompts, self._teacher.tokens_per_microbatch)
        return scored, time.perf_counter() - begun

    def _checked_prompts(self, given: object) -> list[list[int]]:
        """One or several prompts, each a text or a list of ids."""
        tokenizer, limit = self._teacher.policy.tokenizer, self._teacher.max_context
        several = given if isinstance(given, list) else [given]
        if several and all(type(item) is int for item in several):
            several = [several]
        if not 0 < len(several) <= _MAX_PROMPTS:
            raise ServiceError(422, "invalid_prompt", f"Send 1 to {_MAX_PROMPTS} prompts.")
        prompts = []
        for prompt in several:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
                raise ServiceError(
                    422, "invalid_prompt", "A prompt is a text or a list of token ids, not empty."
                )
            wrong = next((i for i in ids if not 0 <= i < self._teacher.policy.embedding_rows), None)
            if wrong is not None:
                raise ServiceError(422, "unknown_token", f"Token id {wrong} is out of vocabulary.")
            if len(ids) > limit:
                raise ServiceError(
                    422, "prompt_too_long", f"A prompt of {len(ids)} tokens; at most {limit}."
                )
            prompts.append(ids)
        return prompts

    def _positions(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[Any]:
        """The form of vLLM; the rank of a token in its distribution is not told."""
        texts = self._texts(ids)
        entries: list[Any] = [
            {str(i): {"logprob": logprob, "rank": None, "decoded_token": texts[i]}}
            for i, logprob in zip(ids[1:], logprobs, strict=True)
        ]
        return [None, *entries]

    def _entries(
        self, ids: Sequence[int], logprobs: Sequence[float], first: int, with_texts: bool
    ) -> list[Any]:
        """The form of SGLang: from position `first` on, the first of them without a log-prob."""
        begin = min(first if first >= 0 else len(ids) - 1, len(ids) - 1)
        texts = self._texts(ids) if with_texts else {}
        known = [None, *logprobs[begin:]]
        return [[logprob, i, texts.get(i)] for logprob, i in zip(known, ids[begin:], strict=True)]

    def _texts(self, ids: Sequence[int]) -> dict[int, str]:
        tokenizer = self._teacher.policy.tokenizer
        return {i: str(tokenizer.decode([i])) for i in set(ids)}


def prompt_logprobs(
    policy: Policy, prompts: Sequence[Sequence[int]], tokens_per_microbatch: int = 16384
) -> list[list[float]]:
    """Log-probs of all tokens of each prompt but its first, at temperature 1.

    Args:
        policy: the model.
        prompts: token ids, at least one each.
        tokens_per_microbatch: padded tokens that go through the model at once.

    Returns:
        For each prompt one number less than it has tokens.
    """
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(ids) for ids in prompts])
    input_ids = torch.full((len(prompts), longest), policy.pad_id, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    mask = torch.arange(longest)[None] < lengths[:, None]
    rows = torch.arange(len(prompts))
    nothing = torch.zeros(len(prompts))
    # Everything after the first token counts as one completion.
    batch = Batch(
        input_ids=input_ids,
        attention_mask=mask,
        completion_ids=input_ids[:, 1:],
        completion_mask=mask[:, 1:],
        sampling_logprobs=torch.zeros(len(prompts), longest - 1),
        sequence_index=rows,
        start=torch.ones_like(rows),
        trajectory_index=rows,
        turn_index=torch.zeros_like(rows),
        turn_rewards=nothing,
        group_index=rows,
        returns=nothing,
    )
    scores = policy.completion_logprobs(batch, tokens_per_microbatch).cpu()
    return [scores[row, : len(ids) - 1].tolist() for row, ids in enumerate(prompts)]


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ServiceError(422, "invalid_body", "Send a JSON object.")
    return value


def _whole_number(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise ServiceError(422, "invalid_body", f"{name} must be a whole number.")
    return value


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM or Ctrl-C; 2 with one line on standard error if it cannot start."""
    parser = argparse.ArgumentParser(
        prog="atod-train serve-teacher",
        description="Scores prompts for students on other machines (--model.teacher URL).",
    )
    parser.add_argument("model", help="a folder, a hub name or smollm2, as model.teacher")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--max-context", type=int, default=0, help="longest prompt in tokens")
    parser.add_argument("--tokens-per-microbatch", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=0, help="of the processor; 0: all")
    parser.add_argument(
        "--token-env", metavar="NAME", help="environment variable with a token to be asked for"
    )
    chosen = parser.parse_args(arguments)
    process.exit_on_signals()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        token = process.read_token(chosen.token_env)
        policy = load_policy(chosen.model, LoadOptions(device=chosen.device, dtype=chosen.dtype))
        most = policy.max_positions
        teacher = ServedTeacher(
            policy, min(chosen.max_context or most, most), max(1, chosen.tokens_per_microbatch)
        )
        listener = process.open_socket(chosen.host, chosen.port, has_token=token is not None)
    except (AtodError, process.StartError) as error:
        print(f"atod-train: error: {error}", file=sys.stderr)
        return 2
    with listener:
        process.serve(create_app(teacher, token), listener, service="teacher")
    return 0
