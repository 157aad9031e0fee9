"""`--env.id module:id` trains on any Gymnasium environment of texts, and names what one lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gymnasium
import pytest
from gymnasium import spaces

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.config import EnvConfig
from atod_train.examples import own_environment
from atod_train.examples.own_environment import GuessEnv
from atod_train.records import StopReason
from atod_train.reports.metrics import read_metrics
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.own_env import check_env
from atod_train.training.supervised import expert_of

GUESS = EnvConfig(
    id="atod_train.examples.own_environment:my/Guess-v0", max_turns=6, eval_splits=("test",)
)


class Talking(gymnasium.Env[Any, str]):
    """Returns the configured answer; its keywords remove parts of it."""

    def __init__(self, split: str = "train", lacks: str = "") -> None:
        texts = spaces.Text(1000)
        self.split, self.lacks = split, lacks
        self.action_space: Any = spaces.Discrete(3) if lacks == "actions" else texts
        self.observation_space: Any = {
            "observations": spaces.Box(0, 1, (4,)), "text": spaces.Dict({"words": texts}),
        }.get(lacks, spaces.Dict({"text": texts, "instruction": texts}))  # fmt: skip
        self.task_ids = ("b", "a") if split == "train" else ("c",)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.task = (options or {})["task_id"]
        return self._observation(), {"task_type": "talk"}

    def step(self, action: str) -> Any:
        if self.lacks == "patience":
            raise KeyError(action)
        info = {} if self.lacks == "success" else {"score": 1.0 if action == self.task else 0.25}
        return self._observation(), 0.0, action == self.task, False, info

    def _observation(self) -> Any:
        said = {
            "text": f"say {self.task}",
            "instruction": "say it",
            "admissible_actions": ["a", "b"],
        }
        return 7 if self.lacks == "words" else said


gymnasium.register("my/Talking-v0", entry_point=f"{__name__}:Talking")


def talking(**options: str) -> EnvConfig:
    return EnvConfig(id="my/Talking-v0", options=dict(options), max_turns=3, eval_splits=("test",))


@pytest.mark.parametrize("name", ["split", "data", "max_turns", "max_episode_steps"])
@pytest.mark.parametrize("env", [talking(), EnvConfig(data="generated")], ids=["own", "vector"])
def test_an_option_with_a_setting_of_its_own_is_refused(env: EnvConfig, name: str) -> None:
    wrong = replace(env, options={name: "valid_seen"})
    with pytest.raises(InvalidSettingError, match=rf"{name}='valid_seen'.*use --.*--env\."):
        EnvPool(wrong, "train")


def test_tasks_of_other_options_have_another_hash() -> None:
    hashes = set()
    for config in (talking(), talking(lacks=""), talking(lacks="much")):
        with closing(EnvPool(config, "train")) as pool:
            hashes.add(pool.content_hash)
    assert len(hashes) == 3


def test_an_episode_that_is_cut_off_is_no_success() -> None:
    with closing(EnvPool(replace(GUESS, options={}), "train")) as pool:
        [episode] = pool.start(pool.task_ids[:1])
        for reason in get_args(StopReason):
            episode.info, episode.stop_reason = {**episode.info, "success": True}, reason
            assert episode.trajectory().success == (reason in ("terminated", "turn_limit"))


def train(folder: Path, env_id: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        "houses-tiny", "--env.id", env_id, "--env.max-turns", "6", "--env.eval-splits", "test",
        "--env.eval-tasks", "2", "--model.student", "micro", "--model.teacher", "micro",
        "--start.demonstrations", "12", "--start.epochs", "1", "2", "--train.steps", "3",
        "--train.tasks-per-step", "2", "--train.group-size", "2", "--train.minibatches", "1",
        "--out", "out", *more,
    ]  # fmt: skip
    environment = {**os.environ, "ATOD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    repository = str(Path(own_environment.__file__).parent.parent.parent)
    environment["PYTHONPATH"] = repository
    return subprocess.run(
        [sys.executable, "-m", "atod_train.cli", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_example_trains_from_a_file_of_the_current_folder(tmp_path: Path) -> None:
    source = Path(own_environment.__file__).read_text(encoding="utf-8")
    (tmp_path / "guess.py").write_text(source, encoding="utf-8")
    done = train(tmp_path, "guess:my/Guess-v0")
    assert done.returncode == 0, done.stderr
    [metrics] = (tmp_path / "out").rglob("metrics.jsonl")
    steps = read_metrics(metrics.parent)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(1 <= step["turns"] <= 6 for step in steps)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("no_such_module:my/Env-v0", "the module no_such_module cannot be imported"),
        ("broken:my/Env-v0", r"broken cannot be imported \(ZeroDivisionError"),
        ("json:my/Env-v0", r"not registered: .*The module json must call gymnasium.register"),
        ("my/Env-v0", r"not registered: .*env.id my_module:my/Env-v0"),
    ],
)
def test_a_wrong_id_is_named(
    env_id: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(AtodError, match=message):
        check_env(replace(GUESS, id=env_id))


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("actions", r"has actions Discrete\(3\).*action_space of gymnasium.spaces.Text"),
        ("observations", r"has observations Box.*Dict with a Text named 'text'"),
        ("text", r"has observations Dict.*Dict with a Text named 'text'"),
        ("words", r"has an observation of type int.*Dict with a Text named 'text'"),
        ("success", r"neither info\['success'\] nor info\['score'\].*info of step"),
        ("patience", r"raised KeyError.*A model can write any text"),
    ],
)
def test_missing_parts_of_an_environment_are_named(lacks: str, message: str) -> None:
    with pytest.raises(AtodError, match=message):
        check_env(talking(lacks=lacks))


def test_settings_that_it_does_not_take_are_named() -> None:
    with pytest.raises(AtodError, match=r"does not take these settings.*colour"):
        check_env(talking(colour="red"))
    with pytest.raises(AtodError, match=r"takes no data; leave out env\.data official"):
        check_env(replace(talking(), data="official"))


@pytest.mark.slow
def test_a_model_from_scratch_needs_an_expert(tmp_path: Path) -> None:
    check_env(GUESS, from_scratch="micro")
    check_env(replace(GUESS, max_turns=0))  # the environment's own limit
    check_env(talking())
    with pytest.raises(AtodError, match=r"micro is made from an expert's episodes.*expert\(\)"):
        check_env(talking(), from_scratch="micro")
    source = Path(own_environment.__file__).read_text(encoding="utf-8")
    (tmp_path / "guess.py").write_text(source.replace("def expert", "def other"), encoding="utf-8")
    refused = train(tmp_path, "guess:my/Guess-v0")
    assert refused.returncode == 2
    [line] = refused.stderr.strip().splitlines()
    assert "guess:my/Guess-v0 has no expert" in line
    assert not (tmp_path / "out").exists()


def test_seeds_are_the_tasks_of_an_environment_without_any() -> None:
    with closing(EnvPool(GUESS, "train")) as pool, closing(EnvPool(GUESS, "test")) as test:
        assert (len(pool.task_ids), len(test.task_ids)) == (10_000, 100)
        assert not set(pool.task_ids) & set(test.task_ids)
        assert pool.content_hash != test.content_hash
        expected = GuessEnv()
        for task_id in (pool.task_ids[0], pool.task_ids[17]):
            [episode] = pool.start([task_id])
            expected.reset(seed=int(task_id.removeprefix("seed-")))
            assert episode.env.unwrapped.number == expected.number
            expert, action = expert_of(episode), None
            while episode.stop_reason is None:
                action = expert.act(episode.observation["text"], (), action)
                pool.play([episode], [action])
            record = episode.trajectory()
            assert (record.task_id, record.success, record.stop_reason) == (
                task_id, True, "terminated",
            )  # fmt: skip
            assert record.episode_return == 1.0
        with pytest.raises(AtodError, match="No task 'seed-x'"):
            pool.start(["seed-x"])
        [episode] = pool.start(pool.task_ids[:1])
        for _ in range(6):
            pool.play([episode], ["hm"])
        assert (episode.stop_reason, episode.trajectory().success) == ("turn_limit", False)


def test_own_tasks_splits_and_admissible_actions_are_taken() -> None:
    with closing(EnvPool(talking(), "train")) as pool, closing(EnvPool(talking(), "test")) as test:
        assert (pool.task_ids, test.task_ids) == (("b", "a"), ("c",))
        [episode] = pool.start(["b"])
        assert "say it" in episode.messages[0].content
        pool.play([episode], ["c"])
        pool.play([episode], ["b"])
        record = episode.trajectory()
    assert [turn.is_action_valid for turn in record.turns] == [False, True]
    assert (record.success, record.score, record.task_type) == (True, 1.0, "talk")
