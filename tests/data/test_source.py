from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sailvl.data.source import JsonlSource
from sailvl.media import MediaError
from sailvl.types import RecordError


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
        ("http://example.com/a.png", "is a URL; pictures are not fetched"),
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
