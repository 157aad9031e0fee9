"""Read question files: their rows, splits and manifests.

A folder holds `<set>.jsonl`, `<set>_<part>.jsonl` or `<set>/<part>.jsonl` with the parts train, dev
(also val, valid, validation) and test. A file has JSON lines or is one JSON array, and ends in
`.jsonl`, `.json` or `.ndjson`; it may be packed by gzip or xz. A row is a JSON object:

| field | value |
|---|---|
| `question`, `query`; KILT: `input` with `output` | a text |
| `golden_answers`, `answers`, `possible_answers`, `answer`; KILT: `output[].answer` | the gold answers |
| `answer_aliases` | more gold answers |
| `id`, `_id`, `qid`, `query_id`, `question_id` | a text or an integer, unique in its file; else the row's number |
| `answerable` | false: the row is left out |
| `data_source` | the task type; the set's name if missing |

Gold answers are a text, a number, a list of them, or a text that contains such a list in JSON or
Python syntax. The first field with one is read. Rows without a question or an answer are left out
and counted.

Every file is a split under its name without endings (`nq_test`, `nq/test`). `train` joins all
parts train; `test` takes from each set its part test, else dev, else the files without a part;
`dev` joins the parts dev of sets that have a test. `nq/train+hotpotqa/train` joins the named files.
A single file given as data makes the same splits.
"""  # noqa: E501

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final, Literal

from atod_gym.datasets import RECORD_FILE, data_set
from atod_gym.envs.search_qa.files import (
    NotJson,
    UnreadableError,
    describe_text,
    read_rows,
    split_name,
)
from atod_gym.errors import DataNotFoundError, InvalidSettingError
from atod_gym.scoring import normalize_answer
from atod_gym.tasks import TaskManifest, announce_once, content_hash

FileKind = Literal["questions", "corpus", "unreadable", "ignored"]

_QUESTION_FIELDS: Final = ("question", "query")
_ANSWER_FIELDS: Final = ("golden_answers", "answers", "possible_answers", "answer")
_ID_FIELDS: Final = ("id", "_id", "qid", "query_id", "question_id")
_PASSAGE_FIELDS: Final = {"contents", "text"}

# Reasons for leaving out a row.
_NO_QUESTION = "no question"
_NO_ANSWER = "no answer"
_CHOICE = "multiple choice: the answer is a label of a choice"

_PARTS: Final = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev",
                 "validation": "dev", "test": "test"}  # fmt: skip
_PART = re.compile(rf"(?:^|[_-])({'|'.join(_PARTS)})\d*(?=[_-]|$)")
_CORPUS_NAME = re.compile(r"corpus|wiki[-_]?18.*")
_CORPUS_FOLDER = "retrieval-corpus"
_ELSEWHERE = "is in a folder whose question files must be named train, dev or test"
_LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
_PEEKED_ROWS = 20
_SHOWN_FILES = 6


