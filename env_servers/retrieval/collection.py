"""Define the content of a server: a corpus, its retriever, and questions of a generated world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from env_servers.retrieval.bm25 import (
    BM25Retriever,
    IndexedCorpus,
    index_cache,
    index_file,
    index_passages,
)
from env_servers.retrieval.corpus import Corpus, CorpusError, Retriever
from env_servers.retrieval.corpus_files import LeftOut
from env_servers.retrieval.settings import CollectionSettings, EncoderSettings
from env_servers.retrieval.world import SPLITS, World


@dataclass(frozen=True, slots=True)
class Collection:
    """A corpus and its retriever, ready to be searched."""

    settings: CollectionSettings
    corpus: Corpus
    retriever: Retriever
    world: World | None
    """The generated world with its questions; None if the corpus is a file."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Rows of the corpus file that are not used."""

    @property
    def label(self) -> str:
        """Return `generated`, or the absolute path of the corpus."""
        path = self.settings.corpus
        return "generated" if path is None else str(path.resolve())

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits of the questions, sorted."""
        return () if self.world is None else SPLITS

    @classmethod
    def open(
        cls, settings: CollectionSettings, encoding: EncoderSettings | None = None
    ) -> Collection:
        """Generate the world, or open the corpus file, which is indexed on first use.

        Raises:
            CorpusError: the file cannot be read, or its index cannot be used.
            ValueError: a setting is out of range, or the encoder cannot be used.
        """
        world = encoder = None
        k1, b = settings.k1, settings.b
        index: Callable[[], IndexedCorpus]
        if settings.corpus is None:
            world = World(settings.entities, settings.world_seed)
            index = partial(index_passages, world.passages, k1, b)
        else:
            index = partial(index_file, settings.corpus, k1, b, settings.index)
        if settings.encoder is not None:
            # Optional packages. Errors of encoder and vectors must be raised before indexing.
            from env_servers.retrieval.dense import vectors_file
            from env_servers.retrieval.encoder import Encoder

            encoder = Encoder.load(settings.encoder, encoding or EncoderSettings())
            if settings.vectors is not None:
                vectors_file(settings.vectors, encoder)
        indexed = index()
        retriever: Retriever = BM25Retriever(indexed.bm25)
        if encoder is not None:
            from env_servers.retrieval.dense import DenseRetriever, HybridRetriever

            # Other settings of BM25 use the same vectors.
            folder = settings.index or index_cache() / "vectors"
            try:
                dense = DenseRetriever.open(indexed.corpus, encoder, folder, settings.vectors)
            except OSError as error:
                raise CorpusError(
                    f"Cannot store the vectors of the passages in {folder}:"
                    f" {error.strerror or error}."
                ) from error
            is_hybrid = settings.retriever == "hybrid"
            retriever = HybridRetriever(retriever, dense) if is_hybrid else dense
        return cls(settings, indexed.corpus, retriever, world, indexed.left_out)
