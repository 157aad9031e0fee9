"""Our environments, rollouts and objective inside the real TRL."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'atod-gym[trl]'")

from accelerate import Accelerator  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from atod_gym.adapters.trl import environment_factory, task_dataset  # noqa: E402
from atod_gym.errors import AtodError, InvalidSettingError  # noqa: E402
from atod_gym.prompts import shown_text  # noqa: E402
from atod_gym.wrappers import agent_env, make_env  # noqa: E402
from atod_train.adapters.trl import ATODTrainer, Rollouts, episode_returns  # noqa: E402
from atod_train.algorithm.atod import Schedule, turn_weights  # noqa: E402
from atod_train.config import EnvConfig  # noqa: E402
from atod_train.models.dialogue import DialogueEncoder  # noqa: E402
from atod_train.models.from_scratch import ModelShape, build_policy  # noqa: E402
from atod_train.models.word_tokenizer import build_word_tokenizer  # noqa: E402
from atod_train.rollout.episode import new_messages  # noqa: E402

# What TRL and transformers say about each other's changes is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORDS = build_word_tokenizer(
    ["go to desk 1", "take mug 1 from desk 1", "look", "open drawer close shelf You see nothing"]
)
SHAPE = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=2048)
SETTINGS = {"split": "train", "data": "generated", "house_size": "tiny"}
ENV = {"data": "generated", "options": {"house_size": "tiny"}, "show_admissible": True}
EQUAL = Schedule(0.0, 0.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def model(seed: int) -> Any:
    return build_policy(SHAPE, WORDS, seed).model


def tasks(count: int = 8) -> Any:
    return task_dataset("atod/ALFWorld-v0", tools=False, **SETTINGS).select(range(count))


def variety(completions: Sequence[Any], **columns: object) -> list[float]:
    """A reward that differs within groups, as random models hardly ever succeed."""
    return [len(set(str(completion))) / 10 for completion in completions]


def make_trainer(
    folder: Path, kind: type[Any] = ATODTrainer, style: str = "chat", **settings: Any
) -> Any:
    env = EnvConfig(**ENV, max_turns=4, prompt_style=style)
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, **settings.pop("options", {})}
    return kind(
        model=model(0),
        processing_class=WORDS,
        reward_funcs=[episode_returns, variety],
        rollout_func=Rollouts(env),
        train_dataset=tasks(),
        args=trl.GRPOConfig(
            output_dir=str(folder), bf16=False, report_to="none", use_cpu=True,
            save_strategy="no", seed=0, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, loss_type="dapo", learning_rate=1e-2, logging_steps=1,
            **options,
        ),
        **settings,
    )  # fmt: skip


def rows_of(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """Return the inputs of the first training step, and the rollout's output for it."""
    kept: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    inner, play = trainer._generate_and_score_completions, trainer.rollout_func

    def generate(inputs: Any) -> Any:
        kept.append(inner(inputs))
        return dict(kept[-1])

    def rollout(prompts: Any, trainer: Any) -> Any:
        output = play(prompts, trainer)
        rollouts.append({**output, "asked": prompts})
        return output

    monkeypatch.setattr(trainer, "_generate_and_score_completions", generate)
    trainer.rollout_func = rollout
    trainer.train()
    return kept[0], rollouts[0]


# -- the objective ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_teachers_part_it_is_their_grpo(tmp_path: Path) -> None:
    theirs = make_trainer(tmp_path, trl.GRPOTrainer)
    ours = make_trainer(tmp_path, teacher=model(1), schedule=EQUAL)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    for trainer in (theirs, ours):
        torch.manual_seed(0)
        trainer.train()
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[name]), name
    assert any(not torch.equal(start[n], v) for n, v in theirs.model.state_dict().items())
    keys = ("loss", "grad_norm", "reward")
    for one, other in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["chat", "window"])
