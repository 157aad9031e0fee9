"""Settings of Search-QA, its questions and corpus, and requests to its retrieval server.

The server is ours or any that answers `POST /retrieve` as Search-R1's does. Functions
raise `DataNotFoundError` if questions, corpus or split are missing (with the command that gets
them, or the known ones), `InvalidSettingError` if a setting or file cannot be used or does not
fit the server, and `ServerError` if the server does not start, fails or sends malformed answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atod_gym.envs.search_qa.questions import (
    DataFile,
    Question,
    QuestionSet,
    has_corpus_name,
    list_files,
    make_question_set,
    missing_official,
    open_question_files,
    scan,
)
from atod_gym.envs.turn_env import check_integer
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.serving.connection import ServedConnection, ServerSettings, connect
from atod_gym.serving.http import in_batches
from atod_gym.tasks import DataSource, announce_once, check_data, expanded, locate

BATCH_LIMIT = 1024
"""Maximum number of queries of one request."""

RETRY_DELAYS = (0.2, 0.8)
"""Seconds before a search is repeated after status 500 or a malformed answer."""

HOW_TO_GET_DATA = (
    "run atod-data get searchqa searchqa-corpus, or put question files such as nq/test.jsonl of "
    "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets and a corpus, as JSON lines, such "
    "as wiki-18.jsonl of https://huggingface.co/datasets/PeterJinGo/wiki-18-corpus into "
    "~/.cache/searchqa, or name their folder in the environment variable SEARCHQA_DATA"
)
DEFAULT_ENTITIES = 1000
DEFAULT_WORLD_SEED = 0
MIN_PASSAGE_CHARACTERS = 20
MIN_CHARACTERS = 100
"""Smallest budget of an observation."""

_LEAST = {"topk": 1, "passage_characters": MIN_PASSAGE_CHARACTERS, "entities": 1,
          "observation_characters": MIN_CHARACTERS, "world_seed": 0}  # fmt: skip
_ID_FIELDS = ("id", "_id", "docid")
_CORPUS_FORMAT = "JSON lines or a JSON array with id and contents (or text and title), also packed"


@dataclass(frozen=True, slots=True)
class SearchQASettings:
    """The arguments of `SearchQAEnv` that decide what is played, searched and shown; checked."""

    data: str | os.PathLike[str] = "auto"
    server_url: str | None = None
    corpus: str | os.PathLike[str] | None = None
    topk: int = 3
    passage_characters: int = 1000
    observation_characters: int = 4000
    entities: int = DEFAULT_ENTITIES
    world_seed: int = DEFAULT_WORLD_SEED
    timeout: float = 60.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_data(self.data)
        if self.corpus is not None and not isinstance(self.corpus, str | os.PathLike):
            raise InvalidSettingError(f"corpus must be a path or None, not {self.corpus!r}.")
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), least)
        if self.corpus is not None and self.server_url is not None:
            raise InvalidSettingError(
                "Give corpus or server_url, not both: a running server has its own corpus."
            )
        if self.corpus is not None and self.data == "generated":
            raise InvalidSettingError(
                'data="generated" has its own passages; give corpus with question files only.'
            )

    def locate(self) -> Path | None:
        """Return the folder of the question files, or the one file; None: a generated world."""
        try:
            found = locate(self.data, SOURCE, lambda found: not missing_official(found))
        except DataNotFoundError as error:
            folder = expanded(self.data)
            raise DataNotFoundError(f"{error}{_there(scan(folder), folder)}") from None
        if found is None:
            if self.corpus is not None:
                raise DataNotFoundError(
                    f"A corpus is given, but no question files were found: {HOW_TO_GET_DATA}."
                )
            return None
        if found.is_file():
            [file] = scan(found, self.corpus_path)
            if file.kind != "questions":
                raise InvalidSettingError(f"{found} {file.note or 'is a corpus, not questions'}.")
        if self.data == "official" and (why := missing_official(found)):
            raise DataNotFoundError(
                f"The question files in {found} are not all of the official ones: {why}. To play "
                f"these alone, give their folder as data. To get the others: {HOW_TO_GET_DATA}."
            )
        return found

    def server_arguments(self) -> tuple[str, ...]:
        """Return the command line of a server for these settings, without the program."""
        questions, given = self.locate(), self.corpus_path
        if questions is None:
            return ("--entities", str(self.entities), "--world-seed", str(self.world_seed))
        if given is not None and not given.is_file():
            raise DataNotFoundError(f"No corpus {str(given)!r}: expected {_CORPUS_FORMAT}.")
        # One file may be in the folder of its set: nq/test.jsonl next to corpus.jsonl.
        places = [questions.parent, questions.parent.parent] if questions.is_file() else [questions]
        files = [] if given else [file for place in places for file in scan(place)]
        found = [given] if given else [file.path for file in files if file.kind == "corpus"]
        # Files with a usual name of a corpus come before other files with passages.
        usual = [path for path in found if has_corpus_name(path)]
        if usual or len(found) == 1:
            return ("--corpus", str((usual or found)[0].resolve()))
        what = f"{len(found)} files of passages, none with a usual name," if found else "No corpus"
        raise DataNotFoundError(
            f"{what} next to the questions in {questions}: put corpus.jsonl there "
            f"({_CORPUS_FORMAT}), or give its path as corpus=... or a running server as "
            f'server_url=... To get one: {HOW_TO_GET_DATA}. data="generated" needs none.'
            f"{_there(files, places[-1])}"
        )

    @property
    def corpus_path(self) -> Path | None:
        """Return the file that was given as corpus; None: none was given."""
        if self.corpus is None:
            return None
        return expanded(self.corpus).resolve()


def _there(files: Sequence[DataFile], folder: Path) -> str:
    """Return the end of a message, with the files of a folder that are not played."""
    there = list_files(files, folder, corpora=True)
    return f" There: {there}." if there else ""


def _find_questions(data: Path) -> Path | None:
    """Return the folder of question files, `searchqa` in `data` or `data` itself, or the file."""
    if data.is_file():
        return data
    folders = (data / "searchqa", data)
    return next((f for f in folders if any(file.kind == "questions" for file in scan(f))), None)


SOURCE = DataSource(
    name="searchqa",
    title="Search-QA",
    find=_find_questions,
    expected="a folder with <set>.jsonl or <set>/<part>.jsonl, or one such file (JSON lines or a "
    "JSON array, plain, .gz or .xz)",
    how_to_get=HOW_TO_GET_DATA,
    generated="a generated world",
    variables=("SEARCHQA_DATA",),
)


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that a retriever returned."""

    passage_id: str
    """Empty if the server gives none."""
    title: str
    text: str
    """A single line."""


