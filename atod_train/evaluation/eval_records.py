"""Records of episodes and the folder of an evaluation, which can be resumed.

settings.json   what results depend on, and the sessions: each time that the program ran
episodes.jsonl  one `EpisodeRecord` per episode, written as soon as it has ended
result.json     the `EvaluationResult` and totals, written at the end
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import EMPTY_REPLY
from atod_train.evaluation.agents import Completion
from atod_train.files import (
    end_last_line,
    locked,
    read_json,
    read_json_lines,
    without_infinities,
    write_json,
)
from atod_train.records import Trajectory, Turn
from atod_train.reports.evaluations import EvaluationMode, EvaluationResult, TaskResult, task_result
from atod_train.reports.run_folder import (
    PACKAGES,
    RunFolderError,
    package_versions,
    without_passwords,
)

SETTINGS_FILE = "settings.json"
EPISODES_FILE = "episodes.jsonl"
RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True)
class EpisodeRecord(TaskResult):
    """The result of one episode; counts of tokens are None where they are unknown."""

    actions: tuple[tuple[str, int], ...]
    """(verb, how often it was used in a valid action), sorted."""
    stop_reason: str
    stop_message: str
    """Why the agent could not continue the episode; empty if it ended in the usual way."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """Including those of the reasoning."""
    reasoning_tokens: int | None
    cut_completions: int
    """Completions that reached the token limit."""
    turns_left_out: int
    """Past turns that prompts left out, because they would not fit, summed over prompts."""
    transcript: tuple[dict[str, Any], ...] = ()
    invalid_reasons: dict[str, int] = field(default_factory=dict)
    """Why turns were not valid, and how many; records of version 0.1 have none."""

    @classmethod
    def of(
        cls, episode: Trajectory, completions: Sequence[Completion], stop_message: str = ""
    ) -> EpisodeRecord:
        """Record an episode with one completion for each of its turns."""
        reasons = Counter(
            _empty_reply(completion) or turn.invalid_reason
            for turn, completion in zip(episode.turns, completions, strict=True)
            if not turn.is_action_valid
        )
        return cls(
            **asdict(task_result(episode)),
            invalid_reasons=dict(sorted(reasons.items())),
            actions=tuple(sorted(episode.verbs.items())),
            stop_reason=episode.stop_reason,
            stop_message=stop_message,
            **_token_sums(completions),
            cut_completions=sum(completion.is_cut for completion in completions),
            turns_left_out=sum(completion.turns_left_out for completion in completions),
            transcript=tuple(map(_transcribed, episode.turns, completions)),
        )


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation and sums over its episodes; None: not known."""

    env_id: str
    agent: str
    data_hash: str
    result: EvaluationResult
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    cost: float | None
    """In the unit of the prices; 0 where no tokens were taken; None without prices."""
    seconds: float
    """Wall time while episodes were played, over all sessions."""
    cut_completions: int
    stop_reasons: dict[str, int]
    settings: dict[str, Any]
    """What results depend on, as JSON values."""
    invalid_reasons: dict[str, int] = field(default_factory=dict)
    """Why turns were not valid, and how many, the most frequent reason first."""

    @property
    def token_limit(self) -> int | None:
        """Limit of a completion; None: the agent has none, or the endpoint's own."""
        agent = self.settings["agent"]
        return agent.get("max_tokens") or agent.get("max_completion_tokens")


