"""Generated pictures: answers are what was drawn, boxes are tight, both languages speak, splits never meet."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from sailvl import assets
from sailvl.curate.synth import FAMILIES
from sailvl.curate.synth.families import LANGS, Scene, Turn, world
from sailvl.curate.synth.scene import Drawing, Shape, Sprite, Text, box_text, draw, sprite_box
from sailvl.curate.synth.words import COLOURS, KINDS, Lang

SIDE = 112


def scenes(family: str, lang: Lang, count: int = 40, split: str = "test") -> list[tuple[Scene, list[Turn]]]:
    """Scenes of a family with the turns that belong to it."""
    found = []
    for seed in range(count):
        rng = Random(f"{family}/{seed}")
        scene = rng.choice(FAMILIES[family])(rng, world(split, SIDE), lang, True)
        found.append((scene, [turn for turn in scene.turns if turn.family == family]))
    return found


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_asks_and_draws(family: str, lang: Lang) -> None:
    asked = [turn for scene, turns in scenes(family, lang) for turn in turns]
    assert len(asked) >= 20
    assert all(turn.question and turn.answer for turn in asked)
    assert len({turn.answer for turn in asked}) > 1
    for scene, _ in scenes(family, lang, 5):
        for drawing in scene.drawings:
            image = draw(drawing)
            assert image.mode == "RGB" and image.size == (drawing.width, drawing.height)
            assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 1, "an empty picture"


@pytest.mark.parametrize("lang", LANGS)
def test_questions_are_in_their_language(lang: Lang) -> None:
    for family in FAMILIES:
        for _, turns in scenes(family, lang, 8):
            for turn in turns:
                assert bool(re.search(r"[一-鿿]", turn.question)) == (lang == "zh"), turn


def test_count_is_the_number_of_sprites_none_of_which_touch() -> None:
    for scene, turns in scenes("count", "en"):
        sprites = [part for part in scene.drawings[0].parts if isinstance(part, Sprite)]
        assert turns[0].answer == str(len(sprites))
        boxes = [sprite_box(sprite) for sprite in sprites]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left and 0 <= top and right <= SIDE and bottom <= SIDE
            for other in boxes[:i]:
                assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]


def test_box_is_where_the_pixels_change() -> None:
    checked = 0
    for scene, turns in scenes("where", "en", 80):
        drawing = scene.drawings[0]
        alone = replace(drawing, parts=drawing.parts[-1:])  # without the ball
        changed = np.asarray(draw(alone)) != np.asarray(drawing.background)
        ys, xs = np.nonzero(changed.any(axis=2))
        left, top, right, bottom = map(int, re.findall(r"\d+", turns[0].answer))
        true = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 1000 / SIDE
        assert np.abs(true - [left, top, right, bottom]).max() <= 3000 / SIDE  # faint edges may equal the ground
        checked += 1
    assert checked >= 20


def test_relation_follows_the_picture() -> None:
    for scene, turns in scenes("relation", "en"):
        ball, thing = scene.drawings[0].parts
        assert isinstance(ball, Shape) and isinstance(thing, Sprite)
        x = thing.centre[0] - (ball.box[0] + ball.box[2]) / 2
        y = thing.centre[1] - (ball.box[1] + ball.box[3]) / 2
        true = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("below" if y > 0 else "above")
        assert [turn.answer for turn in turns] == [true]


def test_chart_answers_are_the_bars() -> None:
    for scene, turns in scenes("chart", "en"):
        bars = [part for part in scene.drawings[0].parts if isinstance(part, Shape)][10:]
        highest = max(bars, key=lambda bar: bar.box[3] - bar.box[1])
        colour = COLOURS[turns[0].answer][0]
        assert max(abs(a - b) for a, b in zip(colour, highest.fill, strict=True)) <= 18


def test_arithmetic_is_right() -> None:
    for scene, turns in scenes("arithmetic", "zh"):
        (line,) = (part.text for part in scene.drawings[0].parts if isinstance(part, Text))
        a, sign, b = line
        assert int(turns[0].answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert turns[0].thought.endswith(turns[0].answer)


def test_table_answers_are_the_cells() -> None:
    for scene, turns in scenes("table", "en"):
        cells = {}
        for part in scene.drawings[0].parts:
            if isinstance(part, Text) and part.fill == (0, 0, 0):
                cells[part.centre] = part.text
        columns, rows = (sorted({centre[axis] for centre in cells}) for axis in (0, 1))
        for turn in turns:
            found = re.search(r"row (\d), column (\w)", turn.question)
            assert found is not None
            assert turn.answer == cells[columns["ABC".index(found[2])], rows[int(found[1]) - 1]]


def test_clip_moves_as_it_says() -> None:
    for scene, turns in scenes("clip", "en"):
        assert scene.clip and len(scene.drawings) == 3
        first, _, last = (drawing.parts[0] for drawing in scene.drawings)
        assert isinstance(first, Sprite) and isinstance(last, Sprite)
        x, y = last.centre[0] - first.centre[0], last.centre[1] - first.centre[1]
        assert turns[0].answer == (("right" if x > 0 else "left") if abs(x) > abs(y) else "down" if y > 0 else "up")


def test_splits_share_no_sprite_and_no_number_column() -> None:
    worlds = [world(split, SIDE) for split in ("train", "validation", "test")]
    used = [{item for items in w.kinds.values() for item in items} for w in worlds]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert not set(worlds[0].columns) & set(worlds[2].columns)
    concepts = [{assets.item(item).concept for item in items} for items in used]
    assert not concepts[0] & concepts[2]
    for w in worlds:
        assert set(w.kinds) == set(KINDS) and all(w.kinds.values())


def test_boxes_are_thousandths_and_never_leave_the_picture() -> None:
    assert box_text((0, 28, 56, 112), 112, 112) == "<box>[[0,250,500,1000]]</box>"
    assert box_text((-5, 0, 130, 50), 100, 100) == "<box>[[0,0,1000,500]]</box>"


def test_drawing_is_a_value() -> None:
    one = Drawing(8, 8, (1, 2, 3), (Shape((0, 0, 3, 3), (9, 9, 9)),))
    assert one == Drawing(8, 8, (1, 2, 3), (Shape((0, 0, 3, 3), (9, 9, 9)),))
    assert draw(one).getpixel((7, 7)) == (1, 2, 3)
