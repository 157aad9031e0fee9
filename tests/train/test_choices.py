"""Completions that are sampled among given ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_generation import POLICY, make_generator, random_prompts

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.batch import make_batch, split_minibatches
from atod_train.config import EnvConfig, ModelConfig, RunConfig
from atod_train.models.choices import Choices
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy, Reference, build_policy
from atod_train.models.scores import score_tokens
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Trajectory
from atod_train.reports.rows import from_row, to_row
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect
from atod_train.studies.study import run_study
from atod_train.teachers.local import LocalTeacher
from atod_train.training.supervised import demonstrate, demonstration_texts

CHOICES = [(5, 6, 2), (5, 7, 8, 2), (9, 2)]
ENV = EnvConfig(
    data="generated", options={"house_size": "tiny"}, max_turns=5, constrain_actions=True
)


def test_only_what_continues_a_choice_can_be_sampled() -> None:
    choices = Choices([CHOICES, [(3, 2)]], longest=4)
    logits = torch.zeros(2, 12)
    first = choices.constrain(logits, 0, [0, 1]).softmax(dim=-1)
    assert first[0].nonzero().flatten().tolist() == [5, 9]
    assert first[0, 5] == pytest.approx(0.5)
    assert first[1].tolist() == [0.0] * 3 + [1.0] + [0.0] * 8
    choices.take(0, 0, 5)
    choices.take(1, 0, 3)
    second = choices.constrain(logits, 1, [0, 1]).softmax(dim=-1)
    assert second[0].nonzero().flatten().tolist() == [6, 7]
    assert choices.allowed == [[(5, 9), (6, 7)], [(3,), (2,)]]


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(AtodError, match="no admissible action"):
        Choices([CHOICES, []], longest=4)
    with pytest.raises(AtodError, match=r"has 4 tokens. Raise train.max_completion_tokens \(now 3"):
        Choices([CHOICES], longest=3)


@pytest.mark.usefixtures("feeding")
def test_every_completion_is_one_of_the_choices() -> None:
    generator = make_generator(limit=4, stop_ids=frozenset({2}))
    generator.start(6)
    rows = [4, 0, 5]
    other = [(11, 2)]
    prompts = random_prompts(3, seed=0)
    for _ in range(3):
        done = generator.prompt(prompts, rows, [CHOICES, other, CHOICES])
        assert all(c is not None and c.finish_reason == "stop" for c in done)
        assert [c.ids in CHOICES for c in done if c] == [True, False, True]
        assert done[1] is not None
        assert done[1].ids == (11, 2)
        assert done[1].logprobs == (0.0, 0.0)


def test_samples_follow_the_smaller_distributions() -> None:
    prompt = random_prompts(1, seed=3)[0]
    count = 4000
    generator = make_generator(limit=4, seed=1, stop_ids=frozenset({2}))
    generator.start(count)
    done = generator.prompt([prompt] * count, range(count), [CHOICES] * count)
    found = [sum(c is not None and c.ids == choice for c in done) / count for choice in CHOICES]
    with torch.no_grad():
        expected = []
        for choice in CHOICES:
            hidden = POLICY.hidden_states(torch.tensor([[*prompt, *choice]]))
            logits = POLICY.logits(hidden)[0, len(prompt) - 1 :]
            probability = 1.0
            for step, token in enumerate(choice):
                ids = sorted({c[step] for c in CHOICES if c[:step] == choice[:step]})
                probability *= float(logits[step, ids].softmax(dim=-1)[ids.index(token)])
            expected.append(probability)
    assert sum(expected) == pytest.approx(1.0, abs=1e-5)
    assert found == pytest.approx(expected, abs=4 * (0.25 / count) ** 0.5)


def test_scores_among_allowed_tokens_in_closed_form() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.0, 0.0, 9.0]], requires_grad=True)
    other = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 9.0]])
    found = score_tokens(
        (logits, other),
        (lambda x: x, lambda x: x),
        torch.tensor([2, 0]),
        allowed=torch.tensor([[0, 2], [0, -1]]),
        with_entropy=True,
        top_k=0,
        rows_at_once=8,
    )
    e = torch.exp(torch.tensor(2.0))
    p = e / (1 + e)  # the second token may be one only
    assert found["logprobs"].tolist() == pytest.approx([float(p.log()), 0.0])
    assert found["reference_logprobs"].tolist() == pytest.approx([float((1 - p).log()), 0.0])
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert found["entropies"].tolist() == pytest.approx([float(entropy), 0.0], abs=1e-6)
    divergence = p * (p / (1 - p)).log() + (1 - p) * ((1 - p) / p).log()
    assert found["divergences"].tolist() == pytest.approx([float(divergence), 0.0], abs=1e-6)
    found["logprobs"].sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # No gradient reaches what could not be chosen, nor a token without an alternative.
    assert logits.grad[0].tolist() == pytest.approx([-float(1 - p), 0.0, float(1 - p), 0.0])
    assert not logits.grad[1].any()


@pytest.fixture(scope="module")
def policy() -> Policy:
    shown = demonstrate(EnvPool(replace(ENV, max_turns=20), "train"), 20, 0.0, 0)
    return build_policy("micro", build_word_tokenizer(demonstration_texts(shown)), seed=0)


@pytest.fixture(scope="module")
def played(policy: Policy) -> list[Trajectory]:
    pool = EnvPool(ENV, "train")
    generator = Generator(policy, DialogueEncoder(policy.tokenizer), max_completion_tokens=12)
    groups = collect(pool, generator, pool.task_ids[:3], group_size=2, turn_limit=5)
    return [trajectory for group in groups for trajectory in group.trajectories]


def test_an_untrained_model_plays_valid_actions_alone(played: list[Trajectory]) -> None:
    turns = [turn for trajectory in played for turn in trajectory.turns]
    assert len(turns) > 20
    assert all(turn.is_action_valid for turn in turns)
    assert len({turn.action for turn in turns}) > 5
    assert not any("<unk>" in turn.action for turn in turns)


def test_the_trainer_sees_the_distributions_that_were_sampled(
    policy: Policy, played: list[Trajectory]
) -> None:
    batch = make_batch(played, policy.pad_id)
    assert batch.allowed_ids is not None
    assert batch.allowed_ids.shape[:2] == batch.completion_ids.shape
    chosen = (batch.allowed_ids == batch.completion_ids[:, :, None]).any(dim=-1)
    assert torch.equal(chosen, batch.completion_mask)
    scores = policy.score(batch, 512, with_entropy=True)
    assert torch.allclose(scores.logprobs, batch.sampling_logprobs, atol=2e-5)
    alone = (batch.allowed_ids >= 0).sum(dim=-1) == 1
    assert alone.any()
    assert not scores.logprobs[alone].any()
    # The same for every part that an update is made of, and for a teacher.
    for part in split_minibatches(batch, 3, torch.Generator().manual_seed(0)):
        again = policy.score(part.batch, 512).logprobs
        assert torch.allclose(again, scores.logprobs[part.rows], atol=2e-5)
    teacher = LocalTeacher(policy, policy)
    assert torch.allclose(teacher.score(batch), scores.logprobs, atol=2e-5)
    exact = policy.score(batch, 512, reference=Reference(policy)).divergences
    assert exact is not None
    assert exact.abs().max() < 1e-5


def test_rows_keep_what_could_be_chosen(played: list[Trajectory]) -> None:
    for trajectory in played:
        again, _ = from_row(to_row(trajectory))
        assert again == trajectory
        assert all(len(t.tokens.allowed_ids) == len(t.tokens.completion_ids) for t in again.turns)


def test_constrained_and_free_turns_do_not_mix(policy: Policy, played: list[Trajectory]) -> None:
    first, second = played[0].turns[:2]
    free = replace(second, tokens=replace(second.tokens, allowed_ids=()))
    with pytest.raises(AtodError, match="separately"):
        make_batch([replace(played[0], turns=(first, free))], policy.pad_id)
    broken = replace(first, tokens=replace(first.tokens, allowed_ids=((1,),)))
    with pytest.raises(AtodError, match="every token, or of none"):
        make_batch([replace(played[0], turns=(broken,))], policy.pad_id)


def test_an_environment_without_admissible_actions_is_refused(policy: Policy) -> None:
    options: dict[str, int | str] = {"entities": 60, "task_types": "one_hop"}
    config = EnvConfig(
        id="atod/SearchQA-v0", data="generated", options=options, constrain_actions=True
    )
    pool = EnvPool(config, "train")
    generator = Generator(policy, DialogueEncoder(policy.tokenizer), max_completion_tokens=12)
    try:
        with pytest.raises(InvalidSettingError, match="lists its admissible actions"):
            collect(pool, generator, pool.task_ids[:1], group_size=1, turn_limit=2)
    finally:
        pool.close()


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    tags = RunConfig(env=replace(ENV, parse_profile="tags"))
    with pytest.raises(AtodError, match="parse_profile plain alone"):
        run_study(tags, tmp_path)
    url = RunConfig(env=ENV, model=ModelConfig(teacher="http://127.0.0.1:1"))
    with pytest.raises(AtodError, match="takes a teacher in this process"):
        run_study(url, tmp_path)
