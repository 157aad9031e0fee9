"""Language models that are shown the task before a run begins."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import CONFIG

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.batch import make_batch
from atod_train.config import RunConfig, StartConfig
from atod_train.models import pretrained
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import build_policy
from atod_train.models.policy import Policy
from atod_train.models.pretrained import cache_folder, load_policy
from atod_train.models.scores import score_completions
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.studies.study import train_one
from atod_train.training import starts, supervised
from atod_train.training.checks import DivergedError
from atod_train.training.starts import policy_of
from atod_train.training.supervised import demonstrate, demonstration_texts, tokenize


@pytest.fixture(scope="module")
def pool() -> EnvPool:
    return EnvPool(replace(CONFIG.env, max_turns=20), "train")


@pytest.fixture
def config(pool: EnvPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    words = demonstration_texts(demonstrate(pool, 16, 0.0, 0))
    build_policy("micro", build_word_tokenizer(words), 0).save(tmp_path / "model")
    model = replace(
        CONFIG.model,
        student=str(tmp_path / "model"),
        teacher=str(tmp_path / "model"),
    )
    start = StartConfig(demonstrations=16, epochs=(3.0, 0.0), lr=(1e-2, 0.0))
    return replace(CONFIG, env=pool.config, model=model, start=start)


def _likelihood(policy: Policy, pool: EnvPool) -> float:
    """Mean log-prob of the expert's tokens."""
    dialogue = DialogueEncoder(policy.tokenizer)
    records = [tokenize(episode, dialogue) for episode in demonstrate(pool, 8, 0.0, 0)]
    batch = make_batch(records, policy.pad_id)
    return float(score_completions(policy, batch).logprobs.sum() / batch.completion_mask.sum())


@pytest.mark.slow
def test_a_language_model_is_trained_once_and_kept(
    config: RunConfig, pool: EnvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = load_policy(config.model.student)
    shown = policy_of(config, "student", pool)
    assert _likelihood(shown, pool) > _likelihood(untouched, pool) + 0.5
    # No passes over the demonstrations: as it is.
    teacher = policy_of(config, "teacher", pool)
    assert _likelihood(teacher, pool) == pytest.approx(_likelihood(untouched, pool), abs=1e-6)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr(starts, "train_on_demonstrations", refuse)
    again = policy_of(config, "student", pool)
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, shown.model.get_parameter(name)), name
    # Adapters are next to the weights that were learned.
    adapted = replace(config, model=replace(config.model, lora_rank=2))
    assert _likelihood(policy_of(adapted, "student", pool), pool) == pytest.approx(
        _likelihood(shown, pool), abs=1e-5
    )


@pytest.mark.slow
def test_other_weights_of_the_same_name_are_trained_again(
    config: RunConfig, pool: EnvPool, tmp_path: Path
) -> None:
    first = policy_of(config, "student", pool)
    model = load_policy(config.model.student)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.5)
    model.save(tmp_path / "model")
    second = policy_of(config, "student", pool)
    assert not torch.equal(
        first.model.get_input_embeddings().weight, second.model.get_input_embeddings().weight
    )


def test_layers_in_low_precision_make_a_start_of_their_own(
    config: RunConfig, pool: EnvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.dtype | None] = []

    def note(policy: Policy, *_: object, **__: object) -> None:
        trained.append(policy.autocast_dtype)
        assert policy.model.dtype == torch.float32

    monkeypatch.setattr(starts, "train_on_demonstrations", note)
    monkeypatch.setattr(pretrained, "computes_bfloat16", lambda device: True)
    start = replace(config.start, epochs=(3.0, 1.0))
    mixed = replace(config, model=replace(config.model, dtype="mixed"), start=start)
    student = policy_of(mixed, "student", pool)
    policy_of(config, "student", pool)
    teacher = policy_of(mixed, "teacher", pool)
    assert trained == [torch.bfloat16, None, torch.bfloat16]
    assert (student.model.dtype, student.autocast_dtype) == (torch.float32, torch.bfloat16)
    assert (teacher.model.dtype, teacher.autocast_dtype) == (torch.bfloat16, None)
    # Where it would be emulated, what float32 made does.
    monkeypatch.setattr(pretrained, "computes_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="no units for bfloat16"):
        student = policy_of(mixed, "student", pool)
    assert len(trained) == 3
    assert (student.model.dtype, student.autocast_dtype) == (torch.float32, None)


FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)


@pytest.mark.parametrize("epochs", [0.0, 3.0])
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_model_counts(
    name: str, epochs: float, config: RunConfig, pool: EnvPool
) -> None:
    """With passes it names a cached start, without them it belongs to stored evaluations."""
    config = replace(config, start=replace(config.start, epochs=(epochs, 0.0)))
    before = starts._identity(config, "student", pool)
    file = Path(config.model.student) / name
    content = file.read_bytes()
    os.utime(file)  # a file that is written again is the same file
    (file.parent / "README.md").write_text("a new card")
    assert starts._identity(config, "student", pool) == before
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert starts._identity(config, "student", pool) != before


