"""Write the README.md of a saved model for the Hugging Face hub: `hf upload NAME FOLDER`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import StrictUndefined, Template

from atod_train.algorithm.methods import needs_teacher
from atod_train.config import RunConfig, is_url
from atod_train.files import read_json, without_infinities
from atod_train.reports.evaluations import Evaluation
from atod_train.reports.run_folder import MANIFEST_FILE
from atod_train.reports.tables import Table, rate_text

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    run_dir: Path, config: RunConfig, label: str, step: int, evaluations: Sequence[Evaluation]
) -> str:
    """Return the card of a run's model after a step.

    Evaluations are those of the start, the teacher and the student.
    """
    manifest = read_json(run_dir / MANIFEST_FILE)
    student, teacher = config.model.student, config.model.teacher
    # Folder names mean nothing to other users, and the hub accepts only its own names.
    is_hub_name = bool(_HUB_NAME.fullmatch(student)) and not Path(student).exists()
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=student if is_hub_name else None,
        tags=["atod", "agent", "on-policy-distillation", "reinforcement-learning", config.env.id],
    )
    teacher = "a server" if is_url(teacher) else f"`{Path(teacher).name}`"
    text = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined, keep_trailing_newline=True).render(
        config=config,
        manifest=manifest,
        metadata=card.to_yaml(),
        method=label,
        student=student if is_hub_name else Path(student).name,
        teacher=teacher if needs_teacher(config.algorithm.method) else "",
        step=step,
        results=_results(step, evaluations),
        data=Path(manifest["data"]["name"]).name,
        settings=json.dumps(without_infinities(asdict(config)), indent=1),
    )


def _results(step: int, evaluations: Sequence[Evaluation]) -> str:
    """Return a table with a row for the model, the start and the teacher, per split and mode."""
    names = {("student", step): "this model", ("student", 0): "start", ("teacher", 0): "teacher"}
    rows = {
        (e.result.split, e.result.mode, names[e.model, e.step]): (
            str(len(e.result.tasks)),
            rate_text(e.result.success),
        )
        for e in evaluations
        if (e.model, e.step) in names
    }
    head = ("split", "decoding", "model", "tasks", "success, % [95 % interval]")
    table = Table("", head, tuple((*key, *cells) for key, cells in sorted(rows.items())))
    return table.markdown if rows else "It was not evaluated."
