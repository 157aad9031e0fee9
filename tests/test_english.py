"""Hold the texts of the project to plain English: phrases that are not used anywhere in it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("atod_gym", "env_servers", "atod_train", "tests")
EXCLUDED = ("tests/test_english.py",)
PATHS = [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
TEXTS = [
    name
    for path in PATHS
    if path.suffix in (".py", ".html", ".j2", ".md", ".toml")
    and (name := str(path.relative_to(ROOT))) not in EXCLUDED
]

# Phrase -> plain words for it.
PHRASES = {
    r"told apart": "indistinguishable, not significantly different, distinguished",
    r"(go|goes|going|went) on": "continue",
    r"nobody": "no user, no process, ..: name it",
    r"somebody": "a user, another process, ..: name it",
    r"whoever": "the process that, the user who, ..",
    r"what is said": "the message, the text, ..",
    r"so many": "this number of, that many",
    r"beside (it|them|each other)": "next to",
    r"(is|are|was|were) (not )?told": "receives, is given, is shown, ..",
    r"(was|were) asked for": "was requested",
    r"asked for again": "requested again",
    r"(is|are|was|were) not there": "is missing, does not exist",
    r"that (is|are) there": "that exists, that is present",
    r"one of our own": "the one that this package starts, makes, ..",
    r"has no meaning": "is invalid",
    r"needed no more": "not needed any more",
    r"of the way (between|from|to)": "say what is interpolated",
    r"anew": "again",
    r"for good measure": "say by how much and why",
    r"likeliest": "most likely",
    r"strangers?": "unknown, external, ..",
}
SPACES = re.compile(r"[\s_#]+")
ANY_PHRASE = re.compile(rf"\b({'|'.join(PHRASES)})\b", re.IGNORECASE)


def test_phrases_are_plain() -> None:
    """Report each phrase of the list with its file and its plain words."""
    found = [
        f"{name}: {match[0]!r}: {plain}"
        for name in TEXTS
        for match in ANY_PHRASE.finditer(SPACES.sub(" ", (ROOT / name).read_text(encoding="utf-8")))
        for phrase, plain in PHRASES.items()
        if re.fullmatch(phrase, match[0], re.IGNORECASE)
    ]
    assert found == []
