from __future__ import annotations

import math
import time

import pytest

from sailvl.verify.cleanup import all_boxed, boxed_answer, last_boxed, sail_answer, split_think
from sailvl.verify.structured import (
    crpe_right,
    dynamath_right,
    json_part,
    letters_match,
    mathvista_value,
    same_value,
    short_answer,
    tempcompass_choice,
    tempcompass_matching,
    typed,
    wemath_letter,
)


def test_json_in_a_reply():
    reply = 'Sure:\n```json\n{"solution": "\\frac{1}{2}\n", "short answer": "B"}\n```'
    assert short_answer(json_part(reply)) == "B"
    assert short_answer(json_part("no braces")) is None
    assert short_answer(json_part('{"short answer": 3.5}')) == 3.5
    assert short_answer(json_part("{[}")) is None and short_answer("[1]") is None
    assert short_answer('{"a":' * 100_000) is None


@pytest.mark.parametrize(
    ("answer", "kind", "value"),
    [
        ("3", "float", 3.0),
        ("3.5 cm", "float", 3.5),
        ("2π", "float", 2 * math.pi),
        ("π", "float", None),
        ("²", "float", None),
        ("cm 3", "float", None),
        (3.5, "float", None),
        ("b", "multiple choice", "B"),
        ("7", "multiple choice", "7"),
        ("(D) x", "multiple choice", "D"),
        ("B or C", "multiple choice", None),
        ("", "multiple choice", None),
        ("y = 2x", "text", "y = 2x"),
        (None, "text", None),
    ],
)
def test_typed_answers(answer, kind, value):
    assert typed(answer, kind) == value


def test_dynamath_rules():
    assert dynamath_right(3.1425, "3.142", "float", "") and not dynamath_right(3.1431, "3.142", "float", "")
    assert not dynamath_right(3.142, "three", "float", "")
    assert dynamath_right(None, "B", "multiple choice", "(b) or c") and not dynamath_right(
        "A", "B", "multiple choice", "B"
    )
    assert dynamath_right("2X", "y = 2x", "text", "") and dynamath_right("", "yes", "text", "")
    assert not dynamath_right("", "yes", "text", "", strict=True) and not dynamath_right(
        ".", "a.", "text", "", strict=True
    )


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("<Thought>: <<A>> <Answer>: <<G>>", "G"), ("B is right", "B"), ("Answer: the F", None), ("", None), ("I", None)],
)
def test_wemath_letter(reply, letter):
    assert wemath_letter(reply) == letter


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("B. a", 1), ("B", 1), ("B) x", 1), ("A. a", 0), ("D", 0), ("E", None), ("b", None), ("(B)", None), ("", None)],
)
def test_tempcompass_choice(reply, rating):
    assert tempcompass_choice(reply, "B. a") == rating


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Caption A: a man runs", 1),
        ("a man runs", 1),
        ("1) a man runs", 1),
        ("Caption A", 1),
        ("A.", 1),
        ("Caption B", 0),
        ("a man walks", 0),
        ("caption a", None),
        ("", None),
    ],
)
def test_tempcompass_matching(reply, rating):
    candidates = ["Caption A: a man runs", "Caption B: a man walks"]
    assert tempcompass_matching(reply, "Caption A: a man runs", candidates) == rating


def test_tempcompass_candidates_without_a_label_do_no_harm():
    assert tempcompass_matching("x", "x", ["x", "y"]) == 1 and tempcompass_matching("z", "", []) is None


@pytest.mark.parametrize(
    ("reply", "truth", "right"),
    [
        ("B", "B", True),
        ("B. thing", "B", True),
        ("A", "B", False),
        ("no idea", "B", True),  # a bare letter has no text, and nothing is in everything
        ("it is red", "B. blue", False),
        ("it is red", "(B) red", True),
        ("", "B", False),
    ],
)
def test_crpe(reply, truth, right):
    assert crpe_right(reply, truth) is right


def test_letters_in_any_order():
    assert letters_match("DC", "C, D") and letters_match("A", "A") and not letters_match("CDD", "C, D")


def test_mathvista_values():
    assert mathvista_value(" 14 ", "integer") == 14 and mathvista_value("14.0", "integer") is None
    assert mathvista_value("14.0", "float") == 14 and mathvista_value("x", "float") is None
    assert mathvista_value(14.7, "integer") == 14 and mathvista_value(float("inf"), "integer") is None
    assert mathvista_value("9" * 5000, "integer") is None and mathvista_value("yes", "text") is None
    assert same_value("[1,2]", "[1, 2]") and not same_value("[1]", "[1, 2]") and same_value("Yes.", "yes")


# ---- clean-up -------------------------------------------------------------------------------------------------


def test_thoughts_go():
    assert split_think("<think> a </think> B") == ("B", "a")
    assert split_think("a</think>B") == ("B", "a</think>")
    assert split_think("<think>a</think>b</think>C") == ("C", "<think>a</think>b</think>")
    assert split_think("<think>a") == ("<think>a", "")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\\boxed{X}</think>\\boxed{A} \\boxed{B}", "A"),  # the first after a thought
        ("\\boxed{A} \\boxed{B}", "B"),  # the last without one
        ("<think>a</think>\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "\\boxed{\\frac{\\sqrt{2}}{2}}"),  # too deep
        ("\\boxed{A", "\\boxed{A"),
        ("<think>\\boxed{A}</think> none", "A"),
        ("", ""),
    ],
)
def test_boxed_answers(reply, answer):
    assert boxed_answer(reply) == answer


def test_strict_boxes_may_be_any_depth():
    assert boxed_answer("\\boxed{\\frac{\\sqrt{2}}{2}}", strict=True) == "\\frac{\\sqrt{2}}{2}"
    assert last_boxed("\\boxed{a{b{c}}} \\boxed{") == "a{b{c}}" and last_boxed("x") is None
    assert all_boxed("\\boxed{1}, \\boxed{\\boxed{2}}") == ["1", "\\boxed{2}"]


def test_one_period_at_the_end_goes_for_two_sets():
    assert sail_answer("5..", "ChartQA_TEST") == "5." and sail_answer("5.", "OCRVQA_TESTCORE") == "5"
    assert sail_answer("5.", "DocVQA_VAL") == "5." and sail_answer("", "ChartQA_TEST") == ""
    assert sail_answer("\\boxed{5.}", "ChartQA_TEST", thinking=True) == "5"


@pytest.mark.parametrize(
    "reply",
    [
        "<think>" * 100_000,
        "<think></think>" * 50_000,
        "\\boxed{" * 100_000,
        "\\boxed{" + "{a}" * 200_000,
        "<think></think>" + "\\boxed{" * 50_000 + "}" * 50_000,
    ],
)
def test_clean_up_takes_linear_time(reply):
    start = time.monotonic()
    for strict in (False, True):
        boxed_answer(reply, strict=strict)
    split_think(reply)
    assert time.monotonic() - start < 3
