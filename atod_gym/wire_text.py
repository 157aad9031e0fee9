"""What is done to texts before they leave the process."""

from __future__ import annotations


def encodable(text: str) -> str:
    """The text with `?` for lone surrogates, which UTF-8, and so most libraries, cannot carry."""
    return text.encode("utf-8", "replace").decode("utf-8")
