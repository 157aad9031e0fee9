"""Our agent loop and objective inside the real verl: its worker, its queue, its loss; no GPU.

verl's rollout engines and training workers need a GPU. Here a small model samples in place of the
engine, and its log-probs stand for those of the workers.
"""

from __future__ import annotations

import asyncio
import copy
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch

pytestmark = [
    # What verl and ray leave open, and say of other packages, is theirs to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "verl.trainer.ppo.v1", reason="verl is not installed: pip install 'atod-gym[train,verl]'"
    )

import ray  # noqa: E402
import transfer_queue as tq  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ  # noqa: E402
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.rollout.replica import TokenOutput  # noqa: E402

from atod_gym.adapters.verl import task_dataset, write_tasks  # noqa: E402
from atod_gym.errors import InvalidSettingError  # noqa: E402
from atod_gym.wrappers import agent_env  # noqa: E402
from atod_train.adapters import verl as adapter  # noqa: E402
from atod_train.adapters.verl import ATODSettings, ATODTrainer, TeacherWorker  # noqa: E402
from atod_train.algorithm.atod import turn_weights  # noqa: E402
from atod_train.models.dialogue import DialogueEncoder  # noqa: E402
from atod_train.models.from_scratch import ModelShape, build_policy  # noqa: E402
from atod_train.models.word_tokenizer import build_word_tokenizer  # noqa: E402
from atod_train.records import Trajectory  # noqa: E402
from atod_train.rollout.episode import new_messages  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORDS = build_word_tokenizer(["go to desk 1", "take mug 1 from desk 1", "look"])
SHAPE = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=2048)
SETTINGS = {"data": "generated", "house_size": "tiny"}
LOOP = """
- name: atod
  _target_: atod_train.adapters.verl.ATODAgentLoop
  max_completion_tokens: 6
  env:
    {{id: atod/ALFWorld-v0, data: generated, options: {{house_size: tiny}}, max_turns: 4,
     prompt_style: {style}, show_admissible: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and tasks."""
    made = tmp_path_factory.mktemp("verl")
    for seed, name in enumerate(("student", "teacher")):
        build_policy(SHAPE, WORDS, seed).save(made / name)
    assert write_tasks(made / "train.parquet", "atod/ALFWorld-v0", **SETTINGS) == 3000
    return made


def composed(folder: Path, style: str = "chat", *more: str) -> Any:
    """verl's own configuration with our overrides."""
    loop = folder / f"{style}.yaml"
    loop.write_text(LOOP.format(style=style), encoding="utf-8")
    overrides = [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"actor_rollout_ref.model.path={folder}/student",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loop}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "data.max_prompt_length=600",
        "data.max_response_length=700",
        "algorithm.adv_estimator=grpo",
        "trainer.v1.trainer_mode=atod",
        "transfer_queue.enable=True",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*overrides, *more])


@pytest.fixture(scope="module")
def queue(folder: Path) -> Iterator[None]:
    """verl's queue between rollout and trainer."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    config = composed(folder)
    OmegaConf.resolve(config)
    tq.init(config.transfer_queue)
    yield
    tq.close()
    ray.shutdown()


class Sampler:
    """Samples from a small model where verl has an engine."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "student")

    @torch.no_grad()
    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> TokenOutput:
        ids = torch.tensor([prompt_ids])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
            max_new_tokens=sampling_params["max_tokens"], output_logits=True,
            return_dict_in_generate=True, pad_token_id=WORDS.pad_token_id,
            eos_token_id=WORDS.eos_token_id,
        )  # fmt: skip
        new = out.sequences[0, len(prompt_ids) :].tolist()
        logprobs = [float(x[0].log_softmax(-1)[t]) for x, t in zip(out.logits, new, strict=True)]
        steps = {"min_global_steps": 1, "max_global_steps": 1}
        return TokenOutput(token_ids=new, log_probs=logprobs, extra_fields=steps)


