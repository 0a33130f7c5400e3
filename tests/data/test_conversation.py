"""One row, many spellings: parts, hub formats, and what is wrong with a row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from sailvl.data.conversation import to_record
from sailvl.data.encode import measure
from sailvl.data.pictures import find_file, open_pictures
from sailvl.types import Record, RecordError

ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, width in (("a", 10), ("b", 20), ("c", 30)):
        Image.new("RGB", (width, 5)).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder: Path, row: dict[str, Any]) -> Record:
    find = partial(find_file, root=folder)
    return to_record(row, find, id="x", where="f line 1, record x", num_frames=2, meta={})


def asked(*parts: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **columns}


def text(what: str) -> dict[str, Any]:
    return {"type": "text", "text": what}


@pytest.mark.parametrize(
    ("row", "said", "widths"),
    [
        (asked({"type": "image"}, text("hi"), images=["a.png"]), "<image>hi", [10]),
        (asked(text("hi "), {"type": "image", "image": "b.png"}), "hi <image>", [20]),
        (asked({"type": "image", "path": "b.png"}, {"type": "image"}, images=["a.png"]), "<image><image>", [20, 10]),
        (asked({"type": "image_url", "image_url": {"url": "c.png"}}, text("?")), "<image>?", [30]),
        (asked({"type": "image", "url": "c.png", "text": None}), "<image>", [30]),
        (
            asked({"type": "image", "index": 1}, {"type": "image", "index": 0}, images=["a.png", "b.png"]),
            "<image><image>",
            [20, 10],
        ),
        # a literal placeholder is a place too, and takes what no part has taken
        (asked(text("<image>\nsee"), {"type": "image", "index": 0}, images=["a.png", "b.png"]), "<image>\nsee<image>",
         [20, 10]),
        (asked(text("no place"), images=["a.png", "b.png"]), "no place", [10, 20]),
        (asked(text("a"), text("b")), "ab", []),
        ({"texts": [{"user": "q", "assistant": "yo", "source": "s"}], "images": ["a.png"]}, "q", [10]),
        ({"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "yo"}], "image": "a.png",
          "messages": None, "videos": None}, "<image>q", [10]),
    ],
)  # fmt: skip
def test_every_spelling_gives_texts_and_pictures_in_order(
    folder: Path, tiny_processor: Any, row: Any, said: str, widths: list[int]
) -> None:
    record = read(folder, row)
    assert [(m.role, m.text) for m in record.messages] == [("user", said), ("assistant", "yo")]
    assert [picture.width for picture in record.pictures] == widths
    assert [image.width for image in open_pictures(record)] == widths
    assert measure(record, tiny_processor)[0] > 0


def test_pictures_may_be_bytes(folder: Path) -> None:
    data = (folder / "b.png").read_bytes()
    rows = [
        {"images": [{"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"}, data]},
        {"image": {"bytes": data, "path": None}},
        {"images": None, "image": data},
    ]
    found = [read(folder, {**asked(text("q")), **row}) for row in rows]
    assert [[picture.width for picture in record.pictures] for record in found] == [[20, 10, 20], [20], [20]]
    assert [image.width for image in open_pictures(found[0])] == [20, 10, 20]


def test_clips_may_be_parts_and_bytes(folder: Path, clips: ModuleType) -> None:
    (folder / "v.mp4").write_bytes(clips.clip(6))
    own = read(folder, asked(text("<image> then "), {"type": "video", "video": "v.mp4"}, images=["a.png"]))
    listed = read(
        folder, asked({"type": "image"}, text(" then "), {"type": "video"}, images=["a.png"], videos=["v.mp4"])
    )
    inside = read(
        folder, asked(text("<image> then <video>"), image="a.png", video={"bytes": (folder / "v.mp4").read_bytes()})
    )
    assert own.messages == listed.messages == inside.messages
    assert own.messages[0].text == "<image> then <image><image>"
    assert own.pictures == listed.pictures
    assert [image.tobytes() for image in open_pictures(own)] == [image.tobytes() for image in open_pictures(inside)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (asked({"type": "image", "image": "http://e.org/a.png"}), "is a URL"),
        (asked({"type": "image", "image": "../a.png"}), "is outside"),
        (asked({"type": "image", "image": 1.5}), "'image' must be a list of file paths"),
        (asked({"type": "image", "image": "absent.png"}), "absent.png: no such file"),
        (asked({"type": "image", "index": 2}, images=["a.png", "b.png"]), "show image 3, the record lists 2"),
        (asked({"type": "image", "index": -1}, images=["a.png"]), "show image 0, the record lists 1"),
        (asked({"type": "image", "index": 0}, images=["a.png", "b.png"]), "show 1 images, and not all of the 2"),
        (asked({"type": "image", "path": "a.png"}, images=["b.png"]), "show 1 images, and not all of the 1"),
        (asked({"type": "image", "path": "a.png"}, {"type": "image"}), "show image 1, the record lists 0"),
        (asked({"type": "audio", "audio": "a.wav"}), "a part of type 'audio' in a user message"),
        (asked("bare string"), "a part of type 'str'"),
        (asked({"type": "text", "text": None}), "the text of a user message must be a string, not NoneType"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "image"}]}]},
         "a part of type 'image' in a assistant message"),
        ({"texts": [{"user": "q"}]}, "the text of a assistant message must be a string"),
        ({"texts": []}, "needs a non-empty list"),
        (asked(text("q"), images=[{"bytes": "text", "path": "a.png"}]), "'images' must be"),
        (asked(text("q"), images=[{"bytes": None, "path": None}]), "'images' must be"),
        (asked(text("q"), images=[None]), "'images' must be"),
        (asked(text("q"), images=[b"junk"]), "image of 4 bytes: not a picture"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(folder: Path, row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"f line 1, record x.*{reason}") as caught:
        read(folder, row)
    assert isinstance(caught.value, RecordError) or "image" in str(caught.value)
