"""A teacher behind a URL: a server scores the student's own tokens.

Two dialects are spoken, as published: the completions of vLLM with `prompt_logprobs`, which
`atod-train serve-teacher` answers too, and the `/generate` of SGLang with `return_logprob`. Which
one a server has, it says at `/v1/models`.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from atod_gym.errors import AtodError, ServerError
from atod_gym.serving.http import JsonClient
from atod_train.models.policy import Policy
from atod_train.records import Batch
from atod_train.teachers.vocabulary import require_same_texts, require_same_vocabulary

TOKEN_VARIABLE = "ATOD_TEACHER_TOKEN"
"""Environment variable with the bearer token of servers that require one."""

PATIENCE = 600.0
"""Seconds that a server may be away before the run ends."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries: the pause doubles from the first to the longest."""

_SLOW = 60.0
"""Seconds without an answer after which a line says so."""
_LONGEST_SLEEP = 0.5
"""Seconds after which a signal is noticed."""

_REQUESTS_AT_ONCE = 8
_PROMPTS_PER_REQUEST = 32
_TOKENS_PER_REQUEST = 16384
_LOWEST = -9999.0
"""Stands for the logarithm of 0, as in vLLM's answers."""
_ROUNDING = 1e-2
"""Nats by which a log-prob may be above 0."""
_ADVICE = (
    "A teacher's server is atod-train serve-teacher, vLLM (/v1/completions with prompt_logprobs) "
    "or SGLang (/generate with return_logprob)."
)
_I = TypeVar("_I")
_O = TypeVar("_O")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Description of a server's model."""

    name: str
    longest: int | None
    """Longest sequence that is scored, in tokens; None: not known."""
    server: str
    """Name of the software: atod, vllm or sglang; others have the dialect of vLLM."""


def connect(url: str, timeout: float = 600.0) -> JsonClient:
    """Return a client of a teacher's server; it connects at the first request.

    Args:
        url: where the server listens, such as http://10.0.0.2:8000.
        timeout: seconds to wait for an answer.

    Raises:
        InvalidSettingError: the URL is not one of http or https.
    """
    return JsonClient(url, advice=_ADVICE, token=os.environ.get(TOKEN_VARIABLE), timeout=timeout)


