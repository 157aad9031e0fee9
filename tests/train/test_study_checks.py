"""Check the refusals of a study before any work, and its header."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_trainer import CONFIG, study_of_methods

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.models.from_scratch import build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.reports.run_folder import first_difference
from atod_train.studies.checks import header
from atod_train.studies.file import study_of
from atod_train.studies.study import run_study, train_one
from atod_train.training.checks import check_settings


def _changed(section: str, **settings: Any) -> Any:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **settings)})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        pytest.param(
            _changed("env", eval_splits=("valid_seen", "other")),
            "No split 'other'.* known: train, valid_seen",
            id="split",
        ),
        pytest.param(_changed("env", id="atod/Other-v0"), "Other", id="environment"),
        pytest.param(_changed("env", data="/absent"), "No ALFWorld data in '/absent'", id="data"),
        pytest.param(
            _changed("env", options={"x": 1}), "does not take these settings", id="option"
        ),
        pytest.param(
            _changed("model", device=("cuda:99",)), "device='cuda:99' cannot", id="device"
        ),
        pytest.param(
            _changed("model", device=("cpu", "none")), "device='none' cannot", id="teacher's device"
        ),
        pytest.param(_changed("model", device=("cpu",) * 3), "one device, or two", id="devices"),
        pytest.param(_changed("model", sampler="sglang"), "must be plain, vllm", id="sampler"),
        pytest.param(_changed("model", sampler="vllm:1.5"), r"\(vllm:0.4\), not", id="share"),
        pytest.param(
            _changed("start", epochs=(0.0, 1.0)), "start.epochs must be above 0", id="passes"
        ),
        pytest.param(_changed("train", save_every=0), r"train\.save_every must be", id="saving"),
        pytest.param(
            _changed("train", eval_every=-1), r"train\.eval_every must be", id="evaluating"
        ),
        pytest.param(_changed("model", dtype="bfloat16"), "bfloat16 rounds away", id="precision"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    config: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AtodError, match=told):
        train_one(config, tmp_path / "out")
    assert not (tmp_path / "cache").exists()
    # Settings that were refused are not continued by `resume`.
    assert not (tmp_path / "out" / "study.json").exists()


def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AtodError, match=r"file is a file, not a folder; choose another.*--out"):
        train_one(CONFIG, tmp_path / "file")
    with pytest.raises(AtodError, match=r"file is a file, not a folder; choose another.*--out"):
        train_one(CONFIG, tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(AtodError, match=rf"{tmp_path} is a folder that you may not write to"):
        train_one(CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_header_describes_the_runs(tmp_path: Path) -> None:
    study = study_of_methods(CONFIG, ("atod", "opd"), tmp_path)
    [part] = study.parts
    text = header(part, part.runs, study.jobs)
    for line in (
        rf"houses in {tmp_path}: atod, opd; seed 0; steps 6, tasks per step 2, episodes per task 2;"
        " 2 runs at a time",
        r"environment  atod/ALFWorld-v0, data generated; tasks: train 3,000, valid_seen 4 of 200",
        r"student      micro \(from scratch\), 0\.\d+ M parameters besides its word embeddings; "
        r"trained on 16 demonstrations, epochs 2$",
        r"teacher      micro \(from scratch\), .*, epochs 4$",
        r"device       cpu, weights in float32$",
    ):
        assert re.search(line, text, re.MULTILINE), (line, text)


def test_the_header_has_no_teacher_where_none_is_used(tmp_path: Path) -> None:
    policy = build_policy("micro", build_word_tokenizer(["go to desk 1"]), 0)
    policy.save(tmp_path / "student")
    config = _changed("model", student=str(tmp_path / "student"), lora_rank=4)
    algorithm = replace(CONFIG.algorithm, method="grpo")
    start = replace(CONFIG.start, epochs=(0.0, 0.0))
    [part] = study_of(replace(config, algorithm=algorithm, start=start), tmp_path).parts
    text = header(part, part.runs, 1)
    count = sum(weight.numel() for weight in policy.model.parameters())
    assert f"student (llama), {count / 1e6:.2f} M parameters, adapters of rank 4" in text
    assert "teacher " not in text


def test_finished_runs_are_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atod_train.studies.study._left", lambda part, resume: [])
    monkeypatch.setattr("atod_train.studies.study._report", lambda *_: None)
    run_study(study_of(CONFIG, tmp_path), tmp_path)
    assert capsys.readouterr().err == "run: finished runs that are kept: 1\n"


def test_vllm_is_refused_where_it_cannot_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _changed("model", sampler="vllm", device=("cpu",))
    found = {"vllm": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name])
    with pytest.raises(MissingExtraError, match=r"pip install vllm .*--model\.sampler plain"):
        check_settings(config)
    found["vllm"] = object()  # type: ignore[assignment]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSettingError, match="serves one process"):
        check_settings(config)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InvalidSettingError, match=r"first GPU, not cuda:1.*CUDA_VISIBLE_DEVICES"):
        check_settings(_changed("model", sampler="vllm", device=("cuda:1", "cuda:0")))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"cannot be imported: .*pip uninstall torchv"):
        check_settings(config)


def test_a_run_continues_with_another_share_of_memory_but_not_another_sampler() -> None:
    half, plain = _changed("model", sampler="vllm:0.5"), _changed("model", sampler="plain")
    assert first_difference(half, _changed("model", sampler="vllm")) is None
    assert first_difference(half, plain) == ("model.sampler", "vllm:0.5", "plain")
