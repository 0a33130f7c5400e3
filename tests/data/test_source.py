from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from sailvl.data.encode import encode, measure
from sailvl.data.loader import Loader
from sailvl.data.source import JsonlSource
from sailvl.media import MediaError
from sailvl.types import RecordError
from sailvl.video import video_frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "pics" / "a.png")
    Image.new("RGB", (50, 20), "red").save(tmp_path / "pics" / "turned.jpg", exif=exif)
    return tmp_path


def turns(text: str = "hi") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "yo"}]


def said(who: str, what: str) -> dict[str, str]:
    return {"from": who, "value": what}


def write(folder: Path, *lines: Any) -> JsonlSource:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "d.jsonl").write_text(text + "\n", encoding="utf-8")
    return JsonlSource(folder / "d.jsonl")


def test_reads_the_usual_spellings(folder: Path) -> None:
    source = write(
        folder,
        {"id": "one", "images": ["pics/a.png", "pics/turned.jpg"], "messages": turns("<image><image>猫?")},
        "",
        {"id": 7, "image": "pics/a.png", "conversations": [said("human", "q"), said("gpt", "a")]},
        {"messages": [{"role": "system", "text": "s"}, *turns()]},
    )
    assert len(source) == 3
    records = [source.record(row) for row in (2, 0, 1)]
    assert [record.id for record in records] == ["d/2", "one", "7"]
    assert [(p.width, p.height, p.frame) for p in records[1].pictures] == [(40, 20, False), (20, 50, False)]
    assert [(m.role, m.text) for m in records[1].messages] == [("user", "<image><image>猫?"), ("assistant", "yo")]
    assert [(m.role, m.text) for m in records[2].messages] == [("user", "q"), ("assistant", "a")]
    assert [m.role for m in records[0].messages] == ["system", "user", "assistant"]
    assert [image.size for image in source.images(records[1])] == [(40, 20), (20, 50)]


def test_ids_are_unique_whatever_the_file_says(folder: Path) -> None:
    same, unnamed, forged = {"id": "x", "messages": turns()}, {"messages": turns()}, {"id": "d/1", "messages": turns()}
    source = write(folder, same, unnamed, same, forged, {"id": "y", "messages": turns()})
    ids = [source.record(row).id for row in range(5)]
    assert ids == ["x", "d/1", "d/2", "d/3", "y"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "x", "messages": [', r"d\.jsonl line 2: not JSON"),
        ("[1, 2]", r"line 2: a JSON object is expected, this is a list"),
        ('{"id": "x"}', r"line 2, record x: needs a non-empty list 'messages'"),
        ('{"id": "x", "messages": []}', r"record x: needs a non-empty list"),
        ('{"id": "x", "messages": ["hi"]}', r"record x: a message must be an object"),
        ('{"id": "x", "messages": [{"role": "tool", "content": "a"}]}', r"record x: role 'tool'"),
        ('{"id": "x", "messages": [{"role": ["user"], "content": "a"}]}', r"record x: role \['user'\]"),
        ('{"id": "x", "messages": [{"role": "user", "content": 3}]}', r"record x: the text of a user message"),
        ('{"id": "x", "messages": [{"role": "user"}]}', r"record x: the text of a user message"),
        ("[" * 100_000, r"line 2: not JSON"),
        ('{"id": "x", "messages": [{"role": "user", "content": "a"}], "images": {}}', r"record x: 'images' must be"),
        ('{"id": "x", "messages": [{"role": "user", "content": "a"}], "images": ["a\\u0000b"]}', r"'images' must be"),
    ],
)
def test_a_broken_line_names_file_and_line_and_spares_the_others(folder: Path, line: str, reason: str) -> None:
    source = write(folder, {"messages": turns()}, line, {"messages": turns("3")})
    assert len(source) == 3
    with pytest.raises(RecordError, match=reason):
        source.record(1)
    assert source.record(2).messages[0].text == "3"


def test_bytes_that_are_no_text_are_a_broken_line(folder: Path) -> None:
    (folder / "d.jsonl").write_bytes(b'{"messages": "\xff\xfe"}\n')
    with pytest.raises(RecordError, match="line 1: not JSON"):
        JsonlSource(folder / "d.jsonl").record(0)


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("pics/missing.png", "missing.png: no such file"),
        ("pics/text.png", "text.png: not a picture"),
        ("pics/empty.png", "empty.png: empty"),
        ("pics", "pics: not a regular file"),
        ("../secret.png", "secret.png' is outside"),
        ("pics/../../secret.png", "secret.png' is outside"),
        ("pics/link.png", "link.png' is outside"),
        ("http://example.com/a.png", "is a URL; nothing is fetched"),
        ("file:///etc/passwd", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
    ],
)
def test_unusable_pictures_name_file_and_record(folder: Path, ref: str, reason: str) -> None:
    inside = folder / "set"
    inside.mkdir()
    (folder / "pics").rename(inside / "pics")
    (inside / "pics" / "text.png").write_text("words")
    (inside / "pics" / "empty.png").touch()
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    (inside / "pics" / "link.png").symlink_to(folder / "secret.png")
    source = write(inside, {"id": "x", "images": [ref], "messages": turns()})
    with pytest.raises((RecordError, MediaError), match=rf"d\.jsonl line 1, record x.*{reason}"):
        source.record(0)


