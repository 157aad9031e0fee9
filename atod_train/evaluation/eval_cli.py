"""`atod-eval`: any agent plays the tasks of a split and gets a table with intervals; no torch.

`atod-eval compare A B` puts two results side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium

from atod_gym import play
from atod_gym.errors import AtodError, InvalidSettingError
from atod_train import progress
from atod_train.evaluation import eval_options as chosen
from atod_train.evaluation.agent_evaluation import EnvThread, PlayedEnv, play_tasks
from atod_train.evaluation.eval_records import (
    EpisodeRecord,
    Evaluated,
    EvaluationFolder,
    command_to_resume,
    read_evaluated,
)
from atod_train.evaluation.eval_tables import comparison, result_table
from atod_train.evaluation.local_model import LocalModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays, or compares.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status: 0; 2 for a mistake of the user or a failing endpoint, which is named in one
        line on standard error; 130 when stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    play.accept_any_text()
    try:
        if words[:1] == ["compare"]:
            return _compare(words[1:])
        return _evaluate(words)
    except BrokenPipeError:
        # Whoever read the output has left; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AtodError, gymnasium.error.Error, OSError) as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        _tell("Stopped.")
        return 130


def _compare(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="atod-eval compare",
        description="Compare two results: success rates with 95 % intervals and their difference.",
    )
    parser.add_argument("first", type=Path, help="result folder")
    parser.add_argument("second", type=Path, help="result folder")
    options = parser.parse_args(words)
    first, second = read_evaluated(options.first), read_evaluated(options.second)
    names = (first.agent, second.agent)
    if names[0] == names[1]:
        names = (f"{options.first}, {names[0]}", f"{options.second}, {names[1]}")
    print(comparison(first, second, names))
    return 0


def _evaluate(words: Sequence[str]) -> int:
    options = chosen.parser().parse_args(words)
    prices, concurrency = chosen.prices(options), chosen.episodes_at_once(options)
    agent = chosen.chosen_agent(options)
    trained = agent.model.found.trained if agent.model is not None else None
    played = chosen.played_env(options, trained.env if trained is not None else None)
    thread = EnvThread(played)
    try:
        unwrapped = thread.env.unwrapped
        for name in ("task_ids", "manifest", "data", "observation", "max_turns"):
            if not hasattr(type(unwrapped), name) and not hasattr(unwrapped, name):
                raise InvalidSettingError(f"{played.id} has no {name}, so it cannot be evaluated.")
        task_ids = chosen.chosen_tasks(unwrapped, options)
        settings = agent.settings
        if agent.model is not None:
            settings = agent.model.load()
            _tell(_described(agent.model, played))
        folder = EvaluationFolder(
            chosen.result_folder(options, agent, played.id),
            chosen.result_settings(played, unwrapped, settings, task_ids),
            resume=options.resume,
            about={"concurrency": concurrency, "arguments": list(words), **agent.about},
        )
        status = _play(folder, agent, played, thread, task_ids, concurrency, options, words)
        if status:
            return status
    finally:
        thread.close()
    evaluated: Evaluated = folder.finish(
        agent=agent.label, mode=agent.mode, task_ids=task_ids, prices=prices
    )
    print(f"\n{result_table(evaluated)}\n\nresults: {folder.path}")
    return 0


def _play(
    folder: EvaluationFolder,
    agent: chosen.ChosenAgent,
    played: PlayedEnv,
    thread: EnvThread,
    task_ids: Sequence[str],
    concurrency: int,
    options: argparse.Namespace,
    words: Sequence[str],
) -> int:
    """Plays what is left to play; gives an exit status."""
    finished = {record.task_id for record in folder.records}
    left = [task_id for task_id in task_ids if task_id not in finished]
    began = time.monotonic()
    if importlib.util.find_spec("rich") is None:
        progress.plain_lines()
    bar: Any = nullcontext(_no_progress)
    if options.agent != "human":
        bar = progress.progress(len(left), "playing")

    def play_all() -> None:
        if agent.model is None:
            asyncio.run(run())
            return
        agent.model.play(
            played, played.max_turns or thread.env.unwrapped.max_turns, left,
            already=len(finished), on_record=keep, keep_transcripts=options.transcripts,
        )  # fmt: skip

    async def run() -> None:
        try:
            await play_tasks(
                played, thread, agent.make, left,
                concurrency=concurrency, on_record=keep, keep_transcripts=options.transcripts,
            )  # fmt: skip
        finally:
            if agent.close is not None:
                await agent.close()

    try:
        with bar as advance:

            def keep(record: EpisodeRecord) -> None:
                folder.add(record, time.monotonic() - began)
                solved = sum(kept.success for kept in folder.records)
                advance(note=f"{solved} of {len(folder.records)} solved")
                if options.agent == "human":
                    end = "Solved" if record.success else "Not solved"
                    print(f"\n{end} after {record.turns} turns (score {record.score:g}).")

            play_all()
    except (KeyboardInterrupt, AtodError, OSError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        what = "Stopped." if stopped else str(error)
        if folder.records:
            what += (
                f" {len(folder.records)} of {len(task_ids)} tasks are kept in {folder.path}; "
                f"to continue: {command_to_resume(words)}"
            )
        _tell(what)
        return 130 if stopped else 2
    return 0


def _described(model: LocalModel, played: PlayedEnv) -> str:
    """Return the line that names the model and its prompts."""
    source = "its run" if model.found.trained is not None else "defaults and command line"
    return (
        f"model {model.found.source}; prompts of {source}: {played.prompt_style} style, profile "
        f"{played.parse_profile}, at most {model.max_completion_tokens} tokens a completion and "
        f"{model.max_context} a sequence, temperature {model.temperature:g}"
    )


def _no_progress(amount: int = 1, note: str = "") -> None:
    """Show no bar: a person sees the episode."""


def _tell(message: str) -> None:
    print(f"atod-eval: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
