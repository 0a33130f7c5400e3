from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sailvl.grounding import Box, draw_boxes, parse_boxes

WIDTH, HEIGHT = 200, 100


def places(text: str) -> list[tuple[float, ...]]:
    return [(box.x1, box.y1, box.x2, box.y2) for box in parse_boxes(text, WIDTH, HEIGHT)]


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[100,200,500,900]]</box>",
        "[[100, 200, 500, 900]]",
        "[100.0,200,500,900.00]",
        "it is at [ 100 , 200 , 500 , 900 ], I think",
        "<box>[[500,900,100,200]]</box>",  # corners in another order
        "<box>[[100,900,500,200]]</box>",
        "［［１００，２００，５００，９００］］",
        "<box>[[100,200,500,900]]",
        "[[1,2],[3,4]] [100,200,500,900] [1,2,3] [1,2,3,4,5]",
    ],
)
def test_one_box_in_many_spellings(text: str) -> None:
    assert places(text) == [(20, 20, 100, 90)]


def test_names_hold_for_the_boxes_directly_behind_them() -> None:
    text = (
        "<ref> 一只猫 </ref><box>[[0,0,100,100],[200,200,300,300]]</box>, <box>[[400,400,500,500]]</box> and "
        "[[600,600,700,700]] <ref>the dog</ref> [[1,1,999,999]]<ref>nothing</ref>"
    )
    found = parse_boxes(text, 1000, 1000)
    assert [box.label for box in found] == ["一只猫", "一只猫", "一只猫", "", "the dog"]
    assert [box.x1 for box in found] == [0, 200, 400, 600, 1]


def test_quadrilaterals() -> None:
    for text in (
        "<ref>sign</ref><quad>[[100,200,500,100,600,800,0,900]]</quad>",
        "<ref>sign</ref><quad>[[100,200],[500,100],[600,800],[0,900]]</quad>",
        "<ref>sign</ref>[100,200,500,100,600,800,0,900]",
    ):
        (box,) = parse_boxes(text, WIDTH, HEIGHT)
        assert box.corners == ((20, 20), (100, 10), (120, 80), (0, 90))
        assert (box.x1, box.y1, box.x2, box.y2, box.label) == (0, 10, 120, 90, "sign")
    two = "<quad>[[1,1,9,1,9,9,1,9],[11,1,19,1,19,9,11,9]]</quad>"
    assert [len(box.corners) for box in parse_boxes(two, 1000, 1000)] == [4, 4]


@pytest.mark.parametrize(
    "text",
    [
        "", "no box", "[[1,2,3]]", "[1,2,3,4,5]", "[[a,b,c,d]]", "[[nan,1,2,3]]", "[[1e2,1,2,3]]", "1 2 3 4",
        "[[100,200,500,900", "[[100,100,100,300]]", "[[100,300,200,300]]", "<quad>[[1,2,3,4]]</quad>",
        "[[1500,0,2000,500]]", "[[-500,0,-1,500]]", "<ref>a</ref>", "<box></box>", "[[,,,]]",
    ],
)  # fmt: skip
def test_what_is_no_box_is_skipped(text: str) -> None:
    assert parse_boxes(text, WIDTH, HEIGHT) == []


def test_coordinates_outside_are_moved_to_the_border() -> None:
    assert places("[[-50,-1.5,1200,500]]") == [(0, 0, 200, 50)]


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "[1," * 80_000, "<ref>" * 50_000, "<ref>a</ref>" * 20_000, "[1,2,3,4]" * 20_000, "<quad>" * 40_000],
)
def test_reading_is_linear(text: str) -> None:
    began = time.process_time()
    parse_boxes(text, 10, 10)
    assert time.process_time() - began < 2


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        parse_boxes("", 0, 5)


numbers = st.one_of(st.integers(-100, 1100), st.floats(0, 1000).map(lambda x: round(x, 3)))


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5), st.integers(1, 5000), st.integers(1, 5000))
def test_boxes_lie_in_the_picture_and_keep_their_place(rows: list[tuple], width: int, height: int) -> None:
    text = " ".join(f"<box>[[{','.join(f'{number:.3f}' for number in row)}]]</box>" for row in rows)
    found = parse_boxes(text, width, height)
    expected = []
    for x1, y1, x2, y2 in rows:
        xs, ys = (sorted(min(max(float(f"{v:.3f}"), 0), 1000) for v in pair) for pair in ((x1, x2), (y1, y2)))
        if xs[0] < xs[1] and ys[0] < ys[1]:
            expected.append((xs[0] * width / 1000, ys[0] * height / 1000, xs[1] * width / 1000, ys[1] * height / 1000))
    assert len(found) == len(expected)
    for box, place in zip(found, expected, strict=True):
        assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx(place)
        assert 0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height


