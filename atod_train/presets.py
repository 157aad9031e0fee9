"""Named settings: what `atod-train NAME` starts from."""

from __future__ import annotations

from dataclasses import dataclass

from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
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
        "generated houses, CPU only, about ten minutes: start, teacher, ATOD, OPD and GRPO",
        RunConfig(
            env=EnvConfig(
                data="generated",
                options={"house_size": "tiny"},
                max_turns=20,
                eval_splits=("valid_unseen",),
            ),
            model=ModelConfig(
                demonstrations=1000, student_epochs=1.0, teacher_epochs=6.0, max_context=1024
            ),
            algorithm=AlgorithmConfig(anneal_steps=30),
            train=TrainConfig(steps=50, tasks_per_step=8, group_size=8, eval_every=10),
            study=StudyConfig(methods=("atod", "opd", "grpo")),
        ),
    ),
    "alfworld-tiny": Preset(
        "official ALFWorld games (--env.data), a student of about a million parameters",
        RunConfig(
            env=EnvConfig(data="official", max_turns=30),
            model=ModelConfig(demonstrations=3553, student_epochs=2.0, teacher_epochs=8.0),
            algorithm=AlgorithmConfig(anneal_steps=60),
            train=TrainConfig(steps=100, tasks_per_step=16, group_size=8),
        ),
    ),
}
