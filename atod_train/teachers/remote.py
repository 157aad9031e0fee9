"""A teacher behind a URL: a server scores the student's own tokens.

Two dialects, as they are published: the completions of vLLM with `prompt_logprobs`, and the native
`/generate` of SGLang with `return_logprob`. `atod-train serve-teacher` speaks both.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_gym.errors import AtodError, ServerError
from atod_train.config import TeacherApi
from atod_train.models.policy import Policy
from atod_train.records import Batch
from atod_train.teachers.describe import REMEDY, connect, describe

_TOKENS_PER_REQUEST = 16384
_PROMPTS_PER_REQUEST = 32
_CACHED_TOKENS = 2**24
_PROBED = 256
"""Ids that are compared beside the added tokens."""

_LOWEST = -9999.0
"""What stands for the logarithm of 0, as in vLLM's answers."""

_ROUNDING = 1e-2
"""Log-probs may be above 0 by as much."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A sequence of ids, and from where on its log-probs are wanted (at least 1)."""

    ids: tuple[int, ...]
    first: int

    @property
    def key(self) -> bytes:
        content = array("q", (self.first, *self.ids)).tobytes()
        return hashlib.sha256(content).digest()


@dataclass(frozen=True, slots=True)
class _Scored:
    """What a server said of the tokens from `first` on."""

    logprobs: array[float]
    texts: tuple[Any, ...]