def play(folder: Path, style: str, *more: str, partition: str = "train") -> dict[str, Any]:
    """Plays two tasks, four times each, by verl's worker; what the queue holds by key."""
    if left := list((tq.kv_list(partition) or {}).get(partition, {})):
        tq.kv_clear(partition_id=partition, keys=left)
    torch.manual_seed(0)
    # The class that ray runs in a process of its own, here in this one.
    worker = AgentLoopWorkerTQ.__ray_actor_class__(
        config=composed(folder, style, *more), llm_client=Sampler(folder)
    )
    rows = task_dataset("atod/ALFWorld-v0", **SETTINGS).select(range(2)).to_list()

    async def run() -> None:
        for index, row in enumerate(rows):
            prompt = {
                **{key: value for key, value in row.items() if key != "prompt"},
                "uid": f"u{index}", "raw_prompt": row["prompt"], "global_steps": 1, "index": index,
            }  # fmt: skip
            trajectory = {"step": 1, "sample_index": index, "rollout_n": 0, "validate": False}
            await worker._run_prompt(prompt, {"temperature": 1.0}, trajectory=trajectory)

    asyncio.run(run())
    listed = tq.kv_list(partition)[partition]
    assert {listed[f"u{i}"]["status"] for i in range(2)} == {"finished"}
    keys = sorted(key for key in listed if key.count("_") == 2)
    names = ["prompts", "responses", "response_mask", "rm_scores", "rollout_log_probs"]
    data = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=names)
    return {
        key: {name: data[name][i].tolist() for name in names} | {"task": rows[int(key[1])]}
        for i, key in enumerate(keys)
    }


# -- the agent loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chat", "window"])
def test_rows_contain_the_shown_and_sampled_tokens(style: str, folder: Path, queue: None) -> None:
    rows = play(folder, style)
    sessions = sorted({key.rpartition("_")[0] for key in rows})
    assert len(sessions) == 8
    dialogue = DialogueEncoder(WORDS, style)
    env = agent_env(
        gymnasium.make("atod/ALFWorld-v0", max_turns=4, **SETTINGS),
        profile="plain", style=style,  # type: ignore[arg-type]
    )  # fmt: skip
    for session in sessions:
        own = [rows[key] for key in sorted(rows) if key.startswith(f"{session}_")]
        task_id = own[0]["task"]["extra_info"]["task_id"]
        messages, _ = env.reset(options={"task_id": task_id})
        turns, at, over, reward = 0, 0, False, 0.0
        while not over:
            row = own[turns] if style == "window" else own[0]
            ids, mask = row["responses"], row["response_mask"]
            assert len(ids) == len(mask) == len(row["rollout_log_probs"])
            if style == "window" or turns == 0:
                assert row["prompts"] == dialogue.first(new_messages(messages))
                at = 0
            end = mask.index(0, at) if 0 in mask[at:] else len(mask)
            completion = ids[at:end]
            messages, gain, terminated, truncated, info = env.step(dialogue.decode(completion))
            reward += float(gain) - (0.01 if info["parse_error"] else 0.0)
            over, turns = terminated or truncated, turns + 1
            if not over and style == "chat":
                reason = "stop" if completion[-1] in dialogue.stop_ids else "length"
                said = dialogue.continuation(new_messages(messages), reason)  # type: ignore[arg-type]
                assert ids[end : end + len(said)] == said
                at = end + len(said)
        assert len(own) == (turns if style == "window" else 1)
        assert [sum(row["rm_scores"]) for row in own] == pytest.approx([reward] * len(own))


@pytest.mark.parametrize("style", ["chat", "window"])
def test_no_row_is_longer_than_the_engine_takes(style: str, folder: Path, queue: None) -> None:
    def longest(*more: str) -> int:
        rows = play(folder, style, *more).values()
        return max(len(row["prompts"]) + len(row["responses"]) for row in rows)

    limit = longest() - 10
    assert longest(f"actor_rollout_ref.rollout.max_model_len={limit}") <= limit


def test_a_prompt_that_does_not_fit_trains_on_nothing(folder: Path, queue: None) -> None:
    loop: Any = SimpleNamespace(encoder=DialogueEncoder(WORDS, "chat"))
    record = Trajectory(0, "t", "k", (), False, True, "context_limit", False, 0.0)
    output = adapter.ATODAgentLoop._outputs(loop, record, [])
    assert (output.response_mask, output.reward_score) == ([0], 0.0)  # type: ignore[union-attr]


# -- the objective --------------------------------------------------------------------------------


