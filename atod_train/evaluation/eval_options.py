"""The options of `atod-eval`, read from the command line by tyro."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ParseProfile
from atod_train.config import EnvConfig
from atod_train.evaluation.local_model import LOCAL

_MOST_EPISODES_AT_ONCE = 1024
_LOWEST = {
    0: "tasks temperature top_p retries price_in price_out",
    1e-3: "timeout",
    1: "concurrency max_turns max_tokens max_context requests_per_minute tokens_per_minute",
}
"""Lowest value -> options."""
_TAKERS = {"sampling": ("chat", LOCAL), "local": (LOCAL,), "chat": ("chat",)}
"""Groups of options and the agents that take them; random play takes a seed, too."""

_T = TypeVar("_T")
Unset = Annotated[_T | None, arg(help_behavior_hint="")]
"""An option whose default depends on others; `--help` shows no default but that of its text."""


@dataclass(frozen=True)
class EnvOptions:
    """The environment and its prompts. A trained model has those of its run as defaults."""

    data: Unset[str] = None
    """auto (default), official, generated, or a path."""
    option: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Further setting of the environment, such as house_size=tiny."""
    max_turns: Unset[int] = None
    """Turn limit of an episode. Default: the environment's."""
    prompt_style: Unset[str] = None
    """chat (default): append-only dialogue; window: the last two turns in one message; window:4:
    the last four."""
    parse_profile: Unset[ParseProfile] = None
    """Format of replies. plain: the action alone; tags (default): <action>..</action>; react:
    Thought: and Action:; compat: as in published runs."""
    template: Unset[Path] = None
    """File with a prompt template."""
    hide_admissible: Unset[bool] = None
    """Whether prompts leave out the list of admissible actions. Default: they show it."""


@dataclass(frozen=True)
class Sampling:
    """With --agent chat or model:FOLDER: how completions are sampled."""

    temperature: Unset[float] = None
    """Default: that of the endpoint; of a local model 0, greedy decoding."""
    max_tokens: Unset[int] = None
    """Longest completion, its reasoning included. Default: 2048 at an endpoint; that of a local
    model's run, else 512, at most half the context."""
    seed: Unset[int] = None
    """Default: none at an endpoint, else 0. It is also that of --agent random."""


@dataclass(frozen=True)
class ModelOptions:
    """With --agent model:FOLDER: a local model."""

    max_context: Unset[int] = None
    """Longest sequence in tokens. Default: that of the run, else 8192, at most the model's."""
    device: Unset[str] = None
    """A torch device. Default: a GPU if there is one."""


