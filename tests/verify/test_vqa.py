from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.verify.vqa import anls_distance, compare, contains, norm, punct, relaxed, total
from sailvl.verify.yesno import begins, yes_or_no


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("Coca-Cola", "Coca Cola"),
        ("Sales, 2019", "Sales 2019"),  # next to a space: goes without a trace
        ("5,000 (a-b)", "5000 ab"),  # a comma between digits: every sign goes without a trace
        ("U.S.A.", "USA"),
        ("1.5 m.", "1.5 m"),
        ("50%", "50%"),
        ("a/b", "a b"),
    ],
)
def test_punctuation(text, bare):
    assert punct(text) == bare


def test_only_32_periods_go_as_published():
    assert punct("." * 40) == "." * 8
    assert punct("." * 40, every_period=True) == ""


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two\tDogs\n", "2 dogs"),
        ("none", "0"),
        ("an apple", "apple"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("A", ""),
        ("ＡＢＣ", "ａｂｃ"),
    ],
)
def test_normal_form(text, normal):
    assert norm(text) == normal


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("5.25", "5", True),
        ("5.26", "5", False),
        ("5 %", "5%", True),
        ("0.05", "5%", True),
        ("500%", "5", True),
        ("0.0", "0", False),  # zero is compared as text
        ("Yes", "yes", True),
        ("nan", "nan", False),
        ("inf", "5", False),
        ("1_0", "10", True),
        ("5,000", "5000", False),
    ],
)
def test_relaxed_numbers(answer, truth, right):
    assert relaxed(answer, truth) is right


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-3, max_value=1e9), st.floats(0.96, 1.04))
def test_five_percent_either_way(number, factor):
    assert relaxed(repr(number * factor), repr(number))


@given(st.text(max_size=30), st.text(max_size=30))
def test_edit_distance_is_a_share(one, other):
    assert 0 <= anls_distance(one, other) <= 1
    assert anls_distance(one, one) == 0 == anls_distance(one, one, strict=True)


def test_half_alike_is_the_least_that_counts():
    assert total(compare("abcx", ["abyz"], "anls"), "anls") == 0.5
    assert total(compare("axyz", ["abcd"], "anls"), "anls") == 0
    assert total(compare("dark blu", ["dark blue", "green"], "anls"), "anls") == pytest.approx(8 / 9)
    # Spaces count in the length, not in the distance.
    assert anls_distance("a    b", "a c") == pytest.approx(1 / 6)
    assert anls_distance("a    b", "a c", strict=True) == pytest.approx(1 / 3)


def test_agreement_is_counted_among_the_other_truths():
    found = compare("stop", ["stop", "STOP!", "halt"], "vqa")
    assert found.match == (1 / 3, 1 / 3, 2 / 3) and total(found, "vqa") == pytest.approx(4 / 9)
    assert total(compare("usa", ["U.S.A."], "vqa"), "vqa") == 0
    assert total(compare("usa", ["U.S.A."] * 10, "vqa"), "vqa") == 1


def test_best_and_mean():
    assert total(compare(" Yes ", ["yes", "no"], "equal_max"), "equal_max") == 1
    assert total(compare(" Yes ", ["yes", "no"], "equal_mean"), "equal_mean") == 0.5
    with pytest.raises(ValueError, match="no truths"):
        compare("x", [], "vqa")


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=4), st.booleans())
def test_scores_are_shares_whatever_the_texts(answer, truths, strict):
    for method in ("vqa", "relaxed", "equal_max", "equal_mean", "anls"):
        assert 0 <= total(compare(answer, truths, method, strict=strict), method) <= 1


def test_containment():
    assert contains("The text reads\nCAFÉ.", "café")
    assert contains("x", "") and not contains("new yor", "new york")
    assert contains("x+ 1\n= y", "x + 1 =y", formula=True) and not contains("x+1", "X+1", formula=True)


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("Yes.", "Yes"),
        ("There is no dog", "No"),
        ("Yes and no", "Unknown"),
        ("yes。", "Unknown"),
        ("a.yes b", "Unknown"),
        ("yes/no", "Unknown"),
        ("Yes,no", "Unknown"),
        ("nothing", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_yes_or_no_by_words(reply, word):
    assert yes_or_no(reply) == word


def test_yes_or_no_by_beginning():
    assert [begins(reply) for reply in ("YES!", "nothing", " yes", "so yes")] == ["Yes", "No", "Unknown", "Unknown"]