@torch.no_grad()
def scored(folder: Path, name: str, rows: dict[str, Any]) -> list[torch.Tensor]:
    """Log-probs of the responses under a model."""
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    found = []
    for row in rows.values():
        ids = torch.tensor([row["prompts"] + row["responses"]])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        found.append(logprobs[-len(row["responses"]) :, 0])
    return found


def nested(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


def batch_of(rows: dict[str, Any]) -> Any:
    return tq.KVBatchMeta(keys=list(rows), partition_id="train", tags=[{} for _ in rows])


def trainer(folder: Path, kind: type[Any] = ATODTrainer, **settings: Any) -> Any:
    """A trainer without workers."""
    made = object.__new__(kind)
    made.config = composed(folder)
    made.global_steps = 2
    made.settings = ATODSettings.read({"teacher": "teacher", **settings})
    return made


def advantages_of(made: Any, rows: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    metrics: dict[str, Any] = {}
    made._compute_advantage(batch_of(rows), metrics)
    data = tq.kv_batch_get(
        keys=list(rows), partition_id="train", select_fields=["advantages", "returns"]
    )
    assert all(torch.equal(a, b) for a, b in zip(*data.values(), strict=True))
    return list(data["advantages"].unbind()), metrics


def prepared(folder: Path, style: str) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Rows of a rollout, with the log-probs that verl's workers would add."""
    rows = play(folder, style)
    student, teacher = (scored(folder, name, rows) for name in ("student", "teacher"))
    # Random models never succeed: rewards that differ within groups, the same within a session.
    rewards = []
    for key, row in rows.items():
        reward = torch.zeros(len(row["responses"]))
        reward[-1] = float(key.split("_")[1]) ** 2
        rewards.append(reward)
    fields = {"old_log_probs": student, "ref_log_prob": teacher, "rm_scores": rewards}
    tq.kv_batch_put(
        keys=list(rows),
        partition_id="train",
        fields=TensorDict({k: nested(v) for k, v in fields.items()}, batch_size=len(rows)),
    )
    return rows, student, teacher


@pytest.mark.parametrize("style", ["chat", "window"])
def test_advantages_are_those_of_the_paper(style: str, folder: Path, queue: None) -> None:
    rows, student, teacher = prepared(folder, style)
    theirs, _ = advantages_of(trainer(folder, PPOTrainerSync), rows)
    assert any(bool(row.any()) for row in theirs)
    # Without the teacher's part it is their GRPO.
    equal = {"kappa": (0.0, 0.0), "rho": (1.0, 1.0)}
    ours, _ = advantages_of(trainer(folder, **equal), rows)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    mixed, metrics = advantages_of(trainer(folder, schedule="linear:4"), rows)
    kappa, rho = 1.0 - 0.9 / 2, 1.0 + 1.0 / 2
    assert (metrics["atod/kappa"], metrics["atod/rho"]) == pytest.approx((kappa, rho))
    for session in sorted({key.rpartition("_")[0] for key in rows}):
        spans = []
        for number, key in enumerate(rows):
            if key.rpartition("_")[0] == session:
                mask = [0, *rows[key]["response_mask"], 0]
                edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
                spans += [
                    (number, a - 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)
                ]
        assert len(spans) == 4
        d = torch.stack([(student[n][a:b] - teacher[n][a:b]).abs().mean() for n, a, b in spans])
        h = torch.stack([-student[n][a:b].mean() for n, a, b in spans])
        for (n, a, b), weight in zip(spans, turn_weights(d, h), strict=True):
            wanted = kappa * weight * (teacher[n] - student[n])[a:b] + rho * theirs[n][a:b]
            torch.testing.assert_close(mixed[n][a:b], wanted, atol=1e-5, rtol=1e-4)
    for row, advantages in zip(rows.values(), mixed, strict=True):
        assert not advantages[torch.tensor(row["response_mask"]) == 0].any()


def test_their_loss_and_an_optimizer_take_a_step(folder: Path, queue: None) -> None:
    rows, student, _ = prepared(folder, "chat")
    advantages, _ = advantages_of(trainer(folder), rows)
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole = composed(folder)
    OmegaConf.resolve(whole)
    config = omega_conf_to_dataclass(whole.actor_rollout_ref.actor)
    loss_of = get_policy_loss_fn("vanilla")
    losses = []
    for _ in range(2):
        total = 0.0
        optimizer.zero_grad()
        for row, old, advantage in zip(rows.values(), student, advantages, strict=True):
            ids = torch.tensor([row["prompts"] + row["responses"]])
            logprobs = (
                model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            )
            loss, _ = loss_of(
                old_log_prob=old[None], log_prob=logprobs[None, -len(old) :, 0],
                advantages=advantage[None], response_mask=torch.tensor([row["response_mask"]]),
                loss_agg_mode="token-mean", config=config,
            )  # fmt: skip
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    assert losses[1] < losses[0]


# -- settings -------------------------------------------------------------------------------------


def test_the_teacher_is_the_model_of_the_reference_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    class Recorder:
        def __init__(self, config: Any) -> None:
            built.append(config)

        def reset(self) -> None: ...

        def get_dispatch_collect(self) -> dict[str, Any]:
            return {"dispatch_dp_rank": 0, "is_collect": True}

    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("verl.workers.engine_workers.aggressive_empty_cache", lambda **_: None)
    config = composed(folder).actor_rollout_ref
    for teacher, expected in ((f"{folder}/teacher", "teacher"), ("", "student")):
        chosen = copy.deepcopy(config)
        with open_dict(chosen):
            chosen.ref.atod_teacher = teacher
        worker = object.__new__(TeacherWorker)
        worker.__dict__.update(config=chosen, role="ref", distillation_enabled=False)
        worker.ref_worker_cls = Recorder
        monkeypatch.setattr(worker, "set_dispatch_collect", lambda **_: None, raising=False)
        worker.init_model()
        assert built[-1].model_config.path == f"{folder}/{expected}"
        assert worker.ref_worker_cls is Recorder


def test_settings_that_make_no_sense(folder: Path) -> None:
    with pytest.raises(InvalidSettingError, match="no setting 'kapa'"):
        ATODSettings.read({"kapa": 1})
    with pytest.raises(InvalidSettingError, match="kappa falls"):
        ATODSettings.read({"kappa": [1.0, 2.0]})
    with pytest.raises(InvalidSettingError, match="of atod-train alone"):
        ATODSettings.read({"turn_weights": "token"})
    for schedule in ("adaptive", "gap", "gap:0.5", "handoff"):
        with pytest.raises(InvalidSettingError, match=f"schedule={schedule} follows the run"):
            ATODSettings.read({"schedule": schedule})
    handoff = ATODSettings.read({"schedule": "handoff:3"}).schedule
    assert [handoff.coefficients(step) for step in (3, 4)] == [(1.0, 0.0), (0.0, 1.0)]
    more = ("+trainer.v1.atod.teacher=x", "actor_rollout_ref.actor.use_kl_loss=False")
    with pytest.raises(InvalidSettingError, match="use_kl_loss=True"):
        ATODTrainer(composed(folder, "chat", *more))
    with pytest.raises(InvalidSettingError, match="no setting 'x'"):
        ATODTrainer(composed(folder, "chat", "+trainer.v1.atod.x=1"))


def test_their_configuration_finds_the_trainer() -> None:
    assert get_trainer_cls("atod") is ATODTrainer
    code = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; get_trainer_cls('atod')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "atod_train.adapters.verl"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("run", "split"), [("alfworld", "valid_seen"), ("webshop", "val"), ("searchqa", "test")]
)
def test_the_recipe_is_one_that_verl_accepts(
    run: str, split: str, folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "atod_train.examples.verl_recipe", run, "--gpus", "4"]
    out = tmp_path / "it's a run, kappa=1"
    command += ["--data", "generated", "--out", str(out)]
    command += ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    [line] = [line for line in result.stdout.splitlines() if "verl.trainer.main_ppo" in line]
    for setting in ("v1.trainer_mode=atod", "n_gpus_per_node=4", "save_freq=25", "test_freq=5"):
        assert f"trainer.{setting}" in line
    assert {path.name for path in out.iterdir()} == {
        "loop.yaml", "train.parquet", f"{split}.parquet"
    }  # fmt: skip
    words = shlex.split(line)[4:]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words)
    assert config.data.train_files == str(out / "train.parquet")
    assert config.trainer.default_local_dir == str(out / "checkpoints")
