"""The README.md of a saved model, as the Hugging Face hub reads it: `hf upload NAME FOLDER`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from atod_train.algorithm.methods import needs_teacher
from atod_train.config import SECTIONS, RunConfig, is_url
from atod_train.files import read_json, without_infinities
from atod_train.reports.evaluations import Evaluation
from atod_train.reports.run_folder import MANIFEST_FILE
from atod_train.reports.tables import Table, rate_text

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT = """\
---
{metadata}
---

# {title}

{student} after {steps} steps of method `{method}` on `{env}`{teacher}, trained with
`atod-gym`. ATOD is Annealed Turn-Aware On-Policy Distillation
([arXiv:2606.27814](https://arxiv.org/abs/2606.27814)).

## Results

{results}

Success in percent of the tasks of a split, with 95 % bootstrap intervals over tasks. The run has
one seed ({seed}); the spread between seeds is not in the intervals.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

It was trained on prompts of style `{style}` with parse profile `{profile}` and at most {turns}
turns of {tokens} tokens; other prompts give other results.

## Data

`{data}`, hash of the training tasks `{hash}`.

## Settings

```json
{settings}
```

## Versions

Python {python}; {packages}.
"""


def model_card(
    run_dir: Path,
    config: RunConfig,
    step: int,
    evaluations: Sequence[Evaluation],
    *,
    label: str = "",
) -> str:
    """Return the text of a model card.

    Args:
        run_dir: of the run, which has a manifest.
        config: its settings.
        step: whose weights are saved.
        evaluations: of the start, the teacher and the student.
        label: name of the run in tables; empty: its method.
    """
    manifest = read_json(run_dir / MANIFEST_FILE)
    model, env = config.model, config.env
    data = manifest.get("data", {})
    # Names of folders say nothing to others, and the hub takes names of its own alone.
    is_hub_name = bool(_HUB_NAME.fullmatch(model.student)) and not Path(model.student).exists()
    student = model.student if is_hub_name else Path(model.student).name
    method = label or config.algorithm.method
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": model.student} if is_hub_name else {}),
        "tags": ["atod", "agent", "on-policy-distillation", "reinforcement-learning", env.id],
    }
    teacher = "a server" if is_url(model.teacher) else f"`{Path(model.teacher).name}`"
    has_teacher = needs_teacher(config.algorithm.method)
    settings = {section: asdict(getattr(config, section)) for section in SECTIONS}
    return _TEXT.format(
        # JSON is YAML.
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        title=f"{student}, {method}, {env.id}",
        student=f"`{student}`",
        steps=step,
        method=method,
        env=env.id,
        teacher=f" from the teacher {teacher}" if has_teacher else "",
        results=_results(step, evaluations),
        seed=config.train.seed,
        style=env.prompt_style,
        profile=env.parse_profile,
        turns=env.max_turns,
        tokens=config.train.max_completion_tokens,
        data=Path(str(data.get("name"))).name,
        hash=data.get("hash"),
        settings=json.dumps(without_infinities(settings), indent=1),
        python=manifest.get("python"),
        packages=", ".join(f"{k} {v}" for k, v in manifest.get("packages", {}).items()),
    )


def _results(step: int, evaluations: Sequence[Evaluation]) -> str:
    """A table with a line for the model, the start and the teacher, for each split and mode."""
    names = {("student", step): "this model", ("student", 0): "start", ("teacher", 0): "teacher"}
    found = {
        (e.result.split, e.result.mode, names[e.model, e.step]): e.result
        for e in evaluations
        if (e.model, e.step) in names
    }
    if not found:
        return "It was not evaluated."
    rows = []
    for (split, mode, name), result in sorted(found.items()):
        rows.append((split, mode, name, str(len(result.tasks)), rate_text(result.success)))
    head = ("split", "decoding", "model", "tasks", "success, % [95 % interval]")
    return Table("", head, tuple(rows)).markdown
