"""`atod-eval`: any agent plays the tasks of a split and gets a table with intervals.

`atod-eval compare A B` compares two results. torch is imported for local models only.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from atod_gym import terminal
from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_gym.tasks import spread
from atod_train.evaluation.agents import Agent, ExpertAgent, HumanAgent, RandomAgent, load_agent
from atod_train.evaluation.chat import ChatAgent, ChatEndpoint
from atod_train.evaluation.eval_records import EpisodeRecord, EvaluationFolder, read_evaluated
from atod_train.evaluation.eval_tables import comparison, result_table
from atod_train.evaluation.local_model import LOCAL, PREFIX, SMOLLM2, LocalModel
from atod_train.evaluation.play import AgentPlayer
from atod_train.progress import Advance, progress
from atod_train.rollout.env_pool import EnvPool

if TYPE_CHECKING:
    from atod_train.evaluation.eval_options import EvalOptions

_AGENTS = ("random", "expert", "human", "chat", LOCAL, SMOLLM2)
_CHAT_EPISODES_AT_ONCE = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate an agent, or compare two results.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        Exit status: 0; 2 for a mistake of the user or a failing endpoint, reported in one line on
        standard error; 130 when stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal.accept_any_text()
    try:
        _run(words)
        return 0
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt as stop:
        status, message = 130, str(stop) or "Stopped."
    except (AtodError, gymnasium.error.Error, OSError) as error:
        status, message = 2, str(error)
    finally:
        terminal.flush_output()
    print(f"atod-eval: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(words: list[str]) -> None:
    try:
        from atod_train.evaluation.eval_options import CompareOptions, read_options
    except ImportError as error:
        raise MissingExtraError(
            f"atod-eval needs the package {error.name}: pip install 'atod-gym[eval]'"
        ) from error
    options = read_options(words)
    if isinstance(options, CompareOptions):
        first, second = read_evaluated(options.first), read_evaluated(options.second)
        names = (first.agent, second.agent)
        if names[0] == names[1]:
            names = (f"{options.first}, {names[0]}", f"{options.second}, {names[1]}")
        print(comparison(first, second, names))
    else:
        _evaluate(options, words)


def chosen_agent(options: EvalOptions) -> AgentPlayer | LocalModel:
    """Return the agent that `--agent` names.

    Raises:
        AtodError: there is no such agent, it does not take an option, or a setting or package for
            it is missing.
    """
    name, sampling = options.agent, options.sampling
    is_model = name == SMOLLM2 or name.startswith(PREFIX)
    options.check(LOCAL if is_model else name)
    if is_model:
        return LocalModel(name.removeprefix(PREFIX), sampling, options.local)
    if name == "chat":
        endpoint = ChatEndpoint(options.chat, sampling)
        return AgentPlayer(
            label=str(options.chat.model),
            mode="greedy" if sampling.temperature == 0 else "sampled",
            make=lambda: ChatAgent(endpoint),
            settings={"kind": name, **endpoint.of_results},
            concurrency=_CHAT_EPISODES_AT_ONCE,
            close=endpoint.close,
        )
    if name == "random":
        seed = sampling.seed or 0
        settings = {"kind": name, "seed": seed}
        return AgentPlayer(name, "sampled", lambda: RandomAgent(seed), settings)
    makers: dict[str, Callable[[], Agent]] = {"expert": ExpertAgent, "human": HumanAgent}
    if name not in makers and ":" not in name:
        advice = f" Use --agent {PREFIX}{name} for that folder." if Path(name).is_dir() else ""
        raise InvalidSettingError(
            f"No agent {name!r}: {', '.join(_AGENTS)}, or module:Class.{advice}"
        )
    make = makers.get(name) or load_agent(name)
    return AgentPlayer(name, "greedy" if name == "expert" else "sampled", make, {"kind": name})


def result_folder(options: EvalOptions, label: str, env_id: str) -> Path:
    """Return the folder of the results."""
    if options.out is not None:
        return options.out
    parts = ("eval", env_id.rpartition("/")[2], options.split, label)
    return Path("runs") / "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)


def _evaluate(options: EvalOptions, words: Sequence[str]) -> None:
    """Play what is left to play and show the result."""
    agent = chosen_agent(options)
    trained = agent.trained if isinstance(agent, LocalModel) else None
    config = options.env_config(trained.env if trained is not None else None)
    folder = EvaluationFolder(
        result_folder(options, agent.label, config.id),
        resume=options.resume,
        transcripts=options.transcripts,
    )
    pool = EnvPool(config, options.split, options.env.template)
    with closing(pool), closing(folder):
        task_ids = _chosen_tasks(pool.task_ids, options)
        folder.begin(_settings(pool, agent.load(config), task_ids), words)
        try:
            _play(folder, agent, pool, task_ids, options)
        except (KeyboardInterrupt, AtodError, OSError) as error:
            if not folder.records:
                raise
            message = str(error) or "Stopped."
            message += "" if message.endswith((".", "?", "!")) else "."
            again = [word for word in words if word != "--resume"]
            message += (
                f" {len(folder.records)} of {len(task_ids)} tasks are kept in {folder.path}; "
                f"to continue: {shlex.join(['atod-eval', *again, '--resume'])}"
            )
            kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else AtodError
            raise kind(message) from error
        evaluated = folder.finish(
            agent=agent.label, mode=agent.mode, task_ids=task_ids, prices=options.chat.prices
        )
    print(f"\n{result_table(evaluated)}\n\nresults: {folder.path}")


def _play(
    folder: EvaluationFolder,
    agent: AgentPlayer | LocalModel,
    pool: EnvPool,
    task_ids: Sequence[str],
    options: EvalOptions,
) -> None:
    """Play what is left to play, below a bar; a person sees the episode instead."""
    finished = {record.task_id for record in folder.records}
    left = [task_id for task_id in task_ids if task_id not in finished]
    bar: AbstractContextManager[Advance | None] = nullcontext()
    if options.agent != "human":
        bar = progress(len(task_ids), "playing", initial=len(finished))
    note = ""
    with bar as advance:

        def count(tokens: int) -> None:
            if advance is not None:
                advance(0, note, tokens)

        def keep(record: EpisodeRecord) -> None:
            nonlocal note
            folder.add(record)
            if advance is None:
                end = "Solved" if record.success else "Not solved"
                print(f"\n{end} after {record.turns} turns (score {record.score:g}).")
            else:
                solved = sum(kept.success for kept in folder.records)
                note = f"{solved} of {len(folder.records)} solved"
                advance(note=note)

        agent.play(
            pool, left, keep,
            on_turn=count, concurrency=options.concurrency, already=len(finished),
        )  # fmt: skip


def _chosen_tasks(known: Sequence[str], options: EvalOptions) -> tuple[str, ...]:
    """Return the tasks to play, in manifest order or in that of `--task-ids`."""
    missing = sorted(set(options.task_ids) - set(known))
    if missing:
        raise InvalidSettingError(
            f"No task {missing[0]!r} among the {len(known)} of split {options.split!r}; "
            f"an example: {known[0]}."
        )
    return tuple(dict.fromkeys(options.task_ids)) or spread(known, options.tasks)


def _settings(pool: EnvPool, agent: Mapping[str, Any], task_ids: Sequence[str]) -> dict[str, Any]:
    """Return all that results depend on, as JSON values."""
    config = asdict(pool.config)
    names = ("options", "prompt_style", "parse_profile", "show_admissible")
    template = pool.template and hashlib.sha256(pool.template.read_bytes()).hexdigest()
    return {
        "env_id": pool.config.id,
        "split": pool.split,
        "max_turns": pool.max_turns,
        **{name: config[name] for name in names},
        "data": pool.data,
        "data_hash": pool.content_hash,
        "template": template,
        "agent": dict(agent),
        "tasks": len(task_ids),
        "tasks_hash": hashlib.sha256("\n".join(task_ids).encode()).hexdigest(),
    }


if __name__ == "__main__":
    sys.exit(main())
