"""Generation: batches equal singles, several answers encode pictures once, caches do not change the answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, TextStreamer, pipeline

from sailvl.model import SailVLForConditionalGeneration, SailVLProcessor
from tests.tiny import loud


@pytest.fixture(scope="module")
def model(tiny_model: SailVLForConditionalGeneration) -> SailVLForConditionalGeneration:
    """The tiny model with weights large enough that answers differ, and with no end token in the way."""
    return loud(tiny_model)


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


ROWS = [
    ("what is it?", [picture(120, 50, 1)]),
    ("how many circles are in the picture?", []),
    ("red", [picture(40, 40, 2), picture(30, 120, 3)]),
]


def encode(processor: SailVLProcessor, rows: list[tuple[str, list[Image.Image]]]) -> dict[str, torch.Tensor]:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text, images in rows
    ]
    images = [image for _, pictures in rows for image in pictures]
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True)


def answers(
    model: SailVLForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: object
) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def singles(model: SailVLForConditionalGeneration, processor: SailVLProcessor) -> list[list[int]]:
    found = [answers(model, encode(processor, [row]))[0] for row in ROWS]
    assert len({tuple(answer) for answer in found}) == len(ROWS)
    return found


def test_a_left_padded_batch_equals_singles(model, tiny_processor) -> None:
    assert answers(model, encode(tiny_processor, ROWS)) == singles(model, tiny_processor)


@pytest.fixture
def num_encodes(model: SailVLForConditionalGeneration) -> Iterator[list[int]]:
    """Tiles of every call of the vision encoder."""
    calls: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda _module, inputs, _output: calls.append(inputs[0].shape[0])
    )
    yield calls
    handle.remove()


def test_several_answers_equal_repeated_singles_and_encode_once(model, tiny_processor, num_encodes) -> None:
    """Mixed tile counts and a text-only row: repeating tiles one by one would give rows each other's pictures."""
    expected = [answer for answer in singles(model, tiny_processor) for _ in range(3)]
    del num_encodes[:]
    inputs = encode(tiny_processor, ROWS)
    greedy = answers(model, inputs, num_return_sequences=3, num_beams=3)
    assert len(greedy) == 9 and num_encodes == [len(inputs["pixel_values"])]
    sampled = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert sampled.tolist() == expected


def test_first_logits_of_several_answers_are_those_of_the_row(model, tiny_processor) -> None:
    inputs = encode(tiny_processor, ROWS)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1].repeat_interleave(3, dim=0)
    out = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(out.logits[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["no", "static"])
def test_the_cache_does_not_change_the_answer(model, tiny_processor, num_encodes, options: dict[str, object]) -> None:
    inputs = encode(tiny_processor, ROWS)
    expected = answers(model, inputs)
    del num_encodes[:]
    # Compiling a static-cache step takes a minute and is the library's business.
    assert answers(model, inputs, **options, disable_compile=True) == expected
    assert num_encodes == [len(inputs["pixel_values"])]


def test_features_made_beforehand(model, tiny_processor, num_encodes) -> None:
    inputs = encode(tiny_processor, ROWS)
    expected = answers(model, inputs)
    features = model.get_image_features(inputs.pop("pixel_values")).pooler_output
    del num_encodes[:]
    assert answers(model, {**inputs, "image_features": features}) == expected
    assert num_encodes == []


def test_placeholders_and_pictures_must_match(model, tiny_processor) -> None:
    inputs = encode(tiny_processor, ROWS)
    tiles = len(inputs["pixel_values"])
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:-1]}
    message = f"{4 * tiles} image placeholders in input_ids, but {4 * tiles - 4} image tokens from {tiles - 1} tiles"
    with pytest.raises(ValueError, match=message):
        model(**fewer)
    with pytest.raises(ValueError, match=r"rows hold \[12, 0, 24\] image placeholders, but 32 image tokens"):
        answers(model, fewer, num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="image placeholders in input_ids, but no images"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"pixel_values must be \[tiles, 3, 56, 56\], got \[1, 3, 28, 28\]"):
        model(**{**inputs, "pixel_values": torch.zeros(1, 3, 28, 28)})


def test_streaming(model, tiny_processor, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = encode(tiny_processor, ROWS[:1])
    streamer = TextStreamer(tiny_processor.tokenizer, skip_prompt=True)
    (expected,) = answers(model, inputs, streamer=streamer)
    assert capsys.readouterr().out.strip() == tiny_processor.tokenizer.decode(expected).strip()


def test_pipeline(model, tiny_processor) -> None:
    pipe = pipeline("image-text-to-text", model=model, processor=tiny_processor)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": ROWS[0][1][0]}, {"type": "text", "text": "what?"}]}
    ]
    out = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(out[0]["generated_text"], str)


def test_gradient_checkpointing_changes_nothing(model, tiny_processor) -> None:
    inputs, gradients = encode(tiny_processor, ROWS), []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        gradients.append(trained.model.vision_tower.preprocessor.pos_embed.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_tokenizer_alone_loads_from_a_saved_folder(tiny_processor, tmp_path) -> None:
    tiny_processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("red").input_ids == tiny_processor.tokenizer("red").input_ids
