"""The generated world: reproducible, unambiguous, easy to find, and with splits kept apart."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import combinations

import pytest

from env_servers.retrieval.world import SPLITS, Question, World
from env_servers.retrieval.world_entities import Draws, Entity, make_entities
from env_servers.retrieval.world_words import KINDS, MAX_STEMS, WORDS, stems
from env_servers.search.bm25 import BM25Index
from env_servers.search.lucene import term_of

DIGESTS = {
    (1_000, 0): "c4ad0204d58cc36f76a7b224edc6c70720063ff59960edf32e11a43dbe7e6dcc",
    (60, 7): "531df89eac617516f7ffcd835df9997304d4c055b8205a7ff6f98a283b0909ca",
}
SHARES = {"one_hop": 0.60, "bridge": 0.25, "comparison": 0.15}
WORD = re.compile(r"\w+|[^\w\s]")


def digest(world: World) -> str:
    asked = [question for split in SPLITS for question in world.questions(split)]
    text = ascii([[tuple(p) for p in world.passages], [
        (q.id, q.question, q.golden_answers, q.kind, q.support) for q in asked]])  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4)
def generated(entities: int = 1_000, seed: int = 0) -> World:
    return World(entities, seed)


def all_questions(world: World) -> list[Question]:
    return [question for split in SPLITS for question in world.questions(split)]


def known_entities(world: World) -> dict[str, Entity]:
    made = make_entities(Draws(world.seed, world.entities), world.entities)
    return {entity.id: entity for entity in made}


def title(contents: str) -> str:
    return contents.partition("\n")[0].strip('"')


def used_ids(questions: tuple[Question, ...]) -> set[str]:
    return {support for question in questions for support in question.support}


def words(text: str) -> set[str]:
    return set(WORD.findall(text))


@pytest.mark.parametrize(("entities", "seed"), DIGESTS)
def test_a_seed_gives_the_same_bytes_everywhere(entities: int, seed: int) -> None:
    assert digest(World(entities, seed)) == DIGESTS[entities, seed]
    assert digest(generated(entities, seed + 1)) != DIGESTS[entities, seed]


def test_neither_the_hash_seed_nor_the_order_of_calls_matters() -> None:
    code = (
        "from env_servers.retrieval.world import World\n"
        "world = World(60, 7)\n"
        "for split in ('train', 'dev', 'test'):\n"
        "    print([(q.id, q.question) for q in world.questions(split)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    world = World(60, 7)
    own = {s: [(q.id, q.question) for q in world.questions(s)] for s in ("test", "dev", "train")}
    assert printed == {f"{own['train']}\n{own['dev']}\n{own['test']}\n"}
    assert world.questions("dev") is world.questions("dev")


@pytest.mark.slow
def test_sizes_and_shares() -> None:
    world = generated()
    assert {s: len(world.questions(s)) for s in SPLITS} == {"dev": 302, "test": 500, "train": 3_699}
    for split in SPLITS:
        kinds = Counter(question.kind for question in world.questions(split))
        for kind, share in SHARES.items():
            assert kinds[kind] == pytest.approx(share * kinds.total(), abs=1.01), (split, kind)


@pytest.mark.parametrize("entities", [50, 51, 77, 200, 999, 1_000, 5_000])
def test_there_is_one_passage_for_each_entity(entities: int) -> None:
    world = generated(entities)
    ids = [passage.id for passage in world.passages]
    assert len(ids) == len(set(ids)) == entities == world.entities
    assert ids == sorted(ids)
    assert {len(i) for i in ids} == {len(str(entities - 1))}
    titles = [title(passage.contents) for passage in world.passages]
    assert len({name.removeprefix("The ") for name in titles}) == entities
    for passage, name in zip(world.passages, titles, strict=True):
        first, text = passage.contents.split("\n")
        assert first == f'"{name}"'
        assert name in text
        assert re.fullmatch(r"[A-Z][^.{}]+\.( [A-Z][^.{}]+\.){2}", text), text
        assert 25 <= len(text.split()) <= 50


@pytest.mark.parametrize("entities", [50, 1_000])
def test_every_question_has_one_answer_which_is_in_its_support(entities: int) -> None:
    world = generated(entities, 3)
    contents = dict(world.passages)
    asked = all_questions(world)
    assert len({q.id for q in asked}) == len({q.question for q in asked}) == len(asked)
    for question in asked:
        assert re.fullmatch(r"[A-Z][^{}?]+\?", question.question)
        texts = [contents[i] for i in question.support]
        assert len(set(texts)) == len(texts) == (1 if question.kind == "one_hop" else 2)
        places = [question.golden_answers[0] in text for text in texts]
        assert any(places) if question.kind == "comparison" else places[-1]
        names = [title(text) in question.question for text in texts]
        # The second name of a bridge must be found out.
        assert names == {"one_hop": [True], "bridge": [True, False]}.get(
            question.kind, [True, True]
        )
        told = re.search(rf"\b{question.golden_answers[0]}\b", question.question)
        assert (told is not None) == (question.kind == "comparison")


@pytest.mark.parametrize(("entities", "seed"), [(50, 0), (300, 1), (1_000, 0), (1_000, 5)])
def test_splits_share_no_entity(entities: int, seed: int) -> None:
    world = generated(entities, seed)
    contents = dict(world.passages)
    used = {split: used_ids(world.questions(split)) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not used[one] & used[other]
        assert {q.id for q in world.questions(one)}.isdisjoint(q.id for q in world.questions(other))
        for split, names in ((one, used[other]), (other, used[one])):
            pattern = re.compile("|".join(re.escape(title(contents[i])) + r"\b" for i in names))
            for question in world.questions(split):
                assert not pattern.search(f"{question.question} {question.golden_answers}")
            assert not any(pattern.search(contents[i]) for i in used[split])


def test_all_values_that_are_entities_are_of_the_same_split() -> None:
    entities = known_entities(generated())
    by_name = {entity.name: entity for entity in entities.values()}
    for entity in entities.values():
        for relation in entity.kind.relations:
            value = entity.values[relation.name]
            assert (value in by_name) == (relation.target is not None)
            if relation.target:
                assert by_name[value].kind.name == relation.target
                assert by_name[value].split == entity.split


@pytest.mark.slow
@pytest.mark.parametrize(("entities", "seed"), [(1_000, 0), (1_000, 4), (1_001, 1), (5_000, 2)])
def test_evaluation_uses_words_of_the_training_split(entities: int, seed: int) -> None:
    world = generated(entities, seed)
    contents = dict(world.passages)
    found = {}
    for split in SPLITS:
        asked = world.questions(split)
        texts = [contents[i] for i in used_ids(asked)]
        texts += [" ".join((q.question, *q.golden_answers)) for q in asked]
        found[split] = set[str]().union(*map(words, texts))
    assert found["dev"] | found["test"] <= found["train"]


def test_the_vocabulary_is_small_and_the_same_for_every_seed() -> None:
    vocabularies = []
    for seed in (0, 5):
        world = generated(1_000, seed)
        texts = [*dict(world.passages).values(), *(q.question for q in all_questions(world))]
        vocabularies.append(set[str]().union(*map(words, texts)))
        assert len(vocabularies[-1]) < 1_000
    # A late year may be missing from one of them.
    assert all(word.isdigit() for word in vocabularies[0] ^ vocabularies[1])


def test_names_have_neighbours() -> None:
    names = [title(passage.contents) for passage in generated().passages]
    shared = Counter(word for name in names for word in set(name.split()) if word != "The")
    assert min(shared.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("entities", [1_000, 20_000])
def test_bm25_finds_named_entities(entities: int) -> None:
    world = generated(entities)
    index = BM25Index.build(world.passages)
    titles = {passage.id: title(passage.contents) for passage in world.passages}
    asked = [*world.questions("test"), *world.questions("dev")]

    def hit(query: str, wanted: set[str]) -> bool:
        return wanted <= {found.id for found in index.search(query, 3)}

    for kind in SHARES:
        several = [q for q in asked if q.kind == kind]
        named = [hit(titles[i], {i}) for q in several for i in q.support]
        assert sum(named) >= 0.99 * len(named)
        whole = [hit(q.question, set(q.support)) for q in several]
        # One search is not enough for a bridge.
        share = sum(whole) / len(whole)
        assert (share < 0.05) if kind == "bridge" else (share > 0.7)


def test_lives_and_years_are_plausible() -> None:
    entities = known_entities(generated(5_000))
    facts = {entity.name: entity.values for entity in entities.values()}
    for entity in entities.values():
        own = facts[entity.name]
        if entity.kind.name == "person":
            assert 50 <= int(own["death_year"]) - int(own["birth_year"]) <= 85
            assert own["birthplace"] != own["deathplace"]
        elif entity.kind.name == "town":
            assert own["region"] == facts[own["river"]]["region"]
            assert int(own["founded"]) < int(own["charter"])
        elif entity.kind.name in ("company", "book"):
            is_book = entity.kind.name == "book"
            life = facts[own["author" if is_book else "founder"]]
            year = int(own["published" if is_book else "founded"])
            assert int(life["birth_year"]) + 20 < year < int(life["death_year"])
    assert all(
        facts[own["factory"]] != facts[own["headquarters"]]
        for own in facts.values()
        if "factory" in own
    )
    assert all(own["author"] != own["illustrator"] for own in facts.values() if "author" in own)


def test_pools_are_made_for_combining() -> None:
    known = stems(MAX_STEMS + 1)
    assert len({term_of(stem) for stem in known}) == len(known) == MAX_STEMS
    last_words = [WORDS[name] for name in ("places", "waters", "firms", "title_nouns")]
    others = {*WORDS["women"], *WORDS["men"], *WORDS["title_adjectives"]}.union(*last_words)
    assert not {term_of(word) for word in others} & {term_of(stem) for stem in known}
    assert sum(map(len, last_words)) == len(set[str]().union(*last_words))
    assert sum(kind.share for kind in KINDS) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("entities", "seed", "message"),
    [
        (49, 0, "entities must be from 50 to 100,000, not 49"),
        (100_001, 0, "entities must be from 50 to 100,000, not 100001"),
        (True, 0, "entities must be an integer, not True"),
        (100.0, 0, "entities must be an integer, not 100.0"),
        (100, "1", "seed must be an integer, not '1'"),
        (100, -1, "seed must be 0 or more, not -1"),
    ],
)
def test_bad_settings_are_refused(entities: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        World(entities, seed)
    with pytest.raises(ValueError, match="unknown split 'validation'; known: dev, test, train"):
        generated(60, 7).questions("validation")


@pytest.mark.slow
def test_the_largest_world() -> None:
    world = World(100_000, 2**40)
    names = {title(passage.contents).removeprefix("The ") for passage in world.passages}
    assert len(names) == len(world.passages) == 100_000
    assert [len(world.questions(split)) for split in ("dev", "test")] == [302, 500]
