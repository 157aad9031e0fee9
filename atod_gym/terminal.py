"""Prepare the standard streams of a command for any text, and for readers that leave."""

from __future__ import annotations

import os
import sys


def accept_any_text() -> None:
    """Accept any bytes as input, and escape what the terminal cannot show."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        # A stream that something else has taken the place of may lack the method.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)


def flush_output() -> None:
    """Flush standard output; discard it if its reader has gone, as `head` does.

    Otherwise the interpreter would report an error at exit. A command calls it last, in any case,
    and ends with status 0 where a BrokenPipeError ended it before.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
