"""Search-QA as a Gymnasium environment: answer a question after searching in many passages."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from atod_gym.envs.search_qa.expert import ScriptedSearcher
from atod_gym.envs.search_qa.questions import Question
from atod_gym.envs.search_qa.settings import (
    SOURCE,
    Passage,
    Passages,
    SearchQASettings,
    connect_retriever,
    open_questions,
    search,
)
from atod_gym.envs.turn_env import TurnEnv, TurnResult
from atod_gym.errors import InvalidSettingError, ServerError
from atod_gym.scoring import exact_match, f1_score
from atod_gym.serving.connection import ENDED_CODE, ServedConnection, ServedEnv
from atod_gym.types import SearchQAInfo

CUT_MARK: Final = " [...]"
"""Ends a text that has been cut."""
LEFT_OUT: Final = "[...]"
"""Replaces passages that are left out."""
_ACTION: Final = re.compile(r"(search|answer)\s*\[(.*)\]", re.IGNORECASE | re.DOTALL)
_BEFORE, _AFTER = "<information>\n", "\n</information>"

MAX_QUERY_LENGTH = 10_000
"""Queries with more characters are not sent: such an action is malformed."""


class SearchQAEnv(TurnEnv, ServedEnv):
    """Answer a question after searching for passages, in one or several steps.

    Passages come from a retrieval server that all environments of a Python process and its workers
    share. It starts with the first of them and ends with the process. `server_url` names a
    running server instead: ours, or any that answers `POST /retrieve` as Search-R1's does.

    ## Observation
    A Dict (`TurnObservation`): `instruction`, the question; `text`, the passages found, between
    `<information>` and `</information>`; `admissible_actions`, empty, as there is no list of all
    queries and answers; `turn_index`.

    ## Action
    `search[query]` or `answer[text]`; the verb in any case, with or without white space around.
    Any other action is malformed and costs the turn; `info["message"]` gives the reason.
    Completions mark actions with the tags `<search>` and `<answer>`.

    ## Reward
    1.0 for an answer that equals one of the gold answers but for case, punctuation and articles
    (exact match, see `atod_gym.scoring`), else 0.0. `info["f1"]` has the token F1.

    ## End of the episode
    `terminated` by an answer; `truncated` after `max_turns` turns without one. A further step
    raises `gymnasium.error.ResetNeeded`, except after a truncation by `gym.make` alone.

    ## Start
    `reset(seed=...)` picks a task of the split; `reset(options={"task_id": ...})` plays that task.

    ## Info
    See `SearchQAInfo`. `is_action_valid` says whether the action was well-formed.

    ## Arguments
    See `__init__`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        **TurnEnv.metadata,
        # Tags that mark actions in completions, see `atod_gym.parsing`.
        "action_tags": ("search", "answer"),
    }
    example_action = "search[first man on the moon]"
    default_max_turns = 4
    source = SOURCE

    def __init__(
        self,
        split: str = "train",
        data: str | os.PathLike[str] = "auto",
        server_url: str | None = None,
        corpus: str | os.PathLike[str] | None = None,
        topk: int = 3,
        passage_characters: int = 1000,
        observation_characters: int = 4000,
        max_turns: int | None = None,
        task_types: Sequence[str] | str | None = None,
        entities: int = 1000,
        world_seed: int = 0,
        timeout: float = 60.0,
        token: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Read the questions and connect to the server, which is started if none runs.

        Args:
            split: `train`, `dev`, `test`, or names of question files joined with `+`, such as
                `nq/train+hotpotqa/train`; see `atod_gym.envs.search_qa.questions`.
            data: `generated`, `auto` (question files where found, else generated), the path of a
                folder of question files or of one such file, or `official`: the files of published
                runs, which must all be there with their published numbers of rows. `info["data"]`
                is the path in each case but `generated`, as no published hash of all files is
                known. With `server_url`, `auto` plays the generated world if the server has one.
            server_url: a running server, such as `http://127.0.0.1:8000`, with or without
                `/retrieve` at the end; None: start one.
            corpus: file that the started server searches; None: the one next to the questions.
            topk: maximum number of passages of a search.
            passage_characters: longer passages are cut.
            observation_characters: passages that do not fit are cut or left out.
            max_turns: turn limit, at least 1; None: that of `gym.make` (`max_episode_steps`).
            task_types: play only questions of these types (`data_source`; in the generated world
                `one_hop`, `bridge`, `comparison`); a list, or separated by commas.
            entities: size of the generated world.
            world_seed: seed of the generated world.
            timeout: seconds to wait for an answer; a late answer is not requested again.
            token: of the server at `server_url`. It is part of the spec and of pickles; a token in
                the environment variable ATOD_SERVER_TOKEN is not.
            render_mode: `ansi`: `render()` returns the last action and the text after it.

        Raises:
            InvalidSettingError: if an argument is invalid or differs from the server's, or a
                question file that `split` names cannot be read.
            DataNotFoundError: if the data or split is missing; the message names the remedy.
            MissingExtraError: if the packages of the server are not installed.
            ServerError: if the server does not start or answer; names the URL and the command.
        """
        settings = SearchQASettings(
            data=data,
            server_url=server_url,
            corpus=corpus,
            topk=topk,
            passage_characters=passage_characters,
            observation_characters=observation_characters,
            entities=entities,
            world_seed=world_seed,
            timeout=timeout,
            token=token,
        )
        TurnEnv.__init__(self, split, max_turns, render_mode)
        self.topk = topk
        self._limits = (passage_characters, observation_characters)
        self._connection = connect_retriever(settings)
        questions, data_name = open_questions(settings, self._connection, split)
        if not questions.types:
            raise InvalidSettingError(f"Split {split!r} has no question.")
        self._set_tasks(questions.manifest, questions.types, task_types, data_name)
        self._questions = questions.questions
        self._question: Question
        self._progress: SearchQAInfo = {}

    def expert(self) -> ScriptedSearcher:
        """Return a scripted searcher that acts on the observations, for any episode."""
        return ScriptedSearcher(self.max_turns)

    def demonstrator(self) -> ScriptedSearcher:
        """Return an expert for this episode only; with question files it has the gold answers.

        Without question files it can only guess: it parses generated wordings only.

        Raises:
            gymnasium.error.ResetNeeded: before `reset`.
        """
        self._check_playing()
        golden = () if self.data == "generated" else self._question.golden_answers
        return ScriptedSearcher(self.max_turns, golden)

    def _open(self, task_id: str) -> tuple[str, TurnResult]:
        self._question = self._questions[task_id]
        self._progress = {"f1": 0.0, "answer": "", "query": "", "retrieved": (), "searches": 0}
        text = "Find out by searching, then give a short answer."
        return self._question.question, TurnResult(text, (), 0.0, terminated=False)

    def _play(self, action: str) -> TurnResult:
        return self._play_many([self], [action])[0]

    @classmethod
    def _play_many(cls, envs: Sequence[SearchQAEnv], actions: Sequence[str]) -> list[TurnResult]:
        """Execute an action in each environment; one request per server for all searches.

        Raises:
            ServerError: if a server fails; no environment is changed.
        """
        parsed = [parse_action(action) for action in actions]
        together: dict[tuple[ServedConnection, int], dict[int, str]] = {}
        for row, (env, (verb, query)) in enumerate(zip(envs, parsed, strict=True)):
            if verb == "search":
                env._renew()
                together.setdefault((env._connection, env.topk), {})[row] = query
        found: dict[int, Passages] = {}
        for (connection, topk), queries in together.items():
            try:
                results = search(connection, [*queries.values()], topk)
            except ServerError as error:
                if error.code != ENDED_CODE:
                    raise
                # A server that this package starts again can repeat searches.
                for row in queries:
                    envs[row]._renew()
                results = search(connection.replacement(), [*queries.values()], topk)
            found.update(zip(queries, results, strict=True))
        return [
            env._turn(verb, argument, found.get(row, ()))
            for row, (env, (verb, argument)) in enumerate(zip(envs, parsed, strict=True))
        ]

    def _turn(self, verb: str, argument: str, passages: Passages) -> TurnResult:
        progress = self._progress
        progress["query"], progress["retrieved"] = "", ()
        if verb == "search":
            text, progress["retrieved"] = information(passages, *self._limits)
            progress["query"] = argument
            progress["searches"] += 1
            return TurnResult(text, (), 0.0, terminated=False)
        if verb == "answer":
            golden = self._question.golden_answers
            progress["answer"] = argument
            progress["f1"] = f1_score(argument, golden)
            score = float(exact_match(argument, golden))
            return TurnResult(f"Your answer was taken: {argument}", (), score, terminated=True)
        text = "This is no action. Write search[..] or answer[..]."
        return TurnResult(text, (), 0.0, False, is_action_valid=False, message=argument)

    def _own_info(self) -> dict[str, Any]:
        info = dict(self._progress)
        info["retriever"] = str(self._connection.health.get("retriever", "unknown"))
        if self._over:
            info["golden_answers"] = self._question.golden_answers
        return info


def parse_action(action: str) -> tuple[str, str]:
    """Return verb and argument of an action; malformed: an empty verb and the reason."""
    match = _ACTION.fullmatch(action.strip())
    if match is None:
        return "", f"An action is search[..] or answer[..], not {action[:60]!r}."
    verb, argument = match[1].lower(), match[2].strip()
    if not argument:
        return "", f"The brackets of {verb}[..] are empty."
    if verb == "search" and len(argument) > MAX_QUERY_LENGTH:
        return "", f"A query has at most {MAX_QUERY_LENGTH:,} characters, not {len(argument):,}."
    return verb, argument


def information(
    passages: Sequence[Passage], passage_characters: int, observation_characters: int
) -> tuple[str, tuple[str, ...]]:
    """Return the text that shows the passages of a search, and the ids of those in it.

    Args:
        passages: the best first.
        passage_characters: maximum length of a passage's text, and of its title.
        observation_characters: maximum length of the whole text.

    Returns:
        The text, in which `CUT_MARK` and `LEFT_OUT` mark what is cut or left out, and the ids.
    """
    if not passages:
        return f"{_BEFORE}No passage matches this query.{_AFTER}", ()
    left = observation_characters - len(_BEFORE) - len(_AFTER)
    lines: list[str] = []
    shown: list[str] = []
    for number, passage in enumerate(passages, 1):
        head = f"Doc {number} (Title: {_cut(passage.title, passage_characters)})"
        # The mark for the passages after this one must still fit.
        room = left - (len(LEFT_OUT) + 1 if number < len(passages) else 0)
        line = _cut(f"{head} {_cut(passage.text, passage_characters)}".rstrip(), room)
        if not line.startswith(head):
            lines.append(LEFT_OUT)
            break
        lines.append(line)
        shown.append(passage.passage_id)
        left -= len(line) + 1
    return f"{_BEFORE}{chr(10).join(lines)}{_AFTER}", tuple(shown)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: max(0, most - len(CUT_MARK))].rstrip()}{CUT_MARK}"
