"""`atod-play`: play a task by hand in a terminal."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

import atod_gym
from atod_gym import terminal
from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import ACTION_TAGS, action_tags
from atod_gym.prompts import shown_text
from atod_gym.types import TurnObservation
from atod_gym.wrappers import make_env

HELP = """\
  a number   plays the action with that number
  a text     is played as it stands
  ?          shows this help and the goal (so does help)
  q          quits (so do quit, exit, Ctrl-D and Ctrl-C)"""

_WIDEST = 100
"""Columns of text that are still easy to read."""

_BUTTON = re.compile(r"click\[(.+)\]", re.DOTALL)
_MARK = " [SEP] "
"""Between the parts of a web page, which come in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Play one episode.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status: 0 when the episode ended or the player left, 2 for a mistake of the user, which
        is named in one line on standard error.
    """
    terminal.accept_any_text()
    try:
        options = _parser().parse_args(arguments)
        with _make(options) as env:
            _play(env, options)
    except (AtodError, gymnasium.error.Error) as error:
        print(f"atod-play: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print()
    except BrokenPipeError:
        pass
    finally:
        terminal.flush_output()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atod-play",
        description="Play a task by hand.",
        epilog=f"While playing:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "env_id",
        nargs="?",
        default=atod_gym.ENV_IDS[0],
        help=f"one of {', '.join(atod_gym.ENV_IDS)} (default: %(default)s)",
    )
    parser.add_argument("--split", help="split of the tasks, such as train")
    parser.add_argument("--data", help="auto, official, generated, or a path to data")
    parser.add_argument("--task-id", help="play exactly this task")
    parser.add_argument("--seed", type=int, help="picks the task (default: a random one)")
    parser.add_argument("--backend", help="engine, such as native or alfworld")
    parser.add_argument("--house-size", help="size of generated houses")
    parser.add_argument("--server-url", help="a running server, such as http://127.0.0.1:3000")
    parser.add_argument("--corpus", help="file of passages to search")
    return parser


def _make(options: argparse.Namespace) -> gymnasium.Env[Any, str]:
    settings = {
        name: getattr(options, name)
        for name in ("split", "data", "backend", "house_size", "server_url", "corpus")
        if getattr(options, name) is not None
    }
    if options.seed is not None and options.seed < 0:
        raise InvalidSettingError(f"--seed must be >= 0, not {options.seed}")
    env = make_env(options.env_id, **settings)
    space = env.observation_space
    needed = TurnObservation.__annotations__.keys()
    if not isinstance(space, spaces.Dict) or not needed <= space.keys():
        env.close()
        raise InvalidSettingError(
            f"{options.env_id} cannot be played: its observations are of {type(space).__name__}, "
            f"without some of {', '.join(needed)}. Environments that can be played: "
            f"{', '.join(atod_gym.ENV_IDS)}, and subclasses of atod_gym.envs.turn_env.TurnEnv."
        )
    return env


def _play(env: gymnasium.Env[Any, str], options: argparse.Namespace) -> None:
    task = {} if options.task_id is None else {"task_id": options.task_id}
    observation, info = env.reset(seed=options.seed, options=task)
    limit = getattr(env.unwrapped, "max_turns", None)
    found = {name: info.get(name, "unknown") for name in ("task_id", "split", "data")}
    print(f"Task {found['task_id']} ({found['split']}, {found['data']} data)")
    print(f"{_wrapped('Goal: ' + observation['instruction'])}\n\n{HELP}")
    tags = action_tags(env.unwrapped.metadata)
    tags = () if tags == ACTION_TAGS else tags
    if tags:
        print(f"Actions: {', '.join(f'{tag}[..]' for tag in tags)}")
    print(f"\n{page(observation, info)}")
    while True:
        action = ask(observation, limit=limit, tags=tags)
        if action is None:
            print(f"Stopped after {_turns(observation['turn_index'])}, not solved.")
            return
        observation, _, terminated, truncated, info = env.step(action)
        print(f"\n{page(observation, info)}")
        if terminated or truncated:
            end = "Solved" if info.get("success") else "Not solved"
            score = f" (score {info['score']:g})" if "score" in info else ""
            print(f"\n{end} after {_turns(observation['turn_index'])}{score}.")
            if "golden_answers" in info:
                print(f"Right answers: {'; '.join(info['golden_answers'])}")
            return


def _turns(count: int) -> str:
    return f"{count} turn{'s' * (count != 1)}"


def page(observation: TurnObservation, info: Mapping[str, Any]) -> str:
    """Return the text in lines of the terminal's width, without the goal.

    A web page has a line for each of its parts. Buttons have the numbers of their actions.
    """
    goal = observation["instruction"]
    numbers = _numbers_of_buttons(observation)
    lines = []
    for part in shown_text(observation, info).split(_MARK):
        if part.strip() in (goal, "Instruction:"):
            continue
        for line in part.replace(f"Your task is to: {goal}", "").rstrip().split("\n"):
            number = numbers.get(line.lower())
            lines.append(_wrapped(line) if number is None else f"  {number:>2}  {line}")
    return "\n".join(lines)


def ask(
    observation: TurnObservation, *, limit: int | None = None, tags: Sequence[str] = ()
) -> str | None:
    """Return the player's next action; None when the player quits.

    Args:
        observation: of the turn. Its actions are listed, except for buttons: `page` shows these.
        limit: turns of an episode, if known.
        tags: names of the actions where any text can stand in their brackets, such as search.
    """
    actions = _numbered(observation)
    on_page = set(_numbers_of_buttons(observation).values())
    listed = [f"{number:>2}  {action}" for number, action in actions.items()
              if number not in on_page]  # fmt: skip
    if listed:
        print(f"\n{_in_columns(listed)}")
    turn = f"turn {observation['turn_index'] + 1}" + (f" of {limit}" if limit else "")
    unknown = ""
    print()
    while True:
        answer = input(f"{turn}> ").strip()
        known = answer in actions.values()
        other = f"click[{answer}]"
        if not answer:
            continue
        if not known and answer in ("q", "quit", "exit"):
            return None
        if not known and answer in ("?", "help"):
            print(f"{HELP}\n{_wrapped('Goal: ' + observation['instruction'])}")
        elif answer in actions and other in actions.values() and actions[answer] != other:
            print(f"{answer} is number {answer}, {actions[answer]}, and the button {other}: type "
                  "one of these actions in full.")  # fmt: skip
        elif answer in actions:
            return _filled_in(actions[answer])
        elif other in actions.values():
            return other
        elif actions and answer.isascii() and answer.isdigit():
            print(f"There is no action {answer[:20]}; the numbers go from 1 to {len(actions)}.")
        elif tags and not answer.startswith(tuple(f"{tag}[" for tag in tags)):
            print(f"Write {' or '.join(f'{tag}[..]' for tag in tags)}.")
        elif _is_listed(answer, actions) or answer == unknown:
            return answer
        else:
            unknown = answer
            print(f"{answer[:60]!a} is no action of the list; type it again to play it anyway.")


def _numbered(observation: TurnObservation) -> dict[str, str]:
    """Return number -> action; buttons in the order of the page, then the others."""
    parts = [part.lower() for part in observation["text"].split(_MARK)]

    def place(action: str) -> int:
        button = _BUTTON.fullmatch(action)
        label = button[1].lower() if button else ""
        return parts.index(label) if label in parts else len(parts)

    ordered = sorted(observation["admissible_actions"], key=place)
    return {str(number): action for number, action in enumerate(ordered, 1)}


def _numbers_of_buttons(observation: TurnObservation) -> dict[str, str]:
    """Return label -> number of the buttons that are parts of a page."""
    parts = {part.lower() for part in observation["text"].split(_MARK)}
    found = {}
    for number, action in _numbered(observation).items():
        button = _BUTTON.fullmatch(action)
        if button and button[1].lower() in parts:
            found[button[1].lower()] = number
    return found


def _is_listed(answer: str, actions: Mapping[str, str]) -> bool:
    """Return whether an answer is an action of the list, whose blanks may hold any words."""
    if not actions:
        return True
    patterns = (re.escape(action).replace("<query>", ".*") for action in actions.values())
    return any(re.fullmatch(pattern, answer, re.DOTALL) for pattern in patterns)


def _filled_in(action: str) -> str:
    """Ask for the words of a search, which stands in the list without them."""
    blank = "<query>"
    return action.replace(blank, input("query> ").strip()) if blank in action else action


def _width() -> int:
    return max(20, min(_WIDEST, shutil.get_terminal_size().columns))


def _wrapped(line: str) -> str:
    """Return a line broken between words where it is too wide."""
    return "\n".join(textwrap.wrap(line, _width(), break_long_words=False)) or line


def _in_columns(items: Sequence[str]) -> str:
    """Return items column by column, in as many columns as fit."""
    wide = max(map(len, items)) + 4
    columns = max(1, min(_width() // wide, len(items) // 5))
    rows = -(-len(items) // columns)
    lines = (items[row::rows] for row in range(rows))
    return "\n".join("  " + "".join(item.ljust(wide) for item in line).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
