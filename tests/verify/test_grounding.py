import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.verify import iou
from sailvl.verify.boxes import box_iou as overlap
from sailvl.verify.grounding import box

TRUTH = "<box>[[100,100,300,300]]</box>"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<box>[[100,100,300,300]]</box>", 1),
        ("[[100, 100, 300, 300]]", 1),
        ("[100.0,100,300,300]", 1),
        ("100 100 300 300", 1),
        ("100,100,300,300", 1),
        ("x from 100 to 300", 0),
        ("[[100,100,300,200]]", 1),  # exactly one half
        ("[[100,100,300,199]]", 0),
        ("[[300,300,100,100]]", 0),
        ("[[100,100,100,300]]", 0),
        ("[[100,100,300,300]] [[0,0,10,10]]", 0),
        ("[[100,100,300,300,300]]", 0),
        ("[[100,100,300]]", 0),
        ("[[-100,100,300,300]]", 0),
        ("-100 100 300 300", 0),
        ("[[100,100,300,1001]]", 0),
        ("[[0,0,1000,1000]]", 0),
        ("[[100,100,300,300", 0),
        ("[[1e2,100,300,300]]", 0),
        ("[[nan,nan,nan,nan]]", 0),
        ("[[" + "9" * 10_000 + ",1,2,3]]", 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_iou(answer: str, right: int) -> None:
    assert iou(answer, TRUTH) == right


def test_a_truth_without_a_box_is_refused() -> None:
    with pytest.raises(ValueError, match="no box"):
        iou(TRUTH, "red")


sides = st.tuples(st.integers(0, 999), st.integers(1, 1000)).filter(lambda ends: ends[0] < ends[1])


@given(sides, sides, sides, sides)
def test_overlap_equals_counting_pixels(x: tuple, y: tuple, u: tuple, v: tuple) -> None:
    across = len(set(range(*x)) & set(range(*u)))
    down = len(set(range(*y)) & set(range(*v)))
    both = (x[1] - x[0]) * (y[1] - y[0]) + (u[1] - u[0]) * (v[1] - v[0]) - across * down
    one, other = box(f"[[{x[0]},{y[0]},{x[1]},{y[1]}]]"), box(f"{u[0]} {v[0]} {u[1]} {v[1]}")
    assert one and other
    assert overlap(one, other) == overlap(other, one) == pytest.approx(across * down / both)
