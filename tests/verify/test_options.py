from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.verify.options import (
    REJECTED,
    by_text,
    first_capital,
    first_word_matches,
    infer,
    option,
    question_options,
    real_world,
    strict_option,
)

COLOURS = {"A": "red", "B": "dark red", "C": "blue", "D": "dark blue"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dark red", "B"),
        ("**B**", "B"),
        ("Answer: B!", "B"),
        ("答案是 B", "B"),
        ("B or C?", "B"),  # "C?" is no letter that stands alone
        ("D and A", None),
        ("B B B", "B"),  # distinct letters count, not words
        ("B is what I would say", None),  # too far from the end
        ("I would say B", "B"),
        ("b", None),
        ("`B`", None),
        ("Z", REJECTED),
        ("A or Z", "A"),
        ("Cannot determine the answer, maybe A", REJECTED),
        ("Failed to obtain answer via API. A", None),
        ("The answer is about colours", "A"),  # published scores read the word's first letter
        ("the ANSWER  is **c** since red is wrong and blue is right", "C"),
        ("the correct answer is E", "A B C D E".split()[4]),
        ("", None),
        ("A\tred", "A"),
        ("Ｂ", None),
    ],
)
def test_the_letter_that_stands_alone_near_the_end(reply, letter):
    letters = (*COLOURS, "E") if letter == "E" else COLOURS
    assert option(reply, letters) == letter


def test_a_letter_that_is_no_option_is_no_answer():
    assert option("D", ("A", "B")) is None
    assert option("the answer is D", ("A", "B")) is None


def test_the_only_option_text_that_a_short_reply_contains():
    assert by_text("It is BLUE, not", {"A": "green", "B": "blue"}) == "B"
    assert by_text("dark blue", COLOURS) is None  # blue is in it too
    assert by_text("blue" + "." * 60, {"A": "green", "B": "blue"}) is None  # longer than twice the options
    assert by_text("", COLOURS) is None
    assert infer("green", {"A": "green", "B": "blue"}) == "A"


@given(st.text(max_size=60), st.sampled_from([COLOURS, {"A": "", "B": "x"}, {}]))
def test_only_options_or_a_rejection_come_out(reply, options):
    for strict in (False, True):
        assert infer(reply, options, strict=strict) in {*options, REJECTED, None}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("答案是B", "B"),
        ("选项：C。", "C"),
        ("C。", "C"),
        ('"C"', "C"),
        ("C?", "C"),
        ("Ｂ", "B"),
        ("<answer>A</answer>", "A"),
        ("A? no: <answer>B</answer>", "B"),
        ("\\boxed{\\text{A}} hm \\boxed{C}", "C"),
        ("The answer is about A dog", None),
        ("The answer is C, as D is wrong", "C"),
        ("A cat sits on B", "B"),
        ("A is right", "A"),
        ("It's A's turn", None),
        ("A or B", None),
        ("I can't process this file.", REJECTED),
    ],
)
def test_strict_reading(reply, letter):
    assert strict_option(reply, COLOURS) == letter


def test_the_first_capital_letter_of_the_video_rule():
    assert first_capital("The best answer is C", "ABCD") == "C"
    assert first_capital("Best answer: C", "ABCD") == "B"  # the flaw that published scores have
    assert first_capital("Answer: Option: D", "ABCD") == "D"
    assert first_capital("E", "ABCD") is None and first_capital("E", "ABCDE") == "E"
    assert first_capital("nothing", "ABCDE") is None


def test_the_real_world_rule_reads_parts_of_bracketed_letters():
    assert real_world("Best answer: C") == "C"
    assert real_world("(b") == "B"
    assert real_world(" ") == "A"
    assert real_world("b.") is None
    assert real_world("no capital letter stands here in more than ten words, none") is None


def test_the_first_word_rule():
    assert first_word_matches("(b) dark red", "B") and first_word_matches("B.", "B")
    assert first_word_matches("", "B") and first_word_matches(".", "B")
    assert not first_word_matches("A", "B") and not first_word_matches("b,", "B")


def test_options_on_the_lines_of_a_question():
    assert question_options("Which?\nA. x.\nB. y \nno option\nD. z") == {"A": "x", "B": "y", "D": "z"}
    assert question_options("Which?") == {}
