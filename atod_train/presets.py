"""Named settings: what `atod-train NAME` starts from."""

from __future__ import annotations

from dataclasses import dataclass

from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    StudyConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Preset:
    """A name's meaning."""

    summary: str
    config: RunConfig


PRESETS: dict[str, Preset] = {
    "quickstart": Preset(
        "generated houses, CPU only, six to nine minutes: start, teacher, ATOD and OPD",
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
            study=StudyConfig(methods=("atod", "opd"), jobs=2),
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
            study=StudyConfig(methods=("atod", "opd", "grpo"), jobs=2),
        ),
    ),
    "webshop-tiny": Preset(
        "a generated shop of 300 products, CPU only: start, teacher, ATOD and OPD",
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
            study=StudyConfig(methods=("atod", "opd"), jobs=2),
        ),
    ),
    "searchqa-tiny": Preset(
        "one-hop questions on a generated world, CPU only: start, teacher, ATOD and OPD",
        RunConfig(
            env=EnvConfig(
                id="atod/SearchQA-v0",
                data="generated",
                # So many entities that nobody can learn them by heart: names must be copied.
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
            study=StudyConfig(methods=("atod", "opd"), jobs=2),
        ),
    ),
}
