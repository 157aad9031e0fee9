"""`atod-train serve-teacher MODEL`: scores prompts for students on other machines.

It answers in the dialects that `remote_teacher` speaks: vLLM's completions with `prompt_logprobs`
and SGLang's `/generate` with `return_logprob`. Only prompts are scored; nothing is generated beyond
the one token that vLLM's contract asks for, and that one is left out of the answer's text.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import torch
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atod_gym.errors import AtodError
from atod_train.batch import length_buckets
from atod_train.models.policy import LOGITS_PER_CHUNK, Policy
from atod_train.models.pretrained import LoadOptions, load_policy
from env_servers import process
from env_servers.endpoints import About, Endpoint, build_application
from env_servers.options import ServiceOptions, add_options
from env_servers.service import ErrorResponder, ServiceError, counter, program_version

Ranked = dict[int, tuple[float, int]]
"""Log-probs and ranks (the most likely token has 1) of tokens at one position, by id."""

_MAX_PROMPTS = 1024
_MAX_TOP = 20
_LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold, as in vLLM's answers."""
_MAX_BODY = 64 * 2**20
_ABOUT = About(
    "teacher",
    "Scores prompts with a language model, in the dialects of vLLM (/v1/completions with"
    " prompt_logprobs) and SGLang (/generate with return_logprob).",
)


class CompletionRequest(msgspec.Struct):
    """What vLLM's clients send; fields that are not named here do not count.

    Fields of type Any change the result in vLLM and are refused unless they are empty.
    """

    prompt: str | list[int | str | list[int]]
    """One or several prompts, each a text or a list of token ids."""
    prompt_logprobs: int | None = None
    """How many of the most likely tokens to give beside the prompt's own, 0 to 20."""
    max_tokens: int | None = 16
    """0 or 1."""
    model: str | None = None
    n: int | None = 1
    stream: Any = None
    echo: Any = None
    logprobs: Any = None
    suffix: Any = None
    truncate_prompt_tokens: Any = None
    prompt_embeds: Any = None


_REFUSED = ("stream", "echo", "logprobs", "suffix", "truncate_prompt_tokens", "prompt_embeds")


class SamplingParams(msgspec.Struct):
    """SGLang's settings of generation, as far as they count."""

    max_new_tokens: int | None = 128
    """0 or 1."""


class GenerateRequest(msgspec.Struct):
    """What SGLang's clients send; fields that are not named here do not count."""

    input_ids: list[int | list[int]] | None = None
    text: str | list[str] | None = None
    """Used where there are no `input_ids`."""
    sampling_params: SamplingParams | None = None
    return_logprob: bool | None = None
    """Must be true."""
    logprob_start_len: int | list[int] | None = None
    """First position with a log-prob, of all prompts or one each; -1: the last."""
    top_logprobs_num: int | None = 0
    token_ids_logprob: Any = None
    return_text_in_logprobs: bool | None = None


class Health(msgspec.Struct):
    """That the server is up, and what it serves."""

    status: str
    service: str
    version: str
    pid: int
    model: str
    device: str
    max_context: int


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


def create_app(
    teacher: ServedTeacher,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    max_body: int = _MAX_BODY,
) -> Starlette:
    """Make the application.

    Args:
        teacher: the model.
        token: if given, every request must carry it.
        allowed_hosts: further host names of the server.
        max_body: bytes that a request may have.
    """
    api = TeacherApi(teacher)
    return build_application(
        _ABOUT,
        api.endpoints(),
        errors=ErrorResponder(),
        metrics=api.metrics,
        max_body=max_body,
        token=token,
        allowed_hosts=allowed_hosts,
    )


