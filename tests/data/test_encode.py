from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.data.batch import collate
from sailvl.data.encode import blank, encode, measure
from sailvl.geometry import AnyRes, ImagePolicy, num_image_tokens
from sailvl.model.processing import build_processor
from sailvl.types import Message, Picture, Record, RecordError

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>")
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

texts = st.text(max_size=30) | st.lists(
    st.sampled_from([*SPECIAL, *GROUNDING, "<|im_", "start|>", "\n", " ", "assistant\n", "猫", "<think>", "<i", "mg>"]),
    max_size=8,
).map("".join)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def record(*turns: tuple[str, str], sizes: list[tuple[int, int]] = [], frames: bool = False) -> Record:  # noqa: B006
    return Record(
        id="r1",
        messages=tuple(Message(role=role, text=text) for role, text in turns),  # type: ignore[arg-type]
        pictures=tuple(Picture(width=w, height=h, ref=None, frame=frames) for w, h in sizes),
    )


def images(of: Record) -> list[Image.Image]:
    return [Image.effect_noise((p.width, p.height), 50).convert("RGB") for p in of.pictures]


def tokens(processor: Any, *names: str) -> set[int]:
    return {processor.tokenizer.convert_tokens_to_ids(name) for name in names}


def supervised(example: Any, processor: Any) -> str:
    return processor.tokenizer.decode(example.targets_T[example.targets_T != -100])


@relaxed
@given(sizes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), max_size=4), frames=st.booleans())
def test_image_tokens_equal_features_for_any_size(
    tiny_processor: Any, sizes: list[tuple[int, int]], frames: bool
) -> None:
    of = record(("user", "what?"), ("assistant", "a cat"), sizes=sizes, frames=frames)
    example = encode(of, images(of), tiny_processor)
    tiling = tiny_processor.image_processor.tiling
    placeholders = int((example.ids_T == tiny_processor.image_token_id).sum())
    assert placeholders == example.num_tiles * tiling.tokens_per_tile
    assert placeholders + 2 * len(sizes) == sum(num_image_tokens(w, h, tiling, frames) for w, h in sizes)
    assert measure(of, tiny_processor) == (example.num_tokens, example.num_tiles)
    assert example.tiles_N3SS.shape[1:] == (3, tiling.side, tiling.side)
    assert example.tiles_N3SS.dtype == np.float32


@relaxed
@given(user=texts, system=texts, answer=texts)
def test_texts_cannot_forge_structure(tiny_processor: Any, user: str, system: str, answer: str) -> None:
    of = record(("system", system), ("user", user), ("assistant", answer + "."))
    example = encode(of, [], tiny_processor)
    ids = example.ids_T.tolist()
    structure = [id for id in ids if id in tokens(tiny_processor, *SPECIAL)]
    start, end = (tiny_processor.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert structure == [start, end] * 3
    prompt = ids[: len(ids) - ids[::-1].index(start)]
    assert not set(prompt) & tokens(tiny_processor, *GROUNDING)
    # grounding marks of the answer survive, each as its token
    kept = len(re.findall("|".join(GROUNDING), answer))
    assert sum(id in tokens(tiny_processor, *GROUNDING) for id in ids) == kept
    assert measure(of, tiny_processor) == (example.num_tokens, 0)


@relaxed
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=st.none() | texts)
def test_exactly_the_answers_and_their_ends_are_supervised(
    tiny_processor: Any, turns: list[tuple[str, str]], system: str | None
) -> None:
    said: list[tuple[str, str]] = [] if system is None else [("system", system)]
    for question, answer in turns:
        # an answer that begins with white space may share its first token with the header: see the next test
        said += [("user", question), ("assistant", "A" + answer)]
    of = record(*said)
    example = encode(of, [], tiny_processor)
    shifted = example.targets_T[:-1] != -100
    assert (example.targets_T[:-1][shifted] == example.ids_T[1:][shifted]).all()
    assert example.targets_T[-1] == -100
    plain = supervised(example, tiny_processor).replace("\u200b", "")
    said_back = "".join(f"A{answer}<|im_end|>" for _, answer in turns).replace("\u200b", "")
    assert plain == unicodedata.normalize("NFC", said_back)  # the tokenizer composes characters


def test_a_token_shared_with_the_header_is_not_supervised(tiny_processor: Any) -> None:
    for answer in ("\n\nyes", " yes", "\n \n yes", "yes"):
        example = encode(record(("user", "?"), ("assistant", answer)), [], tiny_processor)
        text = supervised(example, tiny_processor)
        assert f"\n{answer}<|im_end|>".endswith(text)
        assert text.endswith("yes<|im_end|>")


