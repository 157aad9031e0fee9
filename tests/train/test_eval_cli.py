"""`atod-eval`: options, folders, resuming after a stop, and comparing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo_env import ENV_ID, TASK_IDS
from filelock import FileLock

from atod_gym.errors import InvalidSettingError
from atod_train.evaluation.eval_cli import chosen_agent, main, result_folder
from atod_train.evaluation.eval_options import EvalOptions
from atod_train.evaluation.eval_records import EpisodeRecord, EvaluationFolder
from atod_train.files import FileError
from atod_train.reports.statistics import paired_difference
from atod_train.reports.tables import difference_text


def evaluate(out: Path, *options: str, agent: str = "expert") -> int:
    return main(
        [ENV_ID, "--agent", agent, "--split", "test", "--out", str(out), *options]
    )  # fmt: skip


def read(out: Path, name: str = "result.json") -> Any:
    return json.loads((out / name).read_text(encoding="utf-8"))


def lines(out: Path) -> list[str]:
    return (out / "episodes.jsonl").read_text(encoding="utf-8").splitlines()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err.splitlines()
    [error] = [line for line in shown if not line.startswith("playing")]
    return error


@pytest.mark.slow
def test_the_table_and_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path, "--tasks", "10", "--max-turns", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == f"{ENV_ID}, test (generated data), expert"
    head = "task type tasks success [95 % interval] score turns invalid"
    assert " ".join(shown[3].split()) == head
    assert shown[4].split() == ["all", "10", "100.0", "[72.2,", "100.0]", "100.0", "2.0", "0", "%"]
    # An agent without tokens has neither tokens nor a cost.
    assert re.fullmatch(r"\d+\.\d s", shown[6])
    value = read(tmp_path)
    assert [task["task_id"] for task in value["tasks"]] == list(TASK_IDS[::3])  # of 30
    assert value["settings"]["agent"] == {"kind": "expert"}
    assert value["settings"]["max_turns"] == 2
    assert len(value["data_hash"]) == 64
    assert value["totals"]["stop_reasons"] == {"terminated": 10}
    assert value["sessions"][0]["packages"]["gymnasium"]


def test_resuming_plays_the_remaining_episodes(tmp_path: Path) -> None:
    assert evaluate(tmp_path, agent="random") == 0
    whole, result = lines(tmp_path), read(tmp_path)
    torn = "\n".join([*whole[:7], whole[7][:40]])
    (tmp_path / "episodes.jsonl").write_text(torn, encoding="utf-8")
    (tmp_path / "result.json").unlink()
    assert evaluate(tmp_path, "--resume", "--concurrency", "4", agent="random") == 0
    again = read(tmp_path)
    assert again["tasks"] == result["tasks"]
    assert lines(tmp_path)[:7] == whole[:7]
    assert sorted(json.loads(line)["task_id"] for line in lines(tmp_path)) == list(TASK_IDS)
    assert [json.loads(line)["session"] for line in lines(tmp_path)] == [1] * 7 + [2] * 23
    at = [json.loads(line)["at"] for line in lines(tmp_path)]
    assert at == sorted(at)
    assert again["totals"]["seconds"] == at[-1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "3"), "holds 5 episodes already: continue with --resume"),
        (("--resume", "--tasks", "3"), "was played with tasks 5, not 3"),
        (("--resume", "--tasks", "5", "--seed", "1"), "was played with seed 0, not 1"),
        (("--resume", "--tasks", "5", "--hide-admissible"), "with show_admissible true, not false"),
        (("--resume", "--tasks", "5", "--max-turns", "3"), "with max_turns 2, not 3"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert evaluate(tmp_path, "--tasks", "5", agent="random") == 0
    before = lines(tmp_path)
    capsys.readouterr()
    assert evaluate(tmp_path, *options, agent="random") == 2
    assert message in error_of(capsys)
    assert lines(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--resume", "--seed", "1")])
def test_a_refused_folder_stays_as_it_is(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert evaluate(tmp_path, "--tasks", "5", agent="random") == 0
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write('{"task_id": "am')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert evaluate(tmp_path, "--tasks", "5", *options, agent="random") == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_which_another_process_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(tmp_path / ".lock"):
        assert evaluate(tmp_path, "--tasks", "2") == 2
        assert (
            f"Another process writes to {tmp_path}: wait for it, or choose another folder"
            in error_of(capsys)
        )
    assert evaluate(tmp_path, "--tasks", "2") == 0


@pytest.mark.parametrize("order", ["ABabxb", "ABaxb", "AaBxb", "AaxBb", "AaBbxb"])
def test_two_evaluations_in_one_folder(tmp_path: Path, order: str) -> None:
    """A and B: both are made; a and b: their sessions begin; x: the first one adds and closes."""
    record = EpisodeRecord("t", "k", True, 1.0, 1, 0, (), "terminated", "", 0, 0, 0, 0, 0)
    folders: dict[str, EvaluationFolder] = {}
    for number, event in enumerate(order):
        if event in "AB":
            folders[event] = EvaluationFolder(tmp_path, resume=True)
        elif event == "x":
            folders["A"].add(record)
            folders["A"].close()
        elif event == "b" and "x" in order[number:]:
            with pytest.raises(FileError, match="Another process writes to"):
                folders["B"].begin({"tasks": 2}, [])
        else:
            folders[event.upper()].begin({"tasks": 2}, [])
    assert [kept.task_id for kept in folders["B"].records] == ["t"]
    assert len(read(tmp_path, "settings.json")["sessions"]) == 2
    folders["B"].close()
    with pytest.raises(InvalidSettingError, match="holds 1 episodes already"):
        EvaluationFolder(tmp_path, resume=False)


def test_without_episodes_settings_may_change(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--tasks", "2") == 0
    (tmp_path / "episodes.jsonl").unlink()
    assert evaluate(tmp_path, "--tasks", "3", "--resume") == 0


def test_a_broken_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path, "--tasks", "2") == 0
    first, second = lines(tmp_path)
    broken = f"line 1 of {tmp_path / 'episodes.jsonl'} is broken"
    for content, message in ((f"{first[:9]}\n{second}\n", broken), ("{}\n", "version")):
        (tmp_path / "episodes.jsonl").write_text(content, encoding="utf-8")
        capsys.readouterr()
        assert evaluate(tmp_path, "--tasks", "2", "--resume") == 2
        assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--agent", "missing"), "No agent 'missing': random, expert, human, chat, model:FOLDER"),
        (("--agent", "."), "module:Class. Use --agent model:. for that folder."),
        (("--agent", "random", "--model", "m"), "--model is for --agent chat."),
        (("--agent", "random", "--keep-reasoning"), "--keep-reasoning is for --agent chat."),
        (("--agent", "expert", "--seed", "1"), "--seed is for --agent random"),
        (("--agent", "random", "--concurrency", "1025"), "--concurrency must be <= 1024"),
        (("--agent", "human", "--concurrency", "2"), "A person plays one episode at a time"),
        (("--agent", "random", "--concurrency", "0"), "--concurrency must be >= 1, not 0"),
        (("--agent", "random", "--max-turns", "0"), "--max-turns must be >= 1, not 0"),
        (("--agent", "random", "--tasks", "-1"), "--tasks must be >= 0"),
        (("--agent", "random", "--task-ids", "x"), "No task 'x' among the 30 of split 'test'"),
        (("--agent", "random", "--task-ids", "x", "--tasks", "1"), "not both"),
        (("--agent", "random", "--option", "a"), "--option takes KEY=VALUE, not 'a'."),
        (("--agent", "random", "--option", "a=1"), "does not take these settings"),
        (("--agent", "random", "--option", "split=train"), "use --split"),
        (("--agent", "random", "--template", "/no/file"), "Cannot read the prompt template"),
        (("--agent", "random", "--prompt-style", "window:-1"), "not 'window:-1'"),
        (("--agent", "chat"), "Name the model with --model."),
        (("--agent", "chat", "--model", "m", "--extra-body", "{"), "--extra-body is no JSON"),
        (("--agent", "chat", "--model", "m", "--extra-body", "[]"), "must be a JSON object"),
        (("--agent", "chat", "--model", "m", "--price-in", "1"), "both --price-in and --price-out"),
        (("--agent", "chat", "--requests-per-minute", "0", "--model", "m"), "must be >= 1, not 0"),
        (("--agent", "chat", "--tokens-per-minute", "0", "--model", "m"), "must be >= 1, not 0"),
        (("--agent", "chat", "--timeout", "0", "--model", "m"), "--timeout must be >= 0.001"),
        (("--agent", "chat", "--temperature", "nan"), "--temperature must be >= 0, not nan"),
        (("nothing/Here-v0", "--agent", "random"), "nothing/Here-v0"),
        (("ALFWorld", "--agent", "random"), "Environments here: atod/ALFWorld-v0, atod/WebShop-v0"),
        (("no_module:Here-v0", "--agent", "random"), "no_module"),
        (("CartPole-v1", "--agent", "random"), "CartPole-v1 has actions Discrete(2)"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    env = () if "/" in options[0] or options[0] == "ALFWorld" or options[0][0] != "-" else (ENV_ID,)
    assert main([*env, *options, "--split", "test", "--out", str(tmp_path)]) == 2
    assert message in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_chosen_tasks_play_in_their_order(tmp_path: Path) -> None:
    ids = [TASK_IDS[9], TASK_IDS[2]]
    assert evaluate(tmp_path, "--task-ids", *ids, ids[0]) == 0
    assert [task["task_id"] for task in read(tmp_path)["tasks"]] == ids


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert evaluate(tmp_path / "file") == 2
    assert str(tmp_path / "file") in error_of(capsys)


def test_the_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "atod_train.evaluation.eval_options")
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["--agent", "random", "--split", "test"]) == 2
    assert "atod-eval needs the package tyro: pip install 'atod-gym[eval]'" in error_of(capsys)


def test_help_and_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status in ((["--help"], 0), (["compare", "--help"], 0), (["--agnet", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
    shown = capsys.readouterr()
    assert "{None}" not in shown.out
    assert "default: None" not in shown.out
    assert "--agnet" in shown.err


def test_the_name_of_the_default_folder_describes_it() -> None:
    options = EvalOptions("random", "nq/dev")
    assert str(result_folder(options, chosen_agent(options).label, "atod/ALFWorld-v0")) == (
        "runs/eval-ALFWorld-v0-nq-dev-random"
    )


# -- stopping a process ----------------------------------------------------------------------------

SLOW = """
import asyncio
from atod_train.evaluation.agents import ExpertAgent
class Slow(ExpertAgent):
    async def act(self, *arguments):
        await asyncio.sleep(0.02)
        return await super().act(*arguments)
