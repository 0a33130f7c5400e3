"""The generated source deals the same records for ever, and measures chance instead of assuming it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sailvl.curate.synth import FAMILIES, SynthSource, questions
from sailvl.curate.synth.scene import Sprite
from sailvl.curate.synth.source import THINKING_PROMPT, question_images
from sailvl.data.encode import encode, measure
from sailvl.model.processing import SailVLProcessor
from sailvl.verify import final_answer, score


def source(**changes: object) -> SynthSource:
    values: dict[str, object] = {"families": tuple(FAMILIES), "split": "train", "size": 50, "seed": 3}
    return SynthSource("drawn", **{**values, **changes})  # type: ignore[arg-type]


def test_a_row_is_always_the_same_record_and_picture() -> None:
    one, other = source(), pickle.loads(pickle.dumps(source()))
    for row in (0, 17, 49):
        assert one.record(row) == other.record(row)
        for a, b in zip(one.images(one.record(row)), other.images(other.record(row)), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert one.record(1) != one.record(2)
    with pytest.raises(IndexError, match="row 50 of 50"):
        one.record(50)


def test_fingerprint_follows_what_is_drawn_and_not_the_name() -> None:
    prints = {source(**change).fingerprint() for change in ({}, {"seed": 4}, {"families": ("count",)}, {"side": 56})}
    assert len(prints) == 4
    assert SynthSource("other", families=("ocr",), split="train", size=5, seed=0).fingerprint() == (
        SynthSource("name", families=("ocr",), split="train", size=5, seed=0).fingerprint()
    )


def test_unknown_families_are_named() -> None:
    with pytest.raises(ValueError, match="counting"):
        source(families=("count", "counting"))


def test_turns_keep_to_the_listed_families() -> None:
    one = source(families=("count",), max_turns=3)
    for row in range(50):
        record = one.record(row)
        assert len(record.messages) == 2 and record.messages[1].text in "12345"


def test_thinking_puts_the_thought_before_the_boxed_answer() -> None:
    one = source(families=("count", "arithmetic", "compare"), thinking=True)
    for row in range(50):
        user, assistant = one.record(row).messages
        assert user.text.endswith(THINKING_PROMPT)
        assert assistant.text.startswith("<think>") and "</think>\\boxed{" in assistant.text
        assert final_answer(assistant.text) in assistant.text.split("\\boxed{")[1]


def test_records_encode_as_measured(tiny_processor: SailVLProcessor) -> None:
    one = source(side=tiny_processor.image_processor.tiling.side)
    for row in range(50):
        record = one.record(row)
        example = encode(record, one.images(record), tiny_processor)
        assert (example.num_tokens, example.num_tiles) == measure(record, tiny_processor)


def test_questions_are_stable_halved_between_languages_and_answerable() -> None:
    families = [family for family in FAMILIES if family not in ("describe", "mosaic")]
    asked = questions(families=families, per_family=6)
    assert asked == questions(families=families, per_family=6)
    assert len({question.record.id for question in asked}) == 6 * len(families)
    for family in families:
        assert sum(q.lang == "zh" for q in asked if q.family == family) == 3
    for question in asked:
        assert score(question, question.truth) == 1
        assert 0 < question.chance < 0.6
        assert len(question_images(question.record)) == len(question.record.pictures)


def test_chance_is_what_a_blind_answer_earns() -> None:
    (question,) = questions(families=["relation"], per_family=1)
    assert 0.25 <= question.chance <= 0.35  # four answers, as likely as each other
    (boxed,) = questions(families=["where"], per_family=1)
    assert 0.05 < boxed.chance < 0.5  # a box in the middle overlaps some


def test_test_questions_differ_from_validation() -> None:
    test, validation = (questions(families=["name"], per_family=20, split=split) for split in ("test", "validation"))
    shown = [
        {part.item for q in asked for part in q.record.pictures[0].ref.parts if isinstance(part, Sprite)}
        for asked in (test, validation)
    ]
    assert not shown[0] & shown[1]
