from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from sailvl.config import ConfigError, digest, load, to_dict, value
from sailvl.types import Mixture


@value
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float


@value
class Square:
    kind: Literal["square"] = "square"
    side: Annotated[int, Field(gt=0)]


@value
class Sheet:
    name: str
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="kind")], ...] = ()
    rate: float = 1e-3
    bold: bool = False
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[float, float] = (0.0, 1.0)
    parts: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    frame: Circle | None = None


@value
class Named:
    name: str
    rate: float = 0.0


@value
class Book:
    pages: tuple[Named, ...]
    note: str | None = None


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def errors(source: object, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(Sheet, source, overrides)  # type: ignore[arg-type]
    return dict(caught.value.errors)


def test_every_error_at_once_with_its_path(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml",
        """
shapes:
  - {kind: circle, radius: wide}
  - {kind: square, side: 0, sidee: 3}
  - {kind: squar, side: 1}
  - {side: 1}
  - 7
rate: true
bold: yes
mode: fas
pair: [1, 2, 3]
parts: {a: x}
frame: {radius: 1, kind: square}
naem: x
""",
    )
    found = errors(path)
    assert found == {
        "name": "is required",
        "naem": "unknown key; did you mean 'name'?",
        "shapes.0.radius": "must be a number, not the text 'wide'",
        "shapes.1.side": "must be greater than 0, not 0",
        "shapes.1.sidee": "unknown key; did you mean 'side'?",
        "shapes.2.kind": "'squar' is unknown; did you mean 'square'?",
        "shapes.3": "needs a kind: circle or square",
        "shapes.4": "must be keys and values, not 7",
        "rate": "must be a number, not the boolean true",
        "bold": "must be true or false, not the text 'yes'; write true or false",
        "mode": "the text 'fas' is not one of 'fast' or 'slow'; did you mean 'fast'?",
        "pair": "needs at most 2 item(s)",
        "parts.a": "must be a number, not the text 'x'",
        "frame.kind": "the text 'square' is not one of 'circle'",
    }


def test_the_message_names_the_file_and_has_a_line_per_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "bold: 1\nrate: x\n")
    with pytest.raises(ConfigError) as caught:
        load(Sheet, path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.errors) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("3", 3.0), (".5", 0.5), ("-2.", -2.0), ("2e3", 2000.0), ("+1.5e+2", 150.0)],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, number: float) -> None:
    assert load(Sheet, write(tmp_path / "a.yaml", f"name: a\nrate: {text}\n")).rate == number


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1", '"true"', "0"])
def test_only_true_and_false_are_booleans(tmp_path: Path, text: str) -> None:
    assert "bold" in errors(write(tmp_path / "a.yaml", f"name: a\nbold: {text}\n"))


@pytest.mark.parametrize(
    "text", ["no", "on", "1:30", "2024-01-02", "0x1F", "0o17", "1_000", "NO", "null-ish", "=", "<<"]
)
def test_words_stay_words(tmp_path: Path, text: str) -> None:
    assert load(Sheet, write(tmp_path / "a.yaml", f"name: {text}\n")).name == text


def test_integers_are_whole_numbers_and_never_booleans(tmp_path: Path) -> None:
    for text in ("true", "1.5", "1.0", '"8"', "nothing"):
        path = write(tmp_path / "a.yaml", f"name: a\nshapes: [{{kind: square, side: {text}}}]\n")
        assert "must be a whole number" in errors(path)["shapes.0.side"]
    path = write(tmp_path / "a.yaml", "name: a\nshapes: [{kind: square, side: 1e3}]\n")
    assert load(Sheet, path).shapes == (Square(side=1000),)


@pytest.mark.parametrize("text", [".nan", ".inf", "1e999", "nan", "-1e999"])
def test_numbers_must_be_finite(tmp_path: Path, text: str) -> None:
    assert "number" in errors(write(tmp_path / "a.yaml", f"name: a\nrate: {text}\n"))["rate"]


