"""Splits a few real questions and their passages into training and test files for a study.

    python tests/benchmarks/split_questions.py --data <folder> --out runs/questions

The folder holds `nq_subset.jsonl` and `popqa_subset.jsonl`, questions that say whether a passage
has the answer (`answer_in_corpus`), and `corpus.jsonl.xz`. Kept are questions that one has; of each
set 150 that a fixed seed picks are for the test. `studies/searchqa-real.toml` plays them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

SETS = ("nq", "popqa")
TEST_QUESTIONS = 150


def split(data: Path, out: Path) -> None:
    """Writes `SET_train.jsonl`, `SET_test.jsonl` and the corpus."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = (data / f"{name}_subset.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [
            question for line in lines if (question := json.loads(line))["answer_in_corpus"]
        ]
        questions.sort(key=lambda question: question["id"])
        random.Random(0).shuffle(questions)
        parts = {"test": questions[:TEST_QUESTIONS], "train": questions[TEST_QUESTIONS:]}
        for part, chosen in parts.items():
            text = "".join(json.dumps(question) + "\n" for question in chosen)
            (out / f"{name}_{part}.jsonl").write_text(text, encoding="utf-8")
            print(f"{name}_{part}: {len(chosen)} questions")
    shutil.copyfile(data / "corpus.jsonl.xz", out / "corpus.jsonl.xz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the subsets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    needed = [*(f"{name}_subset.jsonl" for name in SETS), "corpus.jsonl.xz"]
    if missing := [name for name in needed if not (options.data / name).is_file()]:
        parser.error(f"{options.data} has no {', no '.join(missing)}; give the folder that has.")
    split(options.data, options.out)


if __name__ == "__main__":
    main()
