"""Named settings, from which `atod-train NAME` starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    OptionValue,
    RunConfig,
    StartConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Preset:
    """A line for the help, and the settings."""

    summary: str
    config: RunConfig


_PUBLISHED = RunConfig(
    EnvConfig(
        max_turns=50,
        eval_splits=("valid_seen",),
        eval_modes=("sampled:0.4",),
        eval_tasks=128,
        prompt_style="window:2",
        template_options={"enable_thinking": False},
        show_admissible=True,
        parse_profile="compat",
    ),
    ModelConfig(student="", teacher="", max_context=2048 + 512),
    StartConfig(),
    AlgorithmConfig(advantage_over="turns", entropy_bonus=0.001),
    TrainConfig(
        steps=150, minibatches="rows:256", lr=1e-6, max_completion_tokens=512, eval_every=5
    ),
)
"""The published run on ALFWorld. Defaults that are not repeated here are published, too."""

_HOUSES = RunConfig(
    EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=20),
    ModelConfig(device=("cpu",), student="mini", teacher="mini", max_context=1024),
    StartConfig(demonstrations=3000, epochs=(1.0, 2.6)),
    AlgorithmConfig(schedule="linear:21"),
    TrainConfig(steps=40, group_size=4, max_completion_tokens=8, lr=3e-4),
)
"""Generated houses, on a processor."""

PRESETS = {
    "alfworld": Preset(
        "The published run on ALFWorld; give --model.student and --model.teacher.",
        _PUBLISHED,
    ),
    "webshop": Preset(
        "The published run on the shop of 1,000 products; give both models.",
        replace(
            _PUBLISHED,
            env=replace(
                _PUBLISHED.env,
                id="atod/WebShop-v0",
                options={"split_rule": "verl-agent"},
                max_turns=15,
                eval_splits=("val",),
            ),
            model=replace(_PUBLISHED.model, max_context=4096 + 512),
            train=replace(_PUBLISHED.train, minibatches="rows:64"),
        ),
    ),
    "searchqa": Preset(
        "The published run on Search-QA; give both models.",
        replace(
            _PUBLISHED,
            env=replace(
                _PUBLISHED.env,
                id="atod/SearchQA-v0",
                max_turns=4,
                eval_splits=("test",),
                eval_modes=("greedy",),
                eval_tasks=512,
                prompt_style="window:4",
            ),
            model=replace(_PUBLISHED.model, max_context=4096 + 512),
            train=replace(_PUBLISHED.train, tasks_per_step=128, lr_warmup=0.1),
        ),
    ),
    "quickstart": Preset(
        "ATOD and OPD on generated kitchens, on a processor, with the models of this package; at "
        "most five minutes.",
        replace(
            _HOUSES,
            env=replace(
                _HOUSES.env,
                # What such small models learn fastest.
                options={
                    "house_size": "tiny",
                    "task_types": "pick_clean_then_place_in_recep,pick_heat_then_place_in_recep,"
                    "pick_cool_then_place_in_recep",
                },
                max_turns=15,
            ),
            model=replace(
                _HOUSES.model, student="quickstart-student", teacher="quickstart-teacher"
            ),
            start=replace(_HOUSES.start, epochs=(0.0, 0.0)),
            algorithm=AlgorithmConfig(schedule="linear:30", kappa=(1.0, 0.0)),
            train=replace(_HOUSES.train, steps=80, lr=1.5e-4),
        ),
    ),
    "houses-tiny": Preset(
        "Generated houses of all six task types; makes student and teacher first.",
        _HOUSES,
    ),
    "alfworld-tiny": Preset(
        "Official ALFWorld games (--env.data), a student of about half a million parameters.",
        RunConfig(
            EnvConfig(data="official"),
            ModelConfig(device=("cpu",), student="mini", teacher="tiny"),
            StartConfig(demonstrations=3553, epochs=(1.0, 4.0)),
            AlgorithmConfig(schedule="linear:53"),
            TrainConfig(group_size=4, max_completion_tokens=8, lr=3e-4),
        ),
    ),
    "webshop-tiny": Preset(
        "A generated shop of 300 products, on a processor.",
        RunConfig(
            EnvConfig(
                id="atod/WebShop-v0",
                data="generated",
                options={"products": 300},
                max_turns=15,
                eval_splits=("dev", "test"),
            ),
            ModelConfig(device=("cpu",), student="mini", teacher="mini", max_context=3072),
            StartConfig(6000, epochs=(0.8, 1.2), lr=(6e-3, 3.6e-3), observation_weight=0.03),
            AlgorithmConfig(schedule="linear:45"),
            TrainConfig(
                steps=90,
                group_size=4,
                minibatches="1",
                max_completion_tokens=24,
                eval_every=45,
                lr=1e-4,
            ),
        ),
    ),
    "searchqa-tiny": Preset(
        "One-hop questions on a generated world, on a processor.",
        RunConfig(
            EnvConfig(
                id="atod/SearchQA-v0",
                data="generated",
                # More entities than a model can memorise: names must be copied.
                options={"entities": 10000, "topk": 1, "task_types": "one_hop"},
                max_turns=4,
                eval_splits=("test",),
            ),
            ModelConfig(device=("cpu",), student="mini", teacher="mini", max_context=512),
            StartConfig(20000, epochs=(0.6, 0.85), lr=(6e-3, 3.6e-3), observation_weight=0.1),
            AlgorithmConfig(schedule="linear:100"),
            TrainConfig(
                steps=200,
                tasks_per_step=32,
                minibatches="1",
                max_completion_tokens=12,
                tokens_per_microbatch=4096,
                eval_every=50,
                lr=2e-4,
            ),
        ),
    ),
}


_BOOLEANS: dict[str, OptionValue] = {"true": True, "false": False}


def without_tables(config: RunConfig) -> RunConfig:
    """Return settings with empty tables: tyro would accept only the keys of non-empty ones."""
    return replace(config, env=replace(config.env, options={}, template_options={}))


def completed(config: RunConfig, default: RunConfig, words: Sequence[str]) -> RunConfig:
    """Return the settings of a command line, completed with defaults.

    Args:
        config: as parsed, with the table keys of the command line. Their values true and false,
            in any case, are booleans.
        default: its keys are added; those of the environment's options only for the same
            environment. Its passes over demonstrations are for models made from scratch: a loaded
            model instead of one has none, unless the command line gives them.
        words: the command line.
    """
    from atod_train.models.from_scratch import MODEL_SHAPES

    env, start = config.env, config.start
    options, template_options = (
        {name: _BOOLEANS.get(str(value).lower(), value) for name, value in table.items()}
        for table in (env.options, env.template_options)
    )
    if env.id == default.env.id:
        options = default.env.options | options
    template_options = default.env.template_options | template_options
    env = replace(env, options=options, template_options=template_options)
    if not any(word.startswith("--start.epochs") for word in words):
        before, after = default.model, config.model
        student, teacher = (
            0.0 if new != old and new not in MODEL_SHAPES else epochs
            for old, new, epochs in (
                (before.student, after.student, start.epochs[0]),
                (before.teacher, after.teacher, start.epochs[1]),
            )
        )
        start = replace(start, epochs=(student, teacher))
    return replace(config, env=env, start=start)
