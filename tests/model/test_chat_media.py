"""Conversations with pictures and clips anywhere, in one call: against spelling everything out."""

from __future__ import annotations

import base64
import io
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.media import MediaError, open_image
from sailvl.video import video_frames

WIDE, SMALL, TALL = (Image.effect_noise(size, 80).convert("RGB") for size in ((170, 50), (30, 30), (40, 150)))
TWO = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]


def user(*parts: object) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def image(what: object) -> dict[str, Any]:
    return {"type": "image", "image": what}


def video(what: object, **options: object) -> dict[str, Any]:
    return {"type": "video", "video": what, **options}


def tensors(processor: Any, messages: Any, **options: Any) -> Any:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True, **options}
    return processor.apply_chat_template(messages, **options)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, clips: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "clip.mp4").write_bytes(clips.clip(20))
    (folder / "wide picture.png").write_bytes(png(WIDE))
    return folder


def test_pictures_and_clips_anywhere_equal_spelling_everything_out(tiny_processor: Any, files: Path) -> None:
    messages = [
        user("look: ", image(str(files / "wide picture.png")), " and ", image(SMALL), "same?"),
        {"role": "assistant", "content": "no"},
        user(video(files / "clip.mp4", num_frames=3), "what moves?", video(TWO), image(np.asarray(TALL)), "?"),
    ]
    prompt = (
        "<|im_start|>user\nlook: Image-1: <IMG_CONTEXT>\n and Image-2: <IMG_CONTEXT>\nsame?<|im_end|>"
        "<|im_start|>assistant\nno<|im_end|><|im_start|>user\n"
        "Frame-1: <IMG_CONTEXT>\nFrame-2: <IMG_CONTEXT>\nFrame-3: <IMG_CONTEXT>\nwhat moves?"
        "Frame-4: <IMG_CONTEXT>\nFrame-5: <IMG_CONTEXT>\nImage-3: <IMG_CONTEXT>\n?<|im_end|><|im_start|>assistant\n"
    )
    assert tiny_processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
    clip = video_frames(files / "clip.mp4", 3)
    pictures = [WIDE, SMALL, *clip, *TWO, TALL]
    marks = [False, False, *[True] * 5, False]
    out = tensors(tiny_processor, messages)
    same(out, tiny_processor(images=pictures, text=prompt, frames=marks, return_tensors="pt"))
    same(out, tiny_processor([WIDE, SMALL, TALL], prompt, videos=[clip, TWO], return_tensors="pt"))
    assert int((out["input_ids"] == tiny_processor.image_token_id).sum()) == 4 * len(out["pixel_values"])
    assert torch.equal(tensors(tiny_processor, messages, return_dict=False), out["input_ids"])


def test_a_picture_may_be_named_in_many_ways(tiny_processor: Any, files: Path) -> None:
    path = files / "wide picture.png"
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    expected = tensors(tiny_processor, [user(image(WIDE), "what?")])
    ways: list[dict[str, Any]] = [
        image(path), image(str(path)), image(path.as_uri()), image(path.read_bytes()), image(data),
        image(torch.from_numpy(np.asarray(WIDE).copy())), {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()}, {"type": "image_url", "image_url": {"url": data}},
        {"type": "image", "base64": data.partition(",")[2]},
    ]  # fmt: skip
    for way in ways:
        same(tensors(tiny_processor, [user(way, "what?")]), expected)
    same(tensors(tiny_processor, [user({"type": "image"}, "what?")], images=[WIDE]), expected)
    same(tensors(tiny_processor, [user({"type": "image"}, "what?")], processor_kwargs={"images": WIDE}), expected)


def test_a_clip_may_be_named_in_many_ways(tiny_processor: Any, files: Path) -> None:
    path = files / "clip.mp4"
    frames = video_frames(path, 4)
    expected = tensors(tiny_processor, [user(video(frames), "what?")])
    array = np.stack([np.asarray(frame) for frame in frames])
    for index, frame in enumerate(frames):
        frame.save(files / f"{index}.png")
    ways = [
        video(path, num_frames=4), video(path.read_bytes(), num_frames=4), video(array), video(list(array)),
        video([str(files / f"{index}.png") for index in range(4)]),
        {"type": "video", "path": str(path), "num_frames": 4},
        {"type": "video_url", "video_url": {"url": path.as_uri()}, "num_frames": 4},
    ]  # fmt: skip
    for way in ways:
        same(tensors(tiny_processor, [user(way, "what?")]), expected)
    same(tensors(tiny_processor, [user(video(str(path)), "what?")], num_frames=4), expected)
    text = tiny_processor.apply_chat_template([user(video("not even there.mp4"), "?")])
    assert text.count("<IMG_CONTEXT>") == text.count("Frame-") == 16


PARTS = st.one_of(
    st.sampled_from(["what is it? ", "一只猫", "<image>", "<video>", "Frame-1: "]),
    st.sampled_from([image(WIDE), image(SMALL), image(TALL), video(TWO), video([SMALL])]),
)
CHATS = st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=2).map(
    lambda turns: [message for turn in turns for message in (user(*turn), {"role": "assistant", "content": "ok"})]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHATS, min_size=1, max_size=4))