def test_advantages_are_those_of_the_paper(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = model(0), model(1)
    trainer = make_trainer(
        tmp_path, style=style, teacher=model(1), schedule=Schedule(anneal_steps=4)
    )
    rows, rollout = rows_of(trainer, monkeypatch)
    kappa, rho = 1.0 - 0.9 / 4, 1.0 + 1.0 / 4
    found = 0
    parts = []
    for i in range(len(rollout["asked"])):
        turns = _turns(rows, rollout, i, style)
        scored = [_scores(m, turn) for m in (student, teacher) for turn in turns]
        own, other = scored[: len(turns)], scored[len(turns) :]
        d = torch.stack([(a - b).abs().mean() for a, b in zip(own, other, strict=True)])
        h = torch.stack([-a.mean() for a in own])
        weights = turn_weights(d, h)
        returns = []
        for turn, a, b, w in zip(turns, own, other, weights, strict=True):
            returns.append((turn["advantages"] - kappa * w * (b - a)) / rho)
            found += len(a)
        # What is left is the return's part: one number for all tokens of an episode.
        flat = torch.cat(returns)
        assert float(flat.max() - flat.min()) < 1e-4
        parts.append(flat.mean())
    groups = torch.stack(parts).view(-1, 4)
    torch.testing.assert_close(groups.mean(1), torch.zeros(len(groups)), atol=1e-4, rtol=0)
    assert groups.std(1).tolist() == pytest.approx([1.0] * len(groups), abs=0.02)
    mask = rows["completion_mask"] * rows["tool_mask"]
    assert found == int(mask.sum()) == int(rows["num_items_in_batch"])
    # Nothing but sampled tokens has an advantage where there is a teacher.
    assert not rows["advantages"][mask == 0].any()


def _turns(
    rows: dict[str, Any], rollout: dict[str, Any], episode: int, style: str
) -> list[dict[str, Any]]:
    """The turns of an episode: context, completion and its advantages, found by the ids."""
    if style == "chat":
        mask = (rows["completion_mask"] * rows["tool_mask"])[episode].tolist()
        ids = rows["completion_ids"][episode].tolist()
        advantages = rows["advantages"][episode]
        before = rollout["prompt_ids"][episode]
        runs = [m.span() for m in re.finditer("1+", "".join(map(str, mask)))]
        return [
            {"context": before + ids[:a], "ids": ids[a:b], "advantages": advantages[a:b]}
            for a, b in runs
        ]
    found = []
    for turn in rollout["turn_rows"][episode]:
        prompt, completion = turn.prompt_ids, turn.response_ids
        # Episodes of one group may have the same turn, with equal statistics but other weights.
        first = sum(len(turns) for turns in rollout["turn_rows"][:episode]) + len(found)
        row = rows["completion_ids"][first].tolist()
        assert row[: len(completion)] == completion
        assert rows["prompt_ids"][first].tolist()[-len(prompt) :] == prompt
        advantages = rows["advantages"][first][: len(completion)]
        found.append({"context": prompt, "ids": completion, "advantages": advantages})
    return found


@torch.no_grad()
def _scores(scorer: Any, turn: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([turn["context"] + turn["ids"]])
    logprobs = scorer(input_ids=ids).logits.log_softmax(-1)[0, len(turn["context"]) - 1 : -1]
    return logprobs.gather(1, torch.tensor(turn["ids"]).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [0.25, 3.0, 1.0]]),
        ("token_mask", [[2.0, 0.5, 1.0], [0.0, 0.0, 1.0]]),
        ("sequence_truncate", [[1.0], [2.0]]),
        ("sequence_mask", [[1.0], [2.0]]),
    ],
)
def test_turn_rows_are_corrected_for_their_sampler(mode: str, expected: list[list[float]]) -> None:
    settings = {"mode": mode, "clip_min": 0.25, "clip_max": 3.0}
    trainer: Any = SimpleNamespace(
        **{f"vllm_importance_sampling_{name}": value for name, value in settings.items()}
    )
    logprobs = torch.tensor([[2.0, 0.5, 9.0], [0.125, 16.0, 9.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])
    ratio = ATODTrainer._sampling_ratio(trainer, logprobs, torch.zeros(2, 3), mask)
    torch.testing.assert_close(ratio, torch.tensor(expected))


@pytest.mark.slow
def test_turn_rows_are_parts_of_equal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"gradient_accumulation_steps": 3, "max_steps": 1}
    trainer = make_trainer(tmp_path, style="window", teacher=model(1), options=options)
    rows, rollout = rows_of(trainer, monkeypatch)
    turns = [turn for episode in rollout["turn_rows"] for turn in episode]
    assert len(rows["advantages"]) % 3 == 0
    assert 0 <= len(rows["advantages"]) - len(turns) < 3
    trained = (rows["completion_mask"] * rows["tool_mask"]).sum()
    assert int(trained) == sum(len(turn.response_ids) for turn in turns)


@pytest.mark.slow
def test_it_learns_from_its_teacher_alone(tmp_path: Path) -> None:
    options = {"max_steps": 30, "learning_rate": 3e-3, "gradient_accumulation_steps": 1}
    options |= {"per_device_train_batch_size": 8, "temperature": 1.0}
    settings = {"kind": ATODTrainer, "teacher": model(1), "schedule": Schedule(1, 1, 0, 0, 0)}
    del options["per_device_train_batch_size"], options["learning_rate"]
    trainer = make_trainer(tmp_path, options=options, **settings)
    trainer.train()
    distances = [row["atod/log_ratio"] for row in trainer.state.log_history if "reward" in row]
    assert sum(distances[-5:]) < 0.8 * sum(distances[:5])


