"""Local language models in `atod-eval`: what a folder holds, and its play through the trainer.

Importing this loads no torch; `LocalModel.load` does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atod_gym.errors import InvalidSettingError, MissingExtraError
from atod_train.config import EnvConfig, RunConfig
from atod_train.evaluation.agent_evaluation import EpisodeTally, PlayedEnv
from atod_train.evaluation.agents import Completion
from atod_train.evaluation.eval_records import EpisodeRecord
from atod_train.files import read_json
from atod_train.reports.run_folder import CONFIG_FILE, SECTIONS, read_config

if TYPE_CHECKING:
    from atod_train.models.policy import Policy
    from atod_train.records import Trajectory

PREFIX = "model:"
SMOLLM2 = "smollm2"
_FROM_SCRATCH = ("micro", "mini", "tiny", "small")
_SAVED = ("best", "last")
"""Folders of a run's `models`, the preferred one first."""

_COMPLETION_TOKENS = 512
_MAX_CONTEXT = 8192
"""Defaults for models that no run of the trainer describes."""
_DIGESTED = 2**20
_OF_TRAJECTORY = ("task_id", "task_type", "success", "score")


@dataclass(frozen=True)
class ModelFolder:
    """A model to load, and how it was trained."""

    source: str
    """A folder, a hub name or smollm2."""
    label: str
    """For tables and the names of folders."""
    trained: RunConfig | None
    """Settings of the run that saved it; None: not known."""


