"""The nano tokenizer keeps Qwen3's rules at 8,192 ids: the same added tokens in the same order with the same flags."""

from __future__ import annotations

import hashlib
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sailvl import assets

# In order. Qwen3 marks the first 14 special (dropped by skip_special_tokens) and not the next 12.
QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
QWEN_PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
SAIL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()
ADDED = QWEN_SPECIAL + QWEN_PLAIN + SAIL
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHA256 = "37b2d7181b2b52cf4df69cc150221c4e9a272e64c9c5e0e36be684e1f4a6222b"


@pytest.fixture(scope="module")
def spec() -> dict:
    return json.loads(assets.tokenizer_path().read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(assets.tokenizer_path()))


def test_the_file_is_the_pinned_one():
    """Checkpoints store ids: another vocabulary makes them meaningless, so a change must be a decision."""
    assert hashlib.sha256(assets.tokenizer_path().read_bytes()).hexdigest() == SHA256


def test_ids_are_8192_and_dense(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(8192))


def test_added_tokens_order_and_flags(spec):
    added = spec["added_tokens"]
    assert [token["content"] for token in added] == ADDED
    assert [token["id"] for token in added] == list(range(8192 - 35, 8192))
    assert [token["special"] for token in added] == [True] * 14 + [False] * 12 + [True] * 9
    assert not any(token[flag] for token in added for flag in ("single_word", "lstrip", "rstrip", "normalized"))


def test_rules_are_qwen3s(spec):
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == QWEN_SPLIT and split["behavior"] == "Isolated"
    assert byte_level["type"] == "ByteLevel" and not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    assert spec["normalizer"] == {"type": "NFC"}
    assert spec["model"]["type"] == "BPE" and not spec["model"]["byte_fallback"] and spec["model"]["dropout"] is None


def test_every_byte_has_a_token(tokenizer):
    text = "".join(map(chr, range(0x80))) + "é€😀ÿ"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert None not in tokenizer.encode("\u0378\U000e0fff").ids


@pytest.mark.parametrize("text", ["0123456789", "12345", "3.14159", "x2 = 10"])
def test_digits_stand_alone(tokenizer, text):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]
    assert [piece.strip() for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_as_its_nfc_form(tokenizer, text):
    expected = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == expected


def test_thoughts_survive_skipping_and_turn_marks_do_not(tokenizer):
    ids = tokenizer.encode("<think>red</think><|im_end|><img></img>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>red</think>"


@pytest.mark.parametrize("token", ADDED)
def test_each_added_token_is_one_id(tokenizer, token):
    assert tokenizer.encode(token).ids == [8192 - 35 + ADDED.index(token)]


EN = (
    "how many what where picture image chart table left right above below red green blue yellow colour flag count "
    "bar highest lowest value title frame clockwise answer yes no animal food vehicle same different"
).split()
ZH = (
    "图片 多少 什么 哪个 颜色 红色 蓝色 绿色 左边 右边 上面 下面 柱状图 表格 数值 最高 最低 国旗 动物 视频 相同 不同 "
    "文字 答案"
).split()


@pytest.mark.parametrize("word", [f" {word}" for word in EN] + ZH)
def test_words_of_the_tasks_are_one_token(tokenizer, word):
    assert len(tokenizer.encode(word).ids) == 1


def test_ordinary_sentences_are_short(tokenizer):
    english = "There are three red apples on a wooden table next to the open window."
    chinese = "图片中有三个红色的苹果，放在窗户旁边的桌子上。"
    assert len(english) / len(tokenizer.encode(english).ids) > 3
    assert len(chinese) / len(tokenizer.encode(chinese).ids) > 1.2


def test_transformers_reads_the_folder(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(assets.tokenizer_path().parent))
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\n图中有3个红苹果 12? it's\u00a0é<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    prompt = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
