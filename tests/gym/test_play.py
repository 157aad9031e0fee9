from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

import atod_gym
from atod_gym import play
from atod_gym.types import TurnObservation

TASK = "tiny-train-0003-pick_heat_then_place_in_recep"
REPOSITORY = Path(atod_gym.__file__).resolve().parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "atod_gym.play", "--data", "generated"]
COMMAND += ["--house-size", "tiny"]


def atod_play(
    typed: str | bytes, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the program with `typed` on its standard input."""
    finished = subprocess.run(
        [*COMMAND, *arguments],
        input=typed if isinstance(typed, bytes) else typed.encode(),
        capture_output=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **variables},
        check=False,
    )
    out, err = finished.stdout.decode(), finished.stderr.decode()
    return subprocess.CompletedProcess(COMMAND, finished.returncode, out, err)


def observed(text: str, *actions: str, goal: str = "buy shoes") -> TurnObservation:
    return {
        "instruction": goal, "text": text, "admissible_actions": actions, "turn_index": 1,
    }  # fmt: skip


def test_a_page_shows_why_an_action_had_no_effect() -> None:
    observation = observed("Shop [SEP] Search")
    assert play.page(observation, {"message": ""}) == "Shop\nSearch"
    assert play.page(observation, {"message": "No such button."}) == (
        "Shop\nSearch\n\nNo such button."
    )


SIZES = observed(
    "Instruction: [SEP] buy shoes [SEP] Back to Search [SEP] size [SEP] 3 [SEP] 2 [SEP] Buy Now",
    "click[2]", "click[3]", "click[back to search]", "click[buy now]",
)  # fmt: skip


def test_buttons_have_numbers_in_the_order_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["   1  Back to Search", "size", "   2  3", "   3  2", "   4  Buy Now"]
    assert play.page(SIZES, {"message": ""}).split("\n") == lines
    # 2 is a number and the label of another button.
    for typed, action in ((["1"], "click[back to search]"), (["2", "click[2]"], "click[2]")):
        left = iter(typed)
        monkeypatch.setattr("builtins.input", lambda _, left=left: next(left))
        assert play.ask(SIZES) == action
    shown = capsys.readouterr().out
    assert shown.count("2 is number 2, click[3], and the button click[2]") == 1
    assert "1  click" not in shown  # the page shows them


def test_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = play.page(observed("a cabinet 1, " * 20), {"message": ""}).split("\n")
    assert len(lines) > 5
    assert all(len(line) <= 40 and set(line.split()) <= {"a", "cabinet", "1,"} for line in lines)


@pytest.mark.parametrize(
    ("typed", "action"),
    [
        (["search[a pan]"], "search[a pan]"),
        (["dance", "dance"], "dance"),
        (["dance", "look"], "look"),
        (["quit"], None),
        (["help", "1"], "look"),
    ],
)
def test_a_text_that_is_no_action_is_played_only_when_repeated(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], action: str | None
) -> None:
    left = iter(typed)
    monkeypatch.setattr("builtins.input", lambda _: next(left))
    assert play.ask(observed("A room.", "look", "search[<query>]")) == action
    assert next(left, None) is None


def test_an_action_of_a_question_needs_its_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(["who", "search[who]"])
    monkeypatch.setattr("builtins.input", lambda _: next(left))
    assert play.ask(observed("Find out."), tags=("search", "answer")) == "search[who]"
    assert "Write search[..] or answer[..]." in capsys.readouterr().out


def test_a_task_can_be_won_by_text_and_by_number() -> None:
    env = gymnasium.make("atod/ALFWorld-v0", data="generated", house_size="tiny").unwrapped
    observation, _ = env.reset(options={"task_id": TASK})
    typed = []
    for turn, action in enumerate(env.walkthrough):  # type: ignore[attr-defined]
        number = observation["admissible_actions"].index(action) + 1
        typed.append(str(number) if turn % 2 else action)
        observation = env.step(action)[0]
    played = atod_play("\n".join(typed), "--task-id", TASK)
    assert (played.returncode, played.stderr) == (0, "")
    assert TASK in played.stdout
    assert f"Goal: {observation['instruction']}" in played.stdout
    assert f"Solved after {len(typed)} turns (score 1)." in played.stdout


def test_help_wrong_numbers_and_empty_lines_cost_no_turn() -> None:
    # Python refuses to read more than 4300 digits as a number.
    played = atod_play(f"?\n\n999\n{'9' * 5000}\n0\nlook\nnonsense\nnonsense\nq\n", "--seed", "1")
    assert (played.returncode, played.stderr) == (0, "")
    assert played.stdout.count("turn 1 of 50> ") == 6
    assert "There is no action 999" in played.stdout
    assert played.stdout.count("shows this help") == 2
    assert "Nothing happens." in played.stdout
    assert played.stdout.rstrip().endswith("Stopped after 2 turns, not solved.")


def test_the_same_seed_shows_the_same_task() -> None:
    first, second = (atod_play("q\n", "--seed", "3").stdout for _ in range(2))
    assert first == second


@pytest.mark.parametrize("typed", ["", "look", "look\n", b"\xff\xfe\n", "🙂\n"])
def test_the_end_of_the_input_ends_the_game_cleanly(typed: str | bytes) -> None:
    played = atod_play(typed, "--seed", "1")
    assert (played.returncode, played.stderr) == (0, "")


def test_a_terminal_without_unicode_does_not_stop_the_game() -> None:
    played = atod_play("look\nq\n", "--seed", "1", PYTHONIOENCODING="ascii")
    assert (played.returncode, played.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atod/ALFWord-v0"], "ALFWorld"),
        (["nonsense id"], "nonsense id"),
        (["--task-id", "nowhere"], "No task 'nowhere'"),
        (["--split", "test"], "valid_seen"),
        (["--data", "nowhere"], "No ALFWorld data"),
        (["--backend", "thor"], "native, alfworld"),
        (["--house-size", "huge"], "tiny"),
        (["--seed", "-1"], "--seed must be >= 0"),
        (["CartPole-v1"], "unexpected keyword argument"),
        (["no_such_package:Env-v0"], "no_such_package"),
    ],
)
def test_mistakes_are_named_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play.main([*COMMAND[5:], *arguments]) == 2
    assert_one_line(capsys, message)


def test_an_environment_without_texts_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert play.main(["CartPole-v1"]) == 2
    assert_one_line(capsys, "CartPole-v1 cannot be played")


def test_an_error_of_the_environment_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> int:
        raise TypeError("a defect")

    monkeypatch.setattr(play, "_play", fail)
    with pytest.raises(TypeError, match="a defect"):
        play.main(COMMAND[5:])


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("atod-play: ")
    assert captured.err.count("\n") == 1


def test_mistakes_in_the_command_line_exit_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        play.main(["--seed", "x"])
    assert caught.value.code == 2


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    process = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"look\n" * 5)
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_an_interrupt_ends_the_game_cleanly() -> None:
    process = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)  # The game has started; what follows may still be in the buffer.
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")