class RemoteTeacher:
    """Scores the student's tokens with a model that a server holds.

    Sequences that were scored before are not asked for again, so a repeated step costs nothing.

    Args:
        url: Where the server listens, such as http://10.0.0.2:8000.
        student: The student whose tokens are to be scored.
        api: The dialect.
        model: Name of the model at the server; empty: the first that it lists.
        max_context: Longest sequence that will be scored, in tokens; None: not known.
        requests_at_once: Requests under way at the same time.
        timeout: Seconds to wait for an answer.

    Raises:
        ServerError: The server does not answer, or gives no log-probs of prompt tokens.
        AtodError: Another vocabulary, or too short a context.
    """

    def __init__(
        self,
        url: str,
        student: Policy,
        *,
        api: TeacherApi = "completions",
        model: str = "",
        max_context: int | None = None,
        requests_at_once: int = 8,
        timeout: float = 600.0,
    ) -> None:
        self._api = api
        self._client = connect(url, api, timeout)
        self.url = self._client.url
        self._threads = ThreadPoolExecutor(requests_at_once)
        self._known: OrderedDict[bytes, array[float]] = OrderedDict()
        self._known_tokens = 0
        self.name, limit = describe(self._client, api, model)
        if limit is not None and max_context is not None and max_context > limit:
            raise AtodError(
                f"Teacher {self.name} at {self.url} takes sequences of at most {limit} tokens, "
                f"the student's can have {max_context}. Use --model.max-context {limit}, or start "
                "the server with a longer context."
            )
        self._check_vocabulary(student, limit)

    def score(self, batch: Batch) -> Tensor:
        """Log-probs of the completion tokens under the teacher at temperature 1.

        Args:
            batch: The student's batch, packed or not.

        Returns:
            [R, T] float32, 0 on padding, on the batch's device.

        Raises:
            AtodError: The server fails, or its answer is malformed.
        """
        prompts = _prompts(batch)
        self._fetch([prompt for prompt in prompts if prompt is not None])
        scores = torch.zeros(batch.completion_ids.shape, dtype=torch.float32)
        lengths = batch.completion_mask.sum(dim=1).tolist()
        rows = zip(batch.sequence_index.tolist(), batch.start.tolist(), lengths, strict=True)
        for row, (sequence, start, length) in enumerate(rows):
            prompt = prompts[sequence]
            if prompt is None or not length:
                continue
            known = self._known[prompt.key]
            begin = start - prompt.first
            scores[row, :length] = torch.tensor(known[begin : begin + length])
        self._forget()
        return scores.to(batch.completion_ids.device)

    # -- what is known already ---------------------------------------------------------------------

    def _fetch(self, prompts: Sequence[_Prompt]) -> None:
        """Asks for what is not known yet, each once, several requests at a time."""
        missing: dict[bytes, _Prompt] = {}
        for prompt in prompts:
            if prompt.key in self._known:
                self._known.move_to_end(prompt.key)
            else:
                missing[prompt.key] = prompt
        requests = list(self._requests(list(missing.values())))
        futures = [self._threads.submit(self._ask, request) for request in requests]
        # A failure ends the step, but what came is kept for its repetition.
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
        for request, future in zip(requests, futures, strict=True):
            if future.cancelled() or future.exception() is not None:
                continue
            for prompt, scored in zip(request, future.result(), strict=True):
                self._known[prompt.key] = scored.logprobs
                self._known_tokens += len(scored.logprobs)
        for future in futures:
            if not future.cancelled():
                future.result()

    def _forget(self) -> None:
        """Drops what was longest out of use."""
        while self._known_tokens > _CACHED_TOKENS and len(self._known) > 1:
            _, dropped = self._known.popitem(last=False)
            self._known_tokens -= len(dropped)

    def _requests(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
        """Prompts that go in one request: SGLang schedules single ones just as well."""
        part, tokens = list[_Prompt](), 0
        most = _PROMPTS_PER_REQUEST if self._api == "completions" else 1
        for prompt in prompts:
            if part and (len(part) == most or tokens + len(prompt.ids) > _TOKENS_PER_REQUEST):
                yield part
                part, tokens = [], 0
            part.append(prompt)
            tokens += len(prompt.ids)
        if part:
            yield part

    # -- the two dialects --------------------------------------------------------------------------

    def _ask(self, prompts: Sequence[_Prompt], with_texts: bool = False) -> list[_Scored]:
        """Scores prompts in one request; texts come from vLLM always, from SGLang if asked for."""
        path = "/v1/completions" if self._api == "completions" else "/generate"
        try:
            if self._api == "completions":
                return self._ask_completions(prompts)
            return [self._ask_sglang(prompt, with_texts) for prompt in prompts]
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ServerError(
                f"POST {self.url}{path}: the answer gives no usable log-probs of the prompt's "
                f"tokens ({what}). {REMEDY[self._api]}."
            ) from error

    def _ask_completions(self, prompts: Sequence[_Prompt]) -> list[_Scored]:
        ids = [prompt.ids for prompt in prompts]
        body = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        answer = self._client.post("/v1/completions", {**body, "prompt_logprobs": 0})
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        if [choice["index"] for choice in choices] != list(range(len(prompts))):
            raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
        return [
            _scored(prompt, _completions_entries(prompt, choice))
            for prompt, choice in zip(prompts, choices, strict=True)
        ]

    def _ask_sglang(self, prompt: _Prompt, with_texts: bool) -> _Scored:
        body = {
            "input_ids": prompt.ids,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            # The first entry that comes has no log-prob.
            "logprob_start_len": prompt.first - 1,
            "return_text_in_logprobs": with_texts,
        }
        answer = self._client.post("/generate", body)
        return _scored(prompt, _sglang_entries(prompt, answer))

    # -- the vocabulary ----------------------------------------------------------------------------

    def _check_vocabulary(self, student: Policy, limit: int | None) -> None:
        """Compares the texts of ids at the server with those of the student's tokenizer."""
        tokenizer = student.tokenizer
        ids = _probe_ids(tokenizer)
        size = max(1, min(_PROBED, limit or _PROBED) - 1)
        # Before an entry with a log-prob there must be a token.
        prompts = [
            _Prompt((ids[0], *ids[begin : begin + size]), 1) for begin in range(0, len(ids), size)
        ]
        requests = self._requests(prompts)
        try:
            answers = [answer for request in requests for answer in self._ask(request, True)]
        except ServerError as error:
            if error.status not in (400, 422):
                raise
            raise AtodError(
                f"Teacher {self.name} at {self.url} refuses ids of the student's vocabulary "
                f"({error}). Use a teacher of the same model family."
            ) from error
        told = {
            token_id: text
            for prompt, answer in zip(prompts, answers, strict=True)
            for token_id, text in zip(prompt.ids[1:], answer.texts, strict=True)
            if isinstance(text, str)
        }
        if not any(told.values()):
            warnings.warn(
                f"The server at {self.url} gives no texts of tokens, so its vocabulary could not "
                "be compared with the student's; make sure that they are the same.",
                stacklevel=3,
            )
        elif different := _different(tokenizer, told):
            shown = ", ".join(
                f"{token_id} is {told[token_id]!r} for the teacher and "
                f"{tokenizer.convert_ids_to_tokens(token_id)!r} for the student"
                for token_id in different[:3]
            )
            raise AtodError(
                f"Teacher {self.name} at {self.url} and student {student.name} do not share a "
                f"vocabulary: {len(different)} of {len(told)} ids that were compared differ (for "
                f"example {shown}). Use a teacher of the same model family."
            )


def _prompts(batch: Batch) -> list[_Prompt | None]:
    """One prompt for each sequence of a batch; None for one without sampled tokens."""
    has_tokens = batch.completion_mask.any(dim=1)
    count, longest = batch.input_ids.shape
    first = torch.full((count,), longest, dtype=torch.int64, device=batch.start.device)
    first = first.scatter_reduce(
        0, batch.sequence_index[has_tokens], batch.start[has_tokens], "amin"
    )
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows = zip(batch.input_ids.tolist(), lengths, first.tolist(), strict=True)
    return [
        _Prompt(tuple(ids[:length]), begin) if begin < length else None
        for ids, length, begin in rows
    ]


def _completions_entries(prompt: _Prompt, choice: dict[str, Any]) -> list[tuple[Any, str | None]]:
    """vLLM: one entry per position, a mapping from ids to what is known of them."""
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise ValueError("there are no prompt_logprobs")
    if len(entries) != len(prompt.ids):
        raise ValueError(f"{len(entries)} entries for {len(prompt.ids)} tokens")
    found = []
    for position in range(prompt.first, len(prompt.ids)):
        entry = entries[position] or {}
        token = entry.get(str(prompt.ids[position]))
        if token is None:
            raise ValueError(f"id {prompt.ids[position]} is missing at position {position}")
        found.append((token["logprob"], token.get("decoded_token")))
    return found


def _sglang_entries(prompt: _Prompt, answer: dict[str, Any]) -> list[tuple[Any, str | None]]:
    """SGLang: (log-prob, id, text), aligned at the end; versions differ in where they begin."""
    entries = answer["meta_info"].get("input_token_logprobs")
    if entries is None:
        raise ValueError("there are no input_token_logprobs")
    wanted = len(prompt.ids) - prompt.first
    if len(entries) < wanted:
        raise ValueError(f"{len(entries)} entries for {wanted} tokens")
    found = []
    for position, entry in enumerate(entries[len(entries) - wanted :], start=prompt.first):
        if entry[1] != prompt.ids[position]:
            raise ValueError(f"id {entry[1]} at position {position}, not {prompt.ids[position]}")
        found.append((entry[0], entry[2] if len(entry) > 2 else None))
    return found


def _scored(prompt: _Prompt, entries: Sequence[tuple[Any, Any]]) -> _Scored:
    """Checks (log-prob, text) of each position from `first` on."""
    for position, (logprob, _) in enumerate(entries, start=prompt.first):
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise ValueError(f"no log-prob at position {position}: {logprob!r}")
        if math.isnan(logprob) or logprob > _ROUNDING:
            raise ValueError(f"log-prob {logprob} at position {position}")
    return _Scored(array("f", [max(e[0], _LOWEST) for e in entries]), tuple(e[1] for e in entries))


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All added tokens, and ids from all over the vocabulary."""
    everything = sorted(tokenizer.get_vocab().values())
    spread = everything[:: max(1, len(everything) // _PROBED)]
    added = (i for i in tokenizer.added_tokens_decoder if i <= everything[-1])
    return sorted({*added, *spread, everything[-1]})


def _different(tokenizer: PreTrainedTokenizerBase, told: dict[int, str]) -> list[int]:
    """Ids that have another text at the server, or none, as those beyond its vocabulary have."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Some servers leave special tokens out of every text.
    shows_special = any(told.get(token_id) for token_id in special)
    return [
        token_id
        for token_id, text in told.items()
        if not _is_text_of(tokenizer, token_id, text)
        and (text or shows_special or token_id not in special)
    ]


def _is_text_of(tokenizer: PreTrainedTokenizerBase, token_id: int, text: str) -> bool:
    """Whether a server may call a token this; servers differ in how they show one alone."""
    decoded = tokenizer.decode([token_id])
    token = tokenizer.convert_ids_to_tokens(token_id)
    assert isinstance(decoded, str)
    assert isinstance(token, str)
    # A part of a character has no text of its own.
    if "\ufffd" in text or "\ufffd" in decoded:
        return True
    return text.strip() in {decoded.strip(), token.strip(), token.strip("\u2581\u0120 ")}