def test_a_mixed_batch_equals_one_by_one(tiny_processor: Any, chats: list[Any]) -> None:
    together = tensors(tiny_processor, chats)
    pixels = []
    for row, chat in enumerate(chats):
        alone = tensors(tiny_processor, chat)
        kept = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][kept], alone["input_ids"][0])
        pixels += [alone["pixel_values"]] if "pixel_values" in alone else []
    if pixels:
        assert torch.equal(together["pixel_values"], torch.cat(pixels))
    else:
        assert "pixel_values" not in together


def test_options_reach_the_processor(tiny_processor: Any) -> None:
    messages = [user(image(WIDE), "what?")]
    assert len(tensors(tiny_processor, messages)["pixel_values"]) > 1
    assert len(tensors(tiny_processor, messages, max_tiles=1)["pixel_values"]) == 1
    assert len(tensors(tiny_processor, messages, processor_kwargs={"max_tiles": 1})["pixel_values"]) == 1
    assert isinstance(tensors(tiny_processor, messages, return_tensors=None)["input_ids"], list)
    brief = tensors(tiny_processor, messages, system_message="be brief")
    assert tiny_processor.tokenizer.decode(brief["input_ids"][0]).startswith("<|im_start|>system\nbe brief")


def test_nothing_is_fetched(tiny_processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    for address in ("http://example.org/a.png", "https://example.org/a.mp4", "ftp://example.org/a.png", "HTTP://a/b"):
        for part in (image(address), {"type": "image", "url": address}, video(address), video([address])):
            with pytest.raises(ValueError, match=r"is not on this machine; nothing is fetched"):
                tensors(tiny_processor, [user(part, "what?")])
            assert "<IMG_CONTEXT>" in tiny_processor.apply_chat_template([user(part)]), "rendering opens nothing"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (image("absent.png"), "absent.png: no such file"),
        (image(b"no picture"), "not a picture"),
        (image("data:image/png,abc"), "broken data URL"),
        (image("data:image/png;base64,!!"), "broken data URL"),
        ({"type": "image"}, "picture 1 of the conversation is not given"),
        (video("absent.mp4"), "absent.mp4: no such file"),
        (video([]), "a clip without frames"),
        (video("a.mp4", num_frames=0), "num_frames must be between"),
        (video(3), "a path or bytes are expected"),
        ({"type": "audio", "audio": "a.wav"}, "of type 'audio'"),
        ({"type": "text"}, "of type 'text'"),
    ],
)
def test_broken_parts_say_what_is_wrong(tiny_processor: Any, part: Any, reason: str) -> None:
    with pytest.raises((ValueError, MediaError), match=reason):
        tensors(tiny_processor, [user(part, "what?")])


def test_images_that_no_part_needs_are_an_error(tiny_processor: Any) -> None:
    with pytest.raises(ValueError, match="more images are given"):
        tensors(tiny_processor, [user(image(SMALL), "what?")], images=[SMALL])


def test_literal_prompts_with_videos(tiny_processor: Any) -> None:
    text = "<image>\n<video>\nWhat? <video>"
    written = "<IMG_CONTEXT>\nFrame-1: <IMG_CONTEXT>\nFrame-2: <IMG_CONTEXT>\nWhat? Frame-3: <IMG_CONTEXT>\n"
    expected = tiny_processor([WIDE, *TWO, SMALL], written, frames=[False, True, True, True], return_tensors="pt")
    same(tiny_processor(images=WIDE, text=text, videos=[TWO, [SMALL]], return_tensors="pt"), expected)
    same(tiny_processor([WIDE], written, videos=[TWO, [SMALL]], return_tensors="pt"), expected)
    one = tiny_processor(text="<video>Go", videos=TWO, return_tensors="pt")
    same(
        one,
        tiny_processor(
            TWO, "Frame-1: <IMG_CONTEXT>\nFrame-2: <IMG_CONTEXT>\nGo", frames=[True] * 2, return_tensors="pt"
        ),
    )
    batch = tiny_processor(text=["a", "<video>b", "<image>c"], images=SMALL, videos=[TWO], padding=True)
    assert [row.count(tiny_processor.image_start_token_id) for row in batch["input_ids"]] == [0, 2, 1]


@pytest.mark.parametrize(
    ("text", "images", "videos"),
    [
        ("<video>", None, [TWO, TWO]),
        ("<video><video>", None, [TWO]),
        ("no clip", None, [TWO]),
        ("<image><video>", None, [TWO]),
        ("<video>", [SMALL], [TWO]),
        ("Frame-1: <IMG_CONTEXT>", None, [TWO]),
        ("<IMG_CONTEXT><IMG_CONTEXT>", None, [TWO]),
    ],
)
def test_placeholders_must_match(tiny_processor: Any, text: str, images: Any, videos: Any) -> None:
    with pytest.raises(ValueError, match="placeholders of pictures and"):
        tiny_processor(images, text, videos)


def test_videos_are_pictures_already(tiny_processor: Any) -> None:
    with pytest.raises(ValueError, match=r"a clip is a list of pictures, not a str"):
        tiny_processor(text="<video>", videos="a.mp4")
    with pytest.raises(TypeError, match="open files first"):
        tiny_processor(text="<video>", videos=["a.mp4"])
    with pytest.raises(ValueError, match="need a text"):
        tiny_processor(videos=[TWO])


def test_opened_pictures_are_upright(tiny_processor: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    WIDE.save(tmp_path / "turned.jpg", exif=exif)
    given = tensors(tiny_processor, [user(image(tmp_path / "turned.jpg"), "?")])
    same(given, tensors(tiny_processor, [user(image(open_image(tmp_path / "turned.jpg")), "?")]))
