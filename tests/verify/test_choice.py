import pytest

from sailvl.verify import choice

COLOURS = ("red", "dark red", "blue")
LETTERS = ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("answer", "truth", "options", "right"),
    [
        ("Red.", "red", COLOURS, 1),
        ("It is red, clearly red.", "red", COLOURS, 1),
        ("It is dark red.", "dark red", COLOURS, 1),
        ("It is dark red.", "red", COLOURS, 0),
        ("red or blue", "red", COLOURS, 0),
        ("reddish", "red", COLOURS, 0),
        ("purple", "red", COLOURS, 0),
        ("", "red", COLOURS, 0),
        ("左边", "左", ("左", "右"), 1),
        ("在左边不在右边", "左", ("左", "右"), 0),
        ("是", "是", ("是", "不是"), 1),
        ("不是", "是", ("是", "不是"), 0),
        ("B", "B", LETTERS, 1),
        ("(b)", "B", LETTERS, 1),
        ("B。", "B", LETTERS, 1),
        ("答案是B", "B", LETTERS, 1),
        ("The answer is B.", "B", LETTERS, 1),
        ("A cat sits on B", "B", LETTERS, 1),
        ("A is right", "A", LETTERS, 1),
        ("A or B", "B", LETTERS, 0),
        ("ABCD", "A", LETTERS, 0),
        ("A B C D", "A", LETTERS, 0),
        ("bad", "B", LETTERS, 0),
        (".*", "a.c", ("a.c", "b"), 0),
        ("abc", "a.c", ("a.c", "b"), 0),
        ("3", "3", ("3", "30"), 1),
        ("30", "3", ("3", "30"), 0),
        ("(" * 100_000, "red", COLOURS, 0),
    ],
)
def test_choice(answer: str, truth: str, options: tuple[str, ...], right: int) -> None:
    assert choice(answer, truth, options) == right


def test_without_options_only_the_truth_itself_is_right() -> None:
    assert choice("Red", "red") == 1
    assert choice("it is red", "red") == 0


@pytest.mark.parametrize("options", [("blue", "green"), ("red", "Red!"), ("red", "...")])
def test_faulty_options_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="options"):
        choice("red", "red", options)