CONVERSATIONS = [
    [("user", "<image>\nwhat is this?", 1), ("assistant", "a cat", 0)],
    [("user", "what is this?", 1), ("assistant", "a cat", 0), ("user", "sure?", 0), ("assistant", "yes", 0)],
    [("user", "<image> and\n<image>\n\ndiffer how", 2), ("assistant", "<ref>a</ref><box>[[1,2,3,4]]</box>", 0)],
    [("system", "be brief <|im_end|>", 0), ("user", "1+1<img>", 0), ("assistant", "<think>\nhm\n</think>\n2", 0)],
    [("user", "a", 0), ("assistant", "b", 0), ("user", "look: <image>", 1), ("assistant", "<|im_start|>c", 0)],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("frames", [False, True])
def test_equals_the_processor(tiny_processor: Any, turns: list[tuple[str, str, int]], frames: bool) -> None:
    sizes = [(60, 40), (200, 90)][: sum(n for _, _, n in turns)]
    of = record(*((role, text) for role, text, _ in turns), sizes=sizes, frames=frames)
    pictures = images(of)
    conversation = []
    for role, text, num_pictures in turns:
        picture = {"type": "image", "frame": frames}
        if num_pictures and "<image>" not in text:
            parts: list[Any] = [picture] * num_pictures + [{"type": "text", "text": text}]
        else:
            parts = []
            for i, piece in enumerate(re.split("<image>\n?", text)):
                parts += ([picture] if i else []) + [{"type": "text", "text": piece}]
        conversation.append({"role": role, "content": parts})
    prompt = tiny_processor.apply_chat_template(conversation, tokenize=False)
    reference = tiny_processor(
        images=pictures or None, text=prompt, frames=[frames] * len(pictures) if pictures else None
    )
    example = encode(of, pictures, tiny_processor)
    assert example.ids_T.tolist() == list(reference["input_ids"][0])
    if pictures:
        np.testing.assert_array_equal(example.tiles_N3SS, reference["pixel_values"])


def test_format(tiny_processor: Any) -> None:
    k = tiny_processor.image_processor.tiling.tokens_per_tile
    block = "<img>" + "<IMG_CONTEXT>" * k + "</img>\n"
    cases = [
        (record(("user", "hi"), ("assistant", "yo"), sizes=[(9, 9)]), f"{block}hi"),
        (record(("user", "hi"), ("assistant", "yo"), sizes=[(9, 9)] * 2), f"Image-1: {block}Image-2: {block}hi"),
        (record(("user", "see <image>\nok"), ("assistant", "yo"), sizes=[(9, 9)]), f"see {block}ok"),
        (record(("user", "hi"), ("assistant", "yo"), sizes=[(9, 9)], frames=True), f"Frame-1: {block}hi"),
    ]
    for of, user in cases:
        text = tiny_processor.tokenizer.decode(encode(of, images(of), tiny_processor).ids_T)
        assert text == f"<|im_start|>user\n{user}<|im_end|><|im_start|>assistant\nyo<|im_end|>"


def test_a_prompt_is_the_training_sequence_up_to_the_answer(tiny_processor: Any) -> None:
    asked = record(("user", "what?"), sizes=[(50, 50)])
    pictures = images(asked)
    prompt = encode(asked, pictures, tiny_processor, generate=True)
    trained = encode(record(("user", "what?"), ("assistant", "a cat"), sizes=[(50, 50)]), pictures, tiny_processor)
    assert (prompt.targets_T == -100).all()
    assert prompt.ids_T.tolist() == trained.ids_T[: prompt.num_tokens].tolist()
    assert (trained.targets_T[: prompt.num_tokens - 1] == -100).all()
    assert trained.targets_T[prompt.num_tokens - 1] == trained.ids_T[prompt.num_tokens]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record(("user", "<image><image> a"), ("assistant", "b"), sizes=[(5, 5)]), "r1: 2 placeholders, 1 pictures"),
        (record(("user", "<image> a"), ("assistant", "b"), sizes=[(5, 5)] * 2), "r1: 1 placeholders, 2 pictures"),
        (record(("user", "<image> a"), ("assistant", "b")), "r1: 1 placeholders, 0 pictures"),
        (record(("user", "a")), "r1: no assistant turn"),
        (record(("assistant", "a")), "r1: no user turn"),
        (record(("user", "a"), ("assistant", " \n")), "r1: message 2 is an empty answer"),
        (record(("user", "a"), ("system", "s"), ("assistant", "b")), "r1: the system message must come first"),
        (record(), "r1: no user turn"),
    ],
)
def test_broken_records_name_themselves(tiny_processor: Any, broken: Record, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        measure(broken, tiny_processor)
    with pytest.raises(RecordError, match=reason):
        encode(broken, images(broken), tiny_processor)


def test_a_prompt_must_end_with_the_user(tiny_processor: Any) -> None:
    with pytest.raises(RecordError, match="ends with assistant"):
        encode(record(("user", "a"), ("assistant", "b")), [], tiny_processor, generate=True)


def test_pictures_that_are_not_as_recorded_are_refused(tiny_processor: Any) -> None:
    of = record(("user", "a"), ("assistant", "b"), sizes=[(50, 50)])
    with pytest.raises(RecordError, match=r"picture 1 was 50 x 50 .* and is 400 x 50"):
        encode(of, [Image.new("RGB", (400, 50))], tiny_processor)
    with pytest.raises(RecordError, match="1 pictures, 0 images"):
        encode(of, [], tiny_processor)


def test_blank_has_the_planned_size(tiny_processor: Any) -> None:
    k = tiny_processor.image_processor.tiling.tokens_per_tile
    example = blank("x", 3 * k + 7, 3, tiny_processor)
    assert (example.num_tokens, example.num_tiles) == (3 * k + 7, 3)
    assert (example.ids_T == tiny_processor.image_token_id).sum() == 3 * k
    assert (example.targets_T == -100).all()


# ---- policies and any resolution --------------------------------------------------------------------------------

POLICIES = [
    None,
    ImagePolicy(),
    ImagePolicy(max_tiles=9, msac=True),
    ImagePolicy(max_tiles=24, upscale=2),
    ImagePolicy(msac=True, upscale=4),
]


@pytest.fixture(scope="module")
def any_processor(tiny_tokenizer_file: Any) -> Any:
    return build_processor(tiny_tokenizer_file, tiling=AnyRes(side=56, max_side=224))


@relaxed
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=3),
    policy=st.sampled_from(POLICIES),
    any_res=st.booleans(),
    frames=st.booleans(),
)
def test_a_records_policy_equals_the_processors(
    tiny_processor: Any,
    any_processor: Any,
    sizes: list[tuple[int, int]],
    policy: ImagePolicy | None,
    any_res: bool,
    frames: bool,
) -> None:
    processor = any_processor if any_res else tiny_processor
    of = record(("user", "what?"), sizes=sizes, frames=frames)
    pictures = images(of)
    example = encode(of, pictures, processor, generate=True, policy=policy)
    trained = Record(id="r1", messages=(*of.messages, Message(role="assistant", text="yes")), pictures=of.pictures)
    assert measure(trained, processor, policy)[1] == example.num_tiles
    encoded = encode(trained, pictures, processor, policy=policy)
    assert measure(trained, processor, policy) == (encoded.num_tokens, encoded.num_tiles)
    content = [{"type": "image", "frame": frames}] * len(sizes) + [{"type": "text", "text": "what?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = {} if policy is None else {"max_tiles": policy.max_tiles, "msac": policy.msac, "upscale": policy.upscale}
    reference = processor(images=pictures or None, text=prompt, frames=[frames] * len(sizes), **asked)
    assert example.ids_T.tolist() == list(reference["input_ids"][0])
    if pictures:
        np.testing.assert_array_equal(example.tiles_N3SS, reference["pixel_values"])
    if any_res:
        assert example.grids_N2 is not None and example.grids_N2.shape == (len(sizes), 2)
        assert example.grids_N2.tolist() == (reference["image_grid_hw"].tolist() if pictures else [])
        # A 56-pixel square is 16 patches.
        assert example.num_tiles == sum(math.ceil(rows * columns / 16) for rows, columns in example.grids_N2.tolist())
    else:
        assert example.grids_N2 is None and example.num_tiles == len(example.tiles_N3SS)


def test_a_picture_of_another_shape_is_refused_at_any_resolution(any_processor: Any) -> None:
    """Equally many patches in another shape are another picture."""
    of = record(("user", "a"), ("assistant", "b"), sizes=[(56, 112)])
    with pytest.raises(RecordError, match=r"picture 1 was 56 x 112 \(10 tokens\) and is 112 x 56 \(10 tokens\)"):
        encode(of, [Image.new("RGB", (112, 56))], any_processor)


def test_blank_has_the_planned_size_at_any_resolution(any_processor: Any) -> None:
    of = record(("user", "a"), ("assistant", "b"), sizes=[(1, 1), (200, 100), (30, 30)])
    planned = measure(of, any_processor)
    example = blank("x", *planned, any_processor)
    assert (example.num_tokens, example.num_tiles) == planned
    assert example.grids_N2.tolist() == [[2, 2]] * planned[1] and example.tiles_N3SS.shape == (
        4 * planned[1],
        3,
        14,
        14,
    )
    assert (example.ids_T == any_processor.image_token_id).sum() == planned[1]
    empty = blank("x", 5, 0, any_processor)
    assert empty.tiles_N3SS.shape == (0, 3, 14, 14) and empty.grids_N2.shape == (0, 2) and empty.num_tiles == 0


def test_a_batch_holds_examples_of_one_processor(tiny_processor: Any, any_processor: Any) -> None:
    of = record(("user", "a"), ("assistant", "b"), sizes=[(60, 90), (30, 30)])
    text = record(("user", "a"), ("assistant", "b"))
    some, none, tiles = (
        encode(of, images(of), any_processor),
        encode(text, [], any_processor),
        blank("", 3, 0, tiny_processor),
    )
    batch = collate([some, none, some], 0, {})
    assert batch.grids_N2.tolist() == some.grids_N2.tolist() * 2 and batch.num_tiles == 2 * some.num_tiles
    assert len(batch.tiles_N3SS) == int(batch.grids_N2.prod(1).sum())
    assert collate([none], 0, {}).grids_N2.shape == (0, 2)
    with pytest.raises(ValueError, match="the 2 examples of a batch were made by different processors"):
        collate([some, tiles], 0, {})


# ---- thoughts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("<think>one, two</think>\n\nTwo.", "Two.<|im_end|>"),
        ("<think>one</think> and <think>two</think>\nTwo.", "Two.<|im_end|>"),
        ("one, two</think>\n\n\nTwo.", "Two.<|im_end|>"),  # data of models whose prompt opens the thought
        ("<think>\n</think> Two.", " Two.<|im_end|>"),
        ("Two.\nThree", "Two.\nThree<|im_end|>"),
    ],
)
def test_of_a_thinking_answer_only_what_follows_is_learned(tiny_processor: Any, answer: str, learned: str) -> None:
    of = record(("user", "how many?"), ("assistant", answer), ("user", "sure?"), ("assistant", "<think>a</think>\nYes"))
    plain, masked = (encode(of, [], tiny_processor, answer_only=only) for only in (False, True))
    assert supervised(plain, tiny_processor) == f"{answer}<|im_end|><think>a</think>\nYes<|im_end|>"
    assert supervised(masked, tiny_processor) == f"{learned}Yes<|im_end|>"
    assert (plain.ids_T == masked.ids_T).all()
    assert measure(of, tiny_processor) == (masked.num_tokens, masked.num_tiles)


