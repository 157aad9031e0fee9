"""Which questions are played and what is searched: the settings, and where the data lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atod_gym.data import announce_once, data_folders
from atod_gym.envs.search_qa_questions import (
    OFFICIAL_FILES,
    find_question_files,
    is_corpus,
    is_official,
)
from atod_gym.errors import DataNotFoundError, InvalidSettingError

HOW_TO_GET_DATA = (
    "run atod-data get searchqa searchqa-corpus, or put question files such as nq/test.jsonl of "
    "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets and a corpus, as JSON lines, such "
    "as wiki-18.jsonl of https://huggingface.co/datasets/PeterJinGo/wiki-18-corpus into "
    "~/.cache/searchqa, or name their folder in the environment variable SEARCHQA_DATA"
)
_CORPUS_FORMAT = "JSON lines with id and contents (or title and text), plain, .gz or .xz"


@dataclass(frozen=True, slots=True)
class SearchChoice:
    """Which questions are played, and where is searched; checked when made."""

    data: str = "auto"
    server_url: str | None = None
    corpus: str | None = None
    entities: int = 1000
    world_seed: int = 0
    timeout: float = 60.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.data, str) or not self.data:
            raise InvalidSettingError(
                f"data must be auto, official, generated or a path, not {self.data!r}."
            )
        for name, least in (("entities", 1), ("world_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidSettingError(f"{name} must be an integer >= {least}, not {value!r}.")
        if self.token is not None and not isinstance(self.token, str):
            raise InvalidSettingError("token must be a str or None.")
        if self.corpus is not None and self.server_url is not None:
            raise InvalidSettingError(
                "Give corpus or server_url, not both: a running server has its own corpus."
            )
        if self.corpus is not None and self.data == "generated":
            raise InvalidSettingError(
                'data="generated" brings its own passages; give corpus with question files only.'
            )

    def folder(self) -> Path | None:
        """The folder of the question files; None: the questions of the generated world.

        Raises:
            DataNotFoundError: if there is no data; says how to get it.
        """
        if self.data == "generated":
            return None
        if self.data not in ("auto", "official"):
            found = _place(Path(self.data).expanduser())
            if found is None:
                raise DataNotFoundError(
                    f"No questions in {self.data!r}: expected auto, official, generated, or a "
                    "folder with <set>.jsonl or <set>/<part>.jsonl (plain, .gz or .xz)."
                )
            return found
        found = official_folder()
        if found is None and self.data == "official":
            raise DataNotFoundError(
                f"No question files found (looked in {', '.join(map(str, _folders()))}). To get "
                f'some: {HOW_TO_GET_DATA}. data="generated" needs no download.'
            )
        if found is not None and self.data == "official" and not is_official(found):
            missing = sorted(OFFICIAL_FILES - {file.name for file in find_question_files(found)})
            raise DataNotFoundError(
                f"The question files in {found} are not all of the official ones, "
                f"{missing[0]}.jsonl for example is not there: to play those that "
                "are, give their folder as data. To "
                f"get the others: {HOW_TO_GET_DATA}."
            )
        if found is None and self.corpus is not None:
            raise DataNotFoundError(
                f"A corpus is given, but no question files are found: {HOW_TO_GET_DATA}."
            )
        return found

    def server_arguments(self) -> tuple[str, ...]:
        """The command line of a server for these settings, without the program.

        Raises:
            DataNotFoundError: if questions or corpus are not there; says how to get them.
        """
        folder = self.folder()
        if folder is not None:
            return ("--corpus", str(self._find_corpus(folder)))
        if self.data == "auto":
            announce_once(
                'Search-QA: no question files found, so data="auto" plays a generated world. For '
                f"real questions: {HOW_TO_GET_DATA}."
            )
        return ("--entities", str(self.entities), "--world-seed", str(self.world_seed))

    def check_world(self, url: str, health: Mapping[str, object]) -> None:
        """Checks that the generated world of a server is the one that was chosen.

        Args:
            url: the server's, for the message.
            health: what it says about itself.

        Raises:
            InvalidSettingError: names the first difference.
        """
        for name in ("entities", "world_seed"):
            if health.get(name) != getattr(self, name):
                raise InvalidSettingError(
                    f"The server at {url} has {name}={health.get(name)!r}, but "
                    f"{name}={getattr(self, name)!r} was asked for. Change the setting, or start "
                    "the server with it."
                )

    def _find_corpus(self, folder: Path) -> Path:
        if self.corpus is not None:
            path = Path(self.corpus).expanduser()
            if not path.is_file():
                raise DataNotFoundError(
                    f"No corpus {self.corpus!r}: expected a file of {_CORPUS_FORMAT}."
                )
            return path.resolve()
        found = sorted(path for path in folder.iterdir() if is_corpus(path.name))
        if not found:
            raise DataNotFoundError(
                f"No corpus beside the questions in {folder}: put corpus.jsonl there "
                f"({_CORPUS_FORMAT}), or give its path as corpus=... or a running server as "
                f'server_url=... To get one: {HOW_TO_GET_DATA}. data="generated" needs none.'
            )
        return found[0].resolve()


def official_folder() -> Path | None:
    """Where question files are found; None: nowhere."""
    return next((place for folder in _folders() if (place := _place(folder))), None)


def _folders() -> tuple[Path, ...]:
    return data_folders("searchqa", ("SEARCHQA_DATA",))


def _place(folder: Path) -> Path | None:
    return next((f for f in (folder / "searchqa", folder) if find_question_files(f)), None)