class EvaluationFolder:
    """Write an evaluation episode by episode.

    Args:
        path: the folder; `begin` creates it where it does not exist.
        resume: continue with the episodes that it holds.
        transcripts: keep prompts and completions.

    Attributes:
        records: of all episodes, those of earlier sessions too; without transcripts.

    Raises:
        InvalidSettingError: the folder holds episodes and `resume` is off.
        FileError: a file cannot be read.
    """

    def __init__(self, path: Path, *, resume: bool, transcripts: bool = False) -> None:
        self.path = path
        self._lock = ExitStack()
        self._is_resumed, self._keeps_transcripts = resume, transcripts
        self._read()  # a folder that cannot be used is refused before models are loaded

    def _read(self) -> None:
        """Read the settings and episodes of earlier sessions."""
        path = self.path
        self._before = read_json(path / SETTINGS_FILE) if self._is_resumed else {}
        lines = list(read_json_lines(path / EPISODES_FILE))
        if lines and not self._is_resumed:
            raise InvalidSettingError(
                f"{path} holds {len(lines)} episodes already: continue with --resume, or choose "
                "another folder with --out."
            )
        if lines and not self._before:
            raise RunFolderError(
                f"{path} has episodes but no {SETTINGS_FILE}; choose another --out"
            )
        names = {part.name for part in fields(EpisodeRecord)} - {"transcript"}
        try:
            self.records = [
                EpisodeRecord(**{name: value for name, value in line.items() if name in names})
                for line in lines
            ]
            self._seconds = max((float(line.get("at", 0)) for line in lines), default=0.0)
        except (TypeError, ValueError) as error:
            raise RunFolderError(
                f"{path / EPISODES_FILE} is not of this version: {error}"
            ) from error

    def begin(self, settings: Mapping[str, Any], arguments: Sequence[str]) -> None:
        """Lock the folder until `close`, and begin a session after those that it holds by then.

        Args:
            settings: what results depend on, as JSON values.
            arguments: the command line.

        Raises:
            InvalidSettingError: the episodes of the folder were played with other settings.
            FileError: the folder cannot be written to, or another process writes to it.
        """
        self._settings: dict[str, Any] = without_infinities(settings)
        session = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": package_versions((*PACKAGES, "openai")),
            "arguments": without_passwords(arguments),
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.path, "choose another folder with --out"))
            self._read()
            before = self._before.get("settings", {}) if self.records else self._settings
            for name, old, new in differing_settings(before, self._settings):
                raise InvalidSettingError(
                    f"{self.path} was played with {name} {old}, not {new}; give the same settings "
                    "to continue, or choose another folder with --out."
                )
            self._sessions = [*self._before.get("sessions", ()), session]
            write_json(
                self.path / SETTINGS_FILE, {"settings": self._settings, "sessions": self._sessions}
            )
            end_last_line(self.path / EPISODES_FILE)
            # The result of an earlier session does not cover the episodes of this one.
            (self.path / RESULT_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(f"Cannot write to {self.path}: {error}") from error
        self._began = time.monotonic() - self._seconds

    def add(self, record: EpisodeRecord) -> None:
        """Append an episode that has just ended."""
        self._seconds = round(time.monotonic() - self._began, 3)
        line = {**asdict(record), "session": len(self._sessions), "at": self._seconds}
        if not self._keeps_transcripts:
            del line["transcript"]
        text = json.dumps(without_infinities(line), ensure_ascii=False)
        path = self.path / EPISODES_FILE
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
        self.records.append(replace(record, transcript=()))

    def finish(
        self,
        *,
        agent: str,
        mode: EvaluationMode,
        task_ids: Sequence[str],
        prices: tuple[float, float] | None,
    ) -> Evaluated:
        """Write the result of tasks that have all been played.

        Args:
            agent: for tables.
            mode: how completions were chosen.
            task_ids: the tasks, in the order of the result.
            prices: of a million tokens of prompts and of completions; None: not known.

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
        settings = self._settings
        result = EvaluationResult.from_json(
            {**settings, "mode": mode, "tasks": [asdict(record) for record in records]}
        )
        value = {
            "env_id": settings["env_id"],
            "agent": agent,
            "data_hash": settings["data_hash"],
            "mean_score": result.mean_score,
            "mean_turns": result.mean_turns,
            "invalid_share": result.invalid_share,
            "totals": _totals(records, self._seconds, prices),
            "prices": prices,
            "settings": settings,
            "sessions": self._sessions,
            **result.to_json(),
        }
        write_json(self.path / RESULT_FILE, value)
        return read_evaluated(self.path)

    def close(self) -> None:
        """Let other processes continue the evaluation."""
        self._lock.close()


def read_evaluated(path: Path) -> Evaluated:
    """Read the result of an evaluation's folder.

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
        names = {name: value[name] for name in ("env_id", "agent", "data_hash", "settings")}
        return Evaluated(**names, result=result, **value["totals"])
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path / RESULT_FILE} is not of this version: {error}") from error


def _totals(
    records: Sequence[EpisodeRecord], seconds: float, prices: tuple[float, float] | None
) -> dict[str, Any]:
    counts = _token_sums(records)
    asked, said = counts["prompt_tokens"], counts["completion_tokens"]
    cost = 0.0 if asked == 0 and said == 0 else None
    if prices is not None and asked is not None and said is not None:
        cost = (asked * prices[0] + said * prices[1]) / 1e6
    reasons = sum((Counter(record.invalid_reasons) for record in records), Counter[str]())
    return {
        **counts,
        "cost": cost,
        "seconds": seconds,
        "cut_completions": sum(record.cut_completions for record in records),
        "stop_reasons": dict(sorted(Counter(record.stop_reason for record in records).items())),
        "invalid_reasons": dict(reasons.most_common()),
    }


def _token_sums(parts: Sequence[Completion | EpisodeRecord]) -> dict[str, Any]:
    """Sum each count of tokens; a sum with an unknown part is unknown."""
    sums: dict[str, int | None] = {}
    for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens"):
        values = [getattr(part, name) for part in parts]
        sums[name] = None if None in values else sum(values)
    return sums


def _empty_reply(said: Completion) -> str:
    """Name what an agent answered instead of a text; empty if it gave one."""
    if said.instead:
        return f"{EMPTY_REPLY} ({said.instead})"
    return "" if said.text.strip() else EMPTY_REPLY


def _transcribed(turn: Turn, completion: Completion) -> dict[str, Any]:
    is_parsed = turn.invalid_reason in ("", "not admissible")
    return {
        "messages": [asdict(message) for message in turn.prompt],
        "completion": turn.completion,
        "reasoning": completion.reasoning,
        "action": turn.action,
        "is_action_valid": turn.is_action_valid,
        "parse_error": "" if is_parsed else turn.invalid_reason,
    }


def differing_settings(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the name and both values of each setting that differs, as short JSON."""
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differing_settings(a, b)
        elif a != b:
            yield name, _short(a), _short(b)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
