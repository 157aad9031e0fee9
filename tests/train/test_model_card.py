"""Saved models have a card that the hub reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_failures import CONFIG

from atod_train.files import read_json
from atod_train.reports.metrics import read_evaluations
from atod_train.reports.tables import rate_text
from atod_train.studies.study import train_one
from atod_train.training.model_card import model_card


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setenv("ATOD_CACHE", str(tmp_path_factory.mktemp("cache")))
    out = tmp_path_factory.mktemp("run")
    train_one(CONFIG, out)
    patch.undo()
    return out / "atod-seed0"


@pytest.mark.slow
def test_the_card_of_a_model_describes_it(run: Path) -> None:
    last = ModelCard.load(run / "models" / "last" / "README.md")
    assert last.data.library_name == "transformers"
    assert last.data.pipeline_tag == "text-generation"
    assert last.data.base_model is None  # made from scratch
    assert "atod/ALFWorld-v0" in last.data.tags
    manifest = read_json(run / "manifest.json")
    assert manifest["data"]["hash"] in last.text
    assert f"torch {manifest['packages']['torch']}" in last.text
    settings = json.loads(last.text.partition("```json\n")[2].partition("```")[0])
    assert settings["algorithm"]["method"] == "atod"
    assert settings["train"]["steps"] == CONFIG.train.steps
    for evaluation in read_evaluations(run):
        result = evaluation.result
        name = "this model" if evaluation.step == 4 else "start"
        name = "teacher" if evaluation.model == "teacher" else name
        line = f"| {result.split} | {result.mode} | {name} | {len(result.tasks)} | "
        line += f"{rate_text(result.success)} |"
        if evaluation.step != 3:
            assert line in last.text
    best = ModelCard.load(run / "models" / "best" / "README.md")
    step = read_json(run / "summary.json")["best_step"]
    assert f"after {step} steps" in best.text
    assert "this model" in best.text


def test_names_of_the_hub_are_kept_and_folders_are_not(run: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, student="Qwen/Qwen3-0.6B"))
    text = model_card(run, config, "atod", 4, [])
    assert ModelCard(text).data.base_model == "Qwen/Qwen3-0.6B"
    assert "It was not evaluated." in text
    folder = replace(CONFIG, model=replace(CONFIG.model, student=str(tmp_path / "mine")))
    card = ModelCard(model_card(run, folder, "atod", 4, []))
    assert card.data.base_model is None
    assert re.search("^# mine, atod", card.text, re.MULTILINE)
