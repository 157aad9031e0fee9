from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.batch import make_batch
from atod_train.models import pretrained
from atod_train.models import scores as scores_module
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.policy import Policy
from atod_train.models.pretrained import load_policy
from atod_train.models.scores import score_completions, score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn

TINY = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=128)


def make_policy(seed: int = 0) -> Policy:
    return build_policy(TINY, build_word_tokenizer(["take mug from desk"]), seed)


def random_batch(sequences: int = 5, turns: int = 3, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (), generator=random))
        return tuple(torch.randint(1, 109, (count,), generator=random).tolist())

    records = []
    for number in range(sequences):
        record = []
        for index in range(turns):
            completion = ids(1, 6)
            tokens = TokenizedTurn(
                ids(2, 9), completion, (0.0,) * len(completion), "stop", index > 0
            )
            record.append(Turn(index, (), "", "", 0.0, True, tokens))
        records.append(
            Trajectory(number, "t", "k", tuple(record), True, False, "terminated", True, 1.0)
        )
    return make_batch(records, 0)


def plain_scores(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from the whole tensor of logits."""
    logits = policy.model(input_ids=batch.input_ids, use_cache=False).logits
    distribution = logits.log_softmax(dim=-1)
    columns = torch.arange(batch.completion_ids.shape[1])
    places = (batch.start[:, None] + columns - 1).clamp(max=batch.input_ids.shape[1] - 1)
    rows = distribution[batch.sequence_index[:, None], places]
    logprobs = rows.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    entropies = -(rows.exp() * rows).sum(dim=-1)
    mask = batch.completion_mask
    return logprobs * mask, entropies * mask


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_logprobs_equal_those_of_all_logits(budget: int) -> None:
    policy, batch = make_policy(), random_batch()
    expected, expected_entropies = plain_scores(policy, batch)
    found = score_completions(policy, batch, budget).logprobs
    assert found.shape == batch.completion_ids.shape
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (found[~batch.completion_mask] == 0).all()
    rows = []
    for part, scores in score_microbatches(policy, batch, budget, with_entropy=True):
        torch.testing.assert_close(scores.logprobs, expected[part.rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            scores.entropies, expected_entropies[part.rows], rtol=1e-5, atol=1e-5
        )
        rows += part.rows.tolist()
    assert sorted(rows) == list(range(len(batch.start)))


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = make_policy(), random_batch()
    gradients = []
    for limit in (2**26, 7 * policy.embedding_rows):
        monkeypatch.setattr(scores_module, "LOGITS_PER_CHUNK", limit)
        policy.model.zero_grad()
        for _, scores in score_microbatches(policy, batch, with_entropy=True):
            (scores.logprobs.sum() + scores.entropies.sum()).backward()
        grads = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_scores_are_deterministic() -> None:
    batch = random_batch()
    first, second = make_policy(3), make_policy(3)
    assert torch.equal(
        score_completions(first, batch).logprobs, score_completions(second, batch).logprobs
    )
    other = score_completions(make_policy(4), batch).logprobs
    assert not torch.equal(score_completions(first, batch).logprobs, other)


def test_building_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    make_policy()
    assert torch.equal(before, torch.get_rng_state())


def test_presets_have_the_promised_size() -> None:
    tokenizer = build_word_tokenizer([" ".join(f"w{number}" for number in range(795))])
    for name, low, high in (("tiny", 0.85e6, 1.1e6), ("small", 3e6, 4e6)):
        model = build_policy(name, tokenizer, 0).model
        assert low < sum(p.numel() for p in model.parameters()) < high
    with pytest.raises(AtodError, match="tiny, small"):
        build_policy("huge", tokenizer, 0)


def test_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = make_policy(), random_batch()
    target = tmp_path / "runs" / "student"
    policy.save(target)
    make_policy(5).save(target)  # replaces the first
    policy.save(target)
    assert {path.name for path in target.parent.iterdir()} == {"student", ".lock"}
    assert (target / "model.safetensors").is_file()
    loaded = load_policy(target)
    assert loaded.name == "student"
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert torch.equal(
        score_completions(loaded, batch).logprobs, score_completions(policy, batch).logprobs
    )
    half = load_policy(target, dtype="bfloat16", name="half")
    assert half.model.dtype == torch.bfloat16
    torch.testing.assert_close(
        score_completions(half, batch).logprobs,
        score_completions(policy, batch).logprobs,
        rtol=0.05,
        atol=0.05,
    )
    monkeypatch.setattr(pretrained, "computes_bfloat16", lambda device: True)
    mixed = load_policy(target, device="cpu", dtype="mixed")
    assert mixed.model.dtype == torch.float32
    assert mixed.autocast_dtype == torch.bfloat16
    monkeypatch.setattr(pretrained, "computes_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match=r"no units for bfloat16.*in float32 instead"):
        emulated = load_policy(target, device="cpu", dtype="mixed")
    assert (emulated.model.dtype, emulated.autocast_dtype) == (torch.float32, None)
    modes = {path.stat().st_mode for path in target.iterdir()}
    assert len(modes) == 1  # weights are as readable as the configuration


def test_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    target = tmp_path / "student"
    policy.save(target)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(policy.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        policy.save(target)
    assert {path.name for path in tmp_path.iterdir()} == {"student", ".lock"}
    assert load_policy(target).embedding_rows == policy.embedding_rows


SAVE_FOREVER = """
    import sys
    from itertools import cycle
    import torch
    from test_policy import make_policy

    torch.set_num_threads(1)
    for policy in cycle([make_policy(0), make_policy(5)]):
        policy.save(sys.argv[1])
        print(flush=True)
"""


@pytest.mark.slow
def test_a_folder_holds_a_whole_model_at_every_moment(tmp_path: Path) -> None:
    target = tmp_path / "best"
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(target)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        child.stdout.readline()
        end = time.monotonic() + 2
        looks = 0
        while time.monotonic() < end:
            assert load_file(target / "model.safetensors")
            assert (target / "config.json").read_bytes()
            looks += 1
        child.kill()
    assert looks > 50
    assert load_policy(target).embedding_rows == make_policy().embedding_rows
    # Another architecture replaces the folder as a whole.
    other = build_policy("mini", make_policy().tokenizer, 0)
    other.save(target)
    assert load_policy(target).model.config.hidden_size == other.model.config.hidden_size
    assert not [path for path in tmp_path.iterdir() if "previous" in path.name]


def test_a_model_with_nan_is_not_saved(tmp_path: Path) -> None:
    policy = make_policy()
    policy.save(tmp_path / "model", card="# A model")
    assert (tmp_path / "model" / "README.md").read_text() == "# A model"
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(AtodError, match=r"is not saved: .* has NaN"):
        policy.save(tmp_path / "model")
    assert load_policy(tmp_path / "model")
    with pytest.raises(AtodError, match="is not saved"):
        policy.save(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".lock"}


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(AtodError, match="Cannot load a causal language model"):
        load_policy(tmp_path / "absent")


def test_too_long_a_sequence_is_refused() -> None:
    policy = make_policy()
    batch = random_batch(sequences=1, turns=30)
    with pytest.raises(AtodError, match="Lower max_context"):
        score_completions(policy, batch)


def test_autocast_stays_close() -> None:
    policy, batch = make_policy(), random_batch()
    lower = dataclasses.replace(policy, autocast_dtype=torch.bfloat16)
    torch.testing.assert_close(
        score_completions(lower, batch).logprobs,
        score_completions(policy, batch).logprobs,
        rtol=0.05,
        atol=0.05,
    )
