"""Parquet tables: random rows by windows, exact, and broken ones by name."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sailvl.curriculum import Curriculum, Parquet, Train, WebDataset
from sailvl.data.loader import Loader
from sailvl.data.order import Order
from sailvl.data.source import Windowed
from sailvl.media import MediaError
from sailvl.recipes import read
from sailvl.run import open_sources
from sailvl.types import Batch, Mixture, RecordError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from sailvl.data import parquet  # noqa: E402  (needs pyarrow)
from sailvl.data.parquet import ParquetSource  # noqa: E402


def picture(width: int, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, 3, 3)).save(out, "PNG")
    return out.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>\nrow {number}"}, {"role": "assistant", "content": f"{number}."}]
    image = {"bytes": picture(20 + number), "path": f"{number}.png"}
    return {"id": f"r{number}", "messages": turns, "images": [image], **changes}


def write(path: Path, rows: list[dict[str, Any]], group: int = 10) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_reads_rows_at_random_with_pictures_inside(tmp_path: Path) -> None:
    source = ParquetSource(write(tmp_path / "d.parquet", [row(n) for n in range(35)]))
    assert len(source) == 35 and isinstance(source, Windowed)
    for number in (34, 0, 17, 9, 10):
        record = source.record(number)
        assert record.id == f"d/{number}"
        assert record.messages[0].text == f"<image>\nrow {number}"
        assert (record.pictures[0].width, record.pictures[0].height) == (20 + number, 8)
        assert source.images(record)[0].getpixel((0, 0)) == (20 + number, 3, 3)


def test_a_folder_a_pattern_and_paths_below_a_root(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(picture(33))
    for shard in range(3):
        beside = {"bytes": None, "path": "a.png"}
        rows = [
            row(10 * shard + n, images=[beside if n % 2 else {"bytes": picture(9), "path": None}]) for n in range(7)
        ]
        write(tmp_path / f"s-{shard}.parquet", rows, group=3)
    for path in (tmp_path, tmp_path / "s-*.parquet"):
        source = ParquetSource(path, name="mine", image_root=tmp_path / "pics")
        assert len(source) == 21
        said = [source.record(n).messages[1].text for n in range(21)]
        assert said == [f"{10 * shard + n}." for shard in range(3) for n in range(7)]
        assert [source.record(n).pictures[0].width for n in (0, 1, 8)] == [9, 33, 33]
    with pytest.raises(MediaError, match=r"s-0\.parquet row group 0 row 1, record tmp/1 .*a\.png: no such file"):
        ParquetSource(tmp_path / "s-0.parquet", name="tmp").record(1)


def test_structs_of_the_hubs(tmp_path: Path) -> None:
    parts = [{"index": None, "text": "what?", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    said = [
        {"content": parts, "role": "user"},
        {"content": [{"index": None, "text": "x", "type": "text"}], "role": "assistant"},
    ]
    vsft = ParquetSource(write(tmp_path / "vsft.parquet", [row(1, messages=said)]))
    assert vsft.record(0).messages[0].text == "what?<image>"
    pairs = {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}], "images": row(1)["images"]}
    vision = ParquetSource(write(tmp_path / "vision.parquet", [pairs]))
    assert [m.text for m in vision.record(0).messages] == ["a?", "b", "c?", "d"]
    llava = {
        "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
        "image": picture(7),
    }
    assert ParquetSource(write(tmp_path / "llava.parquet", [llava])).record(0).pictures[0].width == 7


@pytest.mark.parametrize("sizes", [[10], [500, 500, 3], [499, 1, 7, 493, 600, 2], [1] * 40, [0, 5, 0, 700, 0]])
def test_windows_are_whole_row_groups_of_enough_rows(sizes: list[int]) -> None:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    windows = parquet._windows(starts)
    assert windows[0] == 0 and set(windows) <= set(starts)
    ends = [*windows[1:], starts[-1]]
    assert all(end - start >= 500 for start, end in zip(windows[:-1], ends[:-1], strict=True))
    assert all(end > start for start, end in zip(windows, ends, strict=True))


@pytest.mark.parametrize("windows", [[0], [0, 30, 31, 90], list(range(0, 100, 7))])
def test_an_epoch_reads_every_row_once_and_window_by_window(windows: list[int]) -> None:
    for num_lanes in (1, 4):
        lanes = [
            Order({"a": 100}, {"a": 1}, seed=2, lane=v, num_lanes=num_lanes, windows={"a": windows})
            for v in range(num_lanes)
        ]
        rows = [lanes[k % num_lanes].draw()[1] for k in range(300)]
        for epoch in range(3):
            drawn = rows[100 * epoch : 100 * epoch + 100]
            assert sorted(drawn) == list(range(100))
            at = [sum(start <= r for start in windows) for r in drawn]
            changes = sum(a != b for a, b in pairwise(at))
            assert changes == len(windows) - 1
        assert rows[:100] != rows[100:200]
        again = Order({"a": 100}, {"a": 1}, seed=2, num_lanes=num_lanes, windows={"a": windows})
        first = Order({"a": 100}, {"a": 1}, seed=2, num_lanes=num_lanes, windows={"a": windows})
        for _ in range(37):
            first.draw()
        again.load_state_dict(first.state_dict())
        assert [again.draw() for _ in range(90)] == [first.draw() for _ in range(90)]


def test_an_order_by_windows_reads_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "WINDOW_ROWS", 40)
    source = ParquetSource(write(tmp_path / "d.parquet", [row(n) for n in range(200)]), cache_bytes=1 << 30)
    small = ParquetSource(write(tmp_path / "d.parquet", [row(n) for n in range(200)]), cache_bytes=0)
    reads = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, **options: Any) -> Any:
        reads.append(number)
        return original(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    order = Order({"d": 200}, {"d": 1}, seed=0, windows={"d": source.windows})
    rows = [order.draw()[1] for _ in range(200)]
    assert [source.record(r).id for r in rows] == [f"d/{r}" for r in rows]
    assert sorted(reads) == list(range(20))
    reads.clear()
    assert [small.record(r).id for r in rows[:50]] == [f"d/{r}" for r in rows[:50]]
    assert len(reads) > 20 and len(small._cache) == 1


def test_bad_rows_are_rejected_by_name_and_resume_is_exact(tmp_path: Path, tiny_processor: Any) -> None:
    rows = [row(n) for n in range(30)]
    rows[4]["images"][0]["bytes"] = b"not a picture"
    rows[11]["images"][0]["bytes"] = picture(31, 40)[:60]
    rows[17]["messages"] = None
    rows[23]["messages"] = [{"role": "tool", "content": "x"}]
    source = ParquetSource(write(tmp_path / "d.parquet", rows, group=6))
    options: dict[str, Any] = {"max_tokens": 150, "max_tiles": 20, "buffer": 6, "seed": 0, "lanes": 2}

    def new(workers: int = 0, **more: Any) -> Loader:
        return Loader({"d": source}, {"d": 1.0}, tiny_processor, workers=workers, **options, **more)

    plain = [next_ for _, next_ in zip(range(14), new(), strict=False)]
    reasons = {reject.id: reject.reason for step in plain for batch in step for reject in batch.rejects}
    assert set(reasons) == {"d/4", "d/11", "d/17", "d/23"}
    assert "d.parquet row group 0 row 4, record d/4 (id 'r4')" in reasons["d/4"]
    assert "needs a non-empty list" in reasons["d/17"] and "role 'tool'" in reasons["d/23"]
    first = new(workers=2)
    before = [next(first) for _ in range(4)]
    state = first.state_dict()
    first.close()
    second = new(rank=1, world_size=2)
    second.load_state_dict(state)
    after = [next(second)[0] for _ in range(10)]

    def ids(batch: Batch) -> list[int]:
        return batch.ids_T.tolist()  # type: ignore[no-any-return]

    assert [ids(b) for step in before for b in step] == [ids(b) for step in plain[:4] for b in step]
    assert [ids(batch) for batch in after] == [ids(step[1]) for step in plain[4:]]


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", [row(n) for n in range(30)])
    where = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset or 0
    data = bytearray(path.read_bytes())
    data[where : where + 300] = os.urandom(300)
    path.write_bytes(data)
    source = ParquetSource(path)
    with pytest.raises(RecordError, match=r"d\.parquet row group 1 row 3, record d/13.*: unreadable"):
        source.record(13)
    assert source.record(5).messages[1].text == "5." and source.record(25).messages[1].text == "25."


def test_what_cannot_be_a_table_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "cut.parquet").write_bytes(write(tmp_path / "d.parquet", [row(1)]).read_bytes()[:-30])
    write(tmp_path / "other.parquet", [{"question": "?"}])
    pq.write_table(pa.Table.from_pylist([row(1)]).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "none.parquet": "not a readable Parquet file",
        "junk.parquet": "not a readable Parquet file",
        "cut.parquet": "not a readable Parquet file",
        "other.parquet": "needs a column messages, conversations or texts; it has question",
        "empty.parquet": "no rows in 1 files",
        "folder": r"no \.parquet files here",
        "d.csv": r"d\.csv is not a \.parquet file",
    }.items():
        with pytest.raises(RecordError, match=f"{name}.*{reason}"):
            ParquetSource(tmp_path / name)


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = ParquetSource(write(tmp_path / "d.parquet", [row(n) for n in range(5)])).fingerprint()
    assert ParquetSource(write(tmp_path / "other" / "d.parquet", [row(n) for n in range(5)])).fingerprint() == first
    assert ParquetSource(write(tmp_path / "d.parquet", [row(n) for n in range(1, 6)])).fingerprint() != first


def test_a_picture_too_large_for_its_row_is_still_a_named_reject(tmp_path: Path) -> None:
    source = ParquetSource(write(tmp_path / "d.parquet", [row(1, images=[{"bytes": b"", "path": None}])]))
    with pytest.raises(MediaError, match=r"record d/0.*empty, 0 bytes"):
        source.record(0)


def test_recipes_name_tables_and_shards(tmp_path: Path) -> None:
    write(tmp_path / "d.parquet", [row(1)])
    (tmp_path / "r.yaml").write_text(
        "sources:\n  mine: {kind: parquet, path: d.parquet}\n"
        "trains: [lm]\nsteps: 2\nmax_tokens: 256\nmax_tiles: 4\nlr: 1e-4\n"
    )
    recipe = read(tmp_path / "r.yaml")
    assert recipe.sources["mine"] == Parquet(path=str(tmp_path / "d.parquet"))
    opened = open_sources(recipe)
    assert isinstance(opened["mine"], ParquetSource) and opened["mine"].record(0).id == "mine/0"
    stage = Train(
        name="s", data=Mixture(shares={"w": 1.0}), trains=("lm",), steps=1, max_tokens=9, max_tiles=0, lr=1e-3
    )
    curriculum = Curriculum(name="c", sources={"w": WebDataset(path=str(tmp_path / "no.tar"))}, stages=(stage,))
    with pytest.raises(ValueError, match=r"sources\.w.*no\.tar"):
        open_sources(curriculum)