def test_a_model_of_the_hub_counts_by_its_commit(
    config: RunConfig, pool: EnvPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(config, model=replace(config.model, student="some/model"))
    found = []
    for commit in ("a1", "b2", None):
        path = str(tmp_path / "snapshots" / commit / "config.json") if commit else None
        monkeypatch.setattr(starts, "try_to_load_from_cache", lambda *_, path=path: path)
        found.append(starts._identity(config, "student", pool))
    assert len(set(found)) == 3


@pytest.mark.parametrize("edited", ["own_env.py", "own_base.py", "own_expert.py"])
def test_the_code_of_an_own_environment_counts(
    edited: str, config: RunConfig, pool: EnvPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    base = (Path(__file__).parent / "echo_env.py").read_text()
    base = base.replace("tests/TwoWords-v0", f"tests/Base-{edited[:-3]}-v0")
    (tmp_path / "own_base.py").write_text(base)
    (tmp_path / "own_expert.py").write_text("def expert(self): return None\n")
    (tmp_path / "own_env.py").write_text(
        "import gymnasium, own_base, own_expert\n"
        "class Own(own_base.EchoEnv): expert = own_expert.expert\n"
        f"gymnasium.register('tests/{edited[:-3]}-v0', entry_point=Own, max_episode_steps=2)\n"
    )
    env_id = f"own_env:tests/{edited[:-3]}-v0"
    env = replace(config.env, id=env_id, data="auto", options={}, max_turns=2)
    before = starts._identity(config, "student", EnvPool(env, "train"))
    file = tmp_path / edited
    file.write_text(file.read_text() + "# edited\n")
    assert starts._identity(config, "student", EnvPool(env, "train")) != before
    assert not pool.code_hash  # its content hash covers its tasks
    for name in ("own_env", "own_base", "own_expert"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("style", ["chat", "window"])
def test_demonstrations_beyond_the_context_are_cut(
    style: str, config: RunConfig, pool: EnvPool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained: list[Any] = []
    monkeypatch.setattr(
        starts, "train_on_demonstrations", lambda _, found, **__: trained.append(found)
    )
    policy = load_policy(config.model.student)
    env = replace(pool.config, prompt_style=style)
    episodes = demonstrate(EnvPool(env, "train"), 16, 0.0, 0)

    def imitated(limit: int) -> list[Trajectory]:
        model = replace(config.model, max_context=limit)
        starts.imitate(policy, episodes, replace(config, env=env, model=model), 1.0, 0)
        found: list[Trajectory] = trained.pop()
        return found

    def lengths(found: list[Trajectory]) -> list[int]:
        rows = make_batch(found, policy.pad_id)
        return sorted(rows.attention_mask.sum(dim=1).tolist())

    dialogue = DialogueEncoder(policy.tokenizer, style)
    whole = [tokenize(episode, dialogue) for episode in episodes]
    longest = lengths(whole)[-1]
    assert imitated(longest) == whole  # the same objects are trained on in the same order
    assert "cut" not in capsys.readouterr().err
    cut = imitated(longest - 1)
    assert lengths(cut)[-1] < longest
    assert cut != whole
    assert f"of {len(episodes)} demonstrations are cut at {longest - 1} tokens" in (
        capsys.readouterr().err
    )
    # A model with fewer positions counts as a smaller context.
    monkeypatch.setattr(type(policy), "max_positions", longest - 1)
    assert imitated(longest) == cut
    with pytest.raises(AtodError, match="No demonstration fits the 3 tokens"):
        imitated(3)


def test_without_passes_nothing_is_trained(config: RunConfig, pool: EnvPool) -> None:
    plain = replace(config, start=StartConfig())
    found = policy_of(plain, "student", pool)
    for name, weight in load_policy(config.model.student).model.named_parameters():
        assert torch.equal(weight, found.model.get_parameter(name)), name


def test_the_expert_may_have_fewer_turns_than_the_student(
    pool: EnvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(shown.turns) for shown in demonstrate(pool, 16, 0.2, 0))

    class Hurried:
        """An expert that says when it should be done."""

        max_turns = longest - 1

        def __init__(self, expert: Any) -> None:
            self.act = expert.act

    expert_of = supervised.expert_of
    monkeypatch.setattr(supervised, "expert_of", lambda episode: Hurried(expert_of(episode)))
    shown = demonstrate(pool, 16, 0.2, 0)
    assert 0 < max(len(episode.turns) for episode in shown) < longest


def test_a_model_from_scratch_needs_demonstrations(config: RunConfig, tmp_path: Path) -> None:
    scratch = replace(config, model=replace(config.model, teacher="micro"))
    with pytest.raises(
        InvalidSettingError, match=r"micro is made from scratch: start\.epochs must"
    ):
        train_one(scratch, tmp_path / "out")


def test_a_start_that_diverges_stops_and_names_its_setting(
    config: RunConfig, pool: EnvPool
) -> None:
    steep = replace(config, start=replace(config.start, lr=(1e30, 0.0)))
    with pytest.raises(DivergedError, match=r"student .* diverged in update .* Lower start\.lr"):
        policy_of(steep, "student", pool)
    assert not list(cache_folder().glob("*/config.json"))


@pytest.mark.parametrize(
    ("tokens", "episodes"), [(11.7, 16), (21.3, 8), (37.1, 4), (53.9, 4), (400, 1)]
)
def test_short_episodes_share_an_update(tokens: float, episodes: int) -> None:
    """Published starts had 4 houses or shops, 8 real and 16 generated questions in an update."""
    lengths = [int(tokens * (i + 1)) - int(tokens * i) for i in range(20)]
    records = [
        SimpleNamespace(turns=[SimpleNamespace(tokens=SimpleNamespace(completion_ids=[0] * n))])
        for n in lengths
    ]
    assert supervised._episodes_per_update(records) == episodes  # type: ignore[arg-type]


def test_tiny_models_compute_with_one_thread_and_later_ones_with_all(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [5]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(starts, "_threads_before", [])
    tiny = replace(config, model=replace(config.model, student="mini", teacher="tiny"))
    saved = replace(tiny, model=replace(tiny.model, teacher=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(bytes(starts._TINY_BYTES))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    larger = replace(tiny, model=replace(tiny.model, student="smollm2"))
    for settings in (larger, tiny, saved, config, larger, larger):
        starts.choose_threads(settings)
    assert threads == [5, 1, 5]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    starts.choose_threads(tiny)
    assert threads == [5, 1, 5]
