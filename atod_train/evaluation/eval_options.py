"""The options of `atod-eval`: what is played, by whom, and where results go."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import PARSE_PROFILES
from atod_gym.prompts import PROMPT_STYLES
from atod_train.config import EnvConfig
from atod_train.evaluation.agent_evaluation import PlayedEnv
from atod_train.evaluation.agents import Agent, ExpertAgent, HumanAgent, RandomAgent, load_agent
from atod_train.evaluation.chat import (
    KEY_VARIABLE,
    ChatAgent,
    ChatEndpoint,
    ChatSettings,
    extra_body,
)
from atod_train.evaluation.local_model import PREFIX, SMOLLM2, LocalModel, find_model
from atod_train.evaluation.rate_limiter import RateLimiter
from atod_train.reports.evaluations import EvaluationMode

AGENTS = ("random", "expert", "human", "chat", "model:FOLDER", SMOLLM2)

_CHAT_EPISODES_AT_ONCE = 8
_MOST_EPISODES_AT_ONCE = 1024
_HOW_ASKED = (
    "base_url",
    "temperature",
    "top_p",
    "max_tokens",
    "keep_reasoning",
    "stop_at_action",
    "timeout",
    "retries",
)
"""Options that are fields of `ChatSettings`."""
_OF_MODELS = ("temperature", "max_tokens")
"""Options of chat endpoints that local models have, too."""
_MODEL_ONLY = ("max_context", "device")
_CHAT_ONLY = (
    "model",
    "api_key_env",
    "extra_body",
    "requests_per_minute",
    "tokens_per_minute",
    "price_in",
    "price_out",
    *_HOW_ASKED,
)


@dataclass(frozen=True)
class ChosenAgent:
    """An agent as the command line names it."""

    label: str
    """For tables and folders."""
    mode: EvaluationMode
    make: Callable[[], Agent]
    settings: Mapping[str, Any]
    """What results depend on."""
    close: Callable[[], Awaitable[None]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What results do not depend on."""
    model: LocalModel | None = None
    """A local model; then `make` is never called, and `settings` are what loading it gives."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="atod-eval",
        description="Let any agent play each task of a split once; prints success rates with "
        "95 % intervals. `atod-eval compare A B` compares two result folders.",
    )
    made.add_argument(
        "env_id",
        nargs="?",
        help=f"Gymnasium id (default: that of a trained model's run, else {EnvConfig.id})",
    )
    made.add_argument(
        "--agent",
        required=True,
        help=f"{', '.join(AGENTS)}, or module:Class of your own"
        " (atod_train.evaluation.agents.Agent). model:FOLDER is a local model: the folder of a "
        "run (its models/best, else models/last) or of a model, or a hub name",
    )
    _add_env_options(
        made.add_argument_group("environment (defaults of a trained model: those of its run)")
    )
    model = made.add_argument_group("--agent model:FOLDER (local models)")
    model.add_argument("--max-context", type=int, help="longest sequence in tokens")
    model.add_argument("--device", help="torch device (default: a GPU if there is one)")
    _add_chat_options(made.add_argument_group("--agent chat (endpoints of chat completions)"))
    run = made.add_argument_group("run")
    run.add_argument(
        "--seed", type=int, help="of the random agent and of sampling (0), of an endpoint (none)"
    )
    run.add_argument(
        "--concurrency",
        type=int,
        help=f"episodes at the same time (default: {_CHAT_EPISODES_AT_ONCE} for chat, for a local "
        "model as many as memory holds, else 1)",
    )
    run.add_argument("--out", type=Path, help="result folder (default: runs/eval-..)")
    run.add_argument("--transcripts", action="store_true", help="keep prompts and completions")
    run.add_argument("--resume", action="store_true", help="continue the evaluation in the folder")
    return made


def _add_env_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--split", required=True, help="split of the tasks")
    group.add_argument("--data", help="auto (default), official, generated, or a path")
    group.add_argument("--tasks", type=int, default=0, help="number of first tasks; 0: all")
    group.add_argument("--task-ids", nargs="+", metavar="ID", help="exactly these tasks")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further setting of the environment, such as house_size=tiny; may be repeated",
    )
    group.add_argument("--max-turns", type=int, help="turn limit (default: the environment's)")
    group.add_argument("--prompt-style", choices=PROMPT_STYLES, help="default: chat")
    group.add_argument(
        "--parse-profile",
        choices=PARSE_PROFILES,
        help="how replies are written: plain, the action alone; tags, <action>..</action>; react, "
        "Thought: and Action:; compat, as in published runs (default: tags)",
    )
    group.add_argument(
        "--history-window", type=int, help="turns shown in window style (default: 2)"
    )
    group.add_argument("--template", help="file with a prompt template")
    group.add_argument(
        "--hide-admissible",
        action=argparse.BooleanOptionalAction,
        help="whether prompts do not list possible actions (default: they do)",
    )


def _add_chat_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="name of the model at the endpoint")
    group.add_argument("--base-url", help="endpoint, such as http://127.0.0.1:8000/v1")
    group.add_argument(
        "--api-key-env", metavar="NAME", help=f"variable with the key (default: {KEY_VARIABLE})"
    )
    group.add_argument(
        "--temperature", type=float, help="default: the endpoint's; of a local model 0: greedy"
    )
    group.add_argument("--top-p", type=float, help="default: the endpoint's")
    group.add_argument("--max-tokens", type=int, help="longest completion")
    group.add_argument("--extra-body", metavar="JSON", help="further fields of a request")
    group.add_argument(
        "--keep-reasoning",
        action="store_true",
        default=None,
        help="put reasoning that comes beside the text before it, in <think>..</think>",
    )
    group.add_argument(
        "--stop-at-action",
        action=argparse.BooleanOptionalAction,
        help="whether replies end with their action (default: yes, with profiles tags and react)",
    )
    group.add_argument("--timeout", type=float, help="seconds for an answer (default: 120)")
    group.add_argument("--retries", type=int, help="of a failed request (default: 8)")
    group.add_argument("--requests-per-minute", type=int)
    group.add_argument("--tokens-per-minute", type=int)
    group.add_argument("--price-in", type=float, help="of a million tokens of prompts")
    group.add_argument("--price-out", type=float, help="of a million tokens of completions")


def played_env(options: argparse.Namespace, trained: EnvConfig | None = None) -> PlayedEnv:
    """What is played.

    Args:
        options: the command line.
        trained: settings that a model was trained with; they are the defaults of prompts, and of
            the data too where the environment is the same.

    Raises:
        InvalidSettingError: an option is no KEY=VALUE.
    """
    usual = trained or EnvConfig(parse_profile="tags", show_admissible=True)
    env_id = _given(options.env_id, usual.id)
    same = trained is not None and env_id == trained.id
    taken = dict(usual.options) if same else {}
    limit = taken.pop("max_turns", usual.max_turns) if same else None
    hides = _given(options.hide_admissible, not usual.show_admissible)
    return PlayedEnv(
        id=env_id,
        split=options.split,
        data=_given(options.data, usual.data if same else "auto"),
        max_turns=_given(options.max_turns, limit),
        options={**taken, **dict(_key_and_value(text) for text in options.option)},
        prompt_style=_given(options.prompt_style, usual.prompt_style),
        parse_profile=_given(options.parse_profile, usual.parse_profile),
        history_window=_given(options.history_window, usual.history_window),
        template=options.template,
        show_admissible=not hides,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def chosen_tasks(unwrapped: Any, options: argparse.Namespace) -> tuple[str, ...]:
    """The tasks to play, in manifest order or in that of `--task-ids`.

    Raises:
        InvalidSettingError: there is no such task, or none is chosen.
    """
    known = tuple(unwrapped.task_ids)
    if options.task_ids:
        if options.tasks:
            raise InvalidSettingError("Give --tasks or --task-ids, not both.")
        missing = sorted(set(options.task_ids) - set(known))
        if missing:
            raise InvalidSettingError(
                f"No task {missing[0]!r} among the {len(known)} of split {options.split!r}; "
                f"an example: {known[0]}."
            )
        return tuple(dict.fromkeys(options.task_ids))
    if options.tasks < 0:
        raise InvalidSettingError(f"--tasks must be >= 0, not {options.tasks}.")
    return known[: options.tasks or None]


def result_settings(
    played: PlayedEnv,
    unwrapped: Any,
    agent_settings: Mapping[str, Any],
    task_ids: tuple[str, ...],
) -> dict[str, Any]:
    """All that results depend on, as JSON values."""
    template = None
    if played.template is not None:
        template = hashlib.sha256(Path(played.template).read_bytes()).hexdigest()
    settings = asdict(played)
    return {
        "env_id": settings.pop("id"),
        **settings,
        "data": unwrapped.data,
        "data_hash": unwrapped.manifest.content_hash,
        "max_turns": played.max_turns or unwrapped.max_turns,
        "template": template,
        "agent": dict(agent_settings),
        "tasks": len(task_ids),
        "tasks_hash": hashlib.sha256("\n".join(task_ids).encode()).hexdigest(),
    }


def chosen_agent(options: argparse.Namespace) -> ChosenAgent:
    """Return the agent.

    Raises:
        AtodError: there is no such agent, or a setting or package for it is missing.
    """
    name: str = options.agent
    is_model = name == SMOLLM2 or name.startswith(PREFIX)
    for option in (*_CHAT_ONLY, *_MODEL_ONLY):
        takers = [
            *(["chat"] if option in _CHAT_ONLY else []),
            *([f"{PREFIX}FOLDER"] if option in (*_MODEL_ONLY, *_OF_MODELS) else []),
        ]
        chosen = f"{PREFIX}FOLDER" if is_model else name
        if getattr(options, option) is not None and chosen not in takers:
            flag = option.replace("_", "-")
            raise InvalidSettingError(f"--{flag} is for --agent {' and --agent '.join(takers)}.")
    if name == "chat":
        return _chat(options)
    if is_model:
        return _model(options)
    if name == "random":
        seed = options.seed or 0
        settings = {"kind": name, "seed": seed}
        return ChosenAgent(name, "sampled", lambda: RandomAgent(seed), settings)
    if options.seed is not None:
        raise InvalidSettingError("--seed is for --agent random, chat and model:FOLDER.")
    if name == "expert":
        return ChosenAgent(name, "greedy", ExpertAgent, {"kind": name})
    if name == "human":
        return ChosenAgent(name, "sampled", HumanAgent, {"kind": name})
    if ":" in name:
        return ChosenAgent(name, "sampled", load_agent(name), {"kind": name})
    raise InvalidSettingError(f"No agent {name!r}: {', '.join(AGENTS)}, or module:Class.")


def episodes_at_once(options: argparse.Namespace) -> int:
    """How many episodes are played at the same time.

    Raises:
        InvalidSettingError: the number makes no sense for the agent.
    """
    chosen = options.concurrency
    if chosen is None:
        return _CHAT_EPISODES_AT_ONCE if options.agent == "chat" else 1
    if not 1 <= chosen <= _MOST_EPISODES_AT_ONCE:
        raise InvalidSettingError(
            f"--concurrency must lie between 1 and {_MOST_EPISODES_AT_ONCE}, not {chosen}."
        )
    if options.agent == "human" and chosen != 1:
        raise InvalidSettingError("A person plays one episode at a time: --concurrency 1.")
    return int(chosen)


def prices(options: argparse.Namespace) -> tuple[float, float] | None:
    """Prices of a million tokens of prompts and of completions; None: not given.

    Raises:
        InvalidSettingError: only one is given, or one is negative.
    """
    given = (options.price_in, options.price_out)
    if given == (None, None):
        return None
    if None in given:
        raise InvalidSettingError("Give both --price-in and --price-out, or neither.")
    if not min(given) >= 0:
        raise InvalidSettingError("Prices must be >= 0.")
    return given


def result_folder(options: argparse.Namespace, agent: ChosenAgent, env_id: str) -> Path:
    """Where results go."""
    if options.out is not None:
        return Path(options.out)
    env = env_id.rpartition("/")[2]
    parts = ("eval", env, options.split, agent.label)
    return Path("runs") / "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)


def _model(options: argparse.Namespace) -> ChosenAgent:
    if options.template is not None:
        raise InvalidSettingError(
            "--template is not for local models, which are played with the prompts of training."
        )
    temperature = options.temperature or 0.0
    if options.seed is not None and not temperature:
        raise InvalidSettingError("--seed of a local model needs --temperature above 0.")
    model = LocalModel(
        find_model(options.agent.removeprefix(PREFIX)),
        temperature=temperature,
        max_completion_tokens=options.max_tokens,
        max_context=options.max_context,
        seed=options.seed or 0,
        device=options.device or "auto",
        episodes_at_once=options.concurrency,
    )

    def make() -> Agent:
        raise AssertionError("a local model plays all episodes at once")

    label = model.found.label
    mode: EvaluationMode = "sampled" if temperature else "greedy"
    return ChosenAgent(label, mode, make, {}, about={"source": model.found.source}, model=model)


def _chat(options: argparse.Namespace) -> ChosenAgent:
    given = {
        name: value
        for name in (*_HOW_ASKED, "seed")
        if (value := getattr(options, name)) is not None
    }
    settings = ChatSettings(
        model=options.model or "",
        key_variable=options.api_key_env,
        extra_body=extra_body(options.extra_body) if options.extra_body is not None else {},
        **given,
    )
    limiter = RateLimiter(options.requests_per_minute, options.tokens_per_minute)
    endpoint = ChatEndpoint(settings, limiter)
    mode: EvaluationMode = "greedy" if settings.temperature == 0 else "sampled"
    return ChosenAgent(
        label=settings.model,
        mode=mode,
        make=lambda: ChatAgent(endpoint),
        settings={"kind": "chat", **settings.of_results()},
        close=endpoint.close,
        about={"url": endpoint.url},
    )


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidSettingError(f"--option takes KEY=VALUE, not {text!r}.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
