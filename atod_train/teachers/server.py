"""`atod-train serve-teacher MODEL`: score prompts for students on other machines.

The server answers in the dialect of vLLM: completions with `prompt_logprobs`, prompts as token ids.
It only scores: nothing is generated.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import torch
from starlette.applications import Starlette
from starlette.requests import Request

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.batch import make_batch
from atod_train.config import Precision
from atod_train.memory import OutOfMemory, memory_errors
from atod_train.models.policy import Policy
from atod_train.models.pretrained import frozen_precision, load_policy
from atod_train.models.scores import score_completions
from atod_train.records import TokenizedTurn, Trajectory, Turn
from env_servers import process
from env_servers.endpoints import About, Endpoint, build_application
from env_servers.service import ErrorResponder, ServiceError, program_version

MOST_TOKENS = 2**16
"""Padded tokens of the prompts of a request; a longer single prompt needs --max-context."""
_LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold, as in vLLM's answers."""
_ABOUT = About(
    "teacher",
    "Scores prompts with a language model, in the dialect of vLLM (/v1/completions with"
    " prompt_logprobs).",
)

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Prompt = Annotated[list[TokenId], msgspec.Meta(min_length=1)]


class CompletionRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The part of vLLM's request that scores prompts."""

    prompt: Annotated[list[Prompt], msgspec.Meta(min_length=1, max_length=1024)]
    """Prompts as lists of token ids."""
    prompt_logprobs: Literal[0]
    """0: the log-probs of the prompts' own tokens alone."""
    max_tokens: Literal[0, 1]
    """vLLM asks for at least 1; nothing is generated in either case."""
    model: str | None = None
    temperature: float | None = None
    """Has no effect: log-probs are those at temperature 1, as in vLLM."""


class TokenLogprob(msgspec.Struct):
    """The log-prob of a token, in nats."""

    logprob: float


class Choice(msgspec.Struct):
    """One scored prompt."""

    index: int
    prompt_logprobs: list[dict[str, TokenLogprob] | None]
    """One entry per token: a mapping from its id. The first token has no log-prob."""
    text: str = ""
    finish_reason: str = "length"


class ScoredPrompts(msgspec.Struct):
    """The scored prompts, in the order of the request."""

    model: str
    choices: list[Choice]
    object: str = "text_completion"


class Model(msgspec.Struct):
    """The model."""

    id: str
    max_model_len: int
    """Longest prompt, and the one token of which vLLM keeps room behind it."""
    object: str = "model"
    owned_by: str = "atod"


class Models(msgspec.Struct):
    """The one model."""

    data: list[Model]
    object: str = "list"


class Vocabulary(msgspec.Struct):
    """The ids of all tokens."""

    ids: dict[str, int]


class Health(msgspec.Struct):
    """State of the server: its model, device, precision of the layers, and limits."""

    model: str
    device: str
    dtype: str
    max_context: int
    version: str = program_version()
    pid: int = msgspec.field(default_factory=os.getpid)
    service: str = "teacher"
    status: str = "ok"


