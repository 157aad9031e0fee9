"""The vectors of a corpus in a .npy file: written once, mapped afterwards.

Encoding takes long, so the file grows block by block under another name, and what a killed process
left is continued. It gets its name when it is complete. The name says what the vectors depend on:
the corpus, the encoder's weights and tokenizer, prefixes, pooling and maximal length.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from env_servers.retrieval.corpus import Corpus
from env_servers.retrieval.encoder import Encoder, EncoderError
from env_servers.retrieval.nearest import Matrix
from env_servers.retrieval.progress_line import progress_line

BLOCK = 2048
"""Passages that are encoded, then written, before the next ones are read."""
_FORMAT = 1
"""Raised when vectors would come out otherwise, so that old files are not opened."""
_CHECKED_ROWS = 8
_LARGEST_DISTANCE = 0.05
"""Far above what number formats and batches make, about 0.01 for bfloat16."""
_DTYPE = np.dtype("<f2")

_LOG = logging.getLogger("env_servers")


def encoded_corpus(corpus: Corpus, encoder: Encoder) -> NDArray[np.float16]:
    """The vectors float16 [passages, dimension] of a small corpus, in memory."""
    return np.concatenate(list(_blocks(corpus, encoder, 0)))


def stored_vectors(corpus: Corpus, encoder: Encoder, folder: Path) -> Matrix:
    """Maps the vectors float16 [passages, dimension] in a folder; makes them if there are none.

    Raises:
        EncoderError: what is stored is damaged.
        OSError: the folder cannot be written.
    """
    key = f"{_FORMAT} {corpus.hash} {encoder.identity()}"
    path = folder / f"vectors-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with _locked(partial) as file:
            # Another process may have made them while this one waited for it.
            if not path.exists():
                _continue(file, corpus, encoder)
                partial.rename(path)
    matrix = _mapped(path)
    if matrix.dtype != _DTYPE or matrix.shape != (len(corpus), encoder.dimension):
        raise EncoderError(f"the stored vectors {path} are damaged: delete this file")
    return matrix


def given_vectors(corpus: Corpus, encoder: Encoder, path: Path) -> Matrix:
    """Maps vectors that the user has, after a look at whether they are this encoder's.

    Args:
        corpus: its passages are in the order of the rows.
        encoder: what the vectors were made with.
        path: a .npy file with float16 or float32 [passages, dimension], rows of length 1.

    Raises:
        EncoderError: they do not fit the corpus or the encoder.
    """
    matrix = _mapped(path)
    if matrix.ndim != 2 or matrix.dtype not in (np.float16, np.float32):
        raise EncoderError(f"--vectors {path} must be a float16 or float32 matrix")
    if len(matrix) != len(corpus):
        raise EncoderError(
            f"--vectors {path} has {len(matrix):,} rows and the corpus {len(corpus):,} passages:"
            " give the vectors of this corpus"
        )
    if matrix.shape[1] != encoder.dimension:
        raise EncoderError(
            f"--vectors {path} has {matrix.shape[1]} numbers a row and the encoder {encoder.name}"
            f" makes {encoder.dimension}: give the encoder that made them"
        )
    rows = np.unique(np.linspace(0, len(corpus) - 1, _CHECKED_ROWS).astype(int)).tolist()
    expected = encoder.encode_passages(corpus.contents(rows))
    distances = np.linalg.norm(matrix[rows].astype(np.float32) - expected, axis=1)
    for row, distance in zip(rows, distances.tolist(), strict=True):
        if not distance <= _LARGEST_DISTANCE:
            raise EncoderError(
                f"--vectors {path}: row {row} is not what the encoder {encoder.name} makes of"
                f" passage {row}, it is {distance:.2f} away. Rows must be in the order of the"
                " corpus, of length 1, and made with the same encoder, --passage-prefix, --pooling"
                " and --max-length"
            )
    return matrix


def _blocks(corpus: Corpus, encoder: Encoder, done: int) -> Iterator[NDArray[np.float16]]:
    """The vectors of all passages from a row on, block by block."""
    with progress_line("Encoding passages", len(corpus), done) as count:
        for begin in range(done, len(corpus), BLOCK):
            rows = range(begin, min(begin + BLOCK, len(corpus)))
            yield encoder.encode_passages(corpus.contents(rows), count).astype(_DTYPE)


def _continue(file: IO[bytes], corpus: Corpus, encoder: Encoder) -> None:
    """Writes what is missing of a file that holds the first blocks, or nothing."""
    header = io.BytesIO()
    shape = (len(corpus), encoder.dimension)
    np.lib.format.write_array_header_1_0(
        header, {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
    )
    bytes_of_block = BLOCK * encoder.dimension * _DTYPE.itemsize
    blocks = max(0, file.seek(0, os.SEEK_END) - header.tell()) // bytes_of_block
    file.seek(0)
    file.write(header.getvalue())
    file.seek(blocks * bytes_of_block, os.SEEK_CUR)
    file.truncate()
    for vectors in _blocks(corpus, encoder, blocks * BLOCK):
        file.write(vectors.data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """A file to be read and written, as soon as no other process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with open(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning("Waiting for another process, which is encoding this corpus.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _mapped(path: Path) -> Matrix:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise EncoderError(f"there is no file {path} with vectors") from None
    except (OSError, ValueError, EOFError) as error:
        raise EncoderError(f"{path} is no .npy file with vectors ({error})") from error
