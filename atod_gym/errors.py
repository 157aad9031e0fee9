"""Errors that tell the user what to do; every error of this package derives from `AtodError`."""

from __future__ import annotations


class AtodError(Exception):
    """Base of all errors raised on purpose: its message says what is wrong and what to do."""


class InvalidSettingError(AtodError, ValueError):
    """A keyword, option or file of the user that has no meaning; the message names what has."""


class DataNotFoundError(AtodError):
    """The data asked for is not there; the message names the command or setting that helps."""


class DownloadError(AtodError):
    """A file cannot be fetched or is not what it should be; nothing wrong was put in its place."""


class TaskNotFoundError(AtodError, KeyError):
    """A task id that the chosen split does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidGameError(AtodError):
    """A game file that cannot be read: not JSON, a missing key, a broken PDDL or grammar text."""


class UnsupportedGameError(AtodError):
    """A well-formed game whose domain or grammar the native engine does not understand."""


class MissingExtraError(AtodError, ImportError):
    """An optional package is needed; the message names the extra to install."""


class ServerError(AtodError):
    """A server cannot be reached, or its answer is an error or makes no sense.

    The message names the URL and the command to run.
    """

    def __init__(
        self, message: str, *, status: int = 0, code: str = "", retry_after: float = 0.0
    ) -> None:
        """Keep the HTTP status (0: no answer came) and the server's own error code.

        The code is `timeout` if the server accepts connections and does not answer in time.
        `retry_after` is the number of seconds that the server asks to wait, 0 if it does not.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
