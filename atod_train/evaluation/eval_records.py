"""The folder of an evaluation: records of episodes, resuming, and the result.

settings.json   what results depend on, and each time that the program ran
episodes.jsonl  one `EpisodeRecord` per episode, written as soon as it has ended
result.json     the `EvaluationResult` and totals, written at the end
"""

from __future__ import annotations

import json
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.files import (
    end_last_line,
    read_json,
    read_json_lines,
    without_infinities,
    write_json,
)
from atod_train.reports.evaluations import EvaluationMode, EvaluationResult, TaskResult
from atod_train.reports.run_folder import (
    RunFolderError,
    package_versions,
)

SETTINGS_FILE = "settings.json"
EPISODES_FILE = "episodes.jsonl"
RESULT_FILE = "result.json"
_PACKAGES = ("atod-gym", "gymnasium", "numpy", "openai")
TOKEN_COUNTS = ("prompt_tokens", "completion_tokens", "reasoning_tokens")


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """How one episode went; counts of tokens are None where they are not known."""

    task_id: str
    task_type: str
    success: bool
    score: float
    turns: int
    invalid_turns: int
    actions: tuple[tuple[str, int], ...]
    """(verb, how often it was used in a valid action), sorted."""
    stop_reason: str
    """`terminated`, `turn_limit`, `context_limit` (the prompt was too long) or `refused`."""
    stop_message: str
    """What the endpoint said in the last two cases."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """With those of the reasoning."""
    reasoning_tokens: int | None
    cut_completions: int
    """Completions that reached the limit of tokens."""
    turns_left_out: int
    """Past turns that prompts left out for want of room, summed over prompts."""
    seconds: float
    transcript: tuple[dict[str, Any], ...] = ()
    invalid_reasons: dict[str, int] = field(default_factory=dict)
    """Why turns were not valid, and how many; records of version 0.1 have none."""

    def task_result(self) -> TaskResult:
        """What tables and intervals are made of."""
        names = [part.name for part in fields(TaskResult)]
        return TaskResult(**{name: getattr(self, name) for name in names})

    def to_json(self) -> dict[str, Any]:
        """As JSON values; without a transcript that is not there."""
        record = asdict(self)
        if not self.transcript:
            del record["transcript"]
        return record


@dataclass(frozen=True)
class Totals:
    """What all episodes took together; None: not known."""

    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    cost: float | None
    """In the unit of the prices; None without prices, unless no tokens were taken."""
    seconds: float
    """Wall time while episodes were played, over all times that the program ran."""
    cut_completions: int
    stop_reasons: dict[str, int]
    invalid_reasons: dict[str, int] = field(default_factory=dict)
    """Why turns were not valid, and how many, the most frequent reason first."""

    @classmethod
    def of(
        cls,
        records: Sequence[EpisodeRecord],
        seconds: float,
        prices: tuple[float, float] | None,
    ) -> Totals:
        """The totals of episodes.

        Args:
            records: the episodes.
            seconds: wall time.
            prices: of a million tokens of prompts and of completions.
        """
        counts: dict[str, int | None] = {}
        for name in TOKEN_COUNTS:
            values = [getattr(record, name) for record in records]
            counts[name] = None if None in values else sum(values)
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record.invalid_reasons)
        asked, said = counts["prompt_tokens"], counts["completion_tokens"]
        cost = 0.0 if asked == 0 and said == 0 else None
        if prices is not None and asked is not None and said is not None:
            cost = (asked * prices[0] + said * prices[1]) / 1e6
        return cls(
            **counts,
            cost=cost,
            seconds=seconds,
            cut_completions=sum(record.cut_completions for record in records),
            stop_reasons=dict(sorted(Counter(r.stop_reason for r in records).items())),
            invalid_reasons=dict(reasons.most_common()),
        )


@dataclass(frozen=True)
class Evaluated:
    """A result with what it is the result of."""

    env_id: str
    agent: str
    data_hash: str
    result: EvaluationResult
    totals: Totals


class EvaluationFolder:
    """Write an evaluation episode by episode.

    Args:
        path: the folder; it is made if need be.
        settings: what results depend on, as JSON values.
        resume: continue with the episodes that are there.
        about: further facts of this time, such as the URL of an endpoint.

    Raises:
        InvalidSettingError: episodes are there and `resume` is off, or they were played with other
            settings.
        RunFolderError: a file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(without_infinities(settings)))
        before = read_json(path / SETTINGS_FILE)
        if before and resume:
            _check_same(before.get("settings", {}), self.settings, path)
        lines = list(read_json_lines(path / EPISODES_FILE))
        if lines and not resume:
            raise InvalidSettingError(
                f"{path} holds {len(lines)} episodes already: continue with --resume, or choose "
                "another folder with --out."
            )
        if lines and not before:
            raise RunFolderError(
                f"{path} has episodes but no {SETTINGS_FILE}; choose another --out"
            )
        self.records = [_record(line, path) for line in lines]
        self._earlier = _seconds_by_session(lines)
        self._sessions: list[Any] = list(before.get("sessions", ())) if resume else []
        self._sessions.append(
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "packages": package_versions(_PACKAGES),
                **(about or {}),
            }
        )
        self._write_settings()
        self._seconds = 0.0

    def add(self, record: EpisodeRecord, seconds: float) -> None:
        """Append an episode that ended some seconds after the start of this session."""
        self._seconds = round(seconds, 3)
        line = {**record.to_json(), "session": len(self._sessions), "at": self._seconds}
        text = json.dumps(without_infinities(line), ensure_ascii=False)
        with (self.path / EPISODES_FILE).open(
            "a", encoding="utf-8", errors="backslashreplace"
        ) as f:
            f.write(text + "\n")
        self.records.append(record)

    def finish(
        self,
        *,
        agent: str,
        mode: EvaluationMode,
        task_ids: Sequence[str],
        prices: tuple[float, float] | None,
    ) -> Evaluated:
        """Writes the result of tasks that have all been played.

        Raises:
            AtodError: no episode had a single turn, so that there is nothing to evaluate.
        """
        by_task = {record.task_id: record for record in self.records}
        records = [by_task[task_id] for task_id in task_ids]
        if not any(record.turns for record in records):
            raise AtodError(
                f"No first prompt got an answer ({records[0].stop_message}) Choose a model with a "
                "longer context, a smaller --max-tokens or shorter prompts (--hide-admissible); "
                f"{self.path} holds nothing else."
            )
        settings = self.settings
        result = EvaluationResult(
            split=settings["split"],
            data=settings["data"],
            mode=mode,
            tasks=tuple(record.task_result() for record in records),
        )
        seconds = round(sum(self._earlier.values()) + self._seconds, 3)
        totals = Totals.of(records, seconds, prices)
        evaluated = Evaluated(settings["env_id"], agent, settings["data_hash"], result, totals)
        value = {
            "env_id": evaluated.env_id,
            "agent": agent,
            "data_hash": evaluated.data_hash,
            "mean_score": result.mean_score,
            "mean_turns": result.mean_turns,
            "invalid_share": result.invalid_share,
            "totals": asdict(totals),
            "prices": prices,
            "settings": settings,
            "sessions": self._sessions,
            **result.to_json(),
        }
        write_json(self.path / RESULT_FILE, value)
        return evaluated

    def _write_settings(self) -> None:
        try:
            write_json(
                self.path / SETTINGS_FILE, {"settings": self.settings, "sessions": self._sessions}
            )
            end_last_line(self.path / EPISODES_FILE)
            # An earlier result does not hold for the episodes that are played now.
            (self.path / RESULT_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(f"Cannot write to {self.path}: {error}") from error


def read_evaluated(path: Path) -> Evaluated:
    """Reads the result of an evaluation's folder.

    Raises:
        RunFolderError: there is none.
        InvalidCountsError: it is no record of an evaluation.
    """
    value = read_json(path / RESULT_FILE)
    if not value:
        raise RunFolderError(
            f"{path} has no {RESULT_FILE}: it is no folder of an evaluation, or one that was "
            "stopped, which --resume finishes"
        )
    result = EvaluationResult.from_json(value)
    try:
        totals = Totals(**value["totals"])
        return Evaluated(value["env_id"], value["agent"], value["data_hash"], result, totals)
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path / RESULT_FILE} is not of this version: {error}") from error


def command_to_resume(arguments: Sequence[str]) -> str:
    """Return the command that continues an evaluation."""
    chosen = [argument for argument in arguments if argument != "--resume"]
    return shlex.join(["atod-eval", *chosen, "--resume"])


def _record(line: Mapping[str, Any], path: Path) -> EpisodeRecord:
    names = {part.name for part in fields(EpisodeRecord)}
    chosen = {name: value for name, value in line.items() if name in names}
    try:
        actions = tuple((str(verb), int(count)) for verb, count in chosen["actions"])
        return EpisodeRecord(**{**chosen, "actions": actions})
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path / EPISODES_FILE} is not of this version: {error}") from error


def _seconds_by_session(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    seconds: dict[int, float] = {}
    for line in lines:
        session = int(line.get("session", 1))
        seconds[session] = max(seconds.get(session, 0.0), float(line.get("at", 0.0)))
    return seconds


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raises `InvalidSettingError` where results of both would not belong together."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _check_same(old, new, path)
        elif old != new:
            raise InvalidSettingError(
                f"{path} was played with {name} {_short(old)}, not {_short(new)}; give the same "
                "settings to continue, or choose another folder with --out."
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
