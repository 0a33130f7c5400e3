"""Folders in the released layout load by renaming alone and compute what an independent model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from sailvl.model import SailVLForConditionalGeneration, checkpoint

SHAPES = {"wide": (130, 60), "tall": (50, 170), "small": (30, 30)}


def picture(shape: str, seed: int = 0) -> Image.Image:
    width, height = SHAPES[shape]
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(processor: Any, pictures: list[Image.Image], text: str) -> str:
    content = [{"type": "image", "image": image} for image in pictures] + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


CASES = {
    "several tiles": ([picture("wide")], "What is in the picture?"),
    "several images": ([picture("tall", 1), picture("small", 2), picture("wide", 3)], "a red square?"),
    "one tile": ([picture("small", 4)], "how many?"),
    "no image": ([], "a blue circle and a red one"),
}


@pytest.mark.parametrize(
    ("tied", "stored_head", "select_layer"),
    [(True, True, -1), (True, False, -2), (False, True, -1), (False, True, -4), (True, False, 0)],
)
def test_logits_and_greedy_answers(
    make_reference: Callable[..., Any],
    write_official: Callable[..., Path],
    tied: bool,
    stored_head: bool,
    select_layer: int,
) -> None:
    reference = make_reference(tied=tied, select_layer=select_layer)
    folder = write_official(reference, stored_head=stored_head)
    processor = AutoProcessor.from_pretrained(folder)
    model, info = SailVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="sailvl_packed"
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    answers = {}
    for name, (pictures, text) in CASES.items():
        inputs = processor(images=pictures or None, text=prompt(processor, pictures, text), return_tensors="pt")
        ids, pixels = inputs["input_ids"][0].tolist(), inputs.get("pixel_values")
        expected = reference.logits(ids, pixels)
        with torch.no_grad():
            actual = model(**inputs).logits[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        answers[name] = reference.greedy(ids, pixels, 6)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert out[0, len(ids) :].tolist() == answers[name], name
    assert len({tuple(answer) for answer in answers.values()}) == len(CASES), "answers must differ for the test to bite"

    pictures = [image for images, _ in CASES.values() for image in images]
    texts = [prompt(processor, images, text) for images, text in CASES.values()]
    batch = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][:, 0] == 0).any() and (batch["attention_mask"][:, -1] == 1).all()
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, answer in zip(out.tolist(), answers.values(), strict=True):
        assert row[: len(answer)] == answer


@pytest.mark.parametrize("select_layer", [-1, -2, 3])
def test_vit_equals_the_librarys(
    make_reference: Callable[..., Any], write_official: Callable[..., Path], select_layer: int
) -> None:
    reference = make_reference(tied=True, select_layer=select_layer)
    model = checkpoint.load(write_official(reference), dtype=torch.float32)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.get_image_features(pixels)
        torch.testing.assert_close(features.last_hidden_state, reference.features(pixels), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.pooler_output, reference.image_tokens(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_saving_writes_released_names(
    make_reference: Callable[..., Any], write_official: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    reference = make_reference(tied=tied, select_layer=-1)
    folder = write_official(reference, stored_head=True)
    model, processor = checkpoint.load(folder), AutoProcessor.from_pretrained(folder)
    checkpoint.save(model, processor, tmp_path / "ours")
    saved, expected = (
        load_file(tmp_path / "ours" / "model.safetensors"),
        reference.official_weights(stored_head=not tied),
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    again = checkpoint.load(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


def test_quick_start_of_the_release(make_reference: Callable[..., Any], write_official: Callable[..., Path]) -> None:
    """The published snippet line by line, without ``trust_remote_code``, with and without a picture."""
    folder = str(write_official(make_reference(tied=True, select_layer=-1), stored_head=True))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert isinstance(model, SailVLForConditionalGeneration)
    device = next(model.parameters()).device
    image = picture("wide")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "image_path"}, {"type": "text", "text": "describe the image"}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n你是由抖音内容理解组开发的") and text.endswith(
        "<|im_start|>assistant\n"
    )
    inputs = processor(images=image, text=text, return_tensors="pt", padding=True, truncation=True)
    inputs = inputs.to(model.device).to(torch.bfloat16)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    generated_ids = model.generate(**inputs, max_new_tokens=8)
    response = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert "describe the image" in response

    messages = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=None, text=text, return_tensors="pt", padding=True, truncation=True).to(device)
    assert model.generate(**inputs, max_new_tokens=8).shape[1] > inputs["input_ids"].shape[1]
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is type(model)


@pytest.mark.parametrize("given", ["absent", "empty", "without eos", "with its own"])
def test_generation_stops_at_the_end_token(
    make_reference: Callable[..., Any], write_official: Callable[..., Path], given: str
) -> None:
    """Whatever ``generation_config.json`` says or does not say; the head is made to prefer the end token."""
    folder = write_official(make_reference(tied=False, select_layer=-1))
    own = {
        "empty": {},
        "without eos": {"do_sample": True, "top_k": 20, "bos_token_id": 299},
        "with its own": {"eos_token_id": 12, "suppress_tokens": [5]},
    }
    if given in own:
        (folder / "generation_config.json").write_text(json.dumps(own[given]))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    stop = 12 if given == "with its own" else 301
    assert model.generation_config.eos_token_id == stop
    assert model.generation_config.pad_token_id is not None
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.language_model.norm.weight.zero_()
        model.lm_head.weight[stop] = 1.0
    ids = torch.tensor([[300, 40, 41]])
    model.model.language_model.norm.register_forward_hook(lambda _module, _inputs, output: output + 1)
    assert model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist() == [300, 40, 41, stop]
    assert {325, 326, 327} <= set(model.generation_config.suppress_tokens)
    assert (5 in model.generation_config.suppress_tokens) == (given == "with its own")


def test_image_tokens_are_never_generated(
    make_reference: Callable[..., Any], write_official: Callable[..., Path]
) -> None:
    from transformers import GenerationConfig

    model = checkpoint.load(write_official(make_reference(tied=False, select_layer=-1)))
    model.model.language_model.norm.register_forward_hook(lambda _module, _inputs, output: output * 0 + 1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[325:328] = 5.0
        model.lm_head.weight[77] = 1.0
    ids = torch.tensor([[300, 40, 41]])
    for options in ({"do_sample": False}, {"generation_config": GenerationConfig(do_sample=True, top_k=2)}):
        new = model.generate(ids, max_new_tokens=5, **options)[0, 3:].tolist()
        assert new and not {325, 326, 327} & set(new)


def test_another_shuffle_version_is_refused(
    make_reference: Callable[..., Any], write_official: Callable[..., Path]
) -> None:
    folder = write_official(make_reference(tied=True, select_layer=-1), ps_version="v1")
    with pytest.raises(ValueError, match="ps_version is 'v1'"):
        AutoModel.from_pretrained(folder)