@dataclass(frozen=True)
class ChatSettings:
    """With --agent chat: an endpoint of chat completions."""

    model: Unset[str] = None
    """Name of the model at the endpoint."""
    base_url: Unset[str] = None
    """URL, such as http://127.0.0.1:8000/v1. Default: the variable OPENAI_BASE_URL, else OpenAI."""
    api_key_env: Unset[str] = None
    """Variable with the key. Default: OPENAI_API_KEY, which may be unset with --base-url."""
    top_p: Unset[float] = None
    """Nucleus sampling. Default: the endpoint's."""
    extra_body: Annotated[str, arg(metavar="JSON")] = "{}"
    """Further fields of a request, such as {"top_k": 20}."""
    keep_reasoning: bool = False
    """Put reasoning that comes next to the text before it, in <think>..</think>."""
    stop_at_action: bool = True
    """End replies with their first action, in profiles tags and react: by stop strings, and by
    cutting what follows."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 8
    """Further attempts of a request that failed."""
    requests_per_minute: Unset[int] = None
    """Rate limit. Default: none."""
    tokens_per_minute: Unset[int] = None
    """Rate limit over prompts and completions. Default: none."""
    price_in: Unset[float] = None
    """Price of a million prompt tokens. Default: results have no cost."""
    price_out: Unset[float] = None
    """Price of a million completion tokens."""

    def extra_fields(self) -> dict[str, Any]:
        """Return the fields of `extra_body`.

        Raises:
            InvalidSettingError: it is not a JSON object.
        """
        try:
            value = json.loads(self.extra_body)
        except ValueError as error:
            raise InvalidSettingError(f"--extra-body is no JSON: {error}.") from error
        if not isinstance(value, dict):
            raise InvalidSettingError('--extra-body must be a JSON object, such as {"top_k": 20}.')
        return value

    @property
    def prices(self) -> tuple[float, float] | None:
        """Prices of a million tokens of prompts and of completions; None: not given."""
        if self.price_in is None or self.price_out is None:
            return None
        return self.price_in, self.price_out


@dataclass(frozen=True)
class EvalOptions:
    """Let an agent play each task of a split once, and print its success rate with an interval.

    `atod-eval compare A B` compares two result folders.
    """

    agent: str
    """random, expert, human, chat, model:FOLDER, smollm2, or module:Class of your own
    (atod_train.evaluation.agents.Agent). FOLDER is that of a run (its models/best, else
    models/last) or of a model; a hub name works too."""
    split: str
    """Split of the tasks."""
    env_id: Annotated[Positional[str | None], arg(metavar="[ENV_ID]", help_behavior_hint="")] = None
    """Gymnasium id. Default: that of a trained model's run, else atod/ALFWorld-v0."""
    tasks: int = 0
    """Number of tasks, spread evenly over the split; 0: all."""
    task_ids: Annotated[tuple[str, ...], arg(metavar="ID [ID ...]", help_behavior_hint="")] = ()
    """Exactly these tasks."""
    concurrency: Unset[int] = None
    """Episodes at the same time. Default: 8 with chat; of a local model as many as memory holds,
    else 1."""
    out: Unset[Path] = None
    """Result folder. Default: runs/eval-ENV-SPLIT-AGENT."""
    transcripts: bool = False
    """Keep prompts and completions."""
    resume: bool = False
    """Continue the evaluation in the result folder."""
    env: EnvOptions = field(default_factory=EnvOptions)
    sampling: Sampling = field(default_factory=Sampling)
    local: ModelOptions = field(default_factory=ModelOptions)
    chat: ChatSettings = field(default_factory=ChatSettings)

    def check(self, kind: str) -> None:
        """Check the numbers, and that the chosen agent takes the options that are given.

        Args:
            kind: the name of the agent; of a local model `model:FOLDER`.

        Raises:
            InvalidSettingError: one is out of range, or two options exclude or need each other.
        """
        groups = (self, self.env, self.sampling, self.local, self.chat)
        values: dict[str, Any] = {k: v for group in groups for k, v in vars(group).items()}
        for lowest, names in _LOWEST.items():
            for name in names.split():
                value = values[name]
                if value is not None and not (value >= lowest and math.isfinite(value)):
                    raise InvalidSettingError(f"{_flag(name)} must be >= {lowest:g}, not {value}.")
        if (self.concurrency or 0) > _MOST_EPISODES_AT_ONCE:
            raise InvalidSettingError(
                f"--concurrency must be <= {_MOST_EPISODES_AT_ONCE}, not {self.concurrency}."
            )
        if self.tasks and self.task_ids:
            raise InvalidSettingError("Give --tasks or --task-ids, not both.")
        if (self.chat.price_in is None) != (self.chat.price_out is None):
            raise InvalidSettingError("Give both --price-in and --price-out, or neither.")
        for group, takers in _TAKERS.items():
            for part in fields(getattr(self, group)):
                allowed = ("random", *takers) if part.name == "seed" else takers
                if kind not in allowed and values[part.name] != part.default:
                    raise InvalidSettingError(
                        f"{_flag(part.name)} is for --agent {', '.join(allowed)}."
                    )
        if kind == LOCAL and self.sampling.seed is not None and not self.sampling.temperature:
            raise InvalidSettingError("--seed of a local model needs --temperature above 0.")
        if kind == "human" and self.concurrency not in (None, 1):
            raise InvalidSettingError("A person plays one episode at a time: --concurrency 1.")

    def env_config(self, trained: EnvConfig | None) -> EnvConfig:
        """Return the environment and its prompts; a `max_turns` of 0 is the environment's own.

        Args:
            trained: settings that a model was trained with. They are the defaults of the prompts,
                and those of the data where the environment is the same.

        Raises:
            InvalidSettingError: an `option` is no KEY=VALUE.
        """
        config = trained or EnvConfig(max_turns=0, parse_profile="tags", show_admissible=True)
        if self.env_id not in (None, config.id):
            config = replace(config, id=self.env_id, data="auto", options={}, max_turns=0)
        options = {**config.options, **dict(map(_key_and_value, self.env.option))}
        given: dict[str, Any] = {"options": options}
        names = ("data", "max_turns", "prompt_style", "parse_profile")
        given |= {name: value for name in names if (value := getattr(self.env, name)) is not None}
        if self.env.hide_admissible is not None:
            given["show_admissible"] = not self.env.hide_admissible
        return replace(config, **given)


@dataclass(frozen=True)
class CompareOptions:
    """Compare two results: success rates with 95 % intervals and their difference."""

    first: Positional[Path]
    """Result folder."""
    second: Positional[Path]
    """Result folder."""


def read_options(words: Sequence[str]) -> EvalOptions | CompareOptions:
    """Read the command line of `atod-eval`, or of `atod-eval compare`.

    Raises:
        SystemExit: help was requested, or an option is unknown, missing or malformed.
    """
    config = (tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
    if words[:1] == ["compare"]:
        return tyro.cli(CompareOptions, prog="atod-eval compare", args=words[1:], config=config)
    return tyro.cli(EvalOptions, prog="atod-eval", args=words, config=config)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidSettingError(f"--option takes KEY=VALUE, not {text!r}.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
