"""Named settings: what `atod-train NAME` starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)

Settings = TypeVar("Settings", bound=RunConfig)


@dataclass(frozen=True)
class Preset:
    """A name's meaning."""

    summary: str
    config: RunConfig


PRESETS: dict[str, Preset] = {
    "houses-tiny": Preset(
        "generated houses, on a processor, about four minutes (the settings of quickstart)",
        RunConfig(
            env=EnvConfig(
                data="generated",
                options={"house_size": "tiny"},
                max_turns=20,
                eval_splits=("valid_seen", "valid_unseen"),
            ),
            model=ModelConfig(
                device="cpu",
                student="mini",
                teacher="mini",
                max_context=1024,
            ),
            start=StartConfig(demonstrations=3000, epochs=(1.0, 2.6)),
            algorithm=AlgorithmConfig(anneal_steps=21),
            train=TrainConfig(
                steps=40,
                tasks_per_step=16,
                group_size=4,
                minibatches=4,
                max_completion_tokens=8,
                eval_every=20,
                lr=3e-4,
            ),
        ),
    ),
    "alfworld-tiny": Preset(
        "official ALFWorld games (--env.data), a student of about half a million parameters",
        RunConfig(
            env=EnvConfig(data="official", max_turns=30),
            model=ModelConfig(
                device="cpu",
                student="mini",
                teacher="tiny",
            ),
            start=StartConfig(demonstrations=3553, epochs=(1.0, 4.0)),
            algorithm=AlgorithmConfig(anneal_steps=53),
            train=TrainConfig(
                steps=100,
                tasks_per_step=16,
                group_size=4,
                minibatches=4,
                lr=3e-4,
                max_completion_tokens=8,
            ),
        ),
    ),
    "webshop-tiny": Preset(
        "a generated shop of 300 products, on a processor",
        RunConfig(
            env=EnvConfig(
                id="atod/WebShop-v0",
                data="generated",
                options={"products": 300},
                max_turns=15,
                eval_splits=("dev", "test"),
            ),
            model=ModelConfig(
                device="cpu",
                student="mini",
                teacher="mini",
                max_context=3072,
            ),
            start=StartConfig(
                demonstrations=6000, epochs=(0.8, 1.2), lr=(6e-3, 3.6e-3), observation_weight=0.03
            ),
            algorithm=AlgorithmConfig(anneal_steps=45),
            train=TrainConfig(
                steps=90,
                tasks_per_step=16,
                group_size=4,
                minibatches=1,
                tokens_per_microbatch=2048,
                max_completion_tokens=24,
                eval_every=45,
                lr=1e-4,
            ),
        ),
    ),
    "searchqa-tiny": Preset(
        "one-hop questions on a generated world, on a processor",
        RunConfig(
            env=EnvConfig(
                id="atod/SearchQA-v0",
                data="generated",
                # More entities than a model can memorise: names must be copied.
                options={"entities": 10000, "topk": 1, "task_types": "one_hop"},
                max_turns=4,
                eval_splits=("test",),
            ),
            model=ModelConfig(
                device="cpu",
                student="mini",
                teacher="mini",
                max_context=512,
            ),
            start=StartConfig(
                demonstrations=20000, epochs=(0.6, 0.85), lr=(6e-3, 3.6e-3), observation_weight=0.1
            ),
            algorithm=AlgorithmConfig(anneal_steps=100),
            train=TrainConfig(
                steps=200,
                tasks_per_step=32,
                group_size=8,
                minibatches=1,
                max_completion_tokens=12,
                tokens_per_microbatch=4096,
                eval_every=50,
                lr=2e-4,
            ),
        ),
    ),
}


def parse_settings(default: RunConfig, arguments: Sequence[str], prog: str) -> RunConfig:
    """Return settings changed by arguments such as `--train.steps 4`.

    Args:
        default: what arguments change; options of the environment are added to its own.
        arguments: of a command line, without its command.
        prog: the command, for messages.

    Raises:
        SystemExit: an argument is wrong; the reason is on the standard error stream.
    """
    import tyro

    bare = replace(default, env=replace(default.env, options={}))  # else tyro takes its keys alone
    config: RunConfig = tyro.cli(RunConfig, default=bare, args=list(arguments), prog=prog)
    return with_options(config, default)


def with_options(config: Settings, default: RunConfig) -> Settings:
    """Return settings whose environment also has the options of a default, if it is the same."""
    if config.env.id != default.env.id:
        return config
    options = default.env.options | config.env.options
    return replace(config, env=replace(config.env, options=options))


def keep_loaded_models(config: Settings) -> Settings:
    """Return settings whose passes over demonstrations are 0 for models that are loaded.

    Those of a preset are for models made from scratch.
    """
    from atod_train.models.from_scratch import MODEL_SHAPES

    models = (config.model.student, config.model.teacher)
    student, teacher = (
        epochs if name in MODEL_SHAPES else 0.0
        for name, epochs in zip(models, config.start.epochs, strict=True)
    )
    return replace(config, start=replace(config.start, epochs=(student, teacher)))
