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
from functools import partial
from itertools import chain
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from atod_gym.errors import AtodError, ServerError
from atod_gym.serving.http import TIMEOUT_CODE, JsonClient
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
_PROBE = 10.0
"""Seconds without an answer after which the server is asked whether it still takes connections."""
_LONGEST_SLEEP = 0.5
"""Seconds after which a signal is noticed."""

_REQUESTS_AT_ONCE = 8
_PROMPTS_PER_REQUEST = 32
_TOKENS_PER_REQUEST = 16384
_LOWEST = -9999.0
"""Stands for the logarithm of 0, as in vLLM's answers."""
_ROUNDING = 1e-2
"""Nats by which a log-prob may be above 0."""
_CHECKED_TOKENS = 384
"""Several blocks of a prefix cache, which have 16 to 128 tokens."""
MOST_ROUNDING = 0.2
"""Mean difference of log-probs of one model, nats per token, that rounding does not reach: 0.046 in
bfloat16."""
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
    """Ask a server for its model and its software.

    Raises:
        ServerError: the server does not answer.
        AtodError: it lists no model, or several.
    """
    listed = client.get("/v1/models").get("data")
    entries = listed if isinstance(listed, list) else []
    models = [entry for entry in entries if isinstance(entry, dict) and "id" in entry]
    if not models:
        raise AtodError(f"The server at {client.url} lists no model at /v1/models. {_ADVICE}")
    # One model may have several names. Served adapters end vLLM 0.32 (on a processor) when it
    # scores prompts, and it leaves out what they add to the output layer.
    if len({str(model.get("root") or model["id"]) for model in models}) > 1:
        names = ", ".join(str(model["id"]) for model in models)
        raise AtodError(
            f"The server at {client.url} lists several models ({names}), and a teacher's must have "
            "one. Merge an adapter into its base model and serve the result alone."
        )
    first = models[0]
    longest = first.get("max_model_len")
    # Servers refuse a prompt that leaves no room for one more token.
    longest = longest - 1 if isinstance(longest, int) else math.inf
    return ServedModel(str(first["id"]), longest, str(first.get("owned_by", "")))


class _Prompt(NamedTuple):
    """A sequence of ids, and the first position whose log-prob is asked for (at least 1)."""

    ids: list[int]
    first: int


