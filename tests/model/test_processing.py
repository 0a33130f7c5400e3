"""Prompts: chat format, placeholders, truncation, escape, and what servers ask of the processor."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerFast

from sailvl.geometry import Tiling, num_image_tokens
from sailvl.model import SailVLImageProcessor, SailVLProcessor, checkpoint
from sailvl.model.chat import OFFICIAL_SYSTEM
from sailvl.model.processing import build_processor, escape

WIDE, SMALL = Image.new("RGB", (170, 50), "red"), Image.new("RGB", (30, 30), "blue")


def user(*parts: object) -> list[dict[str, object]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


IMAGE = {"type": "image"}
FRAME = {"type": "image", "frame": True}


def test_chat_format(tiny_processor) -> None:
    def render(messages: object, **options: object) -> str:
        return tiny_processor.apply_chat_template(messages, **options)

    assert render(user("hi"), add_generation_prompt=True) == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    turns = [
        {"role": "system", "content": "be brief"},
        *user(IMAGE, "one?"),
        {"role": "assistant", "content": "yes"},
        *user("sure?"),
    ]
    assert render(turns) == (
        "<|im_start|>system\nbe brief<|im_end|><|im_start|>user\n<IMG_CONTEXT>\none?<|im_end|>"
        "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nsure?<|im_end|>"
    )
    several = [*user(IMAGE, IMAGE, "same?"), *user(IMAGE, "and this?")]
    assert render(several) == (
        "<|im_start|>user\nImage-1: <IMG_CONTEXT>\nImage-2: <IMG_CONTEXT>\nsame?<|im_end|>"
        "<|im_start|>user\nImage-3: <IMG_CONTEXT>\nand this?<|im_end|>"
    )
    clip = user(FRAME, FRAME, IMAGE, "what moves?")
    assert render(clip) == (
        "<|im_start|>user\nFrame-1: <IMG_CONTEXT>\nFrame-2: <IMG_CONTEXT>\n<IMG_CONTEXT>\nwhat moves?<|im_end|>"
    )
    assert render([user("a"), user("b")]) == [render(user("a")), render(user("b"))]


def test_system_message(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    processor = build_processor(tiny_tokenizer_file, tiling=Tiling(side=56), system_message='say "yes"\n{{ 1 }}')
    expected = '<|im_start|>system\nsay "yes"\n{{ 1 }}<|im_end|><|im_start|>user\nhi<|im_end|>'
    assert processor.apply_chat_template(user("hi")) == expected
    assert processor.tokenizer.apply_chat_template(user("hi"), tokenize=False) == expected, (
        "servers render it themselves"
    )
    processor.save_pretrained(tmp_path)
    loaded = SailVLProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(user("hi")) == expected
    loaded.system_message = ""
    assert loaded.apply_chat_template(user("hi")) == "<|im_start|>user\nhi<|im_end|>"
    assert SailVLProcessor.from_pretrained(tmp_path, system_message="x").system_message == "x"


def test_placeholders_become_image_tokens(tiny_processor) -> None:
    text = tiny_processor.apply_chat_template(user(IMAGE, IMAGE, "same?"), add_generation_prompt=True)
    out = tiny_processor(images=[WIDE, SMALL], text=text, return_tensors="pt")
    ids = out["input_ids"][0].tolist()
    start, end, image = (
        tiny_processor.tokenizer.convert_tokens_to_ids(t) for t in ("<img>", "</img>", "<IMG_CONTEXT>")
    )
    runs = [part.count(image) for part in split(ids, start)[1:]]
    assert runs == [4 * 4, 4] and ids.count(end) == 2
    assert out["pixel_values"].shape[0] == 5
    decoded = tiny_processor.tokenizer.decode(ids)
    assert decoded == text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 16 + "</img>", 1).replace(
        "Image-2: <IMG_CONTEXT>", "Image-2: <img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    )


def split(values: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for value in values:
        if value == separator:
            parts.append([])
        else:
            parts[-1].append(value)
    return parts


def test_every_prompt_of_a_batch_counts(tiny_processor) -> None:
    texts = [tiny_processor.apply_chat_template(user(IMAGE, word)) for word in ("a red square", "b")]
    out = tiny_processor(images=[[SMALL], [WIDE]], text=texts, return_tensors="pt", padding=True)
    rows = out["input_ids"] == tiny_processor.image_token_id
    assert rows.sum(1).tolist() == [4, 16]
    assert out["attention_mask"][:, -1].all() and not out["attention_mask"].all(), "padding is on the left"
    assert set(out) == {"input_ids", "attention_mask", "pixel_values"}
    assert "pixel_values" not in tiny_processor(images=None, text="hi", return_tensors="pt")
    assert set(tiny_processor(images=SMALL)) == {"pixel_values"}


def test_frames_take_one_tile(tiny_processor) -> None:
    text = tiny_processor.apply_chat_template(user(FRAME, FRAME, "what moves?"))
    out = tiny_processor(images=[WIDE, WIDE], text=text, frames=[True, True], return_tensors="pt")
    assert out["pixel_values"].shape[0] == 2 and int((out["input_ids"] == tiny_processor.image_token_id).sum()) == 8


def test_image_alias(tiny_processor) -> None:
    expected = tiny_processor(images=SMALL, text="<IMG_CONTEXT>\nwhat?")["input_ids"]
    assert tiny_processor(images=SMALL, text="<image>\nwhat?")["input_ids"] == expected
    literal = tiny_processor(images=SMALL, text="<IMG_CONTEXT>\nthe tag <image>")["input_ids"][0]
    assert literal.count(tiny_processor.image_token_id) == 4, "beside a real placeholder it is text"
    assert tiny_processor.image_token_id not in tiny_processor(text="the tag <image>")["input_ids"][0]


@pytest.mark.parametrize(
    ("text", "images", "counts"),
    [
        ("<IMG_CONTEXT>\n?", [], "1 <IMG_CONTEXT> and 0 <image> placeholders for 0 images"),
        ("hello", [SMALL], "0 <IMG_CONTEXT> and 0 <image> placeholders for 1 images"),
        ("<image><image>", [SMALL], "0 <IMG_CONTEXT> and 2 <image> placeholders for 1 images"),
        ("<IMG_CONTEXT><image>", [SMALL, SMALL], "1 <IMG_CONTEXT> and 1 <image> placeholders for 2 images"),
    ],
)
def test_a_count_mismatch_names_both_counts(tiny_processor, text: str, images: list[Image.Image], counts: str) -> None:
    with pytest.raises(ValueError, match=counts):
        tiny_processor(images=images or None, text=text)


def test_truncation_never_cuts_placeholders(
    tiny_processor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = "<IMG_CONTEXT>\n" + "red " * 20
    full = tiny_processor(images=SMALL, text=text)["input_ids"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_processor(images=SMALL, text=text, truncation=True, padding=True)["input_ids"][0] == full
        assert tiny_processor(images=SMALL, text=text, truncation=True, max_length=20)["input_ids"][0] == full[:20]
        roomy = tiny_processor(images=SMALL, text=[text], truncation=True, max_length=500, return_tensors="pt")
        assert roomy["input_ids"][0].tolist() == full
    assert not caplog.records
    with pytest.raises(ValueError, match="prompt 0: truncation to 3 tokens would keep 2 of 4 image tokens"):
        tiny_processor(images=SMALL, text=text, truncation=True, max_length=3)


SPECIALS = st.sampled_from(
    "<|im_start|> <|im_end|> <|endoftext|> <img> </img> <IMG_CONTEXT> <box> </ref> <quad> <|im_ end|> < |> "
    "IMG_CONTEXT> <think> <image> 图 \u200b".split(" ")
)


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.one_of(SPECIALS, st.text(max_size=5)), max_size=8))
def test_user_text_yields_no_special_ids(tiny_processor, pieces: list[str]) -> None:
    text = "".join(pieces)
    safe = escape(text)
    tokenizer = tiny_processor.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) == 23
    assert not special & set(tokenizer(safe, add_special_tokens=False)["input_ids"])
    assert escape(safe) == safe and safe.replace("\u200b", "") == text.replace("\u200b", "")
    for role, content in (("user", text), ("user", [{"type": "text", "text": text}]), ("system", text)):
        ids = tokenizer(tiny_processor.apply_chat_template([{"role": role, "content": content}]))["input_ids"]
        assert sum(index in special for index in ids) == 2, "the turn's own start and end"


def test_escape_leaves_other_text_alone() -> None:
    for text in ("a < b |> c", "<image>", "<think>so</think>", "x <| y", "<html><br>", "<|two words|>"):
        assert escape(text) == text
    assert escape("<|im_end|>") == "<\u200b|im_end|>"
    assert escape("<box>[1]</box>", keep_grounding=True) == "<box>[1]</box>" != escape("<box>[1]</box>")


def test_an_answer_in_the_history_keeps_grounding_and_nothing_else(tiny_processor) -> None:
    turns = [*user("where?"), {"role": "assistant", "content": "<ref>it</ref><|im_end|><img>"}]
    text = tiny_processor.apply_chat_template(turns)
    assert text.endswith("<ref>it</ref><\u200b|im_end|><\u200bimg><|im_end|>")
    assert turns[1]["content"] == "<ref>it</ref><|im_end|><img>", "the caller's messages are not changed"


def test_tokenised_chat(tiny_processor) -> None:
    messages = user({"type": "image", "image": SMALL}, "what? <IMG_CONTEXT>")
    out = tiny_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    text = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = tiny_processor(images=SMALL, text=text, return_tensors="pt")
    assert torch.equal(out["input_ids"], expected["input_ids"])
    assert torch.equal(out["pixel_values"], expected["pixel_values"])


KIMI = "{% for m in messages %}<|im_user|>{{ m.content }}<|media_pad|><|im_end|>{% endfor %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FITTING = "{% for m in messages %}<|im_start|>me: {{ m.content }}<IMG_CONTEXT><|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [(KIMI, r"not in the vocabulary \(<\|im_user\|>, <\|media_pad\|>\)"), (PLAIN, "writes no image placeholder")],
)
def test_a_foreign_template_is_replaced_with_a_warning(
    tiny_processor, caplog: pytest.LogCaptureFixture, template: str, reason: str
) -> None:
    tokenizer = copy.deepcopy(tiny_processor.tokenizer)
    tokenizer.chat_template = template
    processor = SailVLProcessor(SailVLImageProcessor(side=56), tokenizer, system_message="")
    assert processor.apply_chat_template(user(IMAGE, "hi")) == "<|im_start|>user\n<IMG_CONTEXT>\nhi<|im_end|>"
    assert re.search(reason, caplog.text)


def test_a_checkpoints_own_fitting_template_is_kept(tiny_processor) -> None:
    tokenizer = copy.deepcopy(tiny_processor.tokenizer)
    tokenizer.chat_template = FITTING
    processor = SailVLProcessor(SailVLImageProcessor(side=56), tokenizer)
    rendered = processor.apply_chat_template([{"role": "user", "content": "hi <|im_end|>"}])
    assert rendered == "<|im_start|>me: hi <\u200b|im_end|><IMG_CONTEXT><|im_end|>"
    assert (
        SailVLProcessor(SailVLImageProcessor(), copy.deepcopy(tiny_processor.tokenizer)).system_message
        == OFFICIAL_SYSTEM
    )


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900), max_tiles=st.sampled_from([None, 1, 3, 9]))
def test_counted_tokens_equal_made_tokens(tiny_processor, width: int, height: int, max_tiles: int | None) -> None:
    policy = {} if max_tiles is None else {"max_tiles": max_tiles}
    counted = tiny_processor._get_num_multimodal_tokens(image_sizes=[(height, width)], **policy)
    nested = tiny_processor._get_num_multimodal_tokens(image_sizes=[(height, width)], images_kwargs=policy)
    assert counted.num_image_tokens == nested.num_image_tokens
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    made = tiny_processor(images=image, text="<IMG_CONTEXT>", return_tensors="pt", **policy)
    assert made["input_ids"].shape[1] == counted.num_image_tokens[0]
    assert made["pixel_values"].shape[0] == counted.num_image_patches[0]
    (tiling,) = tiny_processor.image_processor.schemes(1, **policy)
    assert counted.num_image_tokens == [num_image_tokens(width, height, tiling)]


def test_what_servers_ask_for(tiny_processor) -> None:
    text = "<IMG_CONTEXT>\nand\n<IMG_CONTEXT>"
    out = tiny_processor(
        images=[WIDE, SMALL],
        text=text,
        return_tensors="pt",
        images_kwargs={"max_tiles": 2},
        text_kwargs={"return_text_replacement_offsets": True, "return_mm_token_type_ids": True},
    )
    assert out["image_grid_thw"].tolist() == [[1, 3, 1], [1, 1, 1]] and out["pixel_values"].shape[0] == 4
    assert [(entry["type"], *entry["span"]) for entry in out["text_replacement_offsets"][0]] == [
        ("image", 0, 13),
        ("image", 18, 31),
    ]
    assert int(out["mm_token_type_ids"].sum()) == 4 * 4 + 4
    assert tiny_processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]


def test_a_tokenizer_of_another_model_is_refused(tiny_processor, tiny_model, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="has no token '<img>'"):
        SailVLProcessor(SailVLImageProcessor(), bare)
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": 9}))
    with pytest.raises(ValueError, match=r"config.json says image_token_id 9, the tokenizer has 327"):
        AutoProcessor.from_pretrained(tmp_path / "model")


def test_the_packaged_tokenizer_makes_a_processor() -> None:
    from sailvl.assets import tokenizer_path

    processor = build_processor(tokenizer_path(), tiling=Tiling(side=112, max_tiles=4))
    assert len(processor.tokenizer) == 8192
    text = processor.apply_chat_template(user(IMAGE, "图里有什么？"), add_generation_prompt=True)
    ids = processor(images=SMALL, text=text)["input_ids"][0]
    assert ids.count(processor.image_token_id) == 16
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "user\n\n图里有什么？assistant\n"
    folder = build_processor(tokenizer_path().parent, tiling=Tiling(side=112, max_tiles=4))
    assert folder(images=SMALL, text=text)["input_ids"][0] == ids
