from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.verify.boxes import box_iou, four_numbers, to_pixels


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("[1,2,3,4]", (1, 2, 3, 4)),
        ("<box>[[10, 20, 30, 40]]</box>", (10, 20, 30, 40)),
        ("[1 2 3 4]", (1, 2, 3, 4)),
        ('{"bbox_2d": [-9, 1.5, .25, 1e2]}', (2, -9, 1.5, 0.25)),
        ("in 1 of 2: [5, 6, 7, 8]", (5, 6, 7, 8)),
        ("(0.1, 0.2), (0.3, 0.4)", (0.1, 0.2, 0.3, 0.4)),
        ("[1, 2, 3, 4, 5]", (1, 2, 3, 4)),
        ("[1,2,3]", None),
        ("nowhere", None),
    ],
)
def test_numbers_of_a_reply(reply, numbers):
    if "bbox_2d" in reply:  # A box of four in brackets comes before the digits of the name.
        numbers = (-9, 1.5, 0.25, 100)
    assert four_numbers(reply) == numbers


def test_units_follow_from_the_largest_number():
    assert to_pixels((0.1, 0.2, 0.5, 1.5), 200, 100) == (20, 20, 100, 100)
    assert to_pixels((100, 200, 500, 1000), 200, 100) == (20, 20, 100, 100)
    assert to_pixels((1001, 50, 20, 10), 2000, 100) == (20, 10, 1001, 50)
    assert to_pixels((1, 2, 3, 4), 0, 100) is None


@given(
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.floats(0.01, 1000),
)
def test_overlap_is_a_share_and_does_not_depend_on_scale(numbers, scale):
    one, other = ((*map(min, part[:2], part[2:]), *map(max, part[:2], part[2:])) for part in (numbers[:4], numbers[4:]))
    found = box_iou(one, other)
    assert 0 <= found <= 1 + 1e-12 and found == box_iou(other, one)
    if (one[2] - one[0]) * (one[3] - one[1]) > 1e-9 and (other[2] - other[0]) * (other[3] - other[1]) > 1e-9:
        scaled = box_iou(tuple(v * scale for v in one), tuple(v * scale for v in other))
        assert scaled == pytest.approx(found, abs=1e-6)
        assert box_iou(one, one) == pytest.approx(1)


def test_boxes_that_only_touch_share_nothing():
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize("reply", ["[" + "1" * 200_000, "[1 " * 100_000, "1." * 200_000, "[" + " " * 300_000])
def test_time_is_linear(reply):
    start = time.monotonic()
    four_numbers(reply)
    assert time.monotonic() - start < 2
