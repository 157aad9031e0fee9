"""Write generated ALFWorld games as files, as official data has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from atod_gym.envs.alfworld.generated.files import generate_game
from atod_gym.envs.alfworld.generated.houses import build_problem, generated_task_ids


def write_games(folder: Path, counts: Mapping[str, int], house_size: str) -> tuple[Path, ...]:
    """Write the first games of splits as `<split>/<task>/<trial>/game.tw-pddl`; return the files.

    `counts` are the numbers of games by split; the six task types follow each other.
    """
    written = []
    for split, count in counts.items():
        for task_id in generated_task_ids(split, house_size)[:count]:
            problem = build_problem(task_id)
            house = problem.house.key.replace("/", "_").replace(" ", "_")
            task = f"{problem.task_type}-{problem.target}-None-{problem.destination}-{house}"
            trial = folder / split / task / f"trial_{task_id}"
            trial.mkdir(parents=True)
            written.append(trial / "game.tw-pddl")
            written[-1].write_text(json.dumps(generate_game(task_id)), encoding="utf-8")
    return tuple(written)