@pytest.mark.slow
def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="use ATODTrainer"):
        make_trainer(tmp_path, trl.GRPOTrainer, "window").train()
    trainer = make_trainer(tmp_path, style="window")
    trainer.beta = 0.1
    with pytest.raises(InvalidSettingError, match=r"beta must be 0\.0, not 0\.1"):
        trainer.train()
    other = build_policy(SHAPE, build_word_tokenizer(["another vocabulary"]), 0)
    other.save(tmp_path / "other")
    with pytest.raises(AtodError, match="do not share a vocabulary"):
        make_trainer(tmp_path, teacher=str(tmp_path / "other"))


# -- rollouts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_rows_contain_the_environments_texts_and_the_sampled_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, trl.GRPOTrainer, options={"max_steps": 1})
    _, rollout = rows_of(trainer, monkeypatch)
    dialogue = DialogueEncoder(WORDS, "chat")
    env = agent_env(
        gymnasium.make("atod/ALFWorld-v0", max_turns=4, **SETTINGS), profile="plain", style="chat"
    )
    for i, task_id in enumerate(rollout["asked"]):
        messages, info = env.reset(options={"task_id": task_id})
        assert rollout["prompt_ids"][i] == dialogue.first(new_messages(messages))
        ids, mask = rollout["completion_ids"][i], rollout["env_mask"][i]
        assert len(ids) == len(mask)
        rewards, at, over, turns = 0.0, 0, False, 0
        while not over:
            end = mask.index(0, at) if 0 in mask[at:] else len(mask)
            completion = ids[at:end]
            messages, reward, terminated, truncated, info = env.step(dialogue.decode(completion))
            rewards += float(reward) * 10.0 - (0.1 if info["parse_error"] else 0.0)
            over, turns = terminated or truncated, turns + 1
            if not over:
                reason = "stop" if completion[-1] in dialogue.stop_ids else "length"
                said = dialogue.continuation(new_messages(messages), reason)  # type: ignore[arg-type]
                assert ids[end : end + len(said)] == said
                assert mask[end : end + len(said)] == [0] * len(said)
                at = end + len(said)
        assert (turns, rewards) == (
            rollout["turns"][i],
            pytest.approx(rollout["episode_return"][i]),
        )


@pytest.mark.parametrize(
    ("more", "kept"),
    [("<action>b</action>", ""), ("<|im_end|>", "<|im_end|>"), (" so<|im_end|>", ""), ("", "")],
)
def test_a_turn_ends_with_its_action(more: str, kept: str, tmp_path: Path) -> None:
    tokenizer = _byte_tokenizer()
    action = "<think>not <action>a</action></think><action>look</action>"

    def sample(prompts: list[list[int]], *_: object) -> Any:
        ids = tokenizer.encode(action + more, add_special_tokens=False)
        return [list(ids) for _ in prompts], [[-1.0] * len(ids) for _ in prompts]

    config = SimpleNamespace(max_position_embeddings=100_000)
    trainer: Any = SimpleNamespace(
        processing_class=tokenizer, max_completion_length=200, _generate_single_turn=sample,
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)),
        use_vllm=False, args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    env = EnvConfig(**ENV, max_turns=2, parse_profile="tags")  # type: ignore[arg-type]
    output = Rollouts(env)([tasks(1)[0]["prompt"]], trainer)
    [ids], [mask], [logprobs] = (output[n] for n in ("completion_ids", "env_mask", "logprobs"))
    sampled = [token for token, is_sampled in zip(ids, mask, strict=True) if is_sampled]
    assert tokenizer.decode(sampled) == 2 * (action + kept)
    assert logprobs == [-1.0 * is_sampled for is_sampled in mask]


@pytest.mark.slow
def test_an_episode_that_cannot_begin_trains_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, teacher=model(1), options={"max_steps": 1})
    trainer.model.config.max_position_embeddings = 8
    with pytest.raises(AtodError, match="No first prompt fits"):
        trainer.train()


