"""Local language models in `atod-eval`: what a folder holds, and its play through the trainer.

Importing this loads no torch; `LocalModel.load` does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atod_gym.errors import InvalidSettingError, MissingExtraError
from atod_gym.tasks import expanded
from atod_train.config import SECTIONS, EnvConfig, ModelConfig, RunConfig
from atod_train.evaluation.agents import Completion
from atod_train.evaluation.eval_records import EpisodeRecord
from atod_train.files import read_json
from atod_train.memory import memory_errors
from atod_train.reports.evaluations import EvaluationMode
from atod_train.reports.run_folder import CONFIG_FILE, read_config
from atod_train.rollout.env_pool import EnvPool

if TYPE_CHECKING:
    from atod_train.evaluation.eval_options import ModelOptions, Sampling
    from atod_train.records import Trajectory

PREFIX = "model:"
LOCAL = f"{PREFIX}FOLDER"
SMOLLM2 = "smollm2"
_FROM_SCRATCH = ("micro", "mini", "tiny", "small")
_COMPLETION_TOKENS = 512
_MAX_CONTEXT = 8192
"""Defaults for models that no run of the trainer describes."""
_DIGESTED = 2**20


def find_model(name: str) -> tuple[str, RunConfig | None]:
    """Find a model by the folder of a run, the folder of a model, a hub name or smollm2.

    Of a run's folder `models/best` is taken if it is there, else `models/last`; of a study's folder
    its only run.

    Returns:
        The model's folder, hub name or `smollm2`, and the settings of the run that trained it;
        None: not known.

    Raises:
        InvalidSettingError: no model there; names what to give.
        RunFolderError: the run's settings cannot be read.
    """
    path = expanded(name)
    if not (name and path.is_dir()):
        if name in _FROM_SCRATCH:
            raise InvalidSettingError(
                f"Model {name!r} is trained from scratch in a run; give the folder of that run: "
                f"--agent {LOCAL}."
            )
        if not name or name[0] in "/.~" or name.count("/") > 1:
            raise InvalidSettingError(f"There is no folder {name!r}: --agent {LOCAL}.")
        return name, None
    config = read_json(path / CONFIG_FILE)
    if "model_type" in config:
        run = path.absolute().parent.parent
        if path.absolute().parent.name == "models" and (run / CONFIG_FILE).is_file():
            return str(path), read_config(run)
        return str(path), None
    if set(SECTIONS) <= config.keys():
        for saved in (path / "models" / "best", path / "models" / "last"):
            if (saved / CONFIG_FILE).is_file():
                return find_model(str(saved))
        raise InvalidSettingError(
            f"The run {path} has no models/best or models/last yet; give another folder."
        )
    configs = path.glob(f"*/{CONFIG_FILE}")
    runs = sorted(file.parent.name for file in configs if (file.parent / "models").is_dir())
    if len(runs) == 1:
        return find_model(str(path / runs[0]))
    advice = f"; it has the runs {', '.join(runs)}: give one of them" if runs else ""
    raise InvalidSettingError(
        f"{path} is neither the folder of a run ({CONFIG_FILE}, models/best or models/last) nor "
        f"that of a model ({CONFIG_FILE}, model.safetensors, tokenizer){advice}."
    )


class LocalModel:
    """A local model that plays greedily or sampled, as evaluations in training do.

    `find_model` finds it by its name.

    Attributes:
        trained: settings of the run that trained it; None: not known.
        label: for tables and the names of folders.
        mode: how completions are chosen.

    Raises:
        AtodError: there is no such model.
    """

    def __init__(self, name: str, sampling: Sampling, options: ModelOptions) -> None:
        self._source, self.trained = find_model(name)
        path = Path(self._source).absolute()
        self.label = f"{path.parent.parent.name}/{path.name}" if self.trained else path.name
        self.mode: EvaluationMode = "sampled" if sampling.temperature else "greedy"
        self._sampling = sampling
        self._options = options

    def load(self, env: EnvConfig) -> dict[str, Any]:
        """Load the model, resolve the settings that depend on it, and print a line about them.

        Args:
            env: the prompts that it is going to see.

        Returns:
            What results depend on, as JSON values.

        Raises:
            MissingExtraError: torch or transformers is not installed.
            AtodError: the model cannot be loaded, or a setting does not fit it.
        """
        try:
            import transformers

            from atod_train.models.pretrained import load_policy
        except ImportError as error:
            raise MissingExtraError(
                f"A local model needs {error.name}: pip install 'atod-gym[train]'"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        source, trained = self._source, self.trained
        with memory_errors(f"loading {self.label}", "Use a smaller model."):
            policy = load_policy(source, device=self._options.device or "auto")
        config = trained or RunConfig(model=ModelConfig(max_context=_MAX_CONTEXT))
        context = self._options.max_context or min(config.model.max_context, policy.max_positions)
        if context > policy.max_positions:
            raise InvalidSettingError(
                f"--max-context {context} is more than the {policy.max_positions} positions of "
                f"model {policy.name}. Lower it."
            )
        usual = min(_COMPLETION_TOKENS, max(1, context // 2))
        usual = config.train.max_completion_tokens if trained else usual
        longest = self._sampling.max_tokens or usual
        if longest >= context:
            raise InvalidSettingError(
                f"--max-tokens {longest} leaves no room for a prompt in a context of {context} "
                "tokens. Lower it, or raise --max-context."
            )
        seed, temperature = self._sampling.seed or 0, self._sampling.temperature or 0.0
        print(
            f"atod-eval: model {source}; prompts of "
            f"{'its run' if trained else 'defaults and command line'}: {env.prompt_style} style, "
            f"profile {env.parse_profile}, at most {longest} tokens a completion and {context} a "
            f"sequence, temperature {temperature:g}",
            file=sys.stderr,
        )
        self._policy = policy
        self._config = replace(
            config,
            model=replace(config.model, max_context=context),
            train=replace(config.train, max_completion_tokens=longest, seed=seed),
        )
        return {
            "kind": "model",
            "model": self.label,
            "weights": _digest(Path(source)) if Path(source).is_dir() else source,
            "temperature": temperature,
            "max_completion_tokens": longest,
            "max_context": context,
            "template_options": dict(config.env.template_options),
            **({"seed": seed} if temperature else {}),
        }

    def play(
        self,
        pool: EnvPool,
        task_ids: Sequence[str],
        on_record: Callable[[EpisodeRecord], None],
        *,
        on_turn: Callable[[int], None] | None = None,
        concurrency: int | None = None,
        already: int = 0,
    ) -> None:
        """Play each task once with the loaded model; the arguments are those of `AgentPlayer`.

        A `concurrency` of None is as many episodes as memory holds, at most 128. Sampling draws
        other numbers than earlier sessions did, which have played `already` episodes.

        Raises:
            AtodError: an environment fails, or the tokenizer's chat template cannot be used.
        """
        from atod_train.evaluation.evaluate import play_tasks

        config = replace(self._config, env=replace(pool.config, max_turns=pool.max_turns))
        with memory_errors("playing", "Use a lower --concurrency or --max-context."):
            play_tasks(
                self._policy, pool, config, task_ids,
                temperature=self._sampling.temperature or 0.0, stream=already, at_once=concurrency,
                on_end=lambda trajectory: on_record(_record(trajectory)), on_turn=on_turn,
            )  # fmt: skip


def _record(trajectory: Trajectory) -> EpisodeRecord:
    """Return the record of an episode; prompt tokens are those of each turn's whole prompt."""
    completions: list[Completion] = []
    context = 0
    for turn in trajectory.turns:
        tokens = turn.tokens
        context = len(tokens.prompt_ids) + (context if tokens.extends_previous else 0)
        completions.append(
            Completion(
                turn.completion,
                prompt_tokens=context,
                completion_tokens=len(tokens.completion_ids),
                is_cut=tokens.finish_reason == "length",
                turns_left_out=turn.turns_left_out,
            )
        )
        context += len(tokens.completion_ids)
    does_not_fit = trajectory.stop_reason == "context_limit"
    message = "The prompt does not fit --max-context." if does_not_fit else ""
    return EpisodeRecord.of(trajectory, completions, message)


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