def test_repeated_keys_are_refused_beside_all_other_errors(tmp_path: Path) -> None:
    text = "name: a\nrate: 1\nshapes:\n - {kind: circle, radius: 1, radius: 2}\nrate: 2\nbold: 3\n"
    found = errors(write(tmp_path / "a.yaml", text))
    assert found["rate"] == "given twice, in lines 2 and 5"
    assert found["shapes.0.radius"] == "given twice, in lines 4 and 4"
    assert "bold" in found
    assert errors(write(tmp_path / "a.json", '{"name": "a", "rate": 1, "rate": 2}')) == {"rate": "given 2 times"}


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2",
        "\tname: a",
        "- 1\n- 2\n",
        "just words",
        "name: &a [*a]",
        "x: &x [1,1,1,1,1,1,1,1,1]\ny: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y,*y,*y,*y,*y]\n"
        "u: &u [*z,*z,*z,*z,*z,*z,*z,*z]\nv: &v [*u,*u,*u,*u,*u,*u,*u,*u]\nw: [*v,*v,*v,*v,*v,*v,*v,*v]\n",
        "name: !!python/object/apply:os.system ['true']\n",
        "base: &b {rate: 1}\nname: a\n<<: *b\n",
        "? [a]\n: 1\n",
        "--- {name: a}\n--- {name: b}\n",
        "",
        "[" * 5000,
        "{a: " * 5000,
    ],
)
def test_hostile_files_are_errors_not_crashes(tmp_path: Path, text: str) -> None:
    errors(write(tmp_path / "a.yaml", text))


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff\xfe\x00")
    assert "UTF-8" in errors(path)[""]
    path.write_bytes("name: 名字\n".encode("utf-8-sig"))
    assert load(Sheet, path).name == "名字"
    assert "not JSON" in errors(write(tmp_path / "b.json", "{name: a}"))["line 1"]


def test_overrides_reach_items_by_index_and_by_name() -> None:
    data = {"pages": [{"name": "first"}, {"name": "second", "rate": 1}]}
    book = load(Book, data, ["pages.second.rate=1e-2", "pages.0.rate=5", "note=a: b", "note=x=y"])
    assert book == Book(pages=(Named(name="first", rate=5.0), Named(name="second", rate=0.01)), note="x=y")
    assert data == {"pages": [{"name": "first"}, {"name": "second", "rate": 1}]}


def test_overrides_make_parse_and_clear() -> None:
    sheet = load(Sheet, {"name": "a", "note": "x"}, ["frame.radius=2", "pair=[1, 2.5]", "note=null", "parts={b: 1}"])
    assert (sheet.frame, sheet.pair, sheet.note, sheet.parts) == (Circle(radius=2.0), (1.0, 2.5), None, {"b": 1.0})


def test_bad_overrides_are_reported_together() -> None:
    found = errors(
        {"name": "a", "shapes": [{"kind": "circle", "radius": 1}]},
        "rate",
        "=3",
        "shapes.1.radius=2",
        "shapes.x.radius=2",
        "name.x=3",
        "ratee=3",
        "shapes.0.radius=[",
    )
    assert found["rate"].startswith("an override is written") and "=3" in found
    assert found["shapes.1"].startswith("no such item of 1") and "shapes.x" in found
    assert found["name.x"] == "name is the text 'a', it has no key 'x'"
    assert found["ratee"] == "unknown key; did you mean 'rate'?"
    assert found["shapes.0.radius"] == "must be a number, not the text '['"


def test_values_are_frozen_and_checked_again_when_replaced() -> None:
    square = Square(side=2)
    with pytest.raises(FrozenInstanceError):
        square.side = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="greater than 0"):
        replace(square, side=-1)
    with pytest.raises(ValueError):
        Square(side=True)
    assert replace(square, side=3) == Square(side=3)


SHAPES = st.one_of(
    st.builds(Circle, radius=st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Square, side=st.integers(1, 10**12)),
)
SHEETS = st.builds(
    Sheet,
    name=st.text(),
    shapes=st.lists(SHAPES, max_size=3).map(tuple),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    bold=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    parts=st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3),
    note=st.none() | st.text(),
)


@given(SHEETS)
def test_value_to_json_to_value(sheet: Sheet) -> None:
    text = json.dumps(to_dict(sheet))
    again = load(Sheet, json.loads(text))
    assert again == sheet and digest(again) == digest(sheet)


def test_json_file_equals_mapping(tmp_path: Path) -> None:
    sheet = Sheet(name='emoji 😀 "quoted" \t \\', shapes=(Circle(radius=1e-9),), parts={"b": 1.0, "a": 2.0})
    for ending in ("json", "yaml"):
        path = write(tmp_path / f"a.{ending}", json.dumps(to_dict(sheet), ensure_ascii=ending == "json"))
        assert load(Sheet, path) == sheet


def test_digest_sees_content_only(tmp_path: Path) -> None:
    one = load(Sheet, {"name": "a", "rate": 1, "parts": {"x": 0.5, "y": 1}})
    two = load(Sheet, {"parts": {"y": 1.0, "x": 0.5}, "rate": 1.0, "name": "a"})
    assert digest(one) == digest(two) == digest(replace(one))
    assert len({digest(one), digest(replace(one, rate=2.0)), digest(replace(one, bold=True))}) == 3
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_mixture_shares_sum_to_one() -> None:
    assert list(Mixture(shares={"b": 0.3, "a": 0.7}).shares) == ["a", "b"]
    assert Mixture(shares={name: 0.1 for name in "abcdefghij"}).shares["a"] == 0.1
    for shares in ({}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ValueError, match="share"):
            Mixture(shares=shares)