# -- the tool --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["atod/ALFWorld-v0", "atod/WebShop-v0", "atod/SearchQA-v0"])
def test_the_tool_plays_like_the_environment(env_id: str) -> None:
    settings: dict[str, Any] = {"data": "generated", "max_turns": 12}
    settings |= {"atod/WebShop-v0": {"products": 60}, "atod/SearchQA-v0": {"entities": 60}}.get(
        env_id, {"house_size": "tiny"}
    )
    env = make_env(env_id, **settings)
    tool = environment_factory(env_id, invalid_action_penalty=0.25, **settings)()
    task_id = env.get_wrapper_attr("task_ids")[3]
    observation, _ = env.reset(options={"task_id": task_id})
    assert tool.act("look") == "The episode is over; nothing more can be done."
    told = tool.reset(task_id=task_id, prompt=[], other=1)
    assert observation["instruction"] in told
    assert "tool act" in told
    expert = env.unwrapped.expert()  # type: ignore[attr-defined]
    expert.reset(observation["instruction"], observation["text"])
    reward, over, action = 0.0, False, None
    told = tool.act("fly to the moon")
    observation, _, _, _, info = env.step("fly to the moon")
    assert not info["is_action_valid"]
    # Why it did nothing: in WebShop that is not in the text.
    assert told.startswith(shown_text(observation, info))
    assert (info.get("message", "") or observation["text"]) in told
    while not over:
        action = expert.act(observation["text"], observation["admissible_actions"], action)
        observation, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        told = tool.act(action)
        assert observation["text"] in told
        assert all(choice in told for choice in observation["admissible_actions"] if not over)
    assert float(reward) == 1.0
    assert tool.get_reward() == 0.75
    assert tool.act("look") == "The episode is over; nothing more can be done."
    assert tool.get_reward() == 0.75


@pytest.mark.slow
def test_grpo_trains_on_calls_of_the_tool(tmp_path: Path) -> None:
    tokenizer = _byte_tokenizer()
    policy = build_policy(SHAPE, tokenizer, 0)
    rows = task_dataset("atod/ALFWorld-v0", **SETTINGS).select(range(2))
    factory = environment_factory("atod/ALFWorld-v0", show_admissible=False, **SETTINGS)
    trainer = trl.GRPOTrainer(
        model=policy.model,
        processing_class=tokenizer,
        environment_factory=factory,
        train_dataset=rows,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, save_strategy="no",
            per_device_train_batch_size=2, num_generations=2, max_completion_length=700,
            max_tool_calling_iterations=3, temperature=0.05, max_steps=1, logging_steps=1,
        ),
    )  # fmt: skip
    call = '<tool_call>\n{"name": "act", "arguments": {"action": "look"}}\n</tool_call><|im_end|>'
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": factory().reset(task_id)}],
            tools=trainer.tools, add_generation_prompt=True, tokenize=True, return_dict=False,
        )
        for task_id in rows["task_id"]
    ]  # fmt: skip
    _teach(trainer.model, prompts, tokenizer.encode(call, add_special_tokens=False))
    trainer.train()
    [step] = [row for row in trainer.state.log_history if "reward" in row]
    assert step["tools/call_frequency"] >= 1
    assert step["tools/failure_frequency"] == 0
    assert "rewards/TaskTool/mean" in step


def _byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text(encoding="utf-8")
    return tokenizer


def _teach(student: Any, prompts: list[list[int]], completion: list[int]) -> None:
    """Teaches a model to answer some prompts with one completion."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for number in range(600):
        prompt = prompts[number % len(prompts)]
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        loss = student(input_ids=ids, labels=labels).loss
        if number > 50 and float(loss.detach()) < 0.01:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- the example -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_trains_one_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atod_train.examples.trl_atod", "--style", "window"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'atod/kappa': 0.1" in result.stdout.splitlines()[-1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model in a folder."""
    tokenizer = build_word_tokenizer(["go to desk 1", "take mug 1 from desk 1"])
    shape = ModelShape(layers=1, width=16, heads=2, mlp_width=32, max_positions=1024)
    build_policy(shape, tokenizer, seed=0).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_example_takes_a_model_of_ones_own(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atod_train.examples.trl_atod", "--model", str(saved)]
    result = subprocess.run(
        [*command, "--teacher", str(saved), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    # Student and teacher are the same model.
    assert "'atod/log_ratio': 0.0" in result.stdout.splitlines()[-1]


def test_the_snippet_of_the_guide_makes_a_trainer(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (REPOSITORY / "atod_train/README.md").read_text(encoding="utf-8")
    [snippet] = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from trl" in b]
    snippet = snippet.replace("Qwen/Qwen3-0.6B", str(saved)).replace("<folder>", str(saved))
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(compile(snippet.replace("delta=", "use_cpu=True, delta="), "README.md", "exec"), made)
    assert isinstance(made["trainer"], ATODTrainer)