"""
COMMAND = [
    sys.executable, "-W", "error", "-m", "atod_train.evaluation.eval_cli",
    "--agent", "slow_agent:Slow", "--split", "valid_unseen", "--data", "generated",
    "--option", "house_size=tiny", "--tasks", "24", "--concurrency", "2", "--out", "out",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_evaluation_resumes(
    tmp_path: Path, usual_sigint: None, how: signal.Signals
) -> None:
    (tmp_path / "slow_agent.py").write_text(SLOW)
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        COMMAND, cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    episodes = tmp_path / "out" / "episodes.jsonl"
    deadline = time.monotonic() + 30
    while not episodes.exists() or len(episodes.read_bytes().splitlines()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    kept = len(lines(tmp_path / "out"))
    assert 4 <= kept < 24
    if how is signal.SIGINT:
        assert process.returncode == 130
        [told] = [line for line in error.splitlines() if line.startswith("atod-eval")]
        assert f"Stopped. {kept} of 24 tasks are kept in out; to continue: atod-eval" in told
        assert told.endswith("--concurrency 2 --out out --resume")
        assert "Traceback" not in error
    again = subprocess.run(
        [*COMMAND, "--resume"], cwd=tmp_path, env=environment, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    assert "all" in again.stdout
    assert read(tmp_path / "out")["success_rate"] >= 0.95
    ids = [json.loads(line)["task_id"] for line in lines(tmp_path / "out")]
    assert len(ids) == len(set(ids)) == 24


# -- comparing -------------------------------------------------------------------------------------


def test_comparing_pairs_the_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path / "a") == 0
    assert evaluate(tmp_path / "b", agent="random") == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out.splitlines()
    a, b = ([t["success"] for t in read(tmp_path / name)["tasks"]] for name in "ab")
    found = paired_difference(np.array([a], dtype=float), np.array([b], dtype=float))
    assert shown[-1] == (
        f"A - B, points [95 % interval]: {difference_text(found)}, paired over 30 tasks"
    )
    assert [line.split() for line in shown[2:5]] == [
        ["different", "setting", "A", "B"], ["kind", '"expert"', '"random"'], ["seed", "null", "0"]
    ]  # fmt: skip
    assert shown[7].startswith("A: expert")
    assert shown[8].startswith("B: random")


def test_comparing_names_each_setting_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "a", "--tasks", "5") == 0
    assert evaluate(tmp_path / "b", "--tasks", "5") == 0
    result = read(tmp_path / "b")
    for name, value in result["settings"].items():
        other = {"top": 6} if isinstance(value, dict) else "another"
        changed = {**result, "settings": {**result["settings"], name: other}}
        (tmp_path / "b" / "result.json").write_text(json.dumps(changed), encoding="utf-8")
        capsys.readouterr()
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
        shown = capsys.readouterr().out
        assert re.search(
            rf"^{'top' if isinstance(value, dict) else name} .*(6|another)", shown, re.M
        )
    (tmp_path / "b" / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "different" not in capsys.readouterr().out


def test_comparing_other_tasks_pairs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "a", "--tasks", "5") == 0
    assert evaluate(tmp_path / "b", "--tasks", "6") == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "not paired: they did not play the same tasks" in shown
    assert f"A: {tmp_path / 'a'}, expert" in shown


def test_comparing_other_files_than_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "a", "--tasks", "5") == 0
    (tmp_path / "b").mkdir()
    for content, message in ((None, "has no result.json"), ("{}x", "cannot be read"),
                             ('{"a": 1}', "not the record of an evaluation")):  # fmt: skip
        if content is not None:
            (tmp_path / "b" / "result.json").write_text(content)
        capsys.readouterr()
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert message in error_of(capsys)
