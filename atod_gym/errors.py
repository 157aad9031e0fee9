"""Errors that say what to do; every error of this package derives from `AtodError`."""

from __future__ import annotations


class AtodError(Exception):
    """Base of all intended errors: the message says what is wrong and what to do."""


class InvalidSettingError(AtodError, ValueError):
    """An invalid keyword, option or file of the user; the message names the valid ones."""


class DataNotFoundError(AtodError):
    """The requested data is missing; the message names the command or setting that helps."""


class DownloadError(AtodError):
    """A file cannot be downloaded or is not the expected one; no wrong file was stored."""


class TaskNotFoundError(AtodError, KeyError):
    """An unknown task id of the chosen split."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidGameError(AtodError):
    """A game file that cannot be read: not JSON, a missing key, a broken PDDL or grammar text."""


class UnsupportedGameError(AtodError):
    """A well-formed game whose domain or grammar the native engine does not support."""


class MissingExtraError(AtodError, ImportError):
    """An optional package is needed; the message names the extra to install."""


class ServerError(AtodError):
    """A server cannot be reached, or its answer is an error or malformed.

    The message names the URL and the command to run.
    """

    def __init__(
        self, message: str, *, status: int = 0, code: str = "", retry_after: float = 0.0
    ) -> None:
        """Keep the HTTP status (0: no answer came) and the server's own error code.

        The code is `timeout` if the server accepts connections but does not answer in time.
        `retry_after` is the number of seconds that the server asks to wait, else 0.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
