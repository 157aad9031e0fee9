"""Question files, their splits and manifests."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atod_gym import tasks
from atod_gym.envs.search_qa import files
from atod_gym.envs.search_qa.questions import (
    QuestionSet,
    describe_questions,
    open_question_files,
    scan,
)
from atod_gym.errors import DataNotFoundError, InvalidSettingError
from atod_gym.scoring import normalize_answer


def write(folder: Path, name: str, *questions: str, **fields: object) -> Path:
    """A file in which each question's answer is the question itself in capitals."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": one, "golden_answers": [one.upper()], **fields} for one in questions]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(content))
    return path


def texts(folder: Path, split: str) -> list[str]:
    return [one.question for one in open_question_files(folder, split).questions.values()]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two layouts side by side."""
    write(tmp_path, "nq/train.jsonl", "nq train 1", "nq train 2")
    write(tmp_path, "nq/dev.jsonl.gz", "nq dev")
    write(tmp_path, "nq/test.jsonl.xz", "nq test")
    write(tmp_path, "hotpot_train100.jsonl", "hotpot train")
    write(tmp_path, "hotpot_dev100.jsonl", "hotpot dev")
    write(tmp_path, "popqa_subset.jsonl", "popqa")
    write(tmp_path, "musique_validation.jsonl", "musique dev")
    write(tmp_path, "triviaqa_train_small.jsonl", "trivia train")
    for other in ("corpus.jsonl", "wiki-18.jsonl.gz", "wiki-18-part.jsonl", "nq/notes.jsonl"):
        write(tmp_path, other, "no question")
    (tmp_path / "readme.md").write_text("text", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("nq/train", ["nq train 1", "nq train 2"]),
        ("nq/dev", ["nq dev"]),
        ("popqa_subset", ["popqa"]),
        ("nq/train+hotpot_train100", ["hotpot train", "nq train 1", "nq train 2"]),
        ("nq/test+test", ["hotpot dev", "musique dev", "nq test", "popqa"]),
        ("train", ["hotpot train", "nq train 1", "nq train 2", "trivia train"]),
        ("dev", ["nq dev"]),
        ("test", ["hotpot dev", "musique dev", "nq test", "popqa"]),
    ],
)
def test_splits(mixed: Path, split: str, expected: list[str]) -> None:
    assert texts(mixed, split) == expected


def test_unknown_splits_name_the_known_ones(mixed: Path) -> None:
    for split in ("valid", "nq", "nq/train+", "nq/notes", "corpus"):
        with pytest.raises(DataNotFoundError, match=r"dev, hotpot_dev100, .*popqa_subset, test, "):
            open_question_files(mixed, split)


def test_a_folder_with_files_of_one_set(tmp_path: Path) -> None:
    for part in ("train", "dev", "test"):
        write(tmp_path, f"{part}.jsonl", part)
    assert [texts(tmp_path, part) for part in ("train", "dev", "test")] == [
        ["train"], ["dev"], ["test"]]  # fmt: skip
    assert {file.set_name for file in scan(tmp_path)} == {tmp_path.name}
    assert scan(tmp_path / "nowhere") == ()


def test_fields(tmp_path: Path) -> None:
    rows = [
        {"question": " Who? ", "golden_answers": ["A", "B"], "id": "x7", "data_source": "nq"},
        {"question": "What?", "answer": "C", "id": 12, "golden_answers": "D"},
        {"question": "Où?", "answer": ["E", "\ud800"], "metadata": {}},
        # KILT.
        {"id": "a1", "input": "Is?", "output": [{"answer": "F"}, {"meta": {}}, {"answer": "G"}]},
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "mine_test.jsonl").write_text(f"\ufeff{lines}\n\n", encoding="utf-8")
    found = open_question_files(tmp_path, "mine_test")
    assert [*found.questions] == ["mine_test/12", "mine_test/5", "mine_test/a1", "mine_test/x7"]
    got = {task_id: (one.task_type, one.question, one.golden_answers)
           for task_id, one in found.questions.items()}  # fmt: skip
    assert got == {
        "mine_test/12": ("mine", "What?", ("D",)),
        "mine_test/5": ("mine", "Où?", ("E", "\ud800")),
        "mine_test/a1": ("mine", "Is?", ("F", "G")),
        "mine_test/x7": ("nq", "Who?", ("A", "B")),
    }
    assert found.types == {task_id: fields[0] for task_id, fields in got.items()}
    assert (found.manifest.name, found.manifest.split) == ("searchqa/files", "mine_test")


ROW = {"question": "On which lake does Brenn lie?", "golden_answers": ["Lake Orla"]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"golden_answers": ["a"]}', "no question"),
        ('{"question": " ", "golden_answers": ["a"]}', "no question"),
        ('{"question": ["q"], "golden_answers": ["a"]}', "no question"),
        ('{"question": "q"}', "no answer"),
        ('{"question": "q", "golden_answers": []}', "no answer"),
        ('{"question": "q", "golden_answers": [null, true, NaN, {}, "", " "]}', "no answer"),
        ('{"question": "q", "answer": "a", "answerable": false}', "not answerable"),
        ('{"question": "q", "golden_answers": [1], "choices": ["a", "b"]}', "multiple choice"),
        ('{"question": "q", "answer": "a", "id": 1.5}', "an id that is"),
        ('{"question": "q", "answer": "a", "id": true}', "an id that is"),
        ('{"question": "q", "answer": "a", "id": "1"}', "the id of an earlier row"),
    ],
)
def test_rows_that_are_no_questions_are_left_out_and_counted(
    tmp_path: Path,
    line: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tasks, "_announced", set())
    good = '{"question": "good", "answer": "a"}'
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n{line}\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert texts(tmp_path, "x") == texts(tmp_path, "test") == ["good"]
    [message] = [record.message for record in caplog.records]
    assert "x.jsonl: 2 of 3 rows are left out: 2 (" + reason in message
    [report] = describe_questions(tmp_path)
    assert (report.kind, report.rows, [*report.left_out.values()]) == ("questions", 3, [2])


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"golden_answers": ["Lake Orla", "Orla"]}, ("Lake Orla", "Orla")),
        ({"answer": "Lake Orla", "answer_aliases": ["Orla", "Lake Orla"]}, ("Lake Orla", "Orla")),
        ({"answers": ["Lake Orla", "Orla"]}, ("Lake Orla", "Orla")),
        ({"answers": {"text": ["Lake Orla"], "answer_start": [4]}}, ("Lake Orla",)),
        ({"answer": {"value": "Lake Orla", "aliases": ["Orla"]}}, ("Lake Orla", "Orla")),
        ({"possible_answers": '["Lake Orla", "Orla"]'}, ("Lake Orla", "Orla")),
        ({"golden_answers": ' ["Lake Orla"] '}, ("Lake Orla",)),
        ({"golden_answers": [], "answer": "Orla"}, ("Orla",)),
        ({"golden_answers": "D", "answer": "C"}, ("D",)),
        ({"answer": 1931}, ("1931",)),
        ({"answer": 10**400}, ("1" + "0" * 400,)),
        ({"golden_answers": [1931, 2.0, 2.5, None, "x", ""]}, ("1931", "2", "2.5", "x")),
        ({"answer": "[citation needed]"}, ("[citation needed]",)),
        ({"answer": "[1, 2]"}, ("1", "2")),
        ({"answer": "['Lake Orla', 'Orla']"}, ("Lake Orla", "Orla")),
        ({"answer": """["Orla's", 'the "Orla"', 3, 2.0]"""}, ("Orla's", 'the "Orla"', "3", "2")),
        # As numpy writes arrays; Python would read one text, `ab`.
        ({"answer": "['a' 'b']"}, ("['a' 'b']",)),
        ({"answer": "['a', None]"}, ("['a', None]",)),
        ({"answer": r"['\d']"}, (r"['\d']",)),
        ({"answer": "[" * 100_000 + "]"}, ("[" * 100_000 + "]",)),
        ({"answer": " Orla "}, (" Orla ",)),
        ({"golden_answers": ["no"], "choices": ["yes", "no"]}, ("no",)),
        ({"answer": 7, "choices": []}, ("7",)),
    ],
)
def test_gold_answers(tmp_path: Path, fields: dict[str, object], answers: tuple[str, ...]) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "q", **fields}), encoding="utf-8")
    [question] = open_question_files(tmp_path, "x").questions.values()
    assert question.golden_answers == answers


def test_answers_that_look_like_lists_are_announced(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "['a' 'b']"}, {"question": "r", "answer": "['a', 'b']"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    [report] = describe_questions(tmp_path)
    assert report.note.startswith(
        "1 gold answers look like lists but are not lists of texts or numbers"
    )


@pytest.mark.parametrize("name", ["id", "_id", "qid", "query_id", "question_id"])
@pytest.mark.parametrize("value", ["5a8b", 17])
def test_ids(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({**ROW, "id": None, name: value}), "utf-8")
    assert open_question_files(tmp_path, "x").manifest.task_ids == (f"x/{value}",)


def test_unanswerable_twins_are_left_out_first(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "2hop_1", "answerable": answerable} for answerable in (False, True)]
    (tmp_path / "musique_full_v1.0_dev.jsonl").write_text(
        "\n".join(map(json.dumps, rows)), encoding="utf-8"
    )
    assert [*open_question_files(tmp_path, "test").questions] == ["musique_full_v1.0_dev/2hop_1"]
    [report] = describe_questions(tmp_path)
    assert (report.rows, report.left_out) == (2, {"not answerable": 1})


LINE = json.dumps(ROW).encode()
ODD_FILES = {
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "page.json": (b"\n<!DOCTYPE html><html></html>", "HTML page"),
    "page.jsonl.gz": (gzip.compress(b"<html>"), "HTML page"),
    "packed.zip": (b"PK\x03\x04rest", "zip archive: unpack it"),
    "packed.jsonl": (b"PK\x03\x04rest", "zip archive: unpack it"),
    "table.parquet": (b"PAR1rest", "parquet: write it as JSON lines"),
    "table.arrow": (b"ARROW1rest", "Arrow file"),
    "table.tsv": (b"id\tquestion\n1\twho?\n", "a table with tabs"),
    "table.csv": (b"id,question\n1,who?\n", "a table with commas"),
    "latin.jsonl": (json.dumps(ROW, ensure_ascii=False).encode() + b"\xe9", "not UTF-8 text"),
    "wide.jsonl": (LINE.decode().encode("utf-16"), "UTF-16"),
    "bytes.jsonl": (b"\xff\xfe", "UTF-16"),
    "words.jsonl.gz": (b"no gzip", "not JSON lines"),
    "words.jsonl.xz": (b"no xz", "not JSON lines"),
    "cut.jsonl.gz": (gzip.compress(LINE * 99, mtime=0)[:-5], "cannot be read"),
    "cut.jsonl.xz": (lzma.compress(LINE * 99)[:-5], "cannot be read"),
    "cut.json": (b"[" + LINE, "incomplete JSON array"),
    "joined.json": (b"[%b]\n[%b]" % (LINE, LINE), "text after its JSON array"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "pretty.json": (json.dumps({"version": 1, "data": []}, indent=1).encode(), "one JSON object"),
    "bzip.jsonl": (b"BZh91AY", "bzip2"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd", "zstd"),
    "tar.jsonl.gz": (gzip.compress(b"x".ljust(257, b"\0") + b"ustar".ljust(255)), "tar archive"),
    "empty.jsonl": (b"", "is empty"),
    "settings.json": (b'{"name": "x"}', "no 'question' in its first rows; its fields: name"),
    "mmlu_test.jsonl": (b'{"question": "q", "golden_answers": [1], "choices": ["a"]}', "multiple"),
    "secret_test.jsonl": (b'{"question": "q", "golden_answers": []}', "no answers in its first"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_are_named_and_refuse_no_other(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_announced", set())
    content, message = ODD_FILES[name]
    write(tmp_path, "nq/test.jsonl", "where")
    write(tmp_path, "nq/train.jsonl", "when")
    write(tmp_path, "nq/notes.jsonl", "no part in its name")
    (tmp_path / name).write_bytes(content)
    split = name.split(".")[0]
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        for _ in range(2):
            assert [texts(tmp_path, one) for one in ("nq/test", "nq/train", "test", "train")] == [
                ["where"], ["when"], ["where"], ["when"]]  # fmt: skip
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert f"{name} " in messages[0]
    assert message in messages[0]
    # Only a request for exactly that file raises an error, which describes it.
    with pytest.raises((InvalidSettingError, DataNotFoundError), match=message):
        open_question_files(tmp_path, split)
    reports = {report.path.name: report for report in describe_questions(tmp_path)}
    assert reports[name].kind in ("unreadable", "ignored")
    assert message in reports[name].note
    assert reports["notes.jsonl"].kind == "ignored"
    assert [reports[one].rows for one in ("test.jsonl", "train.jsonl")] == [1, 1]


def test_all_odd_files_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (content, _) in ODD_FILES.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path, "nq/test.jsonl", "where")
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert texts(tmp_path, "test") == ["where"]
    assert "more" in caplog.text


PASSAGE = {"id": "0", "contents": "Brenn\nBrenn is a town."}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("wiki18_100w.jsonl", PASSAGE),
        ("wiki-18.jsonl", PASSAGE),
        ("corpus.json", PASSAGE),
        ("retrieval-corpus/passages.jsonl", PASSAGE),
        ("my_test_passages.jsonl", PASSAGE),
        ("psgs_train.jsonl", {"_id": "MED-10", "title": "Brenn", "text": "A town."}),
        ("psgs.jsonl", {"docid": 1, "text": "A town."}),
    ],
)
def test_a_corpus_is_no_question_file(tmp_path: Path, name: str, row: dict[str, str]) -> None:
    write(tmp_path, "nq/test.jsonl", "where")
    write(tmp_path, "nq/train.jsonl", "when")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
    assert [texts(tmp_path, one) for one in ("test", "train")] == [["where"], ["when"]]
    kinds = {file.path.relative_to(tmp_path).as_posix(): file.kind for file in scan(tmp_path)}
    assert kinds.pop(name) == "corpus"
    assert set(kinds.values()) == {"questions"}


def test_the_file_given_as_corpus_is_no_question_file(tmp_path: Path) -> None:
    write(tmp_path, "a_test.jsonl", "where")
    given = write(tmp_path, "b_test.jsonl", "a corpus that looks like questions")
    assert [*open_question_files(tmp_path, "test", given).questions] == ["a_test/1"]


def test_one_file_as_data(tmp_path: Path) -> None:
    for name, splits, task_id in (
        ("nq/test.jsonl", ("nq/test", "test"), "nq/test/1"),
        ("nq_train.json", ("nq_train", "train"), "nq_train/1"),
        ("questions.txt", ("questions.txt", "test"), "questions.txt/1"),
    ):
        path = write(tmp_path, name, "where")
        for split in splits:
            assert [*open_question_files(path, split).questions] == [task_id]
        with pytest.raises(DataNotFoundError, match=f"known: {', '.join(splits)}"):
            open_question_files(path, "dev")
        [report] = describe_questions(path)
        assert (report.path, report.kind, report.rows) == (path, "questions", 1)
        assert (report.left_out, report.note) == ({}, "")


def test_split_names_that_mislead(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa/dev.jsonl", "which")
    write(tmp_path, "c++_test.jsonl", "what")
    with pytest.raises(
        DataNotFoundError, match=r"set without test is played .* test: hotpotqa/dev"
    ):
        open_question_files(tmp_path, "dev")
    assert texts(tmp_path, "c++_test") == ["what"]
    assert texts(tmp_path, "c++_test+hotpotqa/dev") == ["what", "which"]
    with pytest.raises(DataNotFoundError, match=r"No split 'c\+\+' among"):
        open_question_files(tmp_path, "hotpotqa/dev+c++")


def test_entries_other_than_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, "nq/test.jsonl", "where")
    (tmp_path / "folder_test.jsonl").mkdir()
    (tmp_path / "broken_test.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "loop_test.jsonl").symlink_to(tmp_path / "loop_test.jsonl")
    os.mkfifo(tmp_path / "pipe_test.jsonl")
    assert texts(tmp_path, "test") == ["where"]
    assert len(describe_questions(tmp_path)) == 1


def test_two_files_of_one_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "nq_test.json", "first")
    write(tmp_path, "nq_test.jsonl.gz", "second")
    (tmp_path / "nq_test.parquet").write_bytes(b"PAR1")
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert texts(tmp_path, "test") == ["first"]
    assert "nq_test.jsonl.gz is not read, as nq_test.json has the same name" in caplog.text
    assert [report.kind for report in describe_questions(tmp_path)] == [
        "questions", "ignored", "unreadable"]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "is_played"),
    [
        ({"golden_answers": [0], "choices": ["yes", "no"]}, False),
        ({"golden_answers": ["B"], "options": ["yes", "no"]}, False),
        ({"answer": "A", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}}, False),
        ({"golden_answers": ["no"], "choices": ["yes", "no"]}, True),
        ({"golden_answers": [7], "choices": [5, 7]}, True),
        ({"golden_answers": ["x"], "choices": ["x", "y"]}, True),
        ({"golden_answers": [7], "choices": None}, True),
    ],
)
def test_multiple_choice(tmp_path: Path, fields: dict[str, object], is_played: bool) -> None:
    write(tmp_path, "nq_test.jsonl", "where")
    (tmp_path / "x_test.jsonl").write_text(json.dumps({"question": "q", **fields}), "utf-8")
    assert texts(tmp_path, "test") == (["where", "q"] if is_played else ["where"])
    assert describe_questions(tmp_path)[1].kind == ("questions" if is_played else "ignored")


def test_a_test_file_that_cannot_be_read_is_replaced_by_no_other_part(tmp_path: Path) -> None:
    write(tmp_path, "a/test.jsonl", "where")
    write(tmp_path, "b/dev.jsonl", "when")
    (tmp_path / "b/test.jsonl").write_bytes(b"PK\x03\x04")
    assert texts(tmp_path, "test") == ["where"]
    (tmp_path / "b/test.jsonl").write_text('{"question": "q", "golden_answers": []}', "utf-8")
    assert texts(tmp_path, "test") == ["where", "when"]


any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200) | any_text.map(str.encode) | st.sampled_from([LINE, b"[", b"{"]),
    st.sampled_from(["x_test.jsonl", "x.json", "x.jsonl.gz", "x.jsonl.xz", "x.tsv", "x/dev.jsonl"]),
    st.sampled_from([bytes, gzip.compress, lzma.compress]),
)
def test_no_content_is_in_the_way(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    name: str,
    packed: Callable[[bytes], bytes],
) -> None:
    folder = tmp_path_factory.mktemp("questions")
    write(folder, "nq/test.jsonl", "where")
    write(folder, "nq/train.jsonl", "when")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(packed(content))
    assert texts(folder, "nq/test") == ["where"]
    assert texts(folder, "train") == ["when"]
    assert "where" in texts(folder, "test")
    reports = {report.path: report for report in describe_questions(folder)}
    assert reports[folder / name].kind in ("questions", "corpus", "unreadable", "ignored")
    assert len(reports) == 3


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            any_text.filter(str.strip),
            # A text that looks like a list may be read as one.
            st.lists(any_text.filter(lambda text: text.strip()[:1] not in ("", "[")), min_size=1),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["question", "query"]),
    st.sampled_from(["golden_answers", "answer", "answers", "possible_answers"]),
    st.sampled_from(["lines", "array", "indented"]),
    st.booleans(),
    st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz", "x.json.xz"]),
    st.sampled_from([bytes, gzip.compress, lzma.compress]),
)
def test_written_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, list[str]]],
    question: str,
    answer: str,
    form: str,
    as_text: bool,
    name: str,
    packed: Callable[[bytes], bytes],
) -> None:
    written = [
        {"_id": f"q{number}", question: text, answer: json.dumps(gold) if as_text else gold}
        for number, (text, gold) in enumerate(rows)
    ]
    content = {
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in written),
        "array": json.dumps(written),
        "indented": json.dumps(written, indent=2, ensure_ascii=False),
    }[form]
    path = tmp_path_factory.mktemp("questions") / name
    path.write_bytes(packed(content.encode()))
    found = open_question_files(path.parent, "test").questions.values()
    assert [(one.task_id, one.question, one.golden_answers) for one in found] == [
        (f"x/q{number}", text.strip(), tuple(gold)) for number, (text, gold) in enumerate(rows)
    ]


def test_arrays_larger_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 7)
    rows = [{**ROW, "id": number, "answer": 10**number} for number in range(20)]
    for indent in (None, 3):
        (tmp_path / "x.json").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        assert len(open_question_files(tmp_path, "x").questions) == 20
    (tmp_path / "x.json").write_text("[" + "12, " * 20 + "]", encoding="utf-8")
    [report] = describe_questions(tmp_path)
    assert (report.kind, report.note) == ("unreadable", "is not JSON lines: it begins with 12")


def test_evaluated_questions_are_left_out_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_announced", set())
    write(tmp_path, "a_train.jsonl", "Who is the king?", "What now?", "who is king", "Only here")
    write(tmp_path, "b_train.jsonl", "Where?")
    write(tmp_path, "b_dev.jsonl", "where", "when")
    write(tmp_path, "c.jsonl", "Who is  King")
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert texts(tmp_path, "train") == ["What now?", "Only here"]
        assert texts(tmp_path, "train") == ["What now?", "Only here"]
    assert [record.message for record in caplog.records] == [
        "Search-QA: 3 of 5 training questions of split 'train' are left out: they are in an "
        "evaluation set as well."
    ]
    assert texts(tmp_path, "a_train") == ["What now?", "Only here"]
    # Evaluation sets stay whole, whatever they are joined with.
    assert texts(tmp_path, "b_dev+b_train") == ["where", "when"]
    assert texts(tmp_path, "test") == ["where", "when", "Who is  King"]


def test_hashes_depend_on_content_only(tmp_path: Path) -> None:
    def opened(name: str, *questions: str, **fields: object) -> QuestionSet:
        write(tmp_path / name, "x.jsonl", *questions, **fields)
        return open_question_files(tmp_path / name, "x")

    first = opened("a", "p", "q", id=None)
    same = opened("b", "p", "q", data_source="other")
    assert first.manifest.content_hash == same.manifest.content_hash
    assert len(first.manifest.content_hash) == 64
    others = [opened("c", "q", "p"), opened("d", "p"), opened("e", "p", "q", golden_answers=["P"])]
    assert len({one.manifest.content_hash for one in (first, *others)}) == 4


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl", "first")
    assert texts(tmp_path, "x") == ["first"]
    assert open_question_files(tmp_path, "x") is open_question_files(tmp_path, "x")
    write(tmp_path, "x.jsonl", "first", "second")
    assert texts(tmp_path, "x") == ["first", "second"]


def test_real_training_questions_are_in_no_evaluation_set(searchqa_data: Path) -> None:
    opened: Callable[[str], QuestionSet] = lambda split: open_question_files(  # noqa: E731
        searchqa_data, split
    )
    names = {f.name: f.part for f in scan(searchqa_data) if f.kind == "questions"}
    assert names == {
        "2wiki_in_corpus": "", "hotpot_dev100": "dev", "hotpot_train100": "train",
        "musique_train100": "train", "nq_subset": "", "popqa_subset": "",
    }  # fmt: skip
    training = {normalize_answer(one.question) for one in opened("train").questions.values()}
    assert len(training) == 200
    evaluated = [opened(name) for name, part in names.items() if part != "train"]
    assert sum(len(one.questions) for one in evaluated) == len(opened("test").questions) == 3339
    for one in evaluated:
        assert not training & {normalize_answer(q.question) for q in one.questions.values()}
    assert set(opened("train").types.values()) == {"hotpotqa", "musique"}
    assert "nq_subset/nq_test_3283" in opened("test").questions
