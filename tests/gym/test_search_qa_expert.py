"""The scripted searcher: it reads questions and results, and answers from what it can see."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_gym.envs.search_qa.env import information, parse_action
from atod_gym.envs.search_qa.expert import ScriptedSearcher
from atod_gym.envs.search_qa.settings import make_passage
from env_servers.retrieval.world import SPLITS, World
from env_servers.retrieval.world_words import KINDS
from env_servers.search.bm25 import BM25Index

START = "Find out by searching, then give a short answer."
NOTHING = "<information>\nNo passage matches this query.\n</information>"
MARTA = (
    "Marta Halden",
    "Marta Halden was a painter who was born in Halden Mill in 1843. In later life Halden moved to"
    " Norden Gate, where she died in 1908. All her life Halden played the oboe.",
)
MILL = (
    "Halden Mill",
    "Halden Mill is a small town on the Ostby Brook in the Salt Coast. The town charter was granted"
    " in 1790, but the town was founded in 1751. Halden Mill is known for its lace.",
)
GATE = (
    "Norden Gate",
    "The town of Norden Gate lies in the Long Valley, on the banks of the Ostby Brook. Settlers"
    " founded it in 1722, and its town charter dates from 1763. Norden Gate is known for its silk.",
)
FILM = ("Halden (film)", "Halden is a film about a mill (a real one) in Halden Mill.")


def results(*passages: tuple[str, str]) -> str:
    found = [make_passage("", f'"{title}"\n{text}') for title, text in passages]
    return information(found, 1_000, 4_000)[0]


@lru_cache(maxsize=2)
def library(entities: int, seed: int) -> tuple[World, Callable[[str], str]]:
    """A world, and what a search in it shows."""
    world = World(entities, seed)
    index = BM25Index.build(world.passages)
    contents = dict(world.passages)

    def shown(query: str) -> str:
        found = [make_passage(hit.id, contents[hit.id]) for hit in index.search(query, 3)]
        return information(found, 1_000, 4_000)[0]

    return world, shown


def play(
    question: str,
    shown: Callable[[str], str],
    *,
    searcher: ScriptedSearcher | None = None,
    replaced: dict[int, str] | None = None,
    max_turns: int = 4,
) -> tuple[str, list[str]]:
    """The answer (empty if none was given) and all queries.

    Args:
        replaced: actions that are executed instead of the searcher's, by turn from 1.
    """
    searcher = searcher or ScriptedSearcher(max_turns)
    searcher.reset(question, START)
    text, last, queries = START, None, []
    for turn in range(1, max_turns + 1):
        action = searcher.act(text, (), last)
        last = (replaced or {}).get(turn)
        verb, argument = parse_action(last or action)
        assert verb or last is not None
        if verb == "answer":
            return argument, queries
        if verb == "search":
            queries.append(argument)
        text = shown(argument) if verb else "This is no action."
    return "", queries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entities", "seed", "splits", "least"),
    [(1_000, 0, SPLITS, 0.99), (1_000, 1, SPLITS, 0.99), (60, 3, SPLITS, 0.99),
     (10_000, 2, ["test"], 0.98)],
)  # fmt: skip
def test_it_answers_the_generated_questions(
    entities: int, seed: int, splits: Sequence[str], least: float
) -> None:
    world, shown = library(entities, seed)
    searcher = ScriptedSearcher()
    for split in splits:
        asked = world.questions(split)
        answers = [play(one.question, shown, searcher=searcher)[0] for one in asked]
        right = [a in one.golden_answers for a, one in zip(answers, asked, strict=True)]
        assert sum(right) >= least * len(right)


def test_it_parses_every_wording() -> None:
    searcher = ScriptedSearcher()

    def first_action(question: str) -> str:
        searcher.reset(question, START)
        return searcher.act(START)

    relations = {kind.name: kind.relations for kind in KINDS}
    for kind in KINDS:
        name = kind.subject.format(name="Ada Orn")
        for relation in kind.relations:
            for template in relation.questions + relation.first + relation.last:
                assert first_action(template.format(x=name, y="Leo Orn")) == "search[Ada Orn]"
            for phrase in relation.phrases:
                for following in relations[str(relation.target)]:
                    for template in following.questions:
                        question = template.format(x=phrase.format(x=name))
                        assert first_action(question) == "search[Ada Orn]", question


def test_it_searches_for_names_and_takes_no_turn_too_many() -> None:
    world, shown = library(1_000, 0)
    titles = {i: contents.split("\n")[0].strip('"') for i, contents in world.passages}
    for question in world.questions("test"):
        _, queries = play(question.question, shown)
        assert queries == [titles[i] for i in question.support]


def test_it_recovers_from_a_turn_with_a_foreign_action() -> None:
    world, shown = library(1_000, 0)
    rng = random.Random(1)
    titles = [contents.split("\n")[0].strip('"') for _, contents in world.passages]
    right = 0
    asked = world.questions("test")
    for question in asked:
        instead = rng.choice([f"search[{rng.choice(titles)}]", "search[zzz]", "look around"])
        answer, _ = play(question.question, shown, replaced={rng.randint(1, 3): instead})
        right += answer in question.golden_answers
    assert right >= 0.99 * len(asked)


def test_a_bridge_step_by_step() -> None:
    searcher = ScriptedSearcher()
    searcher.reset("In which region lies the town where Marta Halden was born?", START)
    assert searcher.act(START) == "search[Marta Halden]"
    # Another agent searched for something else.
    assert searcher.act(results(GATE), (), "search[Norden]") == "search[Marta Halden]"
    assert searcher.act(results(FILM, MARTA, GATE)) == "search[Halden Mill]"
    assert searcher.act(results(MILL)) == "answer[Salt Coast]"


def test_it_uses_earlier_results() -> None:
    searcher = ScriptedSearcher()
    searcher.reset("Which was founded later, Halden Mill or Norden Gate?", START)
    assert searcher.act(START) == "search[Halden Mill]"
    assert searcher.act(results(MILL, GATE)) == "answer[Halden Mill]"
    searcher.reset("Which was founded later, Halden Mill or Norden Gate?", START)
    assert searcher.act(START) == "search[Halden Mill]"


def test_a_name_that_is_not_found_is_searched_with_the_question_then_guessed() -> None:
    question = "Where was Marta Halden born?"
    searcher = ScriptedSearcher()
    searcher.reset(question, START)
    assert searcher.act(START) == "search[Marta Halden]"
    assert searcher.act(NOTHING) == f"search[{question}]"
    assert searcher.act(results(FILM)) == "answer[Halden (film)]"
    searcher.reset("What is the town where Marta Halden died known for?", START)
    searcher.act(START)
    assert searcher.act(results(MARTA)) == "search[Norden Gate]"
    assert searcher.act(NOTHING).startswith("search[What is")
    assert searcher.act(NOTHING) == "answer[Norden Gate]"


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        ("how many  people\nlive in halden", results(MILL), "Halden Mill"),
        ("Where was Marta Halden born?", results(MARTA), "Halden Mill"),
        ("where was marta halden born", results(MARTA), "Halden Mill"),
        ("When did Marta Halden die?", results(FILM, MARTA), "1908"),
        ("Who wrote the national anthem of Norway", results(FILM, MILL), "Halden (film)"),
        ("Who died first, Marta Halden or Ada Orn?", results(MARTA), "Marta Halden"),
        ("how many people live in halden", results((" ", "?"), MILL), "Halden Mill"),
        ("how many people live in halden", NOTHING, "how many people live in halden"),
        ("", NOTHING, "unknown"),
    ],
)
def test_answers(question: str, text: str, expected: str) -> None:
    answer, queries = play(question, lambda query: text)
    assert answer == expected
    assert (queries == []) == (question == "")
    if question.startswith("how"):
        # A question in other words is searched as it is.
        assert queries == ["how many people live in halden"]


@given(st.text(), st.lists(st.text()), st.none() | st.text())
def test_it_never_raises(question: str, texts: list[str], last: str | None) -> None:
    searcher = ScriptedSearcher()
    searcher.reset(question, START)
    for text in (START, *texts, results((question, question))):
        assert searcher.act(text, (), last).startswith(("search[", "answer["))


@given(
    st.sampled_from([q for kind in KINDS for r in kind.relations for q in r.questions + r.first]),
    st.text(),
    st.lists(st.tuples(st.text(), st.text())),
)
def test_it_never_raises_for_questions_that_it_can_parse(
    template: str, name: str, passages: list[tuple[str, str]]
) -> None:
    answer, queries = play(
        template.format(x=name, y=name[::-1]), lambda query: results(*passages, (name, name))
    )
    assert len(queries) <= 3
    assert answer or not name.strip()


@pytest.mark.parametrize(
    ("golden", "answer"),
    [
        (("Winchester", "the salt COAST."), "the salt COAST."),  # as exact match reads it
        (("oast",), "Halden Mill"),  # no part of a word; the guess is the title
        (("Halden Mill", "1751"), "Halden Mill"),
        ((), "Halden Mill"),
    ],
)
def test_with_gold_answers_it_gives_the_one_in_a_passage(
    golden: tuple[str, ...], answer: str
) -> None:
    searcher = ScriptedSearcher(golden_answers=golden)
    question = "where do they make lace with salt water"
    found = play(question, lambda query: results(MILL), searcher=searcher)
    assert found == (answer, [question])


def test_with_gold_answers_it_searches_until_a_passage_contains_one() -> None:
    searcher = ScriptedSearcher(golden_answers=("Marta Halden", "1751"))
    question = "When was Halden Mill founded?"

    def shown(query: str) -> str:
        return results(MILL if query == question else GATE)

    found = play(question, shown, searcher=searcher)
    assert found == ("1751", ["Halden Mill", question])
