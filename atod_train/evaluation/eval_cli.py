"""`atod-eval`: any agent plays the tasks of a split and gets a table with intervals.

`atod-eval compare A B` compares two results. torch is imported for local models only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from atod_gym import play
from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.evaluation.agents import Agent, ExpertAgent, HumanAgent, RandomAgent, load_agent
from atod_train.evaluation.chat import ChatAgent, ChatEndpoint
from atod_train.evaluation.eval_records import EpisodeRecord, EvaluationFolder, read_evaluated
from atod_train.evaluation.eval_tables import comparison, result_table
from atod_train.evaluation.local_model import PREFIX, SMOLLM2, LocalModel, find_model
from atod_train.evaluation.play import play_tasks
from atod_train.progress import progress
from atod_train.reports.evaluations import EvaluationMode
from atod_train.rollout.env_pool import EnvPool

if TYPE_CHECKING:
    from atod_train.evaluation.eval_options import CompareOptions, EvalOptions

_AGENTS = ("random", "expert", "human", "chat", f"{PREFIX}FOLDER", SMOLLM2)
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
    play.accept_any_text()
    try:
        from atod_train.evaluation.eval_options import CompareOptions, EvalOptions, read_options
    except ImportError as error:
        _report(f"atod-eval needs the package {error.name}: pip install 'atod-gym[eval]'")
        return 2
    try:
        if words[:1] == ["compare"]:
            _compare(read_options(CompareOptions, "atod-eval compare", words[1:]))
            return 0
        return _evaluate(read_options(EvalOptions, "atod-eval", words), words)
    except BrokenPipeError:
        # The reader of the output has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AtodError, gymnasium.error.Error, OSError) as error:
        _report(str(error))
        return 2
    except KeyboardInterrupt:
        _report("Stopped.")
        return 130


def _compare(options: CompareOptions) -> None:
    first, second = read_evaluated(options.first), read_evaluated(options.second)
    names = (first.agent, second.agent)
    if names[0] == names[1]:
        names = (f"{options.first}, {names[0]}", f"{options.second}, {names[1]}")
    print(comparison(first, second, names))


@dataclass(frozen=True)
class AgentPlayer:
    """Agents that play one episode each at a time; a `LocalModel` plays many in one batch."""

    label: str
    """For tables and folders."""
    mode: EvaluationMode
    make: Callable[[], Agent]
    settings: Mapping[str, Any]
    """Settings that results depend on."""
    concurrency: int = 1
    """Usual number of episodes at the same time."""
    close: Callable[[], Awaitable[None]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """Settings that results do not depend on."""


def chosen_agent(options: EvalOptions) -> AgentPlayer | LocalModel:
    """Return the agent that `--agent` names.

    Raises:
        AtodError: there is no such agent, it does not take an option, or a setting or package for
            it is missing.
    """
    name = options.agent
    is_model = name == SMOLLM2 or name.startswith(PREFIX)
    if name != "chat":
        if not is_model:
            options.refuse(
                f"chat and --agent {PREFIX}FOLDER", "sampling.temperature", "sampling.max_tokens"
            )
        options.refuse("chat", "chat")
    if not is_model:
        options.refuse(f"{PREFIX}FOLDER", "local")
    if name == "chat":
        endpoint = ChatEndpoint(options.chat, options.sampling)
        return AgentPlayer(
            label=str(options.chat.model),
            mode="greedy" if options.sampling.temperature == 0 else "sampled",
            make=lambda: ChatAgent(endpoint),
            settings={"kind": "chat", **endpoint.of_results},
            concurrency=_CHAT_EPISODES_AT_ONCE,
            close=endpoint.close,
            about={"url": endpoint.url},
        )
    if is_model:
        if options.env.template is not None:
            raise InvalidSettingError(
                "--template is not for local models, which are played with the prompts of training."
            )
        found = find_model(name.removeprefix(PREFIX))
        return LocalModel(found, options.sampling, options.local.max_context, options.local.device)
    seed = options.sampling.seed
    if name == "random":
        settings = {"kind": name, "seed": seed or 0}
        return AgentPlayer(name, "sampled", lambda: RandomAgent(seed or 0), settings)
    if seed is not None:
        raise InvalidSettingError(f"--seed is for --agent random, chat and {PREFIX}FOLDER.")
    if name == "human" and options.concurrency not in (None, 1):
        raise InvalidSettingError("A person plays one episode at a time: --concurrency 1.")
    makers: dict[str, Callable[[], Agent]] = {"expert": ExpertAgent, "human": HumanAgent}
    if name not in makers and ":" not in name:
        advice = f" Use --agent {PREFIX}{name} for that folder." if Path(name).is_dir() else ""
        raise InvalidSettingError(
            f"No agent {name!r}: {', '.join(_AGENTS)}, or module:Class.{advice}"
        )
    mode: EvaluationMode = "greedy" if name == "expert" else "sampled"
    return AgentPlayer(name, mode, makers.get(name) or load_agent(name), {"kind": name})


def result_folder(options: EvalOptions, label: str, env_id: str) -> Path:
    """Return the folder of the results."""
    if options.out is not None:
        return options.out
    parts = ("eval", env_id.rpartition("/")[2], options.split, label)
    return Path("runs") / "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)


def _evaluate(options: EvalOptions, words: Sequence[str]) -> int:
    """Play what is left to play and show the result; return the exit status."""
    options.check()
    agent = chosen_agent(options)
    trained = agent.found.trained if isinstance(agent, LocalModel) else None
    config = options.env_config(trained.env if trained is not None else None)
    folder = EvaluationFolder(
        result_folder(options, agent.label, config.id),
        resume=options.resume,
        transcripts=options.transcripts,
    )

    def make_pool() -> EnvPool:
        return EnvPool(config, options.split, options.env.template)

    with closing(make_pool()) as pool, closing(folder):
        task_ids = _chosen_tasks(pool.task_ids, options)
        if isinstance(agent, LocalModel):
            settings = agent.load()
            _report(agent.described(config))
        else:
            settings = dict(agent.settings)
        folder.begin(
            _settings(pool, settings, task_ids, options.env.template),
            {"concurrency": options.concurrency, "arguments": list(words), **agent.about},
        )
        status = _play(folder, agent, pool, make_pool, task_ids, options, words)
    if status == 0:
        evaluated = folder.finish(
            agent=agent.label, mode=agent.mode, task_ids=task_ids, prices=options.chat.prices
        )
        print(f"\n{result_table(evaluated)}\n\nresults: {folder.path}")
    return status


def _play(
    folder: EvaluationFolder,
    agent: AgentPlayer | LocalModel,
    pool: EnvPool,
    make_pool: Callable[[], EnvPool],
    task_ids: Sequence[str],
    options: EvalOptions,
    words: Sequence[str],
) -> int:
    """Play what is left to play; return the exit status."""
    finished = {record.task_id for record in folder.records}
    left = [task_id for task_id in task_ids if task_id not in finished]
    began = time.monotonic()
    is_human = options.agent == "human"
    bar: Any = nullcontext()  # a person sees the episode
    if not is_human:
        bar = progress(len(task_ids), "playing", initial=len(finished))
    try:
        with bar as advance:

            def keep(record: EpisodeRecord) -> None:
                folder.add(record, time.monotonic() - began)
                if is_human:
                    end = "Solved" if record.success else "Not solved"
                    print(f"\n{end} after {record.turns} turns (score {record.score:g}).")
                else:
                    solved = sum(kept.success for kept in folder.records)
                    advance(
                        note=f"{solved} of {len(folder.records)} solved",
                        tokens=record.completion_tokens or 0,
                    )

            if isinstance(agent, LocalModel):
                agent.play(
                    pool, left, already=len(finished), concurrency=options.concurrency,
                    on_record=keep,
                )  # fmt: skip
            else:
                play_tasks(
                    pool, make_pool, agent.make, left, on_record=keep, close=agent.close,
                    concurrency=options.concurrency or agent.concurrency,
                )  # fmt: skip
    except (KeyboardInterrupt, AtodError, OSError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        message = "Stopped." if stopped else str(error)
        message += "" if message.endswith((".", "?", "!")) else "."
        if folder.records:
            again = [word for word in words if word != "--resume"]
            message += (
                f" {len(folder.records)} of {len(task_ids)} tasks are kept in {folder.path}; "
                f"to continue: {shlex.join(['atod-eval', *again, '--resume'])}"
            )
        _report(message)
        return 130 if stopped else 2
    return 0


def _chosen_tasks(known: Sequence[str], options: EvalOptions) -> tuple[str, ...]:
    """Return the tasks to play, in manifest order or in that of `--task-ids`."""
    missing = sorted(set(options.task_ids) - set(known))
    if missing:
        raise InvalidSettingError(
            f"No task {missing[0]!r} among the {len(known)} of split {options.split!r}; "
            f"an example: {known[0]}."
        )
    return tuple(dict.fromkeys(options.task_ids)) or tuple(known)[: options.tasks or None]


def _settings(
    pool: EnvPool, agent: Mapping[str, Any], task_ids: Sequence[str], template: Path | None
) -> dict[str, Any]:
    """Return all that results depend on, as JSON values."""
    config = asdict(pool.config)
    names = ("options", "prompt_style", "parse_profile", "history_window", "show_admissible")
    digest = None if template is None else hashlib.sha256(template.read_bytes()).hexdigest()
    return {
        "env_id": pool.config.id,
        "split": pool.split,
        "max_turns": pool.max_turns,
        **{name: config[name] for name in names},
        "data": pool.data,
        "data_hash": pool.content_hash,
        "template": digest,
        "agent": dict(agent),
        "tasks": len(task_ids),
        "tasks_hash": hashlib.sha256("\n".join(task_ids).encode()).hexdigest(),
    }


def _report(message: str) -> None:
    print(f"atod-eval: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
