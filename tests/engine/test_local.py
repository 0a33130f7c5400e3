import copy
import random

import pytest
import torch
from PIL import Image

from sailvl.data.encode import encode
from sailvl.engine.local import Local
from sailvl.types import Message, Picture, Record, RecordError

SIZES = {
    "text": (),
    "one": ((56, 56),),
    "tiled": ((168, 60),),
    "several": ((56, 56), (112, 56)),
    "clip": ((60, 60),) * 3,
}


def ask(number: int, kind: str) -> tuple[Record, list[Image.Image]]:
    rng = random.Random(number)
    images = []
    for width, height in SIZES[kind]:
        image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        images.append(image)
    pictures = tuple(Picture(width=i.width, height=i.height, ref=None, frame=kind == "clip") for i in images)
    text = f"what is in picture {number}? " + "how many? " * rng.randrange(12)
    return Record(id=f"{kind}-{number}", messages=(Message(role="user", text=text),), pictures=pictures), images


def mixed() -> tuple[list[Record], list[list[Image.Image]]]:
    kinds = ["several", "text", "one", "clip", "tiled", "text", "one", "several", "tiled", "text", "one"]
    asked = [ask(number, kind) for number, kind in enumerate(kinds)]
    return [record for record, _ in asked], [images for _, images in asked]


@pytest.fixture(scope="module")
def lively(tiny_model):
    """The tiny model in fp64, with layers strong enough that different prompts get different answers."""
    model = copy.deepcopy(tiny_model).double()
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(12)
    return model


@torch.inference_mode()
def plain(model, processor, record, images, count: int, end_ids, banned) -> list[int]:
    """Greedy decoding of one prompt without padding, cache or library: every step reads the whole text again."""
    example = encode(record, images, processor, generate=True)
    ids = example.ids_T.tolist()
    tiles = torch.from_numpy(example.tiles_N3SS).double()
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in end_ids):
        pixels = {"pixel_values": tiles} if len(tiles) else {}
        logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False, **pixels).logits[0, -1]
        logits[banned] = float("-inf")
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize("max_batch", [1, 4, 32])
def test_batches_answer_as_single_prompts_do(lively, tiny_processor, max_batch: int) -> None:
    records, images = mixed()
    engine = Local(lively, tiny_processor, max_batch=max_batch)
    # Frequent tokens are made end tokens, so that answers stop at different lengths.
    engine.end_ids |= set(range(100, 160))
    replies = engine.answer(records, images, max_new_tokens=10)
    expected = [
        plain(lively, tiny_processor, record, pictures, 10, engine.end_ids, engine.banned)
        for record, pictures in zip(records, images, strict=True)
    ]
    assert [list(reply.ids) for reply in replies] == expected
    assert len({len(ids) for ids in expected}) > 2 and len({tuple(ids) for ids in expected}) > 8
    for reply in replies:
        stopped = reply.ids[-1] in engine.end_ids
        assert reply.finish_reason == ("stop" if stopped else "length")
        kept = reply.ids[:-1] if stopped else reply.ids
        assert reply.text == tiny_processor.tokenizer.decode(kept).strip()


def favour(model, token: int):
    """A copy of the model that says ``token`` whenever it may, and otherwise what it would have said."""
    forced = copy.deepcopy(model)
    forced.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([token]), 1e4))
    return forced


def test_image_and_chat_tokens_are_never_said(tiny_model, tiny_processor) -> None:
    tokenizer = tiny_processor.tokenizer
    for token in ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|vision_start|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        engine = Local(favour(tiny_model, number), tiny_processor)
        (reply,) = engine.answer([ask(1, "text")[0]], [[]], max_new_tokens=5)
        assert number not in reply.ids and token not in reply.text


def test_grounding_marks_are_text_and_the_end_of_a_turn_is_not(tiny_model, tiny_processor) -> None:
    number = tiny_processor.tokenizer.convert_tokens_to_ids("<box>")
    (reply,) = Local(favour(tiny_model, number), tiny_processor).answer([ask(1, "text")[0]], [[]], max_new_tokens=3)
    assert reply.text == "<box><box><box>" and reply.finish_reason == "length"
    for token in ("<|im_end|>", "<|endoftext|>"):
        number = tiny_processor.tokenizer.convert_tokens_to_ids(token)
        engine = Local(favour(tiny_model, number), tiny_processor)
        (reply,) = engine.answer([ask(1, "text")[0]], [[]], max_new_tokens=3)
        assert (reply.text, reply.ids, reply.finish_reason) == ("", (number,), "stop")


def test_embedding_rows_without_a_token_are_never_said(tiny_model, tiny_processor) -> None:
    unused = tiny_model.config.text_config.vocab_size - 1
    if unused < len(tiny_processor.tokenizer):
        pytest.skip("this vocabulary is full")
    (reply,) = Local(favour(tiny_model, unused), tiny_processor).answer([ask(1, "text")[0]], [[]], max_new_tokens=3)
    assert unused not in reply.ids


def test_a_sampling_checkpoint_is_asked_greedily(tiny_model, tiny_processor) -> None:
    records, images = mixed()
    model = copy.deepcopy(tiny_model)
    expected = Local(model, tiny_processor).answer(records, images, max_new_tokens=4)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    assert Local(model, tiny_processor).answer(records, images, max_new_tokens=4) == expected


def test_faulty_records_are_named(tiny_model, tiny_processor) -> None:
    engine = Local(tiny_model, tiny_processor)
    good, pictures = ask(1, "one")
    with pytest.raises(RecordError, match="one-1"):
        engine.answer([good], [[]], max_new_tokens=4)
    ended = Record(id="ended", messages=(*good.messages, Message(role="assistant", text="red")))
    with pytest.raises(RecordError, match="ended"):
        engine.answer([good, ended], [pictures, []], max_new_tokens=4)
    with pytest.raises(RecordError, match=r"record one-1: \d+ prompt tokens and 5000 new ones exceed the model's 2048"):
        engine.answer([good], [pictures], max_new_tokens=5000)
    with pytest.raises(ValueError, match="2 records, but pictures for 1"):
        engine.answer([good, good], [pictures], max_new_tokens=4)


def test_training_mode_is_given_back(tiny_model, tiny_processor) -> None:
    model = copy.deepcopy(tiny_model).train()
    assert Local(model, tiny_processor).answer([], [], max_new_tokens=4) == []
    record, pictures = ask(1, "one")
    Local(model, tiny_processor).answer([record], [pictures], max_new_tokens=2)
    assert model.training and model.model.vision_tower.training
