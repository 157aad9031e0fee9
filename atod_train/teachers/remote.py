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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from atod_gym.errors import AtodError, ServerError
from atod_gym.serving.http import JsonClient
from atod_train.batch import length_buckets
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


class ServedModel(NamedTuple):
    """Description of a server's model."""

    name: str
    longest: float
    """Longest sequence that is scored, in tokens; inf: not known."""
    server: str
    """Name of the software: atod, vllm or sglang; others have the dialect of vLLM."""


def connect(url: str, timeout: float = 600.0) -> JsonClient:
    """Return a client of a teacher's server, which is asked later; it waits `timeout` seconds.

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
    lengths = [model.get("max_model_len") for model in models]
    longest = next((length for length in lengths if isinstance(length, int)), math.inf)
    # Servers refuse a prompt that leaves no room for one more token.
    return ServedModel(str(models[0]["id"]), longest - 1, str(models[0].get("owned_by", "")))


class _Prompt(NamedTuple):
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
    - vLLM and SGLang decode ids (`/detokenize`): the texts of all tokens are compared, see
      `require_same_texts`.
    - Nothing is compared, with a warning, if the server has neither.

    vLLM and SGLang count rows that are padded beyond the vocabulary into the distribution, this
    trainer does not. For trained models that makes no difference.

    Args:
        url: Where the server listens, such as http://10.0.0.2:8000.
        student: The student whose tokens are to be scored.
        max_context: Longest sequence that will be scored, in tokens; 0: not known.
        timeout: Seconds to wait for an answer.

    Raises:
        ServerError: The server is away, or gives no log-probs of prompt tokens.
        AtodError: Another vocabulary, or too short a context.
    """

    def __init__(
        self, url: str, student: Policy, *, max_context: int = 0, timeout: float = 600.0
    ) -> None:
        self._client, self._timeout = connect(url, timeout), timeout
        self._threads = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
        self.url = self._client.url
        self.interrupted: Sequence[object] = ()
        """While it holds something, a server that is away is not waited for."""
        [served] = self._call(describe, [self._client])
        self.name, self._server = served.name, served.server
        label = f"{self.name} at {self.url}"
        if max_context > served.longest:
            raise AtodError(
                f"Teacher {label} takes sequences of at most {served.longest} tokens, "
                f"the student's can have {max_context}. Use --model.max-context {served.longest}, "
                "or start the server with a longer context."
            )
        # A server that cannot score is refused now, not after the first rollout.
        self._logprobs([_Prompt([min(student.tokenizer.get_vocab().values())] * 2, 1)])
        self._check_vocabulary(student, label)

    def score(self, batch: Batch) -> Tensor:
        """Return log-probs as `Teacher.score`: [R, T] float32, on the batch's device.

        Raises:
            ServerError: The server is away, refuses a request, or its answer is malformed.
        """
        lengths = batch.attention_mask.sum(dim=1)
        first = lengths.scatter_reduce(0, batch.sequence_index, batch.start, "amin")
        sequences = zip(batch.input_ids, lengths.tolist(), first.tolist(), strict=True)
        prompts = [_Prompt(ids[:length].tolist(), begin) for ids, length, begin in sequences]
        scores = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
        for row, prompt, logprobs in zip(scores, prompts, self._logprobs(prompts), strict=True):
            row[prompt.first : len(prompt.ids)] = logprobs
        scores = scores.to(batch.start.device)
        offset = torch.arange(batch.completion_ids.shape[1], device=scores.device)
        position = (batch.start[:, None] + offset).clamp(max=scores.shape[1] - 1)
        found = scores[batch.sequence_index[:, None], position]
        return found.masked_fill(~batch.completion_mask, 0.0)

    # -- requests ----------------------------------------------------------------------------------

    def _call(self, ask: Callable[[_I], _O], items: Sequence[_I]) -> list[_O]:
        """Call `ask` for each item, several at a time; repeat those that find the server away.

        Raises:
            ServerError: the server refuses, or is away for longer than `PATIENCE`.
        """
        answers: dict[int, _O] = {}
        outage = _Outage()
        while len(answers) < len(items):
            failures: list[ServerError] = []

            def call(index: int, failures: list[ServerError] = failures) -> None:
                if failures:  # one is enough to pause, or to end, all of them
                    return
                try:
                    answers[index] = ask(items[index])
                except ServerError as error:
                    failures.append(error)

            known = len(answers)
            left = [index for index in range(len(items)) if index not in answers]
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
            if len(answers) > known:
                outage = _Outage()
            if failures:
                outage.wait(failures[0], self.interrupted)
        return [answers[index] for index in range(len(items))]

    def _logprobs(self, prompts: Sequence[_Prompt]) -> list[Tensor]:
        """Return the log-probs of each prompt's tokens from its position `first` on."""
        if self._server == "sglang":
            # It schedules single prompts as well as several.
            return self._call(self._ask_sglang, prompts)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        buckets = length_buckets(lengths, _TOKENS_PER_REQUEST)
        parts = [part.tolist() for bucket in buckets for part in bucket.split(_PROMPTS_PER_REQUEST)]
        answers = self._call(self._ask_vllm, [[prompts[i] for i in part] for part in parts])
        found = dict(zip(chain(*parts), chain(*answers), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _ask_vllm(self, prompts: Sequence[_Prompt]) -> list[Tensor]:
        ids = [prompt.ids for prompt in prompts]
        settings = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        body = {"model": self.name, "prompt": ids, **settings}
        return self._ask("/v1/completions", body, partial(_read_vllm, prompts))

    def _ask_sglang(self, prompt: _Prompt) -> Tensor:
        body = {
            "input_ids": prompt.ids,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            # The first entry that comes has no log-prob.
            "logprob_start_len": prompt.first - 1,
        }
        return self._ask("/generate", body, partial(_read_sglang, prompt))

    def _ask(self, path: str, body: object, read: Callable[[dict[str, Any]], _O]) -> _O:
        """Send a request and read its answer; what a malformed one raises names the server."""
        answer = self._client.post(path, body)
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ServerError(
                f"POST {self.url}{path}: the answer gives no usable log-probs of the prompt's "
                f"tokens ({what}). {_ADVICE}",
                status=200,
            ) from error

    def _check_vocabulary(self, student: Policy, label: str) -> None:
        if self._server == "atod":
            [answer] = self._call(self._client.get, ["/vocabulary"])
            ours = student.tokenizer.get_vocab()
            return require_same_vocabulary(ours, answer["ids"], student.name, label)
        try:
            decode = partial(self._call, self._text)
            require_same_texts(student.tokenizer, decode, student.name, label)
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


class _Outage:
    """Pauses while a server is away, and an end to them."""

    def __init__(self) -> None:
        self._until = math.inf
        self._pause = FIRST_PAUSE

    def wait(self, error: ServerError, interrupted: Sequence[object]) -> None:
        """Pause before the next try; the second pause and unusually long ones are reported.

        Raises:
            ServerError: the server refuses; it is away for longer than `PATIENCE`, or asks for a
                longer pause; or `interrupted` holds something.
        """
        # 0 is a failed connection, 501 a request that the server does not know.
        if error.status not in (0, 408, 429) and (error.status < 500 or error.status == 501):
            raise error
        now = time.monotonic()
        self._until = min(self._until, now + PATIENCE)
        left = self._until - now
        if left <= 0 or error.retry_after > left:
            raise ServerError(
                f"The teacher's server was away for too long (more than {PATIENCE:.0f} s). {error}"
            ) from error
        pause = max(self._pause, error.retry_after)
        if self._pause == 2 * FIRST_PAUSE or pause > LONGEST_PAUSE:
            _report(left, f"the teacher's server: {error}")
        end = now + min(left, pause)
        while (left := end - time.monotonic()) > 0 and not interrupted:
            time.sleep(min(left, _LONGEST_SLEEP))
        if interrupted:
            raise ServerError(
                f"The run was stopped while the teacher's server was away. {error}"
            ) from error
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def _report(seconds: float, what: str) -> None:
    """Print what is waited for and until when."""
    clock = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
    # Above the bars of a run, if there are any.
    tqdm.write(f"waiting until {clock} for {what}", file=sys.stderr)


def _read_vllm(prompts: Sequence[_Prompt], answer: dict[str, Any]) -> list[Tensor]:
    """Read an answer of vLLM: for each prompt one entry per position, a mapping from ids."""
    choices = {choice["index"]: choice for choice in answer["choices"]}
    if sorted(choices) != list(range(len(prompts))):
        raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
    found = []
    for index, (ids, first) in enumerate(prompts):
        entries = choices[index].get("prompt_logprobs") or []
        if len(entries) != len(ids):
            raise ValueError(f"{len(entries)} prompt_logprobs for {len(ids)} tokens")
        scored = zip(ids[first:], entries[first:], strict=True)
        found.append(_checked([entry[str(token)]["logprob"] for token, entry in scored]))
    return found


def _read_sglang(prompt: _Prompt, answer: dict[str, Any]) -> Tensor:
    """Read an answer of SGLang: (log-prob, id, ..) of some positions up to the last one."""
    entries = answer["meta_info"].get("input_token_logprobs") or []
    scored = prompt.ids[prompt.first :]
    entries = entries[max(0, len(entries) - len(scored)) :]
    if [entry[1] for entry in entries] != scored:
        raise ValueError(f"input_token_logprobs are not of the prompt's last {len(scored)} tokens")
    return _checked([entry[0] for entry in entries])


def _checked(logprobs: list[Any]) -> Tensor:
    """Return log-probs as float32, the logarithm of 0 as a finite number."""
    for value in logprobs:
        # NaN is not below anything.
        if type(value) not in (int, float) or not value <= _ROUNDING:
            raise ValueError(f"log-prob {value!r}")
    return torch.tensor([max(float(value), _LOWEST) for value in logprobs], dtype=torch.float32)
