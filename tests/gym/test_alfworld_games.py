"""ALFWorld games: where they are found, which are official, and why others are left out."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from written_games import write_games

from atod_gym import tasks as tasks_module
from atod_gym.envs.alfworld import games
from atod_gym.envs.alfworld.engine import read_game
from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.envs.alfworld.games import SOURCE, SPLITS, find_games, open_games, scan_games
from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.houses import TASK_TYPES
from atod_gym.errors import DataNotFoundError, InvalidGameError, InvalidSettingError

DESK = "pick_and_place_simple-Mug-None-Desk-1"


def write_tree(root: Path) -> Path:
    """A small folder of games as the official package lays it out."""
    write_games(root / "json_2.1.1", {"train": 12, "valid_seen": 6}, house_size="tiny")
    return root


def write_game(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    game = {**generate_game("tiny-train-0000-pick_and_place_simple"), **changes}
    (folder / "game.tw-pddl").write_text(json.dumps(game), encoding="utf-8")
    return folder


def test_a_copy_in_another_place_has_the_same_manifest(tmp_path: Path) -> None:
    first = write_tree(tmp_path / "first")
    second = tmp_path / "second"
    for path in sorted((first / "json_2.1.1").rglob("*"), reverse=True):
        if path.is_file():
            target = second / path.relative_to(first)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    manifests = [open_games(str(root), "train", "").manifest for root in (first, second)]
    assert manifests[0] == manifests[1]
    assert len(manifests[0].task_ids) == 12
    game = next(second.rglob("valid_seen/*/*/game.tw-pddl"))
    game.write_bytes(game.read_bytes() + b"\n")
    hashes = {open_games(str(root), "valid_seen", "").manifest.content_hash
              for root in (first, second)}  # fmt: skip
    assert len(hashes) == 2


@pytest.mark.parametrize("data", ["", "train", f"train/{DESK}"])
def test_changed_games_are_read_again(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(games, "_PAUSE", 0.0)
    trial = write_game(tmp_path / "train" / DESK / "trial_1", solvable=False)
    with pytest.raises(DataNotFoundError, match="No game"):
        ALFWorldEnv(data=tmp_path / data)
    shutil.rmtree(trial)
    write_game(trial)
    assert ALFWorldEnv(data=tmp_path / data).task_ids == (f"{DESK}/trial_1",)
    game = (trial / "game.tw-pddl").read_bytes()
    (trial / "game.tw-pddl").write_bytes(game.replace(b'"solvable": true', b'"solvable": false'))
    write_game(trial.with_name("trial_2"))
    env = ALFWorldEnv(data=tmp_path / data)
    assert env.task_ids == (f"{DESK}/trial_2",)
    assert env.reset(seed=0)[1]["task_id"] == f"{DESK}/trial_2"


def test_games_that_cannot_be_played_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    game = json.dumps(generate_game("tiny-train-0000-pick_and_place_simple"))
    unsolvable = game.replace('"solvable": true', '"solvable": false')
    unknown = game.replace('"solvable": true, ', "")
    spaced = game.replace('"solvable": true', '"solvable" :\n true')
    for name, content in [
        (f"{DESK}/good", game),
        (f"{DESK}/spaced", spaced),
        (f"{DESK}/unsolvable", unsolvable),
        (f"{DESK}/unknown", unknown),
        ("pick_and_place_simple-AppleSliced-None-Desk-1/sliced", game),
        ("pick_and_place_with_movable_recep-Mug-Bowl-Desk-1/movable", game),
        ("something_else-Mug-None-Desk-1/other", game),
    ]:
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(content, encoding="utf-8")
    (tmp_path / f"train/{DESK}/empty").mkdir()
    (tmp_path / "train/README").write_text("not a folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "atod_gym"):
        games = open_games(str(tmp_path), "train", "")
        open_games(str(tmp_path), "train", "")
    assert games.manifest.task_ids == (f"{DESK}/good", f"{DESK}/spaced")
    assert games.types == dict.fromkeys(games.manifest.task_ids, "pick_and_place_simple")
    assert games.label == str(tmp_path)
    assert len(caplog.records) == 1
    for reason in ("2 with a movable receptacle or a sliced object", "1 of a task type other than",
                   '2 whose file does not say "solvable": true'):  # fmt: skip
        assert reason in caplog.text


def test_a_split_of_unsupported_games_says_why_none_can_be_played(tmp_path: Path) -> None:
    write_game(tmp_path / "train/pick_and_place_with_movable_recep-Mug-Bowl-Desk-1/trial")
    with pytest.raises(DataNotFoundError, match=r"1 with a movable receptacle.*cannot be won"):
        open_games(str(tmp_path), "train", "")


def test_data_is_found_in_every_usual_layout(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "alfworld") / "json_2.1.1"
    assert find_games(tmp_path) == find_games(tmp_path / "alfworld") == find_games(root) == root
    assert find_games(tmp_path / "nowhere") is None
    assert find_games(root / "train/README") is None


def test_one_split_one_task_or_one_game_can_be_played(tmp_path: Path) -> None:
    root = write_tree(tmp_path) / "json_2.1.1"
    every = open_games(str(root), "valid_seen", "").manifest
    alone = open_games(str(root / "valid_seen"), "valid_seen", "")
    assert alone.manifest == every
    assert alone.label == str(root / "valid_seen")
    with pytest.raises(DataNotFoundError, match=r"'train'.*known: valid_seen\."):
        open_games(str(root / "valid_seen"), "train", "")
    task_id = every.task_ids[2]
    trial = root / "valid_seen" / task_id
    for path in (trial, trial / "game.tw-pddl", trial.parent):
        env = ALFWorldEnv(data=path, split="valid_seen")
        assert env.task_ids == (task_id,)
        assert env.reset()[1]["task_id"] == task_id
    shutil.rmtree(root / "train")
    assert open_games(str(tmp_path), "valid_seen", "").manifest == every
    with pytest.raises(DataNotFoundError, match=r"'train'.*known: valid_seen\."):
        open_games(str(tmp_path), "train", "")


def test_a_relative_path_names_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_tree(tmp_path) / "json_2.1.1/valid_seen")
    games = open_games(".", "valid_seen", "")
    assert (len(games.types), games.label) == (6, ".")


@pytest.mark.usefixtures("no_user_data")
@pytest.mark.parametrize("variable", ["ATOD_DATA", "ALFWORLD_DATA"])
def test_other_games_are_never_called_official(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    root = write_tree(tmp_path / "data") / "json_2.1.1"
    monkeypatch.setenv(variable, str(tmp_path / "data"))
    games = open_games("auto", "train", "tiny")
    assert games.label == str(root)
    assert games.manifest.name == "alfworld/files"
    assert ALFWorldEnv(data="auto").reset()[1]["data"] == str(root)
    with pytest.raises(DataNotFoundError) as caught:
        open_games("official", "train", "tiny")
    for part in (str(root), "not the official data", "give that folder", "atod-data get alfworld"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("no_user_data")
def test_official_games_are_known_by_their_content(
    alfworld_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in (alfworld_data, alfworld_data / "valid_seen", alfworld_data.parent):
        env = ALFWorldEnv(data=data, split="valid_seen")
        assert env.data == env.reset(seed=0)[1]["data"] == "official"
        assert env.manifest.name == "alfworld/official"
    shutil.copytree(alfworld_data / "valid_unseen", tmp_path / "copy/valid_unseen")
    monkeypatch.setenv("ATOD_DATA", str(tmp_path / "copy"))
    for data in ("auto", "official"):
        assert open_games(data, "valid_unseen", "").label == "official"
    game = next((tmp_path / "copy").rglob("game.tw-pddl"))
    monkeypatch.setenv("ATOD_DATA", str(tmp_path / "less"))
    (tmp_path / "copy").rename(tmp_path / "less")
    (tmp_path / "less" / game.relative_to(tmp_path / "copy")).unlink()
    assert open_games("auto", "valid_unseen", "").label == str(tmp_path / "less")


@pytest.mark.usefixtures("no_user_data")
def test_a_folder_of_something_else_is_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train/pick_a_photo/1").mkdir(parents=True)
    (tmp_path / "valid_seen").mkdir()
    monkeypatch.setenv("ATOD_DATA", str(tmp_path))
    assert SOURCE.found() is None
    assert open_games("auto", "train", "tiny").label == "generated"
    with pytest.raises(DataNotFoundError, match="No official ALFWorld data"):
        open_games("official", "train", "tiny")
    with pytest.raises(DataNotFoundError, match=r"expected .*json_2\.1\.1/<split>"):
        open_games(str(tmp_path), "train", "tiny")


@pytest.mark.usefixtures("no_user_data")
def test_auto_without_official_data_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "_announced", set())
    with caplog.at_level(logging.WARNING, "atod_gym"):
        assert {open_games("auto", split, "tiny").label for split in SPLITS} == {"generated"}
    assert [record.name for record in caplog.records] == ["atod_gym"]
    assert "ALFWorld: no official data found" in caplog.text
    assert "atod-data list" in caplog.text


@pytest.mark.usefixtures("no_user_data")
def test_missing_official_data_names_the_commands() -> None:
    with pytest.raises(DataNotFoundError) as caught:
        open_games("official", "train", "small")
    for word in ("atod-data get alfworld", "alfworld-download", "ALFWORLD_DATA", ".cache"):
        assert word in str(caught.value)


def test_missing_folders_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"oficial.*generated"):
        open_games("oficial", "train", "small")
    root = str(write_tree(tmp_path))
    (tmp_path / "json_2.1.1/valid_unseen").mkdir()
    for split in ("test", "valid_unseen"):
        with pytest.raises(DataNotFoundError, match=rf"'{split}'.*known: train, valid_seen\."):
            open_games(root, split, "small")
    with pytest.raises(DataNotFoundError, match=r"'\.\.'"):
        open_games("generated", "..", "small")
    with pytest.raises(InvalidSettingError, match="huge"):
        open_games("generated", "train", "huge")


@pytest.mark.parametrize(
    ("name", "split"),
    [("eval_in_distribution", "valid_seen"), ("eval_out_of_distribution", "valid_unseen")],
)
def test_split_names_of_alfworlds_settings_are_explained(
    tmp_path: Path, name: str, split: str
) -> None:
    for data in ("generated", str(write_tree(tmp_path))):
        with pytest.raises(
            DataNotFoundError, match=rf"known: train.*corresponds to the split {split}\."
        ):
            open_games(data, name, "tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "JSON object"),
        (b'{"grammar": "x", "pddl_problem": "y"}', "no text under pddl_domain"),
        (b'{"pddl_domain": 1, "grammar": "x"}', "pddl_domain, pddl_problem"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_corrupt_game_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "game.tw-pddl"
    path.write_bytes(content)
    with pytest.raises(InvalidGameError, match=message) as caught:
        read_game(path)
    assert str(path) in str(caught.value)


def test_unreadable_files_and_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: object, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    trial = write_game(tmp_path / "train" / DESK / "trial")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(InvalidGameError, match=rf"{trial}.*Permission denied"):
            open_games(str(tmp_path), "train", "")
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refused)
        with pytest.raises(InvalidGameError, match=rf"{tmp_path}.*Permission denied"):
            scan_games(tmp_path, "train")
        with pytest.raises(DataNotFoundError):
            open_games(str(tmp_path), "train", "")
    assert len(open_games(str(tmp_path), "train", "").types) == 1


def test_absent_game_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidGameError, match="No such file"):
        read_game(tmp_path / "game.tw-pddl")


def test_generated_splits_are_disjoint() -> None:
    manifests = [open_games("generated", split, "small").manifest for split in SPLITS]
    ids = [task_id for manifest in manifests for task_id in manifest.task_ids]
    assert len(set(ids)) == len(ids)
    assert len({manifest.content_hash for manifest in manifests}) == len(SPLITS)


@pytest.mark.slow
def test_official_splits_have_the_published_sizes_and_share_no_game(alfworld_data: Path) -> None:
    sizes = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
    ids: set[str] = set()
    contents: set[bytes] = set()
    for split, size in sizes.items():
        games = open_games(str(alfworld_data), split, "")
        task_ids = games.manifest.task_ids
        assert len(task_ids) == size
        assert set(games.types.values()) == set(TASK_TYPES)
        ids.update(task_ids)
        for task_id in task_ids:
            game = games.game(task_id)
            assert isinstance(game, Path)
            contents.add(game.read_bytes())
    assert len(ids) == len(contents) == sum(sizes.values())
