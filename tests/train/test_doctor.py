"""`atod-train doctor` on machines that are well and on ones that are not."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, FalconConfig, GPT2Config, LlamaConfig, OPTConfig
from written_games import write_games

from atod_gym.serving.process import shared_server
from atod_train import doctor
from atod_train.cli import main
from atod_train.models.from_scratch import build_policy
from atod_train.models.word_tokenizer import build_word_tokenizer


def test_a_machine_that_is_well(capsys: pytest.CaptureFixture[str], no_user_data: None) -> None:
    assert main(["doctor", "--student", "micro", "--teacher", "micro"]) == 0
    said = capsys.readouterr().out
    assert "ok       atod-gym[train] is complete" in said
    assert "atod/WebShop-v0: no official data found, plays generated tasks" in said
    assert "ok       student micro (from scratch), 0." in said
    assert "vLLM is not installed: --model.sampler plain" in said or "--model.sampler vllm" in said


def test_data_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "webshop").mkdir()
    (tmp_path / "webshop" / "items_shuffle_1000.json").write_text("[]")
    write_games(tmp_path / "json_2.1.1", {"train": 1}, "tiny")
    (tmp_path / "nq").mkdir()
    row = '{"question": "Where?", "golden_answers": ["Here."]}\n'
    (tmp_path / "nq" / "test.jsonl").write_text(row)
    monkeypatch.setenv("ATOD_DATA", str(tmp_path))
    assert [finding.kind for finding in doctor.data_sets()] == ["ok", "ok", "ok"]


def test_servers(capsys: pytest.CaptureFixture[str]) -> None:
    url = shared_server("webshop", ("--data", "generated", "--products", "20")).url
    assert doctor.reach(url) == doctor.Finding("ok", f"{url}: webshop")
    assert main(["doctor", "--server", "http://127.0.0.1:9"]) == 1
    assert "problem  GET http://127.0.0.1:9/health failed" in capsys.readouterr().out
    assert "HTTP 404" in doctor.reach(f"{url}/nothing").text


def test_versions_that_clash_and_packages_that_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {finding.text.split()[0]: finding for finding in doctor.packages()}
    assert "transformers 1.0 (needs >=5.0)" in found["atod-gym[train]:"].text
    assert found["atod-gym[train]:"].kind == "problem"
    assert "lacks peft" in found["atod-gym[llm]"].text


def test_models_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = build_policy("micro", build_word_tokenizer(["go to desk 1"]), 0)
    policy.save(tmp_path / "model")
    path = str(tmp_path / "model")
    assert [found.kind for found in doctor.models(path, "micro", 4096)] == ["ok"] * 3
    found, _ = doctor.models(path, path, 5000)
    assert (found.kind, "4096 positions" in found.text) == ("problem", True)
    assert main(["doctor", "--student", str(tmp_path / "absent")]) == 1
    assert "Cannot load a causal language model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "kind", "told"),
    [
        (1e6, "problem", "memory: 0.0 GB; "),
        (2e8, "note", "memory: 0.2 GB; weights, gradients and moments take 0.6 GB, with adapters"),
        (2e9, "ok", "(--model.lora-rank 16) 0.1 GB; "),
    ],
)
def test_models_that_do_not_fit(
    memory: float, kind: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=5000
    )
    shape.save_pretrained(tmp_path)
    build_word_tokenizer(["go to desk 1"]).save_pretrained(tmp_path)
    monkeypatch.setattr(doctor, "_memory", lambda: memory)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    _, _, found = doctor.models(str(tmp_path), str(tmp_path), 512)
    assert (found.kind, told in found.text) == (kind, True), found.text


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ("quickstart-student", "quickstart-student do not share a vocabulary"),
        ("micro", "memory"),
    ],
)
def test_vocabularies_that_differ(student: str, told: str, tmp_path: Path) -> None:
    build_policy("micro", build_word_tokenizer(["go to desk 1"]), 0).save(tmp_path)
    findings = list(doctor.models(student, str(tmp_path), 512))
    assert any(told in found.text for found in findings)
    assert any(found.kind == "problem" for found in findings) == (told != "memory")


@pytest.mark.parametrize("kind", [GPT2Config, OPTConfig, FalconConfig])
def test_configurations_with_names_of_their_own(kind: type[Any], tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    _, found, *_ = doctor.models("micro", str(tmp_path), 512)
    assert found.kind == "ok"


@pytest.mark.parametrize(
    ("config", "reason"),
    [(BloomConfig(), "scaled_dot_product"), (FalconConfig(alibi=True), "ALiBi")],
    ids=["bloom", "alibi"],
)
def test_settings_that_a_run_would_refuse_are_problems(
    config: Any, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    _, found = doctor.models("micro", str(tmp_path), 512)
    assert found.kind == "problem"
    assert reason in found.text