@given(st.text(alphabet="[]<>/refboxquad0123456789,.- 猫\n", max_size=200))
def test_any_text_gives_boxes_or_nothing(text: str) -> None:
    for box in parse_boxes(text, 37, 41):
        assert 0 <= box.x1 < box.x2 <= 37 and 0 <= box.y1 < box.y2 <= 41


# ---- drawing ----------------------------------------------------------------------------------------------------


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before.convert("RGB")) != np.asarray(after)).any(-1)


def test_only_the_outline_is_drawn() -> None:
    picture = Image.new("RGB", (400, 400), "white")
    drawn = draw_boxes(picture, [Box(x1=100, y1=50, x2=300, y2=250)])
    where = changed(picture, drawn)
    rows, columns = np.nonzero(where)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (100, 50, 300, 250)
    assert not where[60:240, 110:290].any() and where[50:52, 100:300].all() and where[100, 100]
    assert picture.getpixel((100, 100)) == (255, 255, 255), "the picture given is left alone"


def test_lines_grow_with_the_picture_and_colours_differ() -> None:
    for side, line in ((100, 1), (400, 2), (2000, 10)):
        picture = Image.new("RGB", (side, side), "white")
        drawn = draw_boxes(picture, [Box(x1=0.2 * side, y1=0.2 * side, x2=0.8 * side, y2=0.8 * side)])
        assert changed(picture, drawn)[side // 2, : side // 2].sum() == line
    picture = Image.new("L", (400, 400), 255)
    boxes = [Box(x1=30 * index + 5, y1=10, x2=30 * index + 25, y2=100) for index in range(12)]
    drawn = draw_boxes(picture, boxes)
    assert drawn.mode == "RGB"
    assert len({drawn.getpixel((30 * index + 5, 50)) for index in range(12)}) == 12


def test_labels_are_readable_in_both_languages() -> None:
    picture = Image.new("RGB", (400, 300), "white")
    at = Box(x1=50, y1=100, x2=200, y2=200)
    images = {
        label: draw_boxes(picture, [Box(**{**vars(at), "label": label})]) for label in ("", "cat", "猫", "狗", "鱼")
    }
    pixels = {label: changed(images[""], image) for label, image in images.items()}
    for label in ("cat", "猫", "狗", "鱼"):
        rows, columns = np.nonzero(pixels[label])
        assert rows.max() <= 100 and 50 <= columns.min() and rows.min() >= 70, "above its box, from its left edge"
        inside = np.asarray(images[label])[rows.min() : rows.max(), columns.min() : columns.max()]
        assert len(np.unique(inside.reshape(-1, 3), axis=0)) > 3, "letters on a ground of another colour"
    assert not np.array_equal(np.asarray(images["猫"]), np.asarray(images["狗"])), "no empty squares for Chinese"


@pytest.mark.parametrize("label", ["a very long name " * 40, "猫" * 500, "\n\n", "a\nb"])
@pytest.mark.parametrize("size", [(400, 300), (30, 20), (3, 2), (1, 1)])
def test_labels_stay_in_the_picture(label: str, size: tuple[int, int]) -> None:
    width, height = size
    for x, y in ((0, 0), (width / 2, height / 2)):
        drawn = draw_boxes(Image.new("RGB", size), [Box(x1=x, y1=y, x2=width, y2=height, label=label)])
        assert drawn.size == size
    if size == (400, 300) and label.strip():
        base = draw_boxes(Image.new("RGB", size), [Box(x1=300, y1=0, x2=400, y2=300)])
        drawn = draw_boxes(Image.new("RGB", size), [Box(x1=300, y1=0, x2=400, y2=300, label=label)])
        _, columns = np.nonzero(changed(base, drawn))
        assert len(columns) > 50 and columns.max() < 400


def test_quadrilaterals_are_drawn_as_such() -> None:
    picture = Image.new("RGB", (400, 400), "white")
    (box,) = parse_boxes("<quad>[[500,100,900,500,500,900,100,500]]</quad>", 400, 400)
    where = changed(picture, draw_boxes(picture, [box]))
    assert where[118:122, 118:122].any() and not where[40:60, 40:60].any()
