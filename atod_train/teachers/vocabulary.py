"""Check that every token of the student has the same id at the teacher.

The teacher may have more tokens, since the student samples none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from atod_gym.errors import AtodError

_IDS_AT_ONCE = 1024
"""Ids whose common text is compared."""
_MOST_ALONE = 4096
"""Ids, besides added tokens, whose own text is compared."""


def require_same_vocabulary(
    ours: Mapping[str, int], theirs: Mapping[str, int], student: str, teacher: str
) -> None:
    """Check that every token of the student has the same id at the teacher.

    Args:
        ours: token -> id of the student.
        theirs: token -> id of the teacher.
        student: its name, for the message.
        teacher: its name, for the message.

    Raises:
        AtodError: a token has another id or none.
    """
    token_of = {token_id: token for token, token_id in theirs.items()}
    different = [
        (token_id, token, token_of.get(token_id))
        for token, token_id in ours.items()
        if theirs.get(token) != token_id
    ]
    if different:
        raise _error(different, len(ours), student, teacher)


def require_same_texts(
    tokenizer: PreTrainedTokenizerBase,
    decode: Callable[[list[list[int]]], list[str]],
    student: str,
    teacher: str,
) -> None:
    """Check that a teacher decodes every id of the student to the same text.

    Texts of many ids are compared first. Where they differ, the text of each id alone decides:
    versions of tokenizers may join tokens differently. If most of the vocabulary differs, every
    n-th id and all added tokens are compared.

    Args:
        tokenizer: of the student.
        decode: returns the teacher's text of each list of ids.
        student: its name, for the message.
        teacher: its name, for the message.

    Raises:
        AtodError: an id has another text or none.
    """
    ids = sorted(tokenizer.get_vocab().values())
    parts = [ids[begin : begin + _IDS_AT_ONCE] for begin in range(0, len(ids), _IDS_AT_ONCE)]
    found = zip(parts, decode(parts), strict=True)
    unlike = [i for part, text in found if text != tokenizer.decode(part) for i in part]
    step, added = 1 + len(unlike) // _MOST_ALONE, tokenizer.added_tokens_decoder
    left_out = {i for n, i in enumerate(unlike) if n % step and i not in added}
    alone = [i for i in unlike if i not in left_out]
    different = [
        (token_id, str(tokenizer.convert_ids_to_tokens(token_id)), text or None)
        for token_id, text in zip(alone, decode([[i] for i in alone]), strict=True)
        if not _is_text_of(tokenizer, token_id, text)
    ]
    if different:
        raise _error(different, len(ids) - len(left_out), student, teacher)


def _is_text_of(tokenizer: PreTrainedTokenizerBase, token_id: int, text: str) -> bool:
    """Return whether a text is that of a token, perhaps without spaces around it."""
    decoded = str(tokenizer.decode([token_id]))
    # A part of a character has no text of its own.
    if text == decoded or "\ufffd" in text or "\ufffd" in decoded:
        return True
    return bool(text.strip()) and text.strip() == decoded.strip()


def _error(
    different: Sequence[tuple[int, str, str | None]], compared: int, student: str, teacher: str
) -> AtodError:
    """Return the error for two vocabularies that are not the same.

    Args:
        different: id, the student's token and the teacher's (None: it has none), at least one.
        compared: number of tokens that were compared.
        student: its name.
        teacher: its name.
    """
    token_id, ours, theirs = min(different, key=lambda entry: entry[0])
    other = "none" if theirs is None else repr(theirs)
    return AtodError(
        f"Teacher {teacher} and student {student} do not share a vocabulary: {len(different)} of "
        f"{compared} tokens of the student that were compared are others at the teacher (for "
        f"example id {token_id} is {ours!r} for the student and {other} for the teacher). Use a "
        "teacher of the same model family, or train both on one tokenizer."
    )