@relaxed
@given(thought=texts, answer=texts)
def test_learned_parts_are_a_suffix_of_the_answer_for_any_text(tiny_processor: Any, thought: str, answer: str) -> None:
    of = record(("user", "q"), ("assistant", f"<think>{thought}</think>\n{answer.replace('think', '')}."))
    plain, masked = (encode(of, [], tiny_processor, answer_only=only) for only in (False, True))
    kept = np.flatnonzero(masked.targets_T != -100)
    all_ = np.flatnonzero(plain.targets_T != -100)
    assert 0 < len(kept) < len(all_)
    assert kept.tolist() == all_[-len(kept) :].tolist()
    assert "</think>" not in supervised(masked, tiny_processor)
    assert (masked.targets_T[kept] == plain.targets_T[kept]).all()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<think>one, two and so", "message 2 has a thought without an end"),
        ("<think>a</think> so <think>b", "message 2 has a thought without an end"),
        ("<think>one, two</think>\n\n", "message 2 is a thought without an answer"),
    ],
)
def test_a_thought_without_an_answer_is_rejected_only_where_answers_alone_are_learned(
    tiny_processor: Any, answer: str, reason: str
) -> None:
    of = record(("user", "<think> is free here"), ("assistant", answer))
    assert encode(of, [], tiny_processor).num_tokens == measure(of, tiny_processor)[0]
    assert encode(record(("user", answer)), [], tiny_processor, generate=True, answer_only=True).num_tokens > 0
    with pytest.raises(RecordError, match=f"record r1: {reason}"):
        encode(of, [], tiny_processor, answer_only=True)
