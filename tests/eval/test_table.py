"""Benchmark files are read as the published scores' toolkit reads them, whatever is in their cells."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sailvl.eval.table import TableError, picture_key, pictures, read, read_predictions, write_tsv
from sailvl.media import MediaError


def png(colour: str = "red", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def tsv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    return path


def test_cells_are_typed_as_pandas_types_them(tmp_path):
    rows = [["index", "answer", "count", "mixed", "gap", "flag", "hint"]]
    rows += [["1", "None", "12", "a", "3", "True", "N/A"], ["2", "B", "7", "5", "", "False", "null"]]
    first, second = read(tsv(tmp_path / "x.tsv", rows)).rows
    assert first == {"index": 1, "answer": None, "count": 12, "mixed": "a", "gap": 3.0, "flag": True, "hint": None}
    assert second["gap"] is None and second["mixed"] == "5" and str(first["gap"]) == "3.0"


def test_plain_reading_misses_empty_cells_only(tmp_path):
    rows = [["index", "answer", "gap"], ["1", "None", "12"], ["2", "NA", ""]]
    first, second = read(tsv(tmp_path / "x.tsv", rows), plain=True).rows
    assert (first["answer"], first["gap"]) == ("None", "12")
    assert (second["answer"], second["gap"]) == ("NA", None)


def test_indices_are_all_integers_or_all_texts(tmp_path):
    rows = [["index", "question"], ["1", "a"], ["VD_0", "b"]]
    assert [row["index"] for row in read(tsv(tmp_path / "x.tsv", rows)).rows] == ["1", "VD_0"]


def test_pictures_come_from_base64_lists_references_and_paths(tmp_path):
    red, blue = png("red"), png("blue")
    listed = str([b64(red), b64(blue)])
    rows = [["index", "image", "question"], ["1", b64(red), 'a\tb\n"c"'], ["2", "1", "d"], ["3", listed, "e"]]
    table = read(tsv(tmp_path / "Set.tsv", rows))
    assert table.rows[0]["question"] == 'a\tb\n"c"'
    assert [pictures(table, number) for number in range(3)] == [[red], [red], [red, blue]]
    assert [picture_key(table, number) for number in range(3)] == [0, 0, 2]

    (tmp_path / "images/Paths").mkdir(parents=True)
    (tmp_path / "images/Paths/a.png").write_bytes(red)
    absolute = tmp_path / "b.png"
    absolute.write_bytes(blue)
    rows = [["index", "image_path"], ["1", "a.png"], ["2", str(["a.png", str(absolute)])], ["3", "gone.png"]]
    table = read(tsv(tmp_path / "Paths.tsv", rows))
    assert pictures(table, 0) == [tmp_path / "images/Paths/a.png"]
    assert pictures(table, 1) == [tmp_path / "images/Paths/a.png", absolute]
    with pytest.raises(MediaError, match=r"row 3 .*gone\.png"):
        pictures(table, 2)


def test_rows_with_an_empty_picture_are_dropped_and_bad_references_named(tmp_path):
    rows = [["index", "image"], ["1", ""], ["2", b64(png(side=40))], ["3", "9"]]
    table = read(tsv(tmp_path / "x.tsv", rows))
    assert [row["index"] for row in table.rows] == [2, 3]
    with pytest.raises(MediaError, match=r"row 2 .*'9' names no row"):
        pictures(table, 1)


def test_the_local_variant_keeps_the_name_of_its_set(tmp_path):
    assert read(tsv(tmp_path / "MME_local.tsv", [["index"], ["1"]])).name == "MME"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["question"], ["a"]], "index"),
        ([["index", "question"]], "no rows"),
        ([["index"], ["1"], ["1"]], "row 2 has the index of row 1"),
        ([["index"], [""], ["2"]], "row 1|no index"),
        ([["index", "a"], ["1", "b", "c"]], "3 cells for 2 columns"),
        ([["index", "a", "a"], ["1", "b", "c"]], "one name"),
    ],
)
def test_unusable_tables_say_what_is_wrong(tmp_path, rows, message):
    path = tsv(tmp_path / "x.tsv", rows)
    if rows[1:] == [[""], ["2"]]:
        path.write_text("index\tq\n\ta\n2\tb\n")
    with pytest.raises(TableError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_binary_files_are_no_tables(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"index\n\xff\xfe\n")
    with pytest.raises(TableError, match="UTF-8"):
        read(tmp_path / "x.tsv")


def test_cells_of_megabytes_stay_on_disk(tmp_path):
    big = b64(bytes(range(256)) * 12_000)
    table = read(tsv(tmp_path / "x.tsv", [["index", "image", "question"], ["1", big, "q"]]))
    assert "image" not in table.rows[0] and len(pictures(table, 0)[0]) == 256 * 12_000


text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), max_size=40)


@given(st.lists(text, min_size=1, max_size=6))
def test_written_tables_read_back(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("t") / "x.tsv"
    write_tsv(path, [{"index": i, "prediction": cell} for i, cell in enumerate(cells)], ["index", "prediction"])
    assert [row["prediction"] for row in read_predictions(path, plain=True)] == [cell or None for cell in cells]


def test_other_ends_of_lines_are_part_of_a_text(tmp_path):
    odd = "a\u2028b\x0cc\x85d"
    rows = [["index", "question", "image"], ["1", odd, b64(png("red"))]]
    table = read(tsv(tmp_path / "Set.tsv", rows))
    assert table.rows[0]["question"] == odd and pictures(table, 0) == [png("red")]
    (tmp_path / "p.jsonl").write_text(f'{{"index": 1, "prediction": "{odd[:3]}"}}\n', encoding="utf-8")
    assert read_predictions(tmp_path / "p.jsonl")[0]["prediction"] == odd[:3]


def test_predictions_read_alike_from_every_format(tmp_path):
    from openpyxl import Workbook

    rows = [{"index": 1, "answer": "B", "prediction": "B. red"}, {"index": 2, "answer": "A", "prediction": "None"}]
    write_tsv(tmp_path / "p.tsv", rows, ["index", "answer", "prediction"])
    book = Workbook()
    book.active.append(["index", "answer", "prediction"])
    for row in rows:
        book.active.append(list(row.values()))
    book.save(tmp_path / "p.xlsx")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_predictions(tmp_path / "p.tsv") == read_predictions(tmp_path / "p.xlsx")
    assert read_predictions(tmp_path / "p.tsv")[1]["prediction"] is None
    assert read_predictions(tmp_path / "p.json") == read_predictions(tmp_path / "p.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"index,prediction\n1,a\n", r"\.tsv, \.xlsx"),
        ("p.xlsx", b"not a workbook", "workbook"),
        ("p.json", b"{", "JSON"),
        ("p.json", b'{"index": 1}', "list of objects"),
        ("p.jsonl", b'{"index": 1}\n', "row 1 has no 'prediction'"),
        ("p.tsv", b"index\tanswer\n1\ta\n", "row 1 has no 'prediction'"),
    ],
)
def test_unusable_predictions_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message):
        read_predictions(tmp_path / name)
    with pytest.raises(TableError, match="no such file"):
        read_predictions(tmp_path / "gone.tsv")


@pytest.mark.parametrize("column", ["split", "category"])
def test_rows_of_refcoco_are_told_apart_by_their_split(tmp_path, column):
    cells = {"split": ("RefCOCO_val", "RefCOCO+_testA"), "category": ("RefCOCO val", "RefCOCO+ test A")}[column]
    lines = [f"{i}\t{'i' * 70 if i == 0 else f'{s}_0'}\twhere?\t{c}" for c, s in zip(
        cells, ("RefCOCO_val", "RefCOCO+_testA"), strict=True) for i in range(2)]  # fmt: skip
    (tmp_path / "RefCOCO.tsv").write_text("\n".join([f"index\timage\tquestion\t{column}", *lines]) + "\n")
    table = read(tmp_path / "RefCOCO.tsv")
    wanted = ["RefCOCO_val_0", "RefCOCO_val_1", "RefCOCO+_testA_0", "RefCOCO+_testA_1"]
    assert [row["index"] for row in table.rows] == wanted and "split" in table.columns
    assert [row["split"] for row in table.rows] == [name.rpartition("_")[0] for name in wanted]
    assert table.holders == {"RefCOCO_val_0": 0, "RefCOCO+_testA_0": 2} and len(table.references) == 2
    write_tsv(tmp_path / "again/RefCOCO.tsv", table.rows, table.columns)
    assert [row["index"] for row in read(tmp_path / "again/RefCOCO.tsv").rows] == wanted  # named once, not twice
    with pytest.raises(TableError, match="index of row 1"):
        (tmp_path / "other.tsv").write_text("index\tquestion\n0\ta\n0\tb\n")
        read(tmp_path / "other.tsv")