@dataclass(frozen=True, slots=True)
class Question:
    """A question and all its right answers."""

    task_id: str
    task_type: str
    question: str
    golden_answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a split, by task id and in manifest order."""

    manifest: TaskManifest
    questions: Mapping[str, Question]
    types: Mapping[str, str]
    """Task id -> task type."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file in or next to the question files, described by its path and rows."""

    name: str
    """Name of the split that the file makes."""
    path: Path
    set_name: str
    part: str
    """`train`, `dev`, `test`, or empty."""
    kind: FileKind
    note: str
    """Why the file is not read, such as `is parquet: ..`, or its peculiarity; may be empty."""
    version: tuple[int, int]
    """Modification time and size: changes with the content."""
    rows: int = 0
    """Rows with content; 0 if not counted (a corpus, or in `scan`)."""
    left_out: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Reason for leaving out rows -> number of rows."""

    def report(self) -> str:
        """Return the number of rows that are left out, and the reasons; empty if there are none."""
        reasons = ", ".join(f"{count} ({reason})" for reason, count in self.left_out.items())
        total = sum(self.left_out.values())
        return f"{total} of {self.rows} rows are left out: {reasons}" if total else ""


def make_question_set(name: str, split: str, questions: Iterable[Question]) -> QuestionSet:
    """Sort the questions of a split, and hash each with its answers.

    `name` is that of the data, such as `searchqa/files`.
    """
    by_id = {one.task_id: one for one in sorted(questions, key=lambda one: one.task_id)}
    digests = {}
    for task_id, one in by_id.items():
        content = json.dumps([one.question, one.golden_answers]).encode("ascii")
        digests[task_id] = hashlib.sha256(content).hexdigest()
    manifest = TaskManifest(name, split, tuple(by_id), content_hash(digests))
    return QuestionSet(manifest, by_id, {task_id: one.task_type for task_id, one in by_id.items()})


def scan(data: Path, corpus: Path | None = None) -> tuple[DataFile, ...]:
    """List the data files of a folder and of its folders, or one file, sorted by name.

    The first rows of a file decide its kind. A usual name of a corpus decides without them.

    Args:
        data: a folder, or one file.
        corpus: a file that is a corpus, whatever its name and rows.
    """
    is_file = data.is_file()
    corpus = corpus and corpus.resolve()
    files = []
    for path in [data] if is_file else [*data.glob("*"), *data.glob("*/*")]:
        stem = split_name(path.name)[0] or path.name * is_file
        try:
            status = path.stat() if stem else None
        except OSError:
            continue
        if status is None or not S_ISREG(status.st_mode) or path.name == RECORD_FILE:
            continue
        version = (status.st_mtime_ns, status.st_size)
        # One file is named as it would be in the folder of its set: nq/test, or nq_test.
        is_flat = not _PART.fullmatch(stem) if is_file else path.parent == data
        match = _PART.search(stem) if is_flat else _PART.match(stem)
        part = _PARTS[match[1]] if match else ""
        name, set_name = stem, stem[: match.start()] if match else stem
        if not is_flat:
            name, set_name = f"{path.parent.name}/{stem}", ""
        kind: FileKind = "corpus"
        note = ""
        if path.resolve() != corpus and not has_corpus_name(path):
            is_far = not (is_file or part or path.parent in (data, data / _CORPUS_FOLDER))
            kind, note = ("ignored", _ELSEWHERE) if is_far else _look(path, version)
        files.append(DataFile(name, path, set_name or path.parent.name, part, kind, note, version))
    files.sort(key=lambda file: (file.name, file.path))
    first: dict[str, DataFile] = {}
    for row, file in enumerate(files):
        # A file may exist packed and unpacked; the unpacked one comes first.
        if file.kind == "questions" and first.setdefault(file.name, file) is not file:
            note = f"is not read, as {first[file.name].path.name} has the same name"
            files[row] = replace(file, kind="ignored", note=note)
    return tuple(files)


def has_corpus_name(path: Path) -> bool:
    """Return whether a file has a usual name of a corpus: `corpus.jsonl`, `wiki-18.jsonl`, .."""
    stem, is_json = split_name(path.name)
    is_usual = _CORPUS_NAME.fullmatch(stem) is not None or path.parent.name == _CORPUS_FOLDER
    return is_json and is_usual


def describe_questions(data: Path) -> list[DataFile]:
    """Describe each data file of a folder, or one file; reads question files completely."""
    return [_read(file)[0] if file.kind == "questions" else file for file in scan(data)]


def list_files(files: Iterable[DataFile], folder: Path, *, corpora: bool = False) -> str:
    """Return the files of a folder that are not played, each with the reason."""
    kinds = {"unreadable", "ignored", "corpus" if corpora else ""}
    # Files in other folders come last: most of them are unrelated to questions.
    listed = sorted(
        (file for file in files if file.kind in kinds), key=lambda f: f.note == _ELSEWHERE
    )
    shown = [
        f"{file.path.relative_to(folder) if folder in file.path.parents else file.path} "
        f"{file.note or 'is a corpus'}"
        for file in listed[:_SHOWN_FILES]
    ]
    more = len(listed) - len(shown)
    return "; ".join(shown + [f"{more} more"] * bool(more))


def missing_official(data: Path) -> str:
    """Return the file of the published runs that a folder lacks; empty if it has all their rows.

    The files and their numbers of rows are those of the data set `searchqa` of `atod-data`.
    """
    files = {file.name: file for file in scan(data) if file.kind == "questions"}
    for place, entries in sorted(data_set("searchqa").entries.items()):
        file = files.get(place.removesuffix(".jsonl"))
        if file is None:
            return f"{place} is missing"
        try:
            rows = _count_rows(file)
        except UnreadableError as error:
            return f"{file.path} {error}"
        if rows != entries:
            return f"{file.path} has {rows} rows, not {entries}"
    return ""


@lru_cache(maxsize=64)
def _count_rows(file: DataFile) -> int:
    """Count the rows of a file; keeps none of them in memory."""
    return sum(1 for _ in read_rows(file.path))


def open_question_files(data: Path, split: str, corpus: Path | None = None) -> QuestionSet:
    """Read a split; the result is cached until a file changes.

    A training question that is also in a file of another part (after normalising case, punctuation,
    articles and spaces) is left out. Files without questions are skipped with a message.

    Args:
        data: a folder of question files, or one file.
        split: as the module says.
        corpus: a file that is a corpus, whatever its name and rows.

    Raises:
        DataNotFoundError: if there is no such split; names the known ones.
        InvalidSettingError: if a file of the split cannot be read; says what it is.
    """
    return _load(data, split, scan(data, corpus))


@lru_cache(maxsize=16)
def _load(data: Path, split: str, files: tuple[DataFile, ...]) -> QuestionSet:
    chosen = _split_files(split, files)
    if odd := list_files((file for file in files if file.note != _ELSEWHERE), data):
        announce_once(f"Search-QA: not read in {data}: {odd}.")
    training = [file for file in chosen if file.part == "train"]
    evaluated = [file for file in files if file.part != "train" and file.kind == "questions"]
    contents = {file: _read(file) for file in (*chosen, *(evaluated if training else ()))}
    for file, (read, _) in contents.items():
        if read.kind == "unreadable" and chosen.get(file):
            raise InvalidSettingError(f"{read.path} {read.note}.")
        if read.kind == "unreadable":
            announce_once(f"Search-QA: a question file is skipped: {read.path} {read.note}.")
        elif file in chosen:
            for fact in filter(None, (read.report(), read.note)):
                announce_once(f"Search-QA: {read.path}: {fact}.")
    hidden = {
        normalize_answer(one.question)
        for file in (evaluated if training else ())
        for one in contents[file][1]
    }
    trained = [one for file in training for one in contents[file][1]]
    leaked = {one.task_id for one in trained if normalize_answer(one.question) in hidden}
    if leaked:
        announce_once(
            f"Search-QA: {len(leaked)} of {len(trained)} training questions of split {split!r} "
            "are left out: they are in an evaluation set as well."
        )
    kept = (one for file in chosen for one in contents[file][1] if one.task_id not in leaked)
    return make_question_set("searchqa/files", split, kept)


def _split_files(split: str, files: Sequence[DataFile]) -> dict[DataFile, bool]:
    """Return the files of a split; True for one that the split names explicitly."""
    # A test file that cannot be read is not replaced by another part.
    parts = {
        (file.set_name, file.part) for file in files if file.kind in ("questions", "unreadable")
    }
    playable = [file for file in files if file.kind == "questions"]
    known = {file.name: [file] for file in playable}
    for union in ("train", "dev", "test"):
        # A file named like a union, of which other files have the same part, is not the union.
        if members := [file for file in playable if _union(file, parts) == union]:
            known[union] = members
    chosen: dict[DataFile, bool] = {}
    words = split.split("+")
    while words:
        # A name may contain a +: the longest match counts.
        names = ["+".join(words[:size]) for size in range(len(words), 0, -1)]
        name = next((name for name in names if name in known), None)
        if name is None:
            raise _no_split(names[0], known, files)
        for file in known[name]:
            chosen[file] = chosen.get(file, False) or len(known[name]) == 1
        words = words[name.count("+") + 1 :]
    return chosen


def _union(file: DataFile, parts: set[tuple[str, str]]) -> str:
    """Return which of train, dev and test a file belongs to, given all sets and their parts."""
    tested = next((part for part in ("test", "dev") if (file.set_name, part) in parts), "")
    return "test" if file.part == tested else file.part


def _no_split(
    name: str, known: Mapping[str, list[DataFile]], files: Sequence[DataFile]
) -> DataNotFoundError | InvalidSettingError:
    named = next((file for file in files if file.name == name and file.note), None)
    if named is not None and named.kind == "unreadable":
        return InvalidSettingError(f"{named.path} {named.note}.")
    why = f" ({named.path} {named.note})" if named is not None else ""
    if name == "dev" and (only := [f.name for f in known.get("test", ()) if f.part == "dev"]):
        why = f" (the dev part of a set without test is played as split test: {', '.join(only)})"
    return DataNotFoundError(
        f"No split {name!r} among the question files{why}; known: "
        f"{', '.join(sorted(known)) or 'none'}, and more of them joined with +."
    )


@lru_cache(maxsize=4096)
def _look(path: Path, version: tuple[int, int]) -> tuple[FileKind, str]:
    """Return the kind of a file by its first rows, and why it has no questions."""
    del version
    try:
        rows = [row for _, row in islice(read_rows(path), _PEEKED_ROWS)]
    except UnreadableError as error:
        return "unreadable", str(error)
    objects = [row for row in rows if isinstance(row, dict)]
    if not rows:
        return "ignored", "is empty"
    if not objects:
        line = rows[0].rstrip() if isinstance(rows[0], NotJson) else ""
        # DPR's passages are a table with the columns id, text and title.
        columns = {name.strip('"') for name in line.split("\t")}
        is_corpus = len(columns) > 1 and columns & _PASSAGE_FIELDS
        return ("corpus", "") if is_corpus else ("unreadable", describe_text(rows[0]))
    read = [_question(row) for row in objects]
    reasons = {one if isinstance(one, str) else "" for one in read} - {_NO_QUESTION}
    if reasons - {_CHOICE, _NO_ANSWER}:
        return "questions", ""
    if _NO_ANSWER in reasons:
        return "ignored", "has questions, but no answers in its first rows"
    if reasons:
        return "ignored", "is a multiple-choice set: its answers are labels of choices"
    if any(row.keys() & _PASSAGE_FIELDS for row in objects):
        return "corpus", ""
    fields = ", ".join(islice(objects[0], 6)) or "none"
    return "ignored", f"has no 'question' in its first rows; its fields: {fields[:100]}"


@lru_cache(maxsize=64)
def _read(file: DataFile) -> tuple[DataFile, tuple[Question, ...]]:
    """Read a question file completely; `unreadable` if it cannot be read or has no question."""
    questions: dict[str, Question] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    try:
        for number, row in read_rows(file.path):
            rows += 1
            question = _question(row, number, file.name, file.set_name)
            if isinstance(question, Question) and question.task_id in questions:
                question = "the id of an earlier row"
            if isinstance(question, str):
                left_out[question] += 1
            else:
                questions[question.task_id] = question
    except UnreadableError as error:
        return replace(file, kind="unreadable", note=str(error), rows=rows), ()
    read = replace(file, rows=rows, left_out=dict(left_out))
    if rows and not questions:
        note = f"has no question that can be played: {read.report()}"
        return replace(read, kind="unreadable", note=note), ()
    lists = [a for one in questions.values() for a in one.golden_answers if _LIST.fullmatch(a)]
    if lists:
        note = f"{len(lists)} gold answers look like lists but are not lists of texts or numbers, "
        read = replace(read, note=f"{note}and are taken as written: {lists[0][:60]!r}")
    return read, tuple(questions.values())


def _question(row: object, number: int = 0, name: str = "", set_name: str = "") -> Question | str:
    """Read a row of a file; return a text with the reason if it is not a question."""
    if not isinstance(row, dict):
        return "not JSON" if isinstance(row, NotJson) else "not a JSON object"
    if isinstance(output := row.get("output"), list):
        # KILT.
        given = [one.get("answer") for one in output if isinstance(one, dict)]
        row = {"question": row.get("input"), "answer": given, **row}
    question = _first(row, _QUESTION_FIELDS)
    if question is None:
        return _NO_QUESTION
    if not isinstance(question, str) or not question.strip():
        return f"{_NO_QUESTION}: the field is blank or not a text"
    if row.get("answerable") is False:
        return "not answerable"
    answers = next((found for one in _ANSWER_FIELDS if (found := _flat(row.get(one)))), [])
    if not answers:
        return _NO_ANSWER
    if offered := row.get("choices") or row.get("options"):
        choices = {str(one) for one in _flat(offered)}
        # Labels are numbers or letters.
        are_labels = all(not isinstance(one, str) or len(one.strip()) == 1 for one in answers)
        if are_labels and not any(str(one).strip() in choices for one in answers):
            return _CHOICE
    identity = _first(row, _ID_FIELDS, number)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return "an id that is neither a text nor an integer"
    kind = row.get("data_source")
    kind = kind if isinstance(kind, str) and kind else set_name
    golden = [str(one) for one in answers]
    golden += [one for one in map(str, _flat(row.get("answer_aliases"))) if one not in golden]
    return Question(f"{name}/{identity}", kind, question.strip(), tuple(golden))


def _first(row: Mapping[str, Any], names: Iterable[str], default: Any = None) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), default)


def _flat(value: object) -> list[str | int | float]:
    """Return the texts and numbers in a value, itself or a list; blank ones are dropped."""
    if isinstance(value, dict):
        # The form of SQuAD (`text`) and TriviaQA (`value`, `aliases`) in `datasets`.
        return [one for name in ("text", "value", "aliases") for one in _flat(value.get(name))]
    if isinstance(value, list):
        return [one for item in value if not isinstance(item, list) for one in _flat(item)]
    if isinstance(value, str):
        items = _listed(value)
        return _flat(items) if items else [value] * bool(value.strip())
    if isinstance(value, float):
        # A year is often written as 1931.0.
        value = int(value) if value.is_integer() else value if math.isfinite(value) else None
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _listed(text: str) -> list[str | int | float]:
    """Return the items of a list of texts or numbers in JSON or Python syntax; else none."""
    for read in (json.loads, ast.literal_eval) if _LIST.fullmatch(text) else ():
        errors = suppress(ValueError, SyntaxError, RecursionError, MemoryError)
        with errors, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            items = read(text.strip())
            # Python would join the items of numpy's ['a' 'b'].
            written, meant = ("".join(form.split()) for form in (text, repr(items)))
            is_plain = all(type(item) in (str, int, float) for item in items)
            if is_plain and (read is json.loads or written == meant):
                return list(items)
    return []
