"""Declare options of a command line once, as fields of a dataclass.

The field's name defines the flag, its annotation the type, `option` the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from env_servers.caches import expanded

_T = TypeVar("_T")


def option(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare a field with its default and its help text.

    A default of () means that the flag may be repeated. `least` and `most` limit numbers on the
    command line.
    """
    metadata = {"help": text, "metavar": metavar, "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Options of every server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on; 0 picks a free one", least=0, most=65535)
    max_body: int = option(1_000_000, "maximum size of a request", metavar="BYTES", least=1_000_000)
    token_env: str | None = option(
        None,
        "environment variable with a token that every request must carry (Authorization: Bearer,"
        " or as a password in the browser)",
        metavar="NAME",
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "further host name that the server accepts without a token (IP addresses,"
        " localhost and the machine's own name always work; *: every name), or name of the site"
        " whose proxy passes requests on; may be repeated",
        metavar="NAME",
    )
    parent: int | None = option(None, "exit when this process has ended", metavar="PID", least=1)


def add_options(command: argparse.ArgumentParser, *kinds: type, **defaults: Any) -> None:
    """Add a flag for each field of dataclasses; `defaults` replace those of the fields."""
    for kind in kinds:
        hints = get_type_hints(kind)
        for entry in fields(kind):
            given, hint = entry.metadata, hints[entry.name]
            about: dict[str, Any] = {"default": defaults.get(entry.name, entry.default)}
            if hint is bool:
                about = {"action": "store_true"}
            elif about["default"] == ():
                about = {"action": "append", "default": [], "metavar": given["metavar"]}
            else:
                read = _reader(hint, given["least"], given["most"])
                about |= {"type": read, "metavar": given["metavar"]}
            flag = f"--{entry.name.replace('_', '-')}"
            command.add_argument(flag, help=given["help"], **about)


def read_options(kind: type[_T], arguments: argparse.Namespace) -> _T:
    """Make a dataclass from the parsed arguments of its flags."""
    return kind(**{entry.name: getattr(arguments, entry.name) for entry in fields(kind)})  # type: ignore[arg-type]


def _path(text: str) -> Path:
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _reader(hint: Any, least: float | None, most: float | None) -> Callable[[str], Any]:
    """Return a function that reads a value of a type; argparse shows its name in errors."""
    hint = next((kind for kind in (int, float, Path, str) if hint in (kind, kind | None)), hint)
    if hint is Path:
        return _path
    if hint not in (int, float):
        return str

    def read(text: str) -> Any:
        number = hint(text)
        # Written so that NaN is refused, too.
        if least is not None and not number >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least:,}")
        if most is not None and not number <= most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}")
        return number

    read.__name__ = "whole number" if hint is int else "number"
    return read