def test_a_picture_cut_short_is_found_when_decoded(folder: Path) -> None:
    Image.effect_noise((80, 80), 50).save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    source = write(folder, {"id": "x", "images": ["cut.jpg"], "messages": turns()})
    record = source.record(0)
    with pytest.raises(MediaError, match=r"record x, image .*cut\.jpg: damaged"):
        source.images(record)


def test_absolute_paths_and_another_root(folder: Path) -> None:
    write(folder, {"images": [str(folder / "pics" / "a.png"), "a.png"], "messages": turns("<image><image>")})
    record = JsonlSource(folder / "d.jsonl", name="mine", image_root=folder / "pics").record(0)
    assert record.id == "mine/0"
    assert [p.width for p in record.pictures] == [40, 40]


def test_a_file_that_cannot_be_a_source_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.jsonl: No such file"):
        JsonlSource(folder / "none.jsonl")
    (folder / "blank.jsonl").write_text("\n \n")
    with pytest.raises(RecordError, match=r"blank\.jsonl: no rows"):
        JsonlSource(folder / "blank.jsonl")


def test_fingerprint_follows_the_content(folder: Path) -> None:
    first = write(folder, {"messages": turns()}).fingerprint()
    assert write(folder, {"messages": turns()}).fingerprint() == first
    assert write(folder, {"messages": turns("other")}).fingerprint() != first