class TeacherApi:
    """The handlers. One request after the other goes through the model, in a thread."""

    def __init__(self, teacher: ServedTeacher) -> None:
        self._teacher = teacher
        self._thread = ThreadPoolExecutor(1)
        self._requests = self._prompts = self._tokens = 0
        self._seconds = 0.0
        self._known_texts: dict[int, str] = {}

    def endpoints(self) -> list[Endpoint]:
        """Return the table of the API."""
        answer = dict[str, Any]
        return [
            Endpoint(
                "POST", "/v1/completions", self.completions,
                "Score prompts, in the dialect of vLLM.", answer, CompletionRequest,
                errors=(404, 500),
            ),
            Endpoint(
                "GET", "/v1/models", self.models, "Name the one model, as vLLM does.", answer
            ),
            Endpoint(
                "POST", "/generate", self.generate, "Score prompts, in the dialect of SGLang.",
                answer | list[answer], GenerateRequest, errors=(500,),
            ),
            Endpoint(
                "GET", "/get_model_info", self.model_info, "Name the model, as SGLang does.", answer
            ),
            Endpoint("GET", "/health", self.health, "Report what is served.", Health),
        ]  # fmt: skip

    async def completions(self, request: Request, body: CompletionRequest) -> dict[str, Any]:
        """Answer POST /v1/completions."""
        name = self._teacher.policy.name
        if body.model not in (None, name):
            raise ServiceError(404, "no_such_model", f"This server has the model {name!r} only.")
        top = -1 if body.prompt_logprobs is None else body.prompt_logprobs
        if not 0 <= top <= _MAX_TOP:
            raise ServiceError(
                422,
                "no_prompt_logprobs",
                f"Send prompt_logprobs 0 to {_MAX_TOP}: only prompts are scored.",
            )
        if body.max_tokens not in (0, 1) or body.n not in (None, 1):
            raise ServiceError(422, "no_generation", "Send max_tokens 0 or 1, and n 1.")
        for option in _REFUSED:
            if getattr(body, option):
                raise ServiceError(
                    422, "not_offered", f"{option} is not offered; prompt_logprobs has the scores."
                )
        prompts = self._checked_prompts(body.prompt)
        scored = await self._score(prompts, top)
        choices = [
            {
                "index": index,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": [None, *map(self._position, positions)],
            }
            for index, positions in enumerate(scored)
        ]
        count = sum(map(len, prompts))
        return {
            "id": f"cmpl-{self._requests}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "choices": choices,
            "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
        }

    async def generate(
        self, request: Request, body: GenerateRequest
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer POST /generate."""
        if (body.sampling_params or SamplingParams()).max_new_tokens not in (0, 1):
            raise ServiceError(422, "no_generation", "Send sampling_params.max_new_tokens 0 or 1.")
        if not body.return_logprob:
            raise ServiceError(422, "no_logprobs", "Send return_logprob: only prompts are scored.")
        for option in ("top_logprobs_num", "token_ids_logprob"):
            if getattr(body, option):
                raise ServiceError(422, "not_offered", f"{option} is not offered.")
        given: str | list[Any] | None = body.text if body.input_ids is None else body.input_ids
        is_single = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts = self._checked_prompts(given)
        starts = body.logprob_start_len
        if not isinstance(starts, list):
            starts = [-1 if starts is None else starts] * len(prompts)
        if len(starts) != len(prompts):
            raise ServiceError(422, "invalid_body", "logprob_start_len: one number, or one each.")
        scored = await self._score(prompts)
        with_texts = bool(body.return_text_in_logprobs)
        answers = [
            {
                "text": "",
                "meta_info": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": 0,
                    "finish_reason": {"type": "length", "length": 0},
                    "input_token_logprobs": self._entries(ids, positions, start, with_texts),
                    "output_token_logprobs": [],
                },
            }
            for ids, positions, start in zip(prompts, scored, starts, strict=True)
        ]
        return answers[0] if is_single else answers

    async def models(self, request: Request) -> dict[str, Any]:
        """Answer GET /v1/models."""
        model = {
            "id": self._teacher.policy.name,
            "object": "model",
            "owned_by": "atod",
            # As elsewhere, the one token that vLLM's contract asks for has its place in it.
            "max_model_len": self._teacher.max_context + 1,
        }
        return {"object": "list", "data": [model]}

    async def model_info(self, request: Request) -> dict[str, Any]:
        """Answer GET /get_model_info."""
        return {"model_path": self._teacher.policy.name, "is_generation": True}

    async def health(self, request: Request) -> Health:
        """Answer GET /health."""
        policy = self._teacher.policy
        return Health(
            status="ok",
            service="teacher",
            version=program_version(),
            pid=os.getpid(),
            model=policy.name,
            device=str(policy.device),
            max_context=self._teacher.max_context,
        )

    def metrics(self) -> list[Metric]:
        """Return the current metrics of the scoring."""
        return [
            counter("teacher_requests_total", "Requests scored.", self._requests),
            counter("teacher_prompts_total", "Prompts in them.", self._prompts),
            counter("teacher_tokens_total", "Tokens in those.", self._tokens),
            counter("teacher_scoring_seconds_total", "Spent on them.", self._seconds),
        ]

    async def _score(self, prompts: Sequence[Sequence[int]], top: int = 0) -> list[list[Ranked]]:
        loop = asyncio.get_running_loop()
        scored, seconds = await loop.run_in_executor(self._thread, self._score_now, prompts, top)
        self._requests += 1
        self._prompts += len(prompts)
        self._tokens += sum(map(len, prompts))
        self._seconds += seconds
        return scored

    def _score_now(
        self, prompts: Sequence[Sequence[int]], top: int
    ) -> tuple[list[list[Ranked]], float]:
        begun = time.perf_counter()
        scored = prompt_logprobs(
            self._teacher.policy, prompts, self._teacher.tokens_per_microbatch, top=top
        )
        if any(math.isnan(entry[0]) for p in scored for at in p for entry in at.values()):
            raise ServiceError(500, "not_a_number", "The model gives NaN for these prompts.")
        return scored, time.perf_counter() - begun

    def _checked_prompts(self, given: str | list[Any] | None) -> list[list[int]]:
        """One or several prompts, each a text or a list of ids."""
        tokenizer, limit = self._teacher.policy.tokenizer, self._teacher.max_context
        several = given if isinstance(given, list) else [given]
        if several and isinstance(several[0], int):
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
            wrong = next((i for i in ids if not 0 <= i < self._teacher.policy.vocabulary), None)
            if wrong is not None:
                raise ServiceError(422, "unknown_token", f"Token id {wrong} is out of vocabulary.")
            if len(ids) > limit:
                raise ServiceError(
                    422, "prompt_too_long", f"A prompt of {len(ids)} tokens; at most {limit}."
                )
            prompts.append(ids)
        return prompts

    def _position(self, ranked: Ranked) -> dict[str, dict[str, Any]]:
        """Return the form of vLLM: the prompt's own token first."""
        return {
            str(i): {"logprob": logprob, "rank": rank, "decoded_token": self._text(i)}
            for i, (logprob, rank) in ranked.items()
        }

    def _entries(
        self, ids: Sequence[int], positions: Sequence[Ranked], start: int, with_texts: bool
    ) -> list[Any]:
        """Return the form of SGLang: positions from `start`, the first without a log-prob."""
        begin = min(start if start >= 0 else len(ids) - 1, len(ids) - 1)
        known = [None, *(next(iter(ranked.values()))[0] for ranked in positions[begin:])]
        return [
            [logprob, i, self._text(i) if with_texts else None]
            for logprob, i in zip(known, ids[begin:], strict=True)
        ]

    def _text(self, token_id: int) -> str:
        if token_id not in self._known_texts:
            self._known_texts[token_id] = str(self._teacher.policy.tokenizer.decode([token_id]))
        return self._known_texts[token_id]


@torch.no_grad()
def prompt_logprobs(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokens_per_microbatch: int = 16384,
    *,
    top: int = 0,
) -> list[list[Ranked]]:
    """Log-probs of all tokens of each prompt but its first, at temperature 1.

    Args:
        policy: the model.
        prompts: token ids, at least one each.
        tokens_per_microbatch: padded tokens that go through the model at once.
        top: how many of the most likely tokens to give beside the prompt's own, which comes first.

    Returns:
        For each prompt one position less than it has tokens.
    """
    lengths = torch.tensor([len(ids) for ids in prompts])
    at_once = max(1, LOGITS_PER_CHUNK // policy.vocabulary)
    found: list[list[Ranked]] = [[] for _ in prompts]
    for bucket in length_buckets(lengths, tokens_per_microbatch):
        rows = [torch.tensor(prompts[i]) for i in bucket.tolist()]
        ids = pad_sequence(rows, batch_first=True, padding_value=policy.pad_id).to(policy.device)
        is_scored = (torch.arange(1, ids.shape[1]) < lengths[bucket][:, None]).to(policy.device)
        hidden = policy.hidden_states(ids)[:, :-1][is_scored].split(at_once)
        targets = ids[:, 1:][is_scored].split(at_once)
        ranked = iter(
            entry
            for states, own in zip(hidden, targets, strict=True)
            for entry in _ranked(policy.logits(states), own, top)
        )
        for i in bucket.tolist():
            found[i] = list(islice(ranked, len(prompts[i]) - 1))
    return found


def _ranked(logits: Tensor, ids: Tensor, top: int) -> list[Ranked]:
    """Of logits [m, vocabulary] the tokens `ids` [m] and the `top` most likely ones."""
    own = logits.gather(-1, ids[:, None])
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    values = torch.cat([own, best.values], dim=-1) - logits.logsumexp(dim=-1, keepdim=True)
    columns = (
        torch.cat([ids[:, None], best.indices], dim=-1).tolist(),
        values.clamp(min=_LOWEST).tolist(),
        ((logits > own).sum(dim=-1) + 1).tolist(),
    )
    # The prompt's own token may be among the likely ones: the first entry of an id counts.
    return [
        {
            tokens[k]: (logprobs[k], k or rank)
            for k in range(len(tokens))
            if not (k and tokens[k] == tokens[0])
        }
        for tokens, logprobs, rank in zip(*columns, strict=True)
    ]


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; 2 with one line on standard error if it cannot start."""
    parser = argparse.ArgumentParser(
        prog="atod-train serve-teacher",
        description="Scores prompts for students on other machines (--model.teacher URL).",
    )
    parser.add_argument("model", help="a folder, a hub name or smollm2, as model.teacher")
    add_options(parser, ServiceOptions, port=8000, max_body=_MAX_BODY)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--max-context", type=int, default=0, help="longest prompt in tokens")
    parser.add_argument("--tokens-per-microbatch", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=0, help="of the processor; 0: all")
    chosen = parser.parse_args(arguments)
    process.exit_on_signals()
    if chosen.parent is not None:
        process.watch_parent(chosen.parent)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        token = process.read_token(chosen.token_env)
        options = LoadOptions(device=chosen.device, dtype=chosen.dtype)
        policy = load_policy(chosen.model, options, samples=False)
        most = policy.max_positions
        teacher = ServedTeacher(
            policy, min(chosen.max_context or most, most), max(1, chosen.tokens_per_microbatch)
        )
        listener = process.open_socket(chosen.host, chosen.port, has_token=token is not None)
    except (AtodError, process.StartError) as error:
        print(f"atod-train: error: {error}", file=sys.stderr)
        return 2
    app = create_app(teacher, token, chosen.allowed_host, chosen.max_body)
    with listener:
        process.serve(app, listener, service="teacher")
    return 0