def find_model(name: str) -> ModelFolder:
    """Find a model by the folder of a run, the folder of a model, a hub name or smollm2.

    Of a run's folder `models/best` is taken if it is there, else `models/last`.

    Raises:
        InvalidSettingError: no model there; names what to give.
        RunFolderError: the run's settings cannot be read.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if name in _FROM_SCRATCH:
            raise InvalidSettingError(
                f"Model {name!r} is trained from scratch in a run; give the folder of that run: "
                f"--agent {PREFIX}FOLDER."
            )
        if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
            raise InvalidSettingError(f"There is no folder {name!r}: --agent {PREFIX}FOLDER.")
        return ModelFolder(name, Path(name).name, None)
    config = read_json(path / CONFIG_FILE)
    if set(SECTIONS) <= config.keys():
        for saved in _SAVED:
            if (path / "models" / saved / CONFIG_FILE).is_file():
                return _of_run(path, path / "models" / saved)
        raise InvalidSettingError(
            f"The run {path} has no models/{' or models/'.join(_SAVED)} yet; give another folder."
        )
    if "model_type" in config:
        run = path.absolute().parent.parent
        is_of_run = path.absolute().parent.name == "models" and (run / CONFIG_FILE).is_file()
        return _of_run(run, path) if is_of_run else ModelFolder(str(path), path.name, None)
    runs = sorted(file.parent.name for file in path.glob("*/models") if file.is_dir())
    advice = f"; it has the runs {', '.join(runs)}: give one of them" if runs else ""
    raise InvalidSettingError(
        f"{path} is neither the folder of a run ({CONFIG_FILE}, models/best or models/last) nor "
        f"that of a model ({CONFIG_FILE}, model.safetensors, tokenizer){advice}."
    )


def _of_run(run: Path, folder: Path) -> ModelFolder:
    return ModelFolder(str(folder), f"{run.name}/{folder.name}", read_config(run))


@dataclass
class LocalModel:
    """A local model that plays greedily or sampled.

    Attributes:
        found: the model.
        temperature: of sampling; 0: greedy.
        max_completion_tokens: longest completion; None: as trained, else 512, at most half the
            context.
        max_context: longest sequence in tokens; None: as trained, else 8192, at most the model's
            positions.
        seed: of sampling.
        device: a torch device; auto: a GPU if there is one.
        episodes_at_once: None: as many as a fifth of the memory holds, at most 128.
    """

    found: ModelFolder
    temperature: float = 0.0
    max_completion_tokens: int | None = None
    max_context: int | None = None
    seed: int = 0
    device: str = "auto"
    episodes_at_once: int | None = None
    template_options: Mapping[str, bool | str] = field(default_factory=dict)
    _policy: Policy | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InvalidSettingError(f"--temperature must be >= 0, not {self.temperature}.")
        for name, value in (
            ("max-tokens", self.max_completion_tokens),
            ("max-context", self.max_context),
        ):
            if value is not None and value < 1:
                raise InvalidSettingError(f"--{name} must be >= 1, not {value}.")
        if self.found.trained is not None:
            self.template_options = dict(self.found.trained.env.template_options)

    def load(self) -> dict[str, Any]:
        """Load the model and resolve the settings that depend on it.

        Returns:
            What results depend on, as JSON values.

        Raises:
            MissingExtraError: torch or transformers is not installed.
            AtodError: the model cannot be loaded, or a setting does not fit it.
        """
        try:
            from atod_train.models.pretrained import LoadOptions, load_policy
        except ImportError as error:
            raise MissingExtraError(
                f"A local model needs {error.name}: pip install 'atod-gym[train]'"
            ) from error
        source = self.found.source
        policy = self._policy = load_policy(source, LoadOptions(device=self.device))
        trained = self.found.trained
        if self.max_context is None:
            usual = trained.model.max_context if trained else _MAX_CONTEXT
            self.max_context = min(usual, policy.max_positions)
        if self.max_context > policy.max_positions:
            raise InvalidSettingError(
                f"--max-context {self.max_context} is more than the {policy.max_positions} "
                f"positions of model {policy.name}. Lower it."
            )
        if self.max_completion_tokens is None:
            usual = min(_COMPLETION_TOKENS, max(1, self.max_context // 2))
            self.max_completion_tokens = trained.train.max_completion_tokens if trained else usual
        if self.max_completion_tokens >= self.max_context:
            raise InvalidSettingError(
                f"--max-tokens {self.max_completion_tokens} leaves no room for a prompt in a "
                f"context of {self.max_context} tokens. Lower it, or raise --max-context."
            )
        return {
            "kind": "model",
            "model": self.found.label,
            "weights": _digest(Path(source)) if Path(source).is_dir() else source,
            "temperature": self.temperature,
            "max_completion_tokens": self.max_completion_tokens,
            "max_context": self.max_context,
            "template_options": dict(self.template_options),
            **({"seed": self.seed} if self.temperature else {}),
        }

    def play(
        self,
        played: PlayedEnv,
        max_turns: int,
        task_ids: Sequence[str],
        *,
        already: int,
        on_record: Callable[[EpisodeRecord], None],
        keep_transcripts: bool = False,
    ) -> None:
        """Play each task once, as evaluations in training do.

        Args:
            played: the environment.
            max_turns: turn limit of an episode.
            task_ids: the tasks, each once.
            already: episodes that an earlier call played; sampling then draws other numbers.
            on_record: takes each record when its episode has ended.
            keep_transcripts: whether records hold prompts and completions.

        Raises:
            AtodError: an environment fails, or the tokenizer's chat template cannot be used.
        """
        import torch

        from atod_train.evaluation.evaluate import episodes_at_once
        from atod_train.memory import give_back
        from atod_train.models.dialogue import DialogueEncoder
        from atod_train.models.generation import Generator
        from atod_train.rollout.env_pool import EnvPool
        from atod_train.rollout.rollout import collect, seed_for

        policy = self._policy
        assert policy is not None
        assert self.max_context is not None
        assert self.max_completion_tokens is not None
        config = EnvConfig(
            id=played.id,
            data=played.data,
            options={name: value for name, value in played.options.items() if name != "max_turns"},
            max_turns=max_turns,
            prompt_style=played.prompt_style,
            history_window=played.history_window,
            show_admissible=played.show_admissible,
            parse_profile=played.parse_profile,
        )
        pool = EnvPool(config, played.split)
        try:
            generator = Generator(
                policy,
                DialogueEncoder(policy.tokenizer, played.prompt_style, self.template_options),
                temperature=self.temperature,
                max_completion_tokens=self.max_completion_tokens,
                completion_format=pool.completion_format,
                max_context=self.max_context,
                generator=torch.Generator().manual_seed(seed_for(self.seed, already, "evaluation")),
            )
            at_once = self.episodes_at_once or episodes_at_once(policy, self.max_context)
            for start in range(0, len(task_ids), at_once):
                part = task_ids[start : start + at_once]
                began = time.monotonic()

                def keep(trajectory: Trajectory, began: float = began) -> None:
                    seconds = time.monotonic() - began
                    on_record(_record(trajectory, seconds, keep_transcripts))

                collect(
                    pool, generator, part,
                    group_size=1, turn_limit=max_turns, episodes_in_all=len(part), on_end=keep,
                )  # fmt: skip
                give_back()
        finally:
            pool.close()


def _record(trajectory: Trajectory, seconds: float, keep_transcript: bool) -> EpisodeRecord:
    """Return what is kept of an episode; prompt tokens are those of each turn's whole prompt."""
    tally = EpisodeTally(keep_transcript)
    context = 0
    for turn in trajectory.turns:
        tokens = turn.tokens
        context = len(tokens.prompt_ids) + (context if tokens.extends_previous else 0)
        said = Completion(
            turn.completion,
            prompt_tokens=context,
            completion_tokens=len(tokens.completion_ids),
            is_cut=tokens.finish_reason == "length",
            turns_left_out=turn.turns_left_out,
        )
        context += len(tokens.completion_ids)
        is_parsed = turn.invalid_reason in ("", "not admissible")
        info = {
            "action": turn.action,
            "is_action_valid": turn.is_action_valid,
            "parse_error": "" if is_parsed else turn.invalid_reason,
        }
        tally.add(turn.prompt, said, info)
    does_not_fit = trajectory.stop_reason == "context_limit"
    message = "The prompt does not fit --max-context." if does_not_fit else ""
    ended = {name: getattr(trajectory, name) for name in _OF_TRAJECTORY}
    return tally.record(ended, trajectory.stop_reason, message, seconds)


def _digest(folder: Path) -> str:
    """Identify weights by the names, sizes and three parts of the files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _DIGESTED)):
                file.seek(start)
                digest.update(file.read(_DIGESTED))
    return digest.hexdigest()