@dataclass(frozen=True)
class ServedTeacher:
    """A model and its limits."""

    policy: Policy
    max_context: int
    """Longest prompt, in tokens."""
    tokens_per_microbatch: int
    """Padded tokens that go through the model at once."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    """One request after the other goes through the model."""

    async def completions(self, request: Request, body: CompletionRequest) -> ScoredPrompts:
        """Answer POST /v1/completions."""
        name = self.policy.name
        if body.model not in (None, name):
            raise ServiceError(404, "no_such_model", f"This server has the model {name!r} only.")
        self._check(body.prompt)
        loop = asyncio.get_running_loop()
        return ScoredPrompts(
            name, await loop.run_in_executor(self._thread, self._score, body.prompt)
        )

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        count, longest, highest = len(prompts), max(map(len, prompts)), max(map(max, prompts))
        limit, vocabulary = self.max_context, self.policy.vocabulary
        if longest > limit:
            message = f"A prompt of {longest} tokens; at most {limit}."
            raise ServiceError(422, "prompt_too_long", message)
        if count > 1 and count * longest > MOST_TOKENS:
            message = (
                f"{count} prompts, padded to {longest} tokens, are more than {MOST_TOKENS} tokens "
                "in one request. Send fewer at once."
            )
            raise ServiceError(413, "too_many_tokens", message)
        if highest >= vocabulary:
            message = f"Token id {highest} is out of vocabulary, which has {vocabulary} ids."
            raise ServiceError(422, "unknown_token", message)

    def _score(self, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        budget = self.tokens_per_microbatch
        advice = (
            "Send fewer tokens, or start the server with a smaller --tokens-per-microbatch (now "
            f"{budget})."
        )
        try:
            with memory_errors("scoring prompts", advice):
                scored = prompt_logprobs(self.policy, prompts, budget)
        except OutOfMemory as error:
            raise ServiceError(413, "out_of_memory", str(error)) from error
        choices = []
        for index, (ids, logprobs) in enumerate(zip(prompts, scored, strict=True)):
            if any(map(math.isnan, logprobs)):
                raise ServiceError(422, "not_a_number", "The model gives NaN for these prompts.")
            entries = zip(ids[1:], logprobs, strict=True)
            own = [{str(token): TokenLogprob(max(value, _LOWEST))} for token, value in entries]
            choices.append(Choice(index, [None, *own]))
        return choices


def create_app(
    teacher: ServedTeacher,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    max_body: int = 8 * 2**20,
) -> Starlette:
    """Make the application.

    Args:
        teacher: the model.
        token: if given, every request must carry it.
        allowed_hosts: further host names of the server.
        max_body: bytes that a request may have.
    """
    policy, limit = teacher.policy, teacher.max_context
    models = Models([Model(policy.name, limit + 1)])
    vocabulary = Vocabulary(policy.tokenizer.get_vocab())
    health = Health(
        policy.name, str(policy.device), str(policy.layer_dtype).removeprefix("torch."), limit
    )
    return build_application(
        _ABOUT,
        [
            Endpoint(
                "POST", "/v1/completions", teacher.completions,
                "Score prompts, in the dialect of vLLM.", ScoredPrompts, CompletionRequest,
                errors=(404,),
            ),
            Endpoint("GET", "/v1/models", _constant(models), "Name the model.", Models),
            Endpoint("GET", "/vocabulary", _constant(vocabulary), "List all tokens.", Vocabulary),
        ],
        health=lambda: health,
        errors=ErrorResponder(),
        metrics=list,
        max_body=max_body,
        token=token,
        allowed_hosts=allowed_hosts,
    )  # fmt: skip


def _constant(answer: object) -> Callable[[Request], Awaitable[object]]:
    """Return a handler that always gives the same answer."""

    async def handler(request: Request) -> object:
        return answer

    return handler


def prompt_logprobs(
    policy: Policy, prompts: Sequence[Sequence[int]], tokens_per_microbatch: int
) -> list[list[float]]:
    """Return the log-probs of all tokens of each prompt but its first, at temperature 1."""
    records = []
    for first, *scored in prompts:
        tokens = TokenizedTurn((first,), tuple(scored), (0.0,) * len(scored), "stop", False)
        turn = Turn(0, (), "", "", 0.0, True, tokens)
        records.append(Trajectory(0, "", "", (turn,), True, False, "terminated", True, 0.0))
    batch = make_batch(records, policy.pad_id)
    scores = score_completions(policy, batch, tokens_per_microbatch).logprobs.tolist()
    return [row[: len(ids) - 1] for row, ids in zip(scores, prompts, strict=True)]


def serve(
    model: str,
    *,
    host: str,
    port: int,
    max_body: int,
    token_env: str | None,
    allowed_host: Sequence[str],
    parent: int | None,
    device: str,
    dtype: Precision,
    max_context: int,
    tokens_per_microbatch: int,
    threads: int,
) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; see `ServeTeacher` for the options.

    Raises:
        AtodError: an option is out of range, the model cannot be loaded, or the server cannot
            listen.
    """
    for name, value, least, most in (
        ("port", port, 0, 65535),
        ("max-body", max_body, 1, math.inf),
        ("max-context", max_context, 0, math.inf),
        ("tokens-per-microbatch", tokens_per_microbatch, 1, math.inf),
        ("threads", threads, 0, math.inf),
    ):
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise InvalidSettingError(f"--{name} must be {limit}, not {value}.")
    process.exit_on_signals()
    if parent is not None:
        process.watch_parent(parent)
    if threads:
        torch.set_num_threads(threads)
    dtype = frozen_precision(dtype, device)
    try:
        token = process.read_token(token_env)
        policy = load_policy(model, device=device, dtype=dtype, samples=False)
        longest = min(max_context or MOST_TOKENS, policy.max_positions)
        teacher = ServedTeacher(policy, longest, tokens_per_microbatch)
        listener = process.open_socket(host, port, has_token=token is not None)
    except process.StartError as error:
        raise AtodError(str(error)) from error
    with listener:
        app = create_app(teacher, token, allowed_host, max_body)
        process.serve(app, listener, service="teacher")