def describe(client: JsonClient) -> ServedModel:
    """Ask a server for its (first) model and its software.

    Raises:
        ServerError: the server does not answer.
        AtodError: it lists no model.
    """
    listed = client.get("/v1/models").get("data")
    entries = listed if isinstance(listed, list) else []
    models = [entry for entry in entries if isinstance(entry, dict) and "id" in entry]
    if not models:
        raise AtodError(f"The server at {client.url} lists no model at /v1/models. {_ADVICE}")
    # Adapters are listed without a length; it is their base model's.
    lengths = [entry["max_model_len"] for entry in models if entry.get("max_model_len")]
    longest = next((length for length in lengths if isinstance(length, int)), None)
    # Servers refuse a prompt that leaves no room for one more token.
    return ServedModel(
        name=str(models[0]["id"]),
        longest=None if longest is None else longest - 1,
        server=str(models[0].get("owned_by", "")),
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A sequence of ids, and the first position whose log-prob is asked for (at least 1)."""

    ids: list[int]
    first: int


class RemoteTeacher:
    """A teacher that scores the student's tokens on a server.

    A server that is away (it refuses connections, does not answer in time, or answers 408, 429 or
    5xx) is tried again for `PATIENCE` seconds after its last answer.

    Every token of the student must have the same id at the teacher, as with `LocalTeacher`. How
    strictly that is checked depends on the server:

    - `atod-train serve-teacher` lists its vocabulary: all tokens are compared.
    - vLLM and SGLang decode ids (`/detokenize`): the texts of all tokens are compared, a thousand
      at a time. Where they differ, the text of each token decides (of every n-th one if there are
      more than some thousand, and of all added ones); parts of characters have none.
    - Nothing is compared, with a warning, if the server has neither.

    vLLM and SGLang count rows that are padded beyond the vocabulary into the distribution, this
    trainer does not. For trained models that makes no difference.

    Args:
        url: Where the server listens, such as http://10.0.0.2:8000.
        student: The student whose tokens are to be scored.
        max_context: Longest sequence that will be scored, in tokens; None: not known.
        timeout: Seconds to wait for an answer.

    Raises:
        ServerError: The server is away, or gives no log-probs of prompt tokens.
        AtodError: Another vocabulary, or too short a context.
    """

    def __init__(
        self, url: str, student: Policy, *, max_context: int | None = None, timeout: float = 600.0
    ) -> None:
        self._client, self._timeout = connect(url, timeout), timeout
        self._threads = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        self.url = self._client.url
        self.interrupted: Sequence[object] = ()
        """While it holds something, a server that is away is not waited for."""
        [self._served] = self._call(lambda _: describe(self._client), [None])
        self.name = self._served.name
        self._label = f"{self.name} at {self.url}"
        longest = self._served.longest
        if longest is not None and max_context is not None and max_context > longest:
            raise AtodError(
                f"Teacher {self._label} takes sequences of at most {longest} tokens, "
                f"the student's can have {max_context}. Use --model.max-context {longest}, or "
                "start the server with a longer context."
            )
        ours = student.tokenizer.get_vocab()
        # A server that cannot score is refused now, not after the first rollout.
        self._logprobs([_Prompt([min(ours.values())] * 2, 1)])
        if self._served.server == "atod":
            [answer] = self._call(lambda _: self._client.get("/vocabulary"), [None])
            require_same_vocabulary(ours, answer["ids"], student.name, self._label)
        else:
            self._require_same_texts(student)

    def score(self, batch: Batch) -> Tensor:
        """Return the log-probs of the completion tokens under the teacher at temperature 1.

        Args:
            batch: The student's batch, packed or not.

        Returns:
            [R, T] float32, 0 on padding, on the batch's device.

        Raises:
            ServerError: The server is away, refuses a request, or its answer is malformed.
        """
        prompts = _prompts(batch)
        logprobs = dict(zip(prompts, self._logprobs(list(prompts.values())), strict=True))
        scores = torch.zeros(batch.completion_ids.shape, dtype=torch.float32)
        lengths = batch.completion_mask.sum(dim=1).tolist()
        rows = zip(batch.sequence_index.tolist(), batch.start.tolist(), lengths, strict=True)
        for row, (sequence, start, length) in enumerate(rows):
            if length:
                begin = start - prompts[sequence].first
                scores[row, :length] = torch.tensor(logprobs[sequence][begin : begin + length])
        return scores.to(batch.completion_ids.device)

    # -- requests ----------------------------------------------------------------------------------

    def _call(self, ask: Callable[[_I], _O], items: Sequence[_I]) -> list[_O]:
        """Call `ask` for each item, several at a time; repeat those that find the server away.

        Raises:
            ServerError: the server refuses, or is away for longer than `PATIENCE`.
        """
        answers: dict[int, _O] = {}
        patience = _Patience()
        while len(answers) < len(items):
            errors: list[ServerError] = []

            def call(index: int, errors: list[ServerError] = errors) -> None:
                if errors:  # one is enough to pause, or to end, all of them
                    return
                try:
                    answers[index] = ask(items[index])
                except ServerError as error:
                    errors.append(error)

            known = len(answers)
            left = [i for i in range(len(items)) if i not in answers]
            futures = [self._threads.submit(call, index) for index in left]
            try:
                if not wait(futures, _SLOW, return_when=FIRST_COMPLETED).done:
                    what = f"an answer of the teacher's server at {self.url}"
                    _report(self._timeout - _SLOW, what)
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
            for failure in errors:
                if not _is_away(failure):
                    raise failure
            if len(answers) > known:
                patience.renew()
            if errors:
                patience.wait(errors[-1], self.interrupted)
        return [answers[index] for index in range(len(items))]

    def _logprobs(self, prompts: Sequence[_Prompt]) -> list[list[float]]:
        """Return the log-probs of each prompt's tokens from its position `first` on."""
        if self._served.server == "sglang":
            # It schedules single prompts as well as several.
            return self._call(self._ask_sglang, prompts)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
        requests = list(_requests([prompts[index] for index in order]))
        answers = [row for rows in self._call(self._ask_vllm, requests) for row in rows]
        return [row for _, row in sorted(zip(order, answers, strict=True))]

    def _ask_vllm(self, prompts: Sequence[_Prompt]) -> list[list[float]]:
        answer = self._client.post(
            "/v1/completions",
            {
                "model": self.name,
                "prompt": [prompt.ids for prompt in prompts],
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 0,
            },
        )
        with self._reading("/v1/completions"):
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            if [choice["index"] for choice in choices] != list(range(len(prompts))):
                raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
            return [
                _vllm_logprobs(prompt, choice)
                for prompt, choice in zip(prompts, choices, strict=True)
            ]

    def _ask_sglang(self, prompt: _Prompt) -> list[float]:
        answer = self._client.post(
            "/generate",
            {
                "input_ids": prompt.ids,
                "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
                "return_logprob": True,
                # The first entry that comes has no log-prob.
                "logprob_start_len": prompt.first - 1,
            },
        )
        with self._reading("/generate"):
            return _sglang_logprobs(prompt, answer)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Turn what a malformed answer raises into an error that names the server."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ServerError(
                f"POST {self.url}{path}: the answer gives no usable log-probs of the prompt's "
                f"tokens ({what}). {_ADVICE}",
                status=200,
            ) from error

    def _require_same_texts(self, student: Policy) -> None:
        try:
            require_same_texts(
                student.tokenizer,
                lambda parts: self._call(self._text, parts),
                student.name,
                self._label,
            )
        except ServerError as error:
            if error.status not in (404, 405, 501):
                raise
            warnings.warn(
                f"The server at {self.url} has no /detokenize, so its vocabulary could not be "
                "compared with the student's; make sure that they are the same.",
                stacklevel=3,
            )

    def _text(self, ids: list[int]) -> str:
        """Return the text of some ids at the server."""
        body = {"model": self.name, "tokens": ids, "skip_special_tokens": False}
        answer = self._client.post("/detokenize", body)
        # vLLM has the first name, SGLang the second.
        text = answer.get("prompt", answer.get("text"))
        if not isinstance(text, str):
            raise ServerError(f"POST {self.url}/detokenize: no text in the answer", status=501)
        return text


