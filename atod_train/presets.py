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
        "generated houses, CPU only, six to nine minutes: start, teacher, ATOD and OPD",
        RunConfig(
            env=EnvConfig(
                data="generated",
                options={"house_size": "tiny"},
                max_turns=20,
                eval_splits=("valid_seen", "valid_unseen"),
            ),
            model=ModelConfig(
                student="mini",
                teacher="mini",
                demonstrations=3000,
                student_epochs=1.0,
                teacher_epochs=2.6,
                max_context=1024,
            ),
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
                student="mini",
                teacher="tiny",
                demonstrations=3553,
                student_epochs=1.0,
                teacher_epochs=4.0,
            ),
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
}
