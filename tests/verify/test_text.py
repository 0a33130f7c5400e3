from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.types import Message, Question, Record
from sailvl.verify import edit, exact, final_answer, number, score
from sailvl.verify.text import edit_distance, fold, numbers


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (" red ", "red"),
        ("<think>blue? no</think> red", "red"),
        ("<think>a</think><think>b</think>\nred", "red"),
        ("stray </think> red", "red"),
        ("<think>I think it is red", ""),
        ("<think>a</think> so <think>red", ""),
        ("<think>\\boxed{blue}", ""),
        ("<think>\\boxed{blue}</think> red", "red"),
        ("So \\boxed{3}.", "3"),
        ("\\boxed{1} or rather \\boxed{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{}", "\\{"),
        ("\\boxed{3", "\\boxed{3"),
        ("\\boxed{3} \\boxed{4", "3"),
        ("boxed{3}", "boxed{3}"),
        ("\\boxed 3", "\\boxed 3"),
        ("}}}{{{", "}}}{{{"),
        ("\\boxed{}", ""),
        ("", ""),
    ],
)
def test_final_answer(reply: str, answer: str) -> None:
    assert final_answer(reply) == answer


@pytest.mark.parametrize("reply", ["\\boxed{" * 200_000, "\\" * 500_000, "<think>" * 100_000, "{" * 500_000])
def test_hostile_replies_cost_linear_time(reply: str) -> None:
    assert exact(final_answer(reply), "red") == 0
    assert number(final_answer(reply), "3") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Red", "red", 1),
        ("RED.", "red", 1),
        ("«red!»", "red", 1),
        ("**red**", "red", 1),
        ("  dark \n red ", "dark red", 1),
        ("红色", "红色", 1),
        ("红色。", "红色", 1),
        ("“红色”", "红色", 1),
        ("ABC 12", "abc 12", 1),
        ("Straße", "STRASSE", 1),
        ("reddish", "red", 0),
        ("red blue", "red", 0),
        ("dark-red", "dark red", 0),
        ("红", "红色", 0),
        ("-5", "5", 0),
        ("5%", "5", 0),
        ("C#", "C", 0),
        ("", "red", 0),
        ("...", "red", 0),
        ("!", "?", 0),
        ("?", "?", 1),
        ("<script>", "script", 0),
    ],
)
def test_exact(answer: str, truth: str, right: int) -> None:
    assert exact(answer, truth) == right


@given(st.text())
def test_a_text_equals_itself_in_any_surroundings(text: str) -> None:
    assert exact(text, text) == 1
    assert fold(f" “{text} ”。\n") == fold(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234.50", ["1234.5"]),
        ("1,2", ["1", "2"]),
        ("1,2345", ["1", "2345"]),
        ("1,234", ["1234"]),
        ("−3", ["-3"]),
        ("3-4", ["3", "4"]),
        ("-3", ["-3"]),
        ("1e3", ["1000"]),
        ("12%", ["12"]),
        ("three cats", ["3"]),
        ("someone often", []),
        ("three hundred", []),
        ("三个", ["3"]),
        ("一共两只", ["2"]),
        ("十二", ["12"]),
        ("二十一", ["21"]),
        ("三百零五", ["305"]),
        ("二〇二四", ["2024"]),
        ("两万三千", ["23000"]),
        ("3万", ["30000"]),
        ("5²", ["5", "2"]),
        ("½", ["1", "2"]),
        ("3 or four", ["3", "4"]),
        ("", []),
    ],
)
def test_numbers(text: str, values: list[str]) -> None:
    assert numbers(text) == {Decimal(value) for value in values}


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("There are 3 cats.", "3", 1),
        ("3.0", "3", 1),
        ("三", "3", 1),
        ("3", "三", 1),
        ("3, I count 3", "3", 1),
        ("3 or 4", "3", 0),
        ("30", "3", 0),
        ("0.3", "3", 0),
        ("-3", "3", 0),
        ("many", "3", 0),
        ("1e999999999999", "3", 0),
        ("9" * 5000, "3", 0),
        ("nan", "3", 0),
        ("Infinity", "3", 0),
    ],
)
def test_number(answer: str, truth: str, right: int) -> None:
    assert number(answer, truth) == right


@pytest.mark.parametrize("truth", ["many", "3 of 4", ""])
def test_a_truth_without_one_number_is_refused(truth: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        number("3", truth)


@given(st.integers(-(10**12), 10**12))
def test_numbers_read_back(value: int) -> None:
    assert numbers(f"{value}") == numbers(f"{value:,}") == {Decimal(value)}


def _plain_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, one in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (one != other))
    return row[-1]


@given(st.text("abc红", max_size=40), st.text("abc红", max_size=40))
def test_edit_distance_equals_the_table(left: str, right: str) -> None:
    assert edit_distance(left, right) == _plain_distance(left, right)


def test_edit() -> None:
    assert edit("Kitten.", "kitten") == 1
    assert edit("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit("", "abc") == 0
    assert edit("", "") == 1
    assert edit("a" * 200_000, "abc") == pytest.approx(1 / 200_000)


def test_score_judges_the_answer_part_by_the_named_verifier() -> None:
    record = Record(id="q", messages=(Message(role="user", text="?"),), meta={"options": ["red", "blue"]})

    def ask(verifier: str, truth: str, reply: str) -> float:
        question = Question(record=record, truth=truth, family="f", lang="en", verifier=verifier, chance=0.0)  # type: ignore[arg-type]
        return score(question, reply)

    assert ask("exact", "red", "<think>blue</think>Red") == 1
    assert ask("exact", "red", "it is red") == 0
    assert ask("choice", "red", "it is red, \\boxed{red}") == 1
    assert ask("choice", "red", "red or blue") == 0
    assert ask("number", "3", "<think>4 + 5</think> three") == 1
    assert ask("iou", "[[0,0,10,10]]", "<think>[[5,5,6,6]]</think>[[0,0,10,10]]") == 1
    assert 0 < ask("edit", "red", "rd") < 1