class RemoteTeacher:
    """A teacher that scores the student's tokens on a server.

    A server that is away (it refuses connections, does not answer in time, or answers 408, 429 or
    5xx) is tried again for `PATIENCE` seconds after its last answer. Requests that are open at a
    server that takes no new connections are given up: vLLM, once told to end, never answers them.

    Log-probs of one prompt must not depend on requests before it or on the tokens behind it. That
    is checked with random tokens at the beginning, and with the same ones after each outage.

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
        AtodError: Another vocabulary, too short a context, or log-probs that are not consistent.
    """

    def __init__(
        self, url: str, student: Policy, *, max_context: int = 0, timeout: float = 600.0
    ) -> None:
        self._client, self._timeout = connect(url, timeout), timeout
        self.url = self._client.url
        self.interrupted: Sequence[object] = ()
        """While it holds something, a server that is away is not waited for."""
        self._was_away = False
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
        ids = sorted(student.tokenizer.get_vocab().values())
        self._logprobs([_Prompt(ids[:1] * 2, 1)])
        self._check_vocabulary(student, label)
        # Servers of others do not report their precision.
        [health] = self._call(self._client.get, ["/health"]) if self._server == "atod" else [{}]
        self.is_float32 = health.get("dtype") == "float32"
        # Other tokens each time: a cache cannot have them yet.
        generator = torch.Generator()
        generator.seed()
        count = int(min(_CHECKED_TOKENS, served.longest))
        drawn = torch.randint(len(ids), (count,), generator=generator)
        self._sample = [ids[index] for index in drawn.tolist()]
        self._known: Tensor | None = None
        self._check_logprobs()

    def score(self, batch: Batch) -> Tensor:
        """Return log-probs as `Teacher.score`: [R, T] float32, on the batch's device.

        Raises:
            ServerError: The server is away, refuses a request, or its answer is malformed.
            AtodError: After an outage its log-probs are others.
        """
        lengths = batch.attention_mask.sum(dim=1)
        first = lengths.scatter_reduce(0, batch.sequence_index, batch.start, "amin")
        sequences = zip(batch.input_ids, lengths.tolist(), first.tolist(), strict=True)
        prompts = [_Prompt(ids[:length].tolist(), begin) for ids, length, begin in sequences]
        scores = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
        found = self._logprobs(prompts)
        if self._was_away:
            self._check_logprobs()
        for row, prompt, logprobs in zip(scores, prompts, found, strict=True):
            row[prompt.first : len(prompt.ids)] = logprobs
        scores = scores.to(batch.start.device)
        offset = torch.arange(batch.completion_ids.shape[1], device=scores.device)
        position = (batch.start[:, None] + offset).clamp(max=scores.shape[1] - 1)
        scores = scores[batch.sequence_index[:, None], position]
        return scores.masked_fill(~batch.completion_mask, 0.0)

    # -- requests ----------------------------------------------------------------------------------

    def _call(self, ask: Callable[[_I], _O], items: Sequence[_I]) -> list[_O]:
        """Call `ask` for each item, several at a time; repeat those that find the server away.

        Raises:
            ServerError: the server refuses, or is away for longer than `PATIENCE`.
        """
        answers: dict[int, _O] = {}
        outage = _Outage()
        while len(answers) < len(items):
            known = len(answers)
            error = self._try(ask, items, answers)
            if len(answers) > known:
                outage = _Outage()
            if error is not None:
                self._was_away = True
                outage.wait(error, self.interrupted)
        return [answers[index] for index in range(len(items))]

    def _try(
        self, ask: Callable[[_I], _O], items: Sequence[_I], answers: dict[int, _O]
    ) -> ServerError | None:
        """Call `ask` for items without an answer, until one finds the server away: its error."""
        left = [index for index in range(len(items)) if index not in answers]
        unasked, failures = iter(left), list[Exception]()

        def work() -> None:
            try:
                for index in unasked:
                    if failures:  # one is enough to pause, or to end, all of them
                        return
                    answers[index] = ask(items[index])
            except Exception as error:
                failures.append(error)

        # Daemons: one that waits for an answer does not keep the process from ending.
        count = min(_REQUESTS_AT_ONCE, len(left))
        threads = [Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        begin, is_silent = time.monotonic(), True
        for thread in threads:
            while thread.is_alive():
                known = len(answers)
                thread.join(min(_PROBE, _SLOW))
                if len(answers) > known or not thread.is_alive():
                    is_silent = False
                elif (error := self._gone()) is not None:
                    failures.append(error)
                    return error
                elif is_silent and time.monotonic() - begin >= _SLOW:
                    what = f"an answer of the teacher's server at {self.url}"
                    _report(self._timeout - _SLOW, what)
                    is_silent = False  # one line is enough
        for failure in failures:
            if not isinstance(failure, ServerError):
                raise failure
            return failure
        return None

    def _gone(self) -> ServerError | None:
        """Return the error of a server that refuses connections, None if it is only slow."""
        try:
            # A connection of its own: open ones may still be served.
            connect(self.url, min(self._timeout, _PROBE)).get("/v1/models")
        except ServerError as error:
            if error.status == 0 and error.code != TIMEOUT_CODE:
                return error
        return None

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

    def _check_logprobs(self) -> None:
        """Compare log-probs of a prompt alone, asked again, and with more tokens behind it.

        A prefix cache can give none or wrong ones for what it has; a server that was restarted can
        have another model.

        Raises:
            AtodError: they differ by more than rounding.
        """
        self._was_away = False
        beginning = _Prompt(self._sample[: 1 + len(self._sample) * 5 // 6], 1)
        first = self._logprobs([beginning])
        again = self._logprobs([_Prompt(self._sample, 1), beginning])
        if self._known is None:
            [self._known] = first
        count = len(self._known)
        drift = max(float((found[:count] - self._known).abs().mean()) for found in first + again)
        if not drift <= MOST_ROUNDING:
            raise AtodError(
                f"The server at {self.url} gives other log-probs for the same tokens when it is "
                f"asked again or for a longer prompt: {drift:.2g} nats apart on average (at most "
                f"{MOST_ROUNDING} is rounding). Start it without a prefix cache (vLLM: "
                "--no-enable-prefix-caching; SGLang: --disable-radix-cache); after a restart, with "
                "the model that this run began with."
            )

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
