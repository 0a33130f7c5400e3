from __future__ import annotations

import importlib.util
import threading

import pytest

from sailvl.verify import math_equal
from sailvl.verify.math_equal import Latex, LatexMissing, math_is_equal
from sailvl.verify.olympiad import final_part, olympiad_right, precisions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("latex2sympy2_extended") is None, reason="comparing LaTeX needs the extra eval"
)


@pytest.fixture(scope="module")
def latex():
    with Latex() as found:
        yield found


@pytest.mark.parametrize(
    ("answer", "truth", "published", "strict"),
    [
        (" X+1 ", "x+1", True, True),
        ("(x+1)", "x+1", False, True),  # letters have no value, as published
        ("28/2", "14.0", True, True),
        ("0.5", "\\frac{1}{2}", True, True),
        ("0.5000001", "\\frac{1}{2}", True, True),
        ("0.51", "\\frac{1}{2}", False, False),
        ("10^3", "9", True, False),  # exclusive or
        ("10^3", "1000", True, True),
        ("1.41421356237", "\\sqrt{2}", False, True),
        ("3.14159265359", "\\pi", False, True),
        ("a", "14", True, False),  # the name a is the truth's value
        ("14", "b", True, False),  # in LaTeX the name b is the answer's value
        ("b", "a", False, False),
        ("14 cm", "14", False, False),
        ("(1,2)", "(1,2)", True, True),
        ("1,2", "(1,2)", False, False),
        ("90", "90^\\circ", True, True),
        ("十四", "14", False, False),
        ("", "14", False, False),
        ("__import__('os').abort()", "14", False, False),
    ],
)
def test_equality(latex, answer, truth, published, strict):
    assert math_is_equal(answer, truth, latex) is published
    assert math_is_equal(answer, truth, latex, strict=True) is strict


def test_a_formula_that_takes_too_long_is_unequal_and_the_next_one_is_answered():
    with Latex(seconds=0.5) as latex:
        assert not latex.ask("value", "1", "10^{10^{10^{10}}}")
        assert latex.kills == 1
        assert math_is_equal("\\frac{2}{4}", "0.5", latex)


def test_a_worker_that_dies_is_replaced():
    with Latex() as latex:
        assert latex.ask("published", "1/2", "0.5")
        assert latex._child is not None
        latex._child.kill()
        latex._child.wait()
        assert latex.ask("published", "1/2", "0.5") and latex.kills == 0


def test_threads_share_one_worker():
    pairs = [(str(number), f"\\frac{{{2 * number}}}{{2}}") for number in range(20)]
    found: dict[str, bool] = {}

    def ask(answer: str, truth: str) -> None:
        found[answer] = latex.ask("published", truth, answer)

    with Latex() as latex:
        threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {answer: True for answer, _ in pairs}


def test_nothing_is_started_where_no_formula_can_help(monkeypatch):
    monkeypatch.setattr(Latex, "_start", lambda self: pytest.fail("started a process"))
    latex = Latex()
    assert not math_is_equal("B", "C", latex) and math_is_equal("7*2", "14", latex)
    assert not math_is_equal("False", "C", latex)
    assert not math_is_equal("x" * 5000, "y", latex)


def test_a_missing_parser_is_named(monkeypatch):
    monkeypatch.setattr(math_equal.importlib.util, "find_spec", lambda name: None)
    with Latex() as latex, pytest.raises(LatexMissing, match=r"sailvl\[eval\]"):
        math_is_equal("x", "\\frac{1}{2}", latex)


# ---- competition problems -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("\\boxed{3}", "$3$", True),
        ("so $x = 3$", "$3$", True),
        ("\\boxed{1, 2}", "$2$,$1$", True),
        ("\\boxed{1, 2}", "$1$", False),
        ("\\boxed{\\pm 2}", "$2,-2$", True),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "$\\frac{1}{\\sqrt{2}}$", True),
        ("\\boxed{50\\%}", "$0.5$", True),
        ("\\boxed{(0,1]}", "$(0, 1]$", True),
        ("\\boxed{(0,1)}", "$(0, 1]$", False),
        ("\\boxed{2x+2}", "$2(x+1)$", True),
        ("\\boxed{y=x+1}", "$2y=2x+2$", True),
        ("\\boxed{y=x+2}", "$y=x+1$", False),
        ("\\boxed{}", "$3$", False),
        ("能", "能", True),
    ],
)
def test_competition_answers(latex, answer, truth, right):
    assert olympiad_right(answer, truth, latex) is right


def test_competition_answers_may_be_off_by_what_the_problem_allows(latex):
    assert olympiad_right("\\boxed{3.14}", "$3.1416$", latex, precisions("1e-2"))
    assert not olympiad_right("\\boxed{3.14}", "$3.1416$", latex, precisions(None))
    assert precisions("0.1,,x") == [0.1, 1e-8, 1e-8] and precisions(0.5) == [0.5]


def test_the_final_part_is_what_follows_the_last_announcement():
    reply = "So the final answer is 1.\nNo. So the final answer is \\boxed{2}.\nBye"
    assert final_part(reply, chinese=False) == "\\boxed{2}."
    assert final_part(reply, chinese=True) == reply
    assert final_part("所以最终答案是$3$。", chinese=True) == "$3$。"
