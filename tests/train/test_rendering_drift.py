"""The guard that compares what was fed and sampled with the chat template's own rendering."""

from __future__ import annotations

from test_dialogue import CHATML, DESK, MUG, make_tokenizer

from atod_gym.types import Message
from atod_train.batching import make_batch
from atod_train.dialogue import DialogueEncoder
from atod_train.step_records import rendering_drift
from atod_train.types import FinishReason, TokenizedTurn, Trajectory, Turn


def _episode(
    dialogue: DialogueEncoder,
    completions: list[list[int]],
    messages: list[Message],
    reasons: list[FinishReason] | None = None,
) -> Trajectory:
    turns: list[Turn] = []
    reasons = reasons or ["stop"] * len(completions)
    for index, (ids, message) in enumerate(zip(completions, messages, strict=True)):
        prompt = (
            dialogue.continuation([message], reasons[index - 1])
            if index
            else dialogue.first([message])
        )
        tokens = TokenizedTurn(
            tuple(prompt), tuple(ids), (0.0,) * len(ids), reasons[index], index > 0
        )
        text = dialogue.decode(ids)
        turns.append(Turn(index, (message,), text, text, 0.0, True, tokens))
    return Trajectory(0, "t", "k", tuple(turns), True, False, "terminated", True, 1.0)


def test_no_drift_where_text_and_ids_agree() -> None:
    dialogue = DialogueEncoder(make_tokenizer())
    end = dialogue.end_of_turn_id
    ids = dialogue.completion("take mug 1")
    record = _episode(dialogue, [ids, ids, ids], [MUG, DESK, MUG])
    assert rendering_drift([record], dialogue) == 0.0
    # A completion that was cut is closed by the template alike.
    cut = _episode(dialogue, [ids[:-1], ids], [MUG, DESK], ["length", "stop"])
    assert ids[-1] == end
    assert rendering_drift([cut], dialogue) == 0.0


def test_a_template_that_strips_thoughts_drifts() -> None:
    stripping = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    dialogue = DialogueEncoder(make_tokenizer(stripping))
    plain = dialogue.completion("take mug 1")
    thinking = dialogue.completion("<think> desk </think> take mug 1")
    records = [
        _episode(dialogue, [first, plain], [MUG, DESK]) for first in (thinking, plain, plain, plain)
    ]
    assert rendering_drift(records, dialogue) == 0.25
    assert rendering_drift(records, dialogue, limit=1) == 1.0
    # Trained is what was sampled.
    batch = make_batch(records[:1], 0)
    assert batch.completion_ids[0].tolist() == thinking


def test_ids_that_are_not_the_tokenizers_own_segmentation_drift() -> None:
    dialogue = DialogueEncoder(make_tokenizer())
    # "mug 1" is a token, and so are "mug" and "1".
    vocabulary = dialogue.tokenizer.get_vocab()
    split = [vocabulary["take"], vocabulary["mug"], vocabulary["1"], dialogue.end_of_turn_id]
    assert dialogue.decode(split) == "take mug 1"
    record = _episode(dialogue, [split, split], [MUG, DESK])
    assert rendering_drift([record], dialogue) == 1.0
    assert make_batch([record], 0).completion_ids[0].tolist() == split


def test_where_there_is_nothing_to_compare() -> None:
    dialogue = DialogueEncoder(make_tokenizer())
    one = _episode(dialogue, [dialogue.completion("take mug 1")], [MUG])
    assert rendering_drift([one], dialogue) is None
    window = DialogueEncoder(make_tokenizer(), "window")
    assert rendering_drift([one], window) is None
