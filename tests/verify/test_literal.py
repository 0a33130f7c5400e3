from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl.verify.literal import NotArithmetic, answers, arithmetic, list_literal, mapping_literal


@given(
    st.recursive(
        st.integers(0, 9).map(str),
        lambda part: st.one_of(
            st.tuples(part, st.sampled_from(["+", "-", "*", "/", "//", "%", "&", "|", "^", " + "]), part).map("".join),
            part.map("({})".format),
            part.map("-{}".format),
            part.map("~{}".format),
            part.map("{}**2".format),
        ),
        max_leaves=8,
    )
)
@settings(max_examples=300, deadline=None)
def test_arithmetic_is_what_python_says(text):
    try:
        expected = eval(text)
    except (ArithmeticError, TypeError):
        with pytest.raises(NotArithmetic):
            arithmetic(text)
    else:
        found = arithmetic(text)
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2^3", 1),
        ("2**3**2", 512),
        ("-2**2", -4),
        ("2**-1", 0.5),
        ("0x1F", 31),
        ("1_000", 1000),
        (".5", 0.5),
        ("5.", 5),
        ("1e3", 1000),
        ("3j", 3j),
        ("14 # cm", 14),
        ("1 << 3", 8),
        ("5 // 2", 2),
    ],
)
def test_spellings(text, value):
    assert arithmetic(text) == value


def test_a_caret_may_be_a_power_and_names_are_what_is_given():
    assert arithmetic("2^3", caret_is_power=True) == 8
    assert arithmetic("a + 1", {"a": 4}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "abs(1)",
        "1,2",
        "(1",
        "1)",
        "007",
        "1 1",
        "1 < 2",
        "'x'",
        "[1]",
        "1/0",
        "1.5^2",
        "nan",
        "x.y",
        "十",
        "²",
        "10**10**10",
        "1<<10**9",
        "9**(9**9)",
        "(" * 60 + "1" + ")" * 60,
        "1" * 2000,
        "1e308*10**400",
        "-" * 999 + "x",
    ],
)
def test_anything_else_is_refused_at_once(text):
    start = time.monotonic()
    with pytest.raises(NotArithmetic):
        arithmetic(text)
    assert time.monotonic() - start < 1


def test_long_sums_within_the_limits_are_fine():
    assert arithmetic("+".join(["1"] * 500)) == 500
    assert arithmetic("-" * 900 + "1") == 1


def test_lists():
    assert list_literal("['a', 'b']") == ["a", "b"]
    assert list_literal(" [1, 2] ") == [1, 2] and list_literal(["x"]) == ["x"]
    for cell in ("a", "5", "(1, 2)", "[x]", "[1", "['a'] * 9", "[print()]", "[" * 10_000 + "]" * 10_000, None):
        assert list_literal(cell) is None
    assert answers("['a', 5]") == ["a", "5"] and answers("5,000") == ["5,000"]
    assert answers(r"['\sqrt{2}']") == [r"\sqrt{2}"]


def test_mappings():
    assert mapping_literal("{'subject': 'Algebra'}") == {"subject": "Algebra"}
    assert mapping_literal("{'a': x}") == mapping_literal("") == mapping_literal("{1, 2}") == {}