class _Patience:
    """Pauses while a server is away, and an end to them."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Reset: the server has answered."""
        self._until = math.inf
        self._pause = FIRST_PAUSE
        self._is_reported = False

    def wait(self, error: ServerError, interrupted: Sequence[object]) -> None:
        """Pause before the next try; report the first pause of an outage that is not short.

        Raises:
            ServerError: the server is away for longer than `PATIENCE`, or asks for a longer pause;
                or `interrupted` holds something.
        """
        now = time.monotonic()
        self._until = min(self._until, now + PATIENCE)
        left = self._until - now
        if left <= 0 or error.retry_after > left:
            raise ServerError(
                f"The teacher's server was away for too long (more than {PATIENCE:.0f} s). {error}",
                status=error.status,
                code=error.code,
            ) from error
        pause = max(self._pause, error.retry_after)
        if pause > FIRST_PAUSE and not self._is_reported:
            _report(left, f"the teacher's server: {error}")
            self._is_reported = True
        end = now + min(left, pause)
        while (left := end - time.monotonic()) > 0 and not interrupted:
            time.sleep(min(left, _LONGEST_SLEEP))
        if interrupted:
            raise ServerError(
                f"The run was stopped while the teacher's server was away. {error}",
                status=error.status,
                code=error.code,
            ) from error
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _report(seconds: float, what: str) -> None:
    """Print what is waited for and until when."""
    clock = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
    # Above the bars of a run, if there are any.
    tqdm.write(f"waiting until {clock} for {what}", file=sys.stderr)


def _is_away(error: ServerError) -> bool:
    """Return whether the same request may be answered later: 0 is a failed connection."""
    return error.status in (0, 408, 429) or (error.status >= 500 and error.status != 501)


def _prompts(batch: Batch) -> dict[int, _Prompt]:
    """One prompt for each sequence that has sampled tokens."""
    has_tokens = batch.completion_mask.any(dim=1)
    count, longest = batch.input_ids.shape
    first = torch.full((count,), longest, dtype=torch.int64, device=batch.start.device)
    first = first.scatter_reduce(
        0, batch.sequence_index[has_tokens], batch.start[has_tokens], "amin"
    )
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows = zip(batch.input_ids.tolist(), lengths, first.tolist(), strict=True)
    return {
        sequence: _Prompt(ids[:length], begin)
        for sequence, (ids, length, begin) in enumerate(rows)
        if begin < length
    }


def _requests(prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
    """Divide prompts, longest first, into requests with a limit of padded tokens."""
    begin = 0
    while begin < len(prompts):
        fitting = _TOKENS_PER_REQUEST // len(prompts[begin].ids)
        end = begin + max(1, min(_PROMPTS_PER_REQUEST, fitting))
        yield list(prompts[begin:end])
        begin = end


def _vllm_logprobs(prompt: _Prompt, choice: dict[str, Any]) -> list[float]:
    """Read the answer of vLLM: one entry per position, a mapping from ids."""
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise ValueError("there are no prompt_logprobs")
    if len(entries) != len(prompt.ids):
        raise ValueError(f"{len(entries)} entries for {len(prompt.ids)} tokens")
    found = []
    for position in range(prompt.first, len(prompt.ids)):
        token = (entries[position] or {}).get(str(prompt.ids[position]))
        if token is None:
            raise ValueError(f"id {prompt.ids[position]} is missing at position {position}")
        found.append(_checked(token["logprob"], position))
    return found


def _sglang_logprobs(prompt: _Prompt, answer: dict[str, Any]) -> list[float]:
    """Read the answer of SGLang: (log-prob, id, ..) of some positions up to the last one."""
    entries = answer["meta_info"].get("input_token_logprobs")
    if entries is None:
        raise ValueError("there are no input_token_logprobs")
    count = len(prompt.ids) - prompt.first
    if len(entries) < count:
        raise ValueError(f"{len(entries)} entries for {count} tokens")
    found = []
    for position, entry in enumerate(entries[len(entries) - count :], start=prompt.first):
        if entry[1] != prompt.ids[position]:
            raise ValueError(f"id {entry[1]} at position {position}, not {prompt.ids[position]}")
        found.append(_checked(entry[0], position))
    return found


def _checked(logprob: Any, position: int) -> float:
    """Return a log-prob, the logarithm of 0 as a finite number."""
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        raise ValueError(f"no log-prob at position {position}: {logprob!r}")
    if math.isnan(logprob) or logprob > _ROUNDING:
        raise ValueError(f"log-prob {logprob} at position {position}")
    return max(float(logprob), _LOWEST)
