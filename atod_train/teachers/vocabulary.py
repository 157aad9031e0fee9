"""Check that every token of the student has the same id at the teacher.

The teacher may have more tokens, since the student samples none of them. Errors name both models.
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
    """Check the student's ids of tokens against the teacher's.

    Raises:
        AtodError: a token has another id or none at the teacher.
    """
    token_of = {token_id: token for token, token_id in theirs.items()}
    different = [
        (token_id, token, token_of.get(token_id))
        for token, token_id in ours.items()
        if theirs.get(token) != token_id
    ]
    _refuse(different, len(ours), student, teacher)


def require_same_texts(
    tokenizer: PreTrainedTokenizerBase,
    decode: Callable[[list[list[int]]], list[str]],
    student: str,
    teacher: str,
) -> None:
    """Check that a teacher decodes every id of the student to the same text.

    Texts of many ids are compared first. Where they differ, the text of each id alone decides:
    versions of tokenizers may join tokens differently. If most of the vocabulary differs, every
    n-th id and all added tokens are compared. Parts of characters have no text to compare.

    Args:
        tokenizer: of the student.
        decode: returns the teacher's text of each list of ids.
        student: its name.
        teacher: its name.

    Raises:
        AtodError: an id has another text or none at the teacher.
    """
    ids = sorted(tokenizer.get_vocab().values())
    parts = [ids[begin : begin + _IDS_AT_ONCE] for begin in range(0, len(ids), _IDS_AT_ONCE)]
    texts = zip(parts, decode(parts), strict=True)
    unlike = [i for part, text in texts if text != tokenizer.decode(part) for i in part]
    step, added = 1 + len(unlike) // _MOST_ALONE, tokenizer.added_tokens_decoder
    alone = [i for n, i in enumerate(unlike) if n % step == 0 or i in added]
    different = []
    for token_id, theirs in zip(alone, decode([[i] for i in alone]), strict=True):
        ours = str(tokenizer.decode([token_id]))
        is_part = "\ufffd" in ours or "\ufffd" in theirs
        is_same = theirs == ours or theirs.strip() == ours.strip() != ""
        if not (is_part or is_same):
            token = str(tokenizer.convert_ids_to_tokens(token_id))
            different.append((token_id, token, theirs or None))
    _refuse(different, len(ids) - len(unlike) + len(alone), student, teacher)


def _refuse(
    different: Sequence[tuple[int, str, str | None]], compared: int, student: str, teacher: str
) -> None:
    """Raise an error if there are different tokens: id, the student's, the teacher's or None."""
    if different:
        token_id, ours, theirs = min(different, key=lambda entry: entry[0])
        other = "none" if theirs is None else repr(theirs)
        raise AtodError(
            f"Teacher {teacher} and student {student} do not share a vocabulary: {len(different)} "
            f"of {compared} tokens of the student that were compared are others at the teacher "
            f"(for example id {token_id} is {ours!r} for the student and {other} for the teacher). "
            "Use a teacher of the same model family, or train both on one tokenizer."
        )
