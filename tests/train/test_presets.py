"""The published runs: presets with the released settings, and the settings that they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import results_files as files
from test_trainer import CONFIG, cache  # noqa: F401

from atod_gym.errors import InvalidSettingError
from atod_train import cli
from atod_train.batch import minibatch_count
from atod_train.config import EnvConfig, RunConfig, TrainConfig, parse_prompt_style
from atod_train.presets import PRESETS
from atod_train.reports.evaluations import temperature_of
from atod_train.reports.results import ResultsError, read_results
from atod_train.reports.run_summary import read_run
from atod_train.reports.tables import claims_table, difference_table, main_table
from atod_train.studies.file import read_study
from atod_train.studies.study import train_one
from atod_train.training import trainer
from atod_train.training.checks import check_settings
from atod_train.training.update import learning_rate

PUBLISHED = ("alfworld", "webshop", "searchqa")
REWARD = (10, 10, 1)
"""Of success; ours is 1, so that penalties are divided by it."""
TABLE: dict[str, tuple[Any, ...]] = {
    "env.id": ("atod/ALFWorld-v0", "atod/WebShop-v0", "atod/SearchQA-v0"),
    "train.tasks_per_step": (16, 16, 128),
    "train.group_size": (8, 8, 8),
    "env.max_turns": (50, 15, 4),
    "env.prompt_style": ("window:2", "window:2", "window:4"),
    "model.max_context": (2048 + 512, 4096 + 512, 4096 + 512),
    "train.max_completion_tokens": (512, 512, 512),
    "train.minibatches": ("rows:256", "rows:64", "rows:256"),
    "env.eval_modes": (("sampled:0.4",), ("sampled:0.4",), ("greedy",)),
    "algorithm.schedule": ("linear:80",) * 3,
    "train.lr_warmup": (0.0, 0.0, 0.1),
    "env.eval_splits": (("valid_seen",), ("val",), ("test",)),
    "env.eval_tasks": (128, 128, 512),
}
"""Rows that differ between the runs."""
COMMON: dict[str, Any] = {
    "env.data": "auto",  # official where it is found; else the run says that it is generated
    "env.template_options": {"enable_thinking": False},
    "env.show_admissible": True,
    "env.parse_profile": "compat",
    "model.student": "",
    "model.teacher": "",
    "model.dtype": "auto",
    "model.lora_rank": 0,
    "start.epochs": (0.0, 0.0),
    "algorithm.method": "atod",
    "algorithm.kappa": (1.0, 0.1),
    "algorithm.rho": (1.0, 2.0),
    "algorithm.turn_weights": "soft_or",
    "algorithm.advantage_over": "turns",
    "algorithm.clip": (0.2, 0.2, 3.0),
    "algorithm.aggregation": "token-mean",
    "algorithm.entropy_bonus": 0.001,
    "train.steps": 150,
    "train.lr": 1e-6,
    "train.eval_every": 5,
    "train.seed": 0,
}
MODELS = ("--model.student", "smollm2", "--model.teacher", "smollm2")


def _parsed(*words: str) -> RunConfig:
    command = cli._parsed(words)
    assert isinstance(command, cli.Train)
    return command.config(words)


def _value(config: RunConfig, name: str) -> Any:
    section, _, setting = name.partition(".")
    return getattr(getattr(config, section), setting)


@pytest.mark.parametrize("name", [*TABLE, *COMMON])
def test_presets_have_the_published_settings(name: str) -> None:
    found = tuple(_value(PRESETS[run].config, name) for run in PUBLISHED)
    assert found == TABLE.get(name, (COMMON.get(name),) * 3)


def test_an_invalid_action_costs_a_hundredth_of_success() -> None:
    for run, reward, penalty in zip(PUBLISHED, REWARD, (0.1, 0.1, 0.01), strict=True):
        assert PRESETS[run].config.env.invalid_action_penalty == penalty / reward


@pytest.mark.parametrize("run", PUBLISHED)
def test_a_published_run_needs_models_alone(run: str) -> None:
    with pytest.raises(InvalidSettingError, match=r"Give --model\.student NAME and"):
        check_settings(PRESETS[run].config)
    with pytest.raises(InvalidSettingError, match=r"^No teacher: .* Give --model\.teacher NAME: a"):
        check_settings(_parsed(run, *MODELS[:2]))
    check_settings(_parsed(run, *MODELS[:2], "--algorithm.method", "grpo"))
    config = _parsed(run, *MODELS)
    check_settings(config)
    assert config == replace(
        PRESETS[run].config, model=replace(config.model, student="smollm2", teacher="smollm2")
    )


def test_tables_of_a_preset_stay_where_others_are_given(tmp_path: Path) -> None:
    words = ("--env.options", "products", "10", "--env.template-options", "date", "today")
    env = _parsed("webshop", *MODELS, *words).env
    assert env.options == {"split_rule": "verl-agent", "products": 10}
    assert env.template_options == {"enable_thinking": False, "date": "today"}
    words = ("--env.id", "atod/ALFWorld-v0", "--env.template-options", "enable_thinking", "True")
    env = _parsed("webshop", *MODELS, *words).env
    assert (env.options, env.template_options) == ({}, {"enable_thinking": True})
    (tmp_path / "study.toml").write_text(
        '[runs.atod]\n[environments.shop]\npreset = "webshop"\n"model.student" = "smollm2"\n'
        '"env.template_options" = { date = "today" }'
    )
    [part] = read_study(tmp_path / "study.toml", tmp_path).parts
    assert part.config.env.template_options == {"enable_thinking": False, "date": "today"}
    assert part.config.env.options == {"split_rule": "verl-agent"}


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "rows", "updates"),
    [
        ("4", 9, 4),
        ("1", 5000, 1),
        ("rows:256", 3333, 13),
        ("rows:64", 3333, 52),
        ("rows:256", 9, 1),
    ],
)
def test_updates_of_a_step(setting: str, rows: int, updates: int) -> None:
    assert minibatch_count(setting, rows) == updates


def test_the_learning_rate_rises_to_its_value() -> None:
    settings = TrainConfig(steps=150, lr=3e-6, lr_warmup=0.1)
    found = [learning_rate(settings, step) for step in (1, 5, 15, 16, 150)]
    assert found == pytest.approx([2e-7, 1e-6, 3e-6, 3e-6, 3e-6])
    assert learning_rate(TrainConfig(lr=5e-4), 1) == 5e-4


def test_modes_and_styles_have_numbers() -> None:
    modes = ("greedy", "sampled", "sampled:0.4", "sampled:1")
    assert [temperature_of(mode) for mode in modes] == [0.0, 0.4, 0.4, 1.0]
    assert parse_prompt_style("window") == parse_prompt_style("window:2") == ("window", 2)
    assert parse_prompt_style("window:0") == ("window", 0)
    assert parse_prompt_style("chat")[0] == "chat"


@pytest.mark.slow
def test_a_run_warms_up_and_is_evaluated_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def watched(learner: Any, *arguments: Any) -> Any:
        before = [weight.detach().clone() for weight in learner.student.model.parameters()]
        found = update(learner, *arguments)
        after = learner.student.model.parameters()
        # AdamW moves a weight by the learning rate in the first update.
        moved = [(a.detach() - b).abs().max().item() for a, b in zip(after, before, strict=True)]
        rates.append(max(moved))
        return found

    update = trainer.update_policy
    monkeypatch.setattr(trainer, "update_policy", watched)
    config = replace(
        CONFIG,
        env=replace(CONFIG.env, eval_modes=("sampled:0.7", "greedy")),
        train=replace(
            CONFIG.train, steps=4, eval_every=2, save_every=4, minibatches="rows:1000",
            lr=1e-3, lr_warmup=0.5,
        ),
    )  # fmt: skip
    train_one(config, tmp_path)
    assert rates[0] == pytest.approx(0.5e-3, rel=0.01)
    run = read_run(tmp_path / "atod-seed0", "atod", 0)
    assert [e.step for e in run.course("valid_seen", "sampled:0.7")] == [0, 2, 4]
    assert [e.step for e in run.course("valid_seen", "greedy")] == [0, 4]
    assert run.summary["best_step"] in (2, 4)
    [results] = read_results([tmp_path / "results.json"])
    assert main_table(results).head == (
        "model", "seeds", "sampled:0.7, last", "sampled:0.7, best", "greedy, last",
        "gain over start (greedy, last)", "minutes",
    )  # fmt: skip
    table = difference_table(results, [("atod", "teacher")])
    assert table.head[2:] == ("sampled:0.7, last", "verdict", "greedy, last", "verdict")
    assert claims_table([results]).title.startswith("Greedy, last: ")


def test_files_of_earlier_settings_are_merged(tmp_path: Path) -> None:
    paths = []
    for number, (env, minibatches) in enumerate(
        [
            ({"success_reward": 10.0, "invalid_action_penalty": 0.1, "history_window": 2}, 4),
            ({"invalid_action_penalty": EnvConfig().invalid_action_penalty}, "4"),
            ({"invalid_action_penalty": 0.1}, "4"),
        ]
    ):
        run = {**files.run("a", number, {"s": "01"}), "train": {"minibatches": minibatches}}
        record = files.environment([run], start={"s": "00"}, teacher={"s": "11"}, env=env)
        paths.append(files.write(tmp_path / f"{number}.json", houses=record))
    [merged] = read_results(paths[:2])
    assert len(merged.runs) == 2
    with pytest.raises(ResultsError, match=r"env\.invalid_action_penalty \(0\.01 and 0\.1\)"):
        read_results(paths)