def test_survives_pickling_and_reads_of_several_processes(folder: Path) -> None:
    source = write(folder, *({"id": f"r{i}", "messages": turns("x" * i)} for i in range(200)))
    assert pickle.loads(pickle.dumps(source)).record(150).id == "r150"
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:  # a shared file position would mix the rows up
            good = all(source.record(row).id == f"r{row}" for _ in range(3) for row in range(child, 200, 3))
            os._exit(0 if good else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


# ---- clips --------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(folder: Path, clips: ModuleType) -> Path:
    (folder / "a.mp4").write_bytes(clips.clip(20))
    (folder / "b.avi").write_bytes(clips.clip(5, size=(32, 16), container="avi"))
    (folder / "cut.mp4").write_bytes(clips.clip(20)[:2000])
    return folder


def test_clips_become_frames_where_they_stand(videos: Path) -> None:
    first = "look <image> and <video>\nthen <video><image>?"
    named = {"id": "n", "images": ["pics/a.png", "pics/turned.jpg"], "videos": ["a.mp4", "b.avi"], "num_frames": 3}
    source = write(videos, {**named, "messages": turns(first)}, {"video": "a.mp4", "messages": turns("<video>\nwhat?")})
    record = source.record(0)
    assert record.messages[0].text == "look <image> and <image><image><image>\nthen <image><image><image><image>?"
    assert [picture.frame for picture in record.pictures] == [False, *[True] * 6, False]
    assert [(picture.width, picture.height) for picture in record.pictures] == [
        (40, 20), *[(64, 48)] * 3, *[(32, 16)] * 3, (20, 50),
    ]  # fmt: skip
    images = source.images(record)
    assert [image.size for image in images] == [(picture.width, picture.height) for picture in record.pictures]
    for image, expected in zip(
        images[1:7], [*video_frames(videos / "a.mp4", 3), *video_frames(videos / "b.avi", 3)], strict=True
    ):
        assert image.tobytes() == expected.tobytes()
    assert len(source.record(1).pictures) == 16
    assert pickle.loads(pickle.dumps(record)) == record
    assert len(JsonlSource(videos / "d.jsonl", num_frames=5).record(1).pictures) == 5
    assert len(JsonlSource(videos / "d.jsonl", num_frames=5).record(0).pictures) == 8


def test_lists_of_frames_are_clips(videos: Path) -> None:
    row = {"id": "f", "frames": [["pics/a.png", "pics/turned.jpg"], ["pics/a.png"]], "video": "b.avi", "num_frames": 2}
    source = write(
        videos, {**row, "messages": turns("<video> <video> <video>")}, {**row, "messages": turns("no place")}
    )
    record = source.record(0)
    assert record.messages[0].text == "<image><image> <image><image> <image>"
    assert [(picture.width, picture.frame) for picture in record.pictures] == [
        (32, True), (32, True), (40, True), (20, True), (40, True),
    ]  # fmt: skip
    assert [image.size for image in source.images(record)] == [(32, 16), (32, 16), (40, 20), (20, 50), (40, 20)]
    assert source.record(1).pictures == record.pictures and source.record(1).messages[0].text == "no place"


def test_clips_are_measured_and_encoded_alike(videos: Path, tiny_processor: Any) -> None:
    source = write(
        videos,
        {"images": ["pics/a.png"], "video": "a.mp4", "num_frames": 4, "messages": turns("<video>\nand <image>\nsame?")},
        {"video": "b.avi", "messages": turns("a <video> tag")},
    )
    for row in (0, 1):
        record = source.record(row)
        example = encode(record, source.images(record), tiny_processor)
        assert measure(record, tiny_processor) == (example.num_tokens, example.num_tiles)
    record = source.record(0)
    example = encode(record, source.images(record), tiny_processor)
    assert example.num_tiles == 4 + 3  # a tile a frame; a still picture is cut
    text = tiny_processor.tokenizer.decode(example.ids_T)
    shown = re.sub(r"<img>(<IMG_CONTEXT>)+</img>", "X", text)
    assert shown.startswith("<|im_start|>user\nFrame-1: X\nFrame-2: X\nFrame-3: X\nFrame-4: X\nand X\nsame?<|im_end|>")
    content = [{"type": "video", "video": str(videos / "a.mp4"), "num_frames": 4}, {"type": "text", "text": "and "}]
    content += [{"type": "image", "image": str(videos / "pics" / "a.png")}, {"type": "text", "text": "same?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "yo"}]
    served = tiny_processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert served["input_ids"][0].tolist() == example.ids_T.tolist()
    assert served["pixel_values"].numpy().tobytes() == example.tiles_N3SS.tobytes()


def test_the_word_video_is_free_where_there_is_none(folder: Path) -> None:
    source = write(
        folder, {"messages": turns("what does the <video> tag do?")}, {"videos": [], "messages": turns("<video>")}
    )
    assert source.record(0).messages[0].text == "what does the <video> tag do?"
    with pytest.raises(RecordError, match="1 <video> placeholders for 0 images and 0 videos"):
        source.record(1)


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"videos": ["cut.mp4"]}, "<video>", r"cut\.mp4: cut short: 2000 of \d+ bytes"),
        ({"videos": ["d.jsonl"]}, "<video>", r"d\.jsonl: damaged, or not a video"),
        ({"videos": ["absent.mp4"]}, "<video>", r"absent\.mp4: no such file"),
        ({"videos": ["../a.mp4"]}, "<video>", "is outside"),
        ({"videos": ["https://example.org/a.mp4"]}, "<video>", "is a URL; nothing is fetched"),
        ({"videos": [3]}, "<video>", "'videos' must be a list of file paths"),
        ({"frames": ["pics/a.png"]}, "<video>", "'frames' must be a list of clips"),
        ({"frames": [[]]}, "<video>", "'frames' must be a list of clips"),
        ({"frames": [["pics/absent.png"]]}, "<video>", "absent.png: no such file"),
        ({"videos": ["a.mp4"], "num_frames": 0}, "<video>", "num_frames must be between 1 and 1024, got 0"),
        ({"videos": ["a.mp4"], "num_frames": "8"}, "<video>", "num_frames must be between"),
        ({"videos": ["a.mp4"]}, "<video><video>", "0 <image> and 2 <video> placeholders for 0 images and 1 videos"),
        ({"videos": ["a.mp4"], "image": "pics/a.png"}, "<video>", "for 1 images and 1 videos"),
    ],
)
def test_unusable_clips_name_file_and_record(videos: Path, fields: Any, text: str, reason: str) -> None:
    source = write(videos, {"id": "x", **fields, "messages": turns(text)})
    with pytest.raises((RecordError, MediaError), match=rf"(?s)d\.jsonl line 1, record x.*{reason}"):
        source.record(0)


def test_broken_clips_are_rejected_by_name_and_workers_agree(
    folder: Path, clips: ModuleType, tiny_processor: Any
) -> None:
    rows = []
    for index in range(8):
        (folder / f"{index}.mp4").write_bytes(clips.clip(4 + index))
        rows.append({"id": f"r{index}", "video": f"{index}.mp4", "messages": turns(f"<video>\nclip {index}")})
    (folder / "2.mp4").write_bytes((folder / "2.mp4").read_bytes()[:-500])
    (folder / "5.mp4").write_text("no clip at all")
    source = JsonlSource(write(folder, *rows).path, num_frames=3)
    options: dict[str, Any] = {"max_tokens": 150, "max_tiles": 12, "buffer": 4, "seed": 0}
    plain = Loader({"d": source}, {"d": 1.0}, tiny_processor, **options)
    batches = [batch for _ in range(6) for batch in next(plain)]
    reasons = {reject.id: reject.reason for batch in batches for reject in batch.rejects}
    assert set(reasons) == {"d/2", "d/5"}
    assert "2.mp4: cut short" in reasons["d/2"] and "5.mp4: damaged, or not a video" in reasons["d/5"]
    assert any(len(batch.tiles_N3SS) >= 6 for batch in batches)
    with_workers = Loader({"d": source}, {"d": 1.0}, tiny_processor, workers=2, **options)
    for batch in batches:
        (other,) = next(with_workers)
        assert batch.ids_T.equal(other.ids_T) and batch.tiles_N3SS.equal(other.tiles_N3SS)
    with_workers.close()
