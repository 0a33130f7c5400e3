"""WebDataset shards: found without unpacking, read at random, and hostile archives."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.data import webdataset
from sailvl.data.loader import Loader
from sailvl.data.tar import members
from sailvl.data.webdataset import WebDatasetSource
from sailvl.types import RecordError


def picture(width: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, 12), 40).convert("RGB").save(out, kind)
    return out.getvalue()


def said(question: str, answer: str = "yo") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path: Path, files: list[tuple[str, Any]], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, folder: str = "") -> list[tuple[str, Any]]:
    return [
        (f"{folder}{number:04d}.jpg", picture(20 + number)),
        (f"{folder}{number:04d}.json", {"messages": said(f"row {number}")}),
    ]


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1300)), max_size=6),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_lie_where_tarfile_finds_them(files: list[tuple[str, bytes]], kind: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        for extra in (folder, link):
            archive.addfile(extra)
        for name, data in files:
            info = tarfile.TarInfo("d/" + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in archive if info.isfile()]
    found = list(members(io.BytesIO(out.getvalue()), "x"))
    assert [(m.name, m.start, m.data, m.size) for m in found] == expected
    data = out.getvalue()
    assert [data[m.data : m.data + m.size] for m in found] == [content for _, content in files]


def test_old_headers_and_prefixes(tmp_path: Path) -> None:
    deep = "/".join(["folder"] * 20)
    path = write(
        tmp_path / "u.tar", [(f"{deep}/a.txt", b"hi"), (f"{deep}/a.png", picture(9, "PNG"))], tarfile.USTAR_FORMAT
    )
    with path.open("rb") as file:
        assert [member.name for member in members(file, "x")] == [f"{deep}/a.txt", f"{deep}/a.png"]
    assert WebDatasetSource(path).record(0).messages[1].text == "hi"


def test_samples_by_key_in_every_form(tmp_path: Path, clips: ModuleType) -> None:
    two = said("first <image> then <image>")
    path = write(
        tmp_path / "s.tar",
        [
            ("a/1.jpg", picture(21)), ("a/1.json", {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}),  # noqa: E501
            ("a/2.txt", b" a red thing \n"), ("a/2.json", {"url": "http://example.org", "width": 5}), ("a/2.PNG", picture(22, "PNG")),  # noqa: E501
            ("README", b"no sample"),
            ("b/1.json", {"messages": two}), ("b/1.0.webp", picture(23, "WEBP")), ("b/1.1.jpg", picture(24)),
            ("b/2.json", {"messages": two, "images": ["1.jpg", "b/2.0.jpg"]}), ("b/2.0.jpg", picture(25)), ("b/2.1.jpg", picture(26)),  # noqa: E501
            ("b/3.json", {"messages": said("text alone")}),
            ("b/4.json", {"messages": said("q"), "image": "coco/train/000.jpg"}), ("b/4.jpg", picture(27)),
            ("b/5.json", {"messages": said("<video>")}), ("b/5.mp4", clips.clip(4)),
            ("b/6.json", {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.jpg"}, {"type": "image", "image": "a.jpg"}]}, {"role": "assistant", "content": "x"}]}),  # noqa: E501
            ("b/6.a.jpg", picture(28)), ("b/6.b.jpg", picture(29)),
        ],
    )  # fmt: skip
    source = WebDatasetSource(path, prompt="Describe it.", num_frames=3)
    found = {source.record(row).meta["key"]: source.record(row) for row in range(len(source))}
    assert list(found) == ["a/1", "a/2", "b/1", "b/2", "b/3", "b/4", "b/5", "b/6"]
    widths = {key: [p.width for p in record.pictures] for key, record in found.items()}
    assert widths == {
        "a/1": [21], "a/2": [22], "b/1": [23, 24], "b/2": [26, 25], "b/3": [], "b/4": [27], "b/5": [64] * 3,
        "b/6": [29, 28],
    }  # fmt: skip
    assert [m.text for m in found["a/2"].messages] == ["Describe it.", "a red thing"]
    assert found["b/5"].messages[0].text == "<image>" * 3
    for record in found.values():
        assert [image.width for image in source.images(record)] == [picture.width for picture in record.pictures]
    assert [record.id for record in found.values()] == [f"s/{row}" for row in range(8)]


def test_a_folder_of_shards_in_order_and_random_rows(tmp_path: Path) -> None:
    for shard in range(3):
        write(tmp_path / f"t-{shard}.tar", [f for n in range(5) for f in sample(5 * shard + n)])
    (tmp_path / "notes.md").write_text("x")
    for path in (tmp_path, tmp_path / "t-*.tar"):
        source = WebDatasetSource(path, name="mine")
        assert [source.record(row).messages[0].text for row in (14, 0, 7)] == ["row 14", "row 0", "row 7"]
        assert [source.record(row).pictures[0].width for row in (14, 0, 7)] == [34, 20, 27]
        assert len(source) == 15


def test_the_index_is_kept_where_asked_and_follows_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data", tmp_path / "run" / "index"
    data.mkdir()
    path = write(data / "s.tar", sample(1) + sample(2))
    first = WebDatasetSource(path, cache=cache)
    (stored,) = cache.iterdir()
    assert [file.name for file in data.iterdir()] == ["s.tar"]
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_scan", None)  # not needed again
        second = WebDatasetSource(path, cache=cache)
    assert second.fingerprint() == first.fingerprint() == WebDatasetSource(path).fingerprint()
    assert second.record(1) == first.record(1)
    stored.write_bytes(stored.read_bytes()[:50])
    assert WebDatasetSource(path, cache=cache).record(1) == first.record(1)
    write(path, sample(1) + sample(3))
    os.utime(path, ns=(1, 1))
    third = WebDatasetSource(path, cache=cache)
    assert third.record(1).messages[0].text == "row 3"
    assert third.fingerprint() != first.fingerprint()
    assert len(list(cache.iterdir())) == 2 and not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("1.json", b"{"), ("1.jpg", b"")], r"sample 1, record s/0: json or txt: JSONDecodeError"),
        ([("1.json", [1])], "json: an object is expected, this is a list"),
        ([("1.json", {"a": 1})], r"needs a non-empty list 'messages'"),
        ([("1.jpg", picture(9))], r"needs a non-empty list 'messages'"),
        ([("1.txt", b"\xff\xfe"), ("1.jpg", picture(9))], "json or txt: UnicodeDecodeError"),
        ([("1.txt", b"a caption")], "a caption without a picture; members are txt"),
        ([("1.txt", b"hi"), ("1.jpg", b"junk")], "image of 4 bytes: not a picture"),
        ([("1.txt", b"a"), ("1.txt", b"b")], "two members 1.txt"),
        ([("1.json", {"messages": said("q"), "images": ["x.jpg", "a.jpg"]}), ("1.a.jpg", picture(9)),
          ("1.b.jpg", picture(9))], r"image 'x\.jpg' is not among the sample's members json, a\.jpg, b\.jpg"),
        ([("1.json", {"messages": said("q"), "image": "/etc/passwd"})], "is not among"),
        ([("1.json", {"messages": said("q"), "image": "https://example.org/a.jpg"})], "is a URL"),
        ([("1.json", {"messages": said("q"), "image": {"bytes": None, "path": "/etc/passwd"}})], "not among"),
    ],
)  # fmt: skip
def test_a_bad_sample_is_named_and_spares_the_others(tmp_path: Path, files: Any, reason: str) -> None:
    source = WebDatasetSource(write(tmp_path / "s.tar", [*files, *sample(5)]))
    assert source.record(1).messages[0].text == "row 5"
    with pytest.raises(ValueError, match=rf"s\.tar.*{reason}"):
        source.record(0)


def test_a_shard_cut_short_loses_its_last_sample_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.tar", sample(1) + sample(2) + [("3.json", {"messages": said("q")}), ("3.jpg", picture(300))]
    )
    with path.open("rb") as file:
        last = list(members(file, "x"))[-1]
    path.write_bytes(path.read_bytes()[: last.data + last.size // 2])
    source = WebDatasetSource(path)
    assert len(source) == 3 and source.record(1).messages[0].text == "row 2"
    with pytest.raises(RecordError, match=r"s\.tar sample 3, record s/2: cut short: \d+ of \d+ bytes"):
        source.record(2)
    path.write_bytes(path.read_bytes()[: last.start + 100])
    with pytest.raises(RecordError, match=rf"s\.tar: cut short at byte {last.start}"):
        WebDatasetSource(path)


def test_what_cannot_be_a_shard_is_refused_at_once(tmp_path: Path) -> None:
    whole = write(tmp_path / "good.tar", sample(1) + sample(2)).read_bytes()
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.txt"))
    damaged = bytearray(whole)
    with (tmp_path / "good.tar").open("rb") as file:
        third = list(members(file, "x"))[2]
    damaged[third.start + 3] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    write(tmp_path / "none.tar", [("README", b"hi")])
    for name, reason in {
        "absent.tar": "No such file",
        "zipped.tar": r"at byte 0: no tar header: damaged, or not a tar file \(compressed",
        "damaged.tar": rf"at byte {third.start}: no tar header",
        "none.tar": "no sample in 1 shards",
        "s.tar.gz": r"is not a \.tar file",
    }.items():
        with pytest.raises(RecordError, match=f"{name}.*{reason}"):
            WebDatasetSource(tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 4000), data=st.binary(min_size=1, max_size=40))
def test_no_damage_does_anything_but_raise_a_named_error(at: int, data: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("1.txt", "ü" * 90 + ".txt", "2.json"):
            archive.addfile(tarfile.TarInfo(name))
    broken = bytearray(out.getvalue())
    broken[at : at + len(data)] = data
    try:
        assert len(list(members(io.BytesIO(bytes(broken)), "the shard"))) <= 3
    except RecordError as error:
        assert str(error).startswith("the shard")


def header(kind: bytes, size: bytes) -> bytes:
    """A header with a right checksum."""
    made = bytearray(b"a.txt".ljust(124, b"\0") + size.ljust(12, b"\0") + b"0" * 12 + b" " * 8 + kind + b"\0" * 355)
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(b"0", b"-0000001000"), "is no size"),
        (header(b"0", b"\xff" * 12), "is no size"),
        (header(b"0", b"9"), "is no size"),
        (header(b"x", b"77777777"), "a header record of 16777215 bytes"),
        (header(b"x", b"10") + b"0 path=x".ljust(512, b"\0"), "a broken pax record"),  # a length that leads nowhere
        (header(b"x", b"10") + b"2 path=x".ljust(512, b"\0"), "a broken pax record"),
        (header(b"x", b"10") + b"99 path=".ljust(512, b"\0"), "a broken pax record"),
        (header(b"x", b"33") + b"27 size=9999999999999999999".ljust(512, b"\0"), "is no size|broken pax"),
    ],
)
@pytest.mark.timeout(10)
def test_hostile_headers_end_at_once(content: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=f"the shard.*({reason})"):
        list(members(io.BytesIO(content + b"\0" * 1024), "the shard"))


def test_rejects_and_exact_resume_in_a_loader(tmp_path: Path, tiny_processor: Any) -> None:
    files = [f for n in range(20) for f in sample(n)]
    files[14] = (files[14][0], picture(60)[:-200])
    source = WebDatasetSource(write(tmp_path / "s.tar", files), name="d")
    options: dict[str, Any] = {"max_tokens": 150, "max_tiles": 20, "buffer": 4, "seed": 0, "lanes": 2}
    plain = Loader({"d": source}, {"d": 1.0}, tiny_processor, **options)
    whole = [batch.ids_T.tolist() for _ in range(8) for batch in next(plain)]
    first = Loader({"d": source}, {"d": 1.0}, tiny_processor, workers=2, **options)
    batches = [batch for _ in range(4) for batch in next(first)]
    second = Loader({"d": source}, {"d": 1.0}, tiny_processor, workers=1, **options)
    second.load_state_dict(first.state_dict())
    first.close()
    batches += [batch for _ in range(4) for batch in next(second)]
    second.close()
    assert [batch.ids_T.tolist() for batch in batches] == whole
    rejects = [reject for batch in batches for reject in batch.rejects]
    assert {reject.id for reject in rejects} == {"d/7"}
    assert "record d/7, image of" in rejects[0].reason
