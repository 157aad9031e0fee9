"""Porter's stemmer in the form that Lucene uses (`PorterStemFilter`).

M.F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with the two departures that
its author made in his own program: `bli` becomes `ble` (not `abli` `able`), and `logi` becomes
`log`. Words of one or two characters stay as they are. Snowball's "porter" differs from this.
"""

from __future__ import annotations

_STEP_2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "logi": "log",
}
_STEP_3 = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
_ENDINGS = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = frozenset(_ENDINGS.split())


def stem(word: str) -> str:
    """The stem of one word, which must be in lower case.

    Any string is fine. What is not a, e, i, o, u (or a y behind a consonant) counts as a consonant,
    a character beyond U+FFFF as two of them, as in Java.
    """
    if word.isascii() or max(word) <= "\uffff":
        return _stem(word)
    pairs = "".join(map(chr, memoryview(word.encode("utf-16-le", "surrogatepass")).cast("H")))
    return _stem(pairs).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _stem(word: str) -> str:
    if len(word) <= 2:
        return word
    word = _without_plural_and_tense(word)
    if word[-1] == "y" and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(word, _STEP_2, longest=7)
    word = _replaced(word, _STEP_3, longest=5)
    word = _without_suffix(word)
    return _tidied(word)


def _shape(word: str) -> str:
    """For every character `v` if it is a vowel, else `c`."""
    shape = ""
    last = "v"  # as if a vowel stood before the word: a y at its beginning is a consonant
    for character in word:
        is_vowel = character in "aeiou" or (character == "y" and last == "c")
        last = "v" if is_vowel else "c"
        shape += last
    return shape


def _measure(stem: str) -> int:
    """Porter's m: how often a consonant follows a vowel."""
    return _shape(stem).count("vc")


def _ends_consonant_vowel_consonant(word: str) -> bool:
    """Porter's condition *o: such a word takes back its final e."""
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"


def _ends_in_double_consonant(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _without_plural_and_tense(word: str) -> str:
    """Steps 1a and 1b."""
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word[-1] == "s" and word[-2] != "s":
        word = word[:-1]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    suffix = "ed" if word.endswith("ed") else "ing" if word.endswith("ing") else ""
    if not suffix or "v" not in _shape(word[: -len(suffix)]):
        return word
    word = word[: -len(suffix)]
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if _ends_in_double_consonant(word):
        return word if word[-1] in "lsz" else word[:-1]
    if _measure(word) == 1 and _ends_consonant_vowel_consonant(word):
        return word + "e"
    return word


def _replaced(word: str, rules: dict[str, str], longest: int) -> str:
    """Steps 2 and 3: the longest suffix that has a rule is replaced, if m > 0 before it."""
    for length in range(longest, 2, -1):
        suffix = word[-length:]
        if suffix in rules:
            head = word[:-length]
            return head + rules[suffix] if _measure(head) > 0 else word
    return word


def _without_suffix(word: str) -> str:
    """Step 4: the longest suffix of the list goes, if m > 1 before it."""
    for length in range(5, 1, -1):
        if word[-length:] in _STEP_4:
            head = word[:-length]
            if length == 3 and word.endswith("ion") and not head.endswith(("s", "t")):
                continue
            return head if _measure(head) > 1 else word
    return word


def _tidied(word: str) -> str:
    """Step 5: a final e, and one of two final l, go from long stems."""
    measure = _measure(word)
    if word[-1] == "e":
        head = word[:-1]
        if measure > 1 or (measure == 1 and not _ends_consonant_vowel_consonant(head)):
            word = head
    if measure > 1 and word.endswith("ll"):
        word = word[:-1]
    return word
