"""`atod-play`: play a task by hand in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium import spaces

import atod_gym
from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import ACTION_TAGS, action_tags
from atod_gym.prompts import shown_text
from atod_gym.types import TurnObservation
from atod_gym.wrappers import make_env

HELP = """\
  a number   plays the action with that number
  a text     is played as it stands
  ?          shows this help
  q          quits (so do Ctrl-D and Ctrl-C)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays one episode.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status: 0 when the episode ended or the player left, 2 for a mistake of the user, which
        is named in one line on standard error.
    """
    accept_any_text()
    options = _parser().parse_args(arguments)
    try:
        env = _make(options)
        try:
            return _play(env, options)
        finally:
            env.close()
    except (AtodError, gymnasium.error.Error) as error:
        print(f"atod-play: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print()
        return 0
    except BrokenPipeError:
        # Whoever read the output has left; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    if not isinstance(space, spaces.Dict) or not {"instruction", "text"} <= space.keys():
        env.close()
        raise InvalidSettingError(
            f"{options.env_id} has no texts to play; its observations are {space}. "
            f"Environments that can be played: {', '.join(atod_gym.ENV_IDS)}."
        )
    return env


def _play(env: gymnasium.Env[Any, str], options: argparse.Namespace) -> int:
    task = {} if options.task_id is None else {"task_id": options.task_id}
    observation, info = env.reset(seed=options.seed, options=task)
    print(f"Task {info['task_id']} ({info['split']}, {info['data']} data)")
    print(f"Goal: {observation['instruction']}\n\n{page(observation, info)}\n\n{HELP}")
    tags = action_tags(env.unwrapped.metadata)
    if tags != ACTION_TAGS:
        print(f"Actions: {', '.join(f'{tag}[..]' for tag in tags)}")
    while True:
        action = ask(observation)
        if action is None:
            print("Bye.")
            return 0
        observation, _, terminated, truncated, info = env.step(action)
        print(f"\n{page(observation, info)}")
        if terminated or truncated:
            end = "Solved" if info["success"] else "Not solved"
            print(f"\n{end} after {info['turn_index']} turns (score {info['score']:g}).")
            if "golden_answers" in info:
                print(f"Right answers: {'; '.join(info['golden_answers'])}")
            return 0


def page(observation: TurnObservation, info: Mapping[str, Any]) -> str:
    """The text in lines: that of a web page has its parts in one line, with marks between them."""
    return shown_text(observation, info).replace(" [SEP] ", "\n")


def ask(observation: TurnObservation) -> str | None:
    """The player's next action; None when the player quits."""
    actions = {str(n): one for n, one in enumerate(observation["admissible_actions"], 1)}
    print()
    for number, action in actions.items():
        print(f"  {number:>2}  {action}")
    while True:
        answer = input(f"turn {observation['turn_index'] + 1}> ").strip()
        if answer == "q":
            return None
        if answer == "?":
            print(HELP)
        elif answer in actions:
            return _filled_in(actions[answer])
        elif answer.isascii() and answer.isdigit():
            print(f"There is no action {answer[:20]}; the numbers go from 1 to {len(actions)}.")
        elif answer:
            return answer


def _filled_in(action: str) -> str:
    """Asks for the words of a search, which stands in the list without them."""
    blank = "<query>"
    return action.replace(blank, input("query> ").strip()) if blank in action else action


def accept_any_text() -> None:
    """Takes any bytes typed and escapes what the terminal cannot show, so that play goes on."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        # A stream that something else has taken the place of may lack the method.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)


if __name__ == "__main__":
    sys.exit(main())