Passages = tuple[Passage, ...]


def make_passage(passage_id: str, contents: str, title: str = "") -> Passage:
    """Split contents: the title is the first line, often in quotation marks.

    Contents of one line without quotation marks are text. A given title need not be in them.
    """
    first, line_break, rest = contents.partition("\n")
    own_title = first.strip()
    is_quoted = len(own_title) > 1 and own_title[0] == own_title[-1] == '"'
    own_title = own_title[1:-1] if is_quoted else own_title
    if (title and own_title != title) or not (line_break or is_quoted):
        own_title, rest = title, contents
    return Passage(passage_id, own_title, " ".join(rest.splitlines()).strip())


def connect_retriever(settings: SearchQASettings) -> ServedConnection:
    """Return the connection to the server of these settings, shared by a process's environments."""
    url = settings.server_url
    # The result of `auto` may change while a process runs.
    arguments = settings.server_arguments() if url is None else ()
    server = ServerSettings(
        "retrieval",
        arguments,
        arguments[1:] if arguments[:1] == ("--corpus",) else (),
        # Settings of other programs have the path at the end.
        server_url=url.rstrip("/").removesuffix("/retrieve") if isinstance(url, str) else url,
        token=settings.token,
        timeout=settings.timeout,
        advice="Is the server running? To start one: atod-serve retrieval --corpus <file> "
        "--port <port>",
        is_health_required=False,
    )
    connection = connect(server)
    if not connection.health and "probe" not in connection.cache:
        # A server without our /health: a wrong path is reported now, not in the first episode.
        connection.cache["probe"] = search(connection, ["first man on the moon"], 1)
    if settings.topk > connection.health.get("max_topk", settings.topk):
        raise InvalidSettingError(
            f"topk={settings.topk} is more than the server at {connection.url} returns "
            f"({connection.health['max_topk']}). Lower topk, or start a server with a larger "
            "--max-topk and give its URL as server_url."
        )
    if left_out := connection.health.get("left_out"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        corpus = connection.health.get("data")
        announce_once(f"Search-QA: {corpus}: rows of the corpus are left out: {reasons}.")
    return connection


def search(connection: ServedConnection, queries: Sequence[str], topk: int) -> list[Passages]:
    """Return the best passages for each query, at most `topk`; equal queries are sent once."""
    found: dict[str, Passages] = {}
    for part in in_batches(list(dict.fromkeys(queries)), BATCH_LIMIT):
        found.update(zip(part, _retrieve(connection, part, topk), strict=True))
    return [found[query] for query in queries]


def _retrieve(connection: ServedConnection, queries: list[str], topk: int) -> list[Passages]:
    body = {"queries": queries, "topk": topk, "return_scores": True}
    for delay in (*RETRY_DELAYS, None):
        try:
            result = connection.request("POST", "/retrieve", body).get("result")
            lists = result if isinstance(result, list) else []
            if len(lists) != len(queries) or not all(isinstance(hits, list) for hits in lists):
                what = f"not {len(queries)} lists of passages: {str(result)[:100]}"
                raise connection.malformed("/retrieve", what)
            return [tuple([_passage(connection, hit) for hit in hits[:topk]]) for hits in lists]
        except ServerError as error:
            # The client has retried others itself, or retrying is useless.
            if error.status not in (200, 500) or delay is None:
                raise
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")


def _passage(connection: ServedConnection, hit: Any) -> Passage:
    """Read a passage with or without its score, in the forms that corpora have."""
    document = hit.get("document", hit) if isinstance(hit, dict) else None
    if isinstance(document, dict):
        title = document.get("title")
        title = title.strip() if isinstance(title, str) else ""
        passage_id = str(next((document[n] for n in _ID_FIELDS if document.get(n) is not None), ""))
        match document:
            case {"contents": str(contents)}:
                return make_passage(passage_id, contents, title)
            case {"text": str(text)}:
                return make_passage(passage_id, f"{title}\n{text}", title)
    raise connection.malformed("/retrieve", f"a passage {str(hit)[:100]!r}")


def open_questions(
    settings: SearchQASettings, connection: ServedConnection, split: str
) -> tuple[QuestionSet, str]:
    """Return the questions of a split, and the value of `info["data"]`."""
    has_world = connection.health.get("data") == "generated"
    is_world = settings.data == "auto" and settings.server_url is not None and has_world
    found = None if is_world else settings.locate()
    if found is None and has_world:
        return _world_questions(settings, connection, split), "generated"
    if found is None:
        raise DataNotFoundError(
            f"The server at {connection.url} has no generated questions. Give question files as "
            "data=..., or start a server with them: atod-serve retrieval."
        )
    if has_world:
        raise InvalidSettingError(
            f"The server at {connection.url} has a generated world, which has no answers to the "
            f"questions in {found}. Start a server with their corpus: atod-serve retrieval "
            "--corpus <file>."
        )
    # No published hash of the official questions is known, so their folder names them.
    label = str(found) if settings.data in ("auto", "official") else os.fspath(settings.data)
    return open_question_files(found, split, settings.corpus_path), label


def _world_questions(
    settings: SearchQASettings, connection: ServedConnection, split: str
) -> QuestionSet:
    """Return the questions of the server's generated world, requested once."""
    health = connection.health
    world = "generated"
    for name, usual, label in (
        ("entities", DEFAULT_ENTITIES, "-"), ("world_seed", DEFAULT_WORLD_SEED, "-seed")
    ):  # fmt: skip
        value = getattr(settings, name)
        if health.get(name) != value:
            raise InvalidSettingError(
                f"The server at {connection.url} has {name}={health.get(name)!r}, but {name}="
                f"{value!r} was requested. Change the setting, or start the server with it."
            )
        # Other worlds have other task ids.
        world += f"{label}{value}" * (value != usual)
    key = f"questions/{split}"
    if key not in connection.cache:
        known = [str(name) for name in health.get("splits", ())]
        if split not in known:
            raise DataNotFoundError(
                f"No split {split!r} in the generated world; known: {', '.join(known)}."
            )
        path = f"/questions/{quote(split, safe='')}"
        rows = connection.read_list(path).get("questions")
        made = []
        for row in rows if isinstance(rows, list) else [rows]:
            match row:
                case {
                    "id": str(name),
                    "data_source": str(kind),
                    "question": str(question),
                    "golden_answers": [str(), *_] as golden,
                } if all(isinstance(one, str) for one in golden):
                    made.append(Question(f"{world}/{name}", kind, question, tuple(golden)))
                case _:
                    raise connection.malformed(path, f"a question {str(row)[:100]}")
        connection.cache[key] = make_question_set(f"searchqa/{world}", split, made)
    questions: QuestionSet = connection.cache[key]
    return questions
