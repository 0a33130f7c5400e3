import copy
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from sailvl.data.encode import encode
from sailvl.engine.base import EngineError, Request, Sampling, replies, stream
from sailvl.engine.local import Local
from sailvl.geometry import AnyRes, ImagePolicy
from sailvl.model import SailVLForConditionalGeneration, checkpoint
from sailvl.model.processing import build_processor
from sailvl.types import Message, Picture, Record, RecordError
from tests.tiny import LM, VIT

SIZES = {
    "text": (),
    "one": ((56, 56),),
    "tiled": ((168, 60),),
    "several": ((56, 56), (112, 56)),
    "clip": ((60, 60),) * 3,
}
KINDS = ["several", "text", "one", "clip", "tiled", "text", "one", "several", "tiled", "text", "one"]


def ask(number: int, kind: str, policy: ImagePolicy | None = None, **sampling) -> Request:
    rng = random.Random(number)
    images = []
    for width, height in SIZES[kind]:
        image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        images.append(image)
    pictures = tuple(Picture(width=i.width, height=i.height, ref=None, frame=kind == "clip") for i in images)
    text = f"what is in picture {number}? " + "how many? " * rng.randrange(12)
    record = Record(id=f"{kind}-{number}", messages=(Message(role="user", text=text),), pictures=pictures)
    policy = policy or ImagePolicy()
    return Request(id=record.id, record=record, images=images, sampling=Sampling(**sampling), policy=policy)


def mixed(**sampling) -> list[Request]:
    return [ask(number, kind, **sampling) for number, kind in enumerate(KINDS)]


def answers(engine: Local, requests: Sequence[Request]):
    """Completions by request id, in the requests' order."""
    found = {}
    for reply in replies(engine, requests):
        assert not reply.error, reply.error
        found[reply.id] = reply.completions
    return {request.id: found[request.id] for request in requests}


def answer(engine: Local, request: Request):
    return answers(engine, [request])[request.id][0]


def enlivened(model, scale: float = 12):
    """In fp64, with layers strong enough that different prompts get different answers."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name and "gate.weight" not in name:
                weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def lively(tiny_model):
    return enlivened(tiny_model)


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer_file, tiny_processor, lively):
    """Model and processor of each kind: dense and sparse, tiles and any resolution."""
    any_processor = build_processor(tiny_tokenizer_file, tiling=AnyRes(side=56, max_side=168))
    anyres = checkpoint.config_for("nano-anyres", processor=any_processor, vit=VIT, lm=LM)
    experts = {**LM, "moe_intermediate_size": 32}
    moe = checkpoint.config_for("nano-moe", processor=tiny_processor, vit=VIT, lm=experts)
    # The grouped kernel of experts refuses fp64.
    sparse = enlivened(checkpoint.build(moe, seed=0).eval(), 6)
    sparse.config.text_config._experts_implementation = "eager"
    return {
        "dense": (lively, tiny_processor),
        "moe": (sparse, tiny_processor),
        "anyres": (enlivened(checkpoint.build(anyres, seed=0).eval()), any_processor),
    }


@torch.inference_mode()
def generated(model, processor, request: Request, count: int, end_ids, banned) -> list[int]:
    """Greedy ids of the library's ``generate`` for one prompt: its own cache, its own masks, its own loop."""
    example = encode(request.record, request.images, processor, generate=True, policy=request.policy)
    pixels = {}
    if example.num_tiles:
        pixels = {"pixel_values": torch.from_numpy(example.tiles_N3SS).to(model.dtype)}
        if example.grids_N2 is not None:
            pixels["image_grid_hw"] = torch.from_numpy(example.grids_N2)
    ids = model.generate(
        input_ids=torch.from_numpy(example.ids_T)[None],
        attention_mask=torch.ones(1, example.num_tokens, dtype=torch.long),
        **pixels,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(end_ids),
        suppress_tokens=list(banned),
    )
    return ids[0, example.num_tokens :].tolist()


@torch.inference_mode()
def logprobs_of(model, processor, request: Request, ids: Sequence[int], banned) -> torch.Tensor:
    """Log-probabilities [tokens, V] of an answer, read in one go without a cache."""
    example = encode(request.record, request.images, processor, generate=True)
    pixels = {"pixel_values": torch.from_numpy(example.tiles_N3SS).to(model.dtype)} if example.num_tiles else {}
    whole = torch.tensor([[*example.ids_T.tolist(), *ids]])
    logits = model(input_ids=whole, use_cache=False, **pixels).logits[0, example.num_tokens - 1 : -1]
    return logits.index_fill(-1, torch.tensor(list(banned)), float("-inf")).log_softmax(-1)


@pytest.mark.parametrize("capacity", [1, 4, 32])
@pytest.mark.parametrize("kind", ["dense", "moe", "anyres"])
def test_answers_are_those_of_generate(pairs, kind: str, capacity: int) -> None:
    """Text, one picture, tiles, several pictures and clips, joining and leaving: greedy ids of each prompt alone."""
    model, processor = pairs[kind]
    engine = Local(model, processor, capacity=capacity, prefill_tokens=150)
    # Frequent tokens are made end tokens, so that answers stop at different lengths.
    engine.end_ids |= set(range(100, 160))
    requests = mixed(max_new_tokens=10)
    found = answers(engine, requests)
    expected = {
        request.id: generated(model, processor, request, 10, engine.end_ids, engine.banned) for request in requests
    }
    assert {id: list(completions[0].ids) for id, completions in found.items()} == expected
    assert len({len(ids) for ids in expected.values()}) > 2 and len({tuple(ids) for ids in expected.values()}) > 8
    for (completion,) in found.values():
        stopped = completion.ids[-1] in engine.end_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        kept = completion.ids[:-1] if stopped else completion.ids
        assert completion.text == processor.tokenizer.decode(kept)


@pytest.mark.parametrize("slow", [False, True])
def test_the_lean_step_and_the_librarys_agree(pairs, slow: bool, monkeypatch) -> None:
    model, processor = pairs["dense"]
    if slow:
        monkeypatch.setattr("sailvl.model.decode.supports", lambda model: False)
    engine = Local(model, processor, capacity=5)
    for request, (completion,) in zip(mixed(), answers(engine, mixed(max_new_tokens=6)).values(), strict=True):
        assert list(completion.ids) == generated(model, processor, request, 6, engine.end_ids, engine.banned)


def test_fp32_batches_and_singles_agree(tiny_model, tiny_processor) -> None:
    model = enlivened(tiny_model).float()
    requests = mixed(max_new_tokens=8, top_logprobs=3)
    together = answers(Local(model, tiny_processor), requests)
    for request in requests:
        alone = answer(Local(model, tiny_processor), request)
        (found,) = together[request.id]
        assert found.ids == alone.ids and found.text == alone.text
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_logprobs_are_those_of_reading_the_answer(pairs) -> None:
    model, processor = pairs["dense"]
    engine = Local(model, processor)
    for request in mixed(max_new_tokens=5, temperature=1.5, seed=1, presence_penalty=1.0, top_logprobs=4)[:6]:
        deltas = [delta for delta in stream(engine, request) if delta.ids]
        ids = [id for delta in deltas for id in delta.ids]
        truth = logprobs_of(model, processor, request, ids, engine.banned)
        for step, delta in enumerate(deltas):
            assert delta.logprobs == pytest.approx([truth[step, ids[step]].item()], abs=1e-6)
            values, order = truth[step].topk(4)
            assert [id for id, _ in delta.top_logprobs[0]] == order.tolist()
            assert [value for _, value in delta.top_logprobs[0]] == pytest.approx(values.tolist(), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_n_answers_are_n_prompts(tiny_model, tiny_processor, temperature: float) -> None:
    """Of one prompt: the i-th is drawn by (seed, i), whoever else is there; the prompt is read, and seen, once."""
    model = enlivened(tiny_model, 4).float()
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 5, "top_p": 0.95}
    engine = Local(model, tiny_processor, capacity=7)
    reads = []
    read = engine._read
    engine._read = lambda prompts, features: reads.append(len(prompts)) or read(prompts, features)  # type: ignore
    together = answers(engine, [ask(4, "tiled", n=4, **options), ask(1, "several", n=3, **options)])
    assert sum(reads) == 2
    tiles = engine.encoded_tiles
    for request in (ask(4, "tiled", **options), ask(1, "several", **options)):
        found = together[request.id]
        if temperature:
            assert len({completion.ids for completion in found}) > 1
        more = ask(int(request.id.split("-")[1]), request.id.split("-")[0], **{**options, "n": 6})
        again = answers(Local(model, tiny_processor), [more])[more.id]
        assert again[: len(found)] == found
        assert answer(engine, request) == found[0]
    assert engine.encoded_tiles == tiles and engine.reused_tiles == tiles


def test_sampling_does_not_depend_on_company(lively, tiny_processor) -> None:
    options = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1}
    requests = [ask(number, kind, seed=number, **options) for number, kind in enumerate(KINDS)]
    straight = answers(Local(lively, tiny_processor, capacity=3), requests)
    mingled = answers(Local(lively, tiny_processor, capacity=8), requests[::-1])
    assert straight == {id: mingled[id] for id in straight}


def favour(model, token: int):
    """A copy of the model that says ``token`` whenever it may, and otherwise what it would have said."""
    forced = copy.deepcopy(model)
    forced.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([token]), 1e4))
    return forced


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_image_and_chat_tokens_are_never_said(tiny_model, tiny_processor, temperature: float) -> None:
    tokenizer = tiny_processor.tokenizer
    for token in ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|vision_start|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        engine = Local(favour(tiny_model, number), tiny_processor)
        found = answer(engine, ask(1, "text", max_new_tokens=5, temperature=temperature, top_logprobs=20))
        assert number not in found.ids and token not in found.text


def test_grounding_marks_are_text_and_the_end_of_a_turn_is_not(tiny_model, tiny_processor) -> None:
    number = tiny_processor.tokenizer.convert_tokens_to_ids("<box>")
    found = answer(Local(favour(tiny_model, number), tiny_processor), ask(1, "text", max_new_tokens=3))
    assert found.text == "<box><box><box>" and found.finish_reason == "length"
    for token in ("<|im_end|>", "<|endoftext|>"):
        number = tiny_processor.tokenizer.convert_tokens_to_ids(token)
        found = answer(Local(favour(tiny_model, number), tiny_processor), ask(1, "text", max_new_tokens=3))
        assert (found.text, found.ids, found.finish_reason) == ("", (number,), "stop")


def test_embedding_rows_without_a_token_are_never_said(tiny_model, tiny_processor) -> None:
    unused = tiny_model.config.text_config.vocab_size - 1
    if unused < len(tiny_processor.tokenizer):
        pytest.skip("this vocabulary is full")
    found = answer(Local(favour(tiny_model, unused), tiny_processor), ask(1, "text", max_new_tokens=3))
    assert unused not in found.ids


def test_a_sampling_checkpoint_is_asked_greedily(tiny_model, tiny_processor) -> None:
    requests = mixed(max_new_tokens=4)
    model = copy.deepcopy(tiny_model)
    expected = answers(Local(model, tiny_processor), requests)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    assert answers(Local(model, tiny_processor), requests) == expected


def spell(model, tokens: Sequence[int]):
    """A copy of the model whose greedy answers are ``tokens``, one after the other, each answer's from the first on."""
    forced = copy.deepcopy(model)
    heads = forced.lm_head.weight.shape[0]
    order = dict(itertools.pairwise(tokens))

    class Head(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(len(hidden), heads)
            last = [answer.last for answer in forced.engine._running[-len(hidden) :]]
            for row, token in enumerate(last):
                logits[row, order.get(token, tokens[0])] = 9.0
            return logits

    forced.lm_head = Head()
    return forced


def test_stop_strings_and_characters_across_tokens(tiny_model, tiny_processor) -> None:
    ids = tiny_processor.tokenizer.backend_tokenizer.encode("好 猫dog:fin", add_special_tokens=False).ids
    assert len(set(ids)) == len(ids) > 8
    model = spell(tiny_model, ids)
    model.__dict__["engine"] = engine = Local(model, tiny_processor)
    deltas = list(stream(engine, ask(1, "text", max_new_tokens=len(ids), stop=("never", "猫do", "g"))))
    assert "".join(delta.text for delta in deltas) == "好 "
    assert deltas[-1].finish_reason == "stop" and sum(len(delta.ids) for delta in deltas) < len(ids)
    assert all("\ufffd" not in delta.text for delta in deltas)
    whole = answer(engine, ask(1, "text", max_new_tokens=len(ids), stop=("find",)))
    assert (whole.text, whole.finish_reason) == ("好 猫dog:fin", "length")
    cut = answer(engine, ask(1, "text", max_new_tokens=2))
    assert cut.text == "\ufffd" and cut.finish_reason == "length"


def test_faulty_records_are_named(tiny_model, tiny_processor) -> None:
    engine = Local(tiny_model, tiny_processor, capacity=4)
    good = ask(1, "one")
    pictures = good.record.pictures

    def refused(match: str, **changes) -> None:
        with pytest.raises(RecordError, match=match):
            engine.submit(Request(**{**vars(good), **changes}))

    refused("record one-1: 1 pictures, 0 images given", images=[])
    ended = Record(id="ended", messages=(*good.record.messages, Message(role="assistant", text="red")))
    refused("record ended: a prompt must end with a user turn", record=ended, images=[])
    refused(
        r"record one-1: \d+ prompt tokens and 5000 new ones exceed the model's 2048",
        sampling=Sampling(max_new_tokens=5000),
    )
    refused("record one-1: 5 answers are asked for, and 4 fit at once", sampling=Sampling(n=5))
    refused(
        "record one-1: picture 1 was 56 x 56 and is 168 x 60, which takes another number",
        images=[Image.new("RGB", (168, 60))],
    )
    assert engine.step() == []
    engine.submit(good)
    with pytest.raises(ValueError, match="'one-1' is in flight"):
        engine.submit(good)
    assert pictures == good.record.pictures


class Torn(Image.Image):
    """A picture whose file turns out to be truncated when its pixels are wanted."""

    def load(self):
        raise OSError("image file is truncated")

    size = (56, 56)
    mode = "RGB"


def test_a_broken_picture_fails_its_request_alone(lively, tiny_processor) -> None:
    bad = ask(2, "one", max_new_tokens=4)
    bad = Request(**{**vars(bad), "images": [Torn()]})
    requests = [ask(0, "several", max_new_tokens=4), bad, ask(1, "text", max_new_tokens=4)]
    found = {reply.id: reply for reply in replies(Local(lively, tiny_processor), requests)}
    assert found["one-2"].error == "image file is truncated" and not found["one-2"].completions
    for request in (requests[0], requests[2]):
        assert found[request.id].completions[0] == answer(Local(lively, tiny_processor), request)


def test_a_failing_model_ends_the_engines_work_and_not_the_engine(lively, tiny_processor) -> None:
    engine = Local(lively, tiny_processor)
    expected = answers(engine, [ask(1, "text", max_new_tokens=5)])
    hook = None

    def fail(*_):
        hook.remove()
        raise torch.OutOfMemoryError("no memory for 3 GiB")

    for layer in (lively.model.language_model.layers[1], lively.model.vision_tower):
        engine.submit(ask(0, "text", max_new_tokens=9))
        engine.step()
        engine.submit(ask(2, "one"))
        hook = layer.register_forward_pre_hook(fail)
        engine.features.forget()
        with pytest.raises(EngineError, match="OutOfMemoryError: no memory for 3 GiB"):
            for _ in range(2):
                engine.step()
        assert engine.step() == []
        assert answers(engine, [ask(1, "text", max_new_tokens=5)]) == expected


def test_cancelling(lively, tiny_processor) -> None:
    engine = Local(lively, tiny_processor, capacity=3)
    engine.end_ids = set()
    expected = answers(Local(lively, tiny_processor), [ask(5, "text", max_new_tokens=6)])["text-5"][0]
    for request in (ask(0, "one", n=2), ask(5, "text", max_new_tokens=6), ask(9, "text", n=2)):
        engine.submit(request)
    said = defaultdict(list)
    for _ in range(3):
        for delta in engine.step():
            said[delta.id] += delta.ids
    assert set(said) == {"one-0", "text-5"}  # text-9 waits: three answers fit
    engine.cancel("one-0")
    engine.cancel("text-9")
    engine.cancel("unknown")
    deltas = engine.step()
    ended = sorted((delta.id, delta.index) for delta in deltas if delta.finish_reason == "cancelled")
    assert ended == [("one-0", 0), ("one-0", 1), ("text-9", 0), ("text-9", 1)]
    said["text-5"] += [id for delta in deltas if delta.id == "text-5" for id in delta.ids]
    while deltas := engine.step():
        assert {delta.id for delta in deltas} == {"text-5"}
        said["text-5"] += [id for delta in deltas for id in delta.ids]
    assert tuple(said["text-5"])[: len(expected.ids)] == expected.ids
    assert engine._cache.num_rows == 0 and engine._cache.keys == []


def test_capacity_counts_answers_and_prompts_wait_for_memory(lively, tiny_processor) -> None:
    most = 0

    def watched(engine: Local, requests) -> None:
        nonlocal most
        most, step = 0, engine.step

        def counted():
            nonlocal most
            deltas = step()
            most = max(most, len(engine._running))
            return deltas

        engine.step = counted  # type: ignore[method-assign]
        answers(engine, requests)

    requests = mixed(max_new_tokens=5, n=2)
    watched(Local(lively, tiny_processor, capacity=5), requests)
    assert most == 4
    watched(Local(lively, tiny_processor, capacity=32, cache_mb=0.001), requests)
    assert most == 2  # the first is read whatever the limit says


def test_packs_hold_so_many_tokens_and_long_prompts_are_read_alone(lively, tiny_processor) -> None:
    requests = mixed(max_new_tokens=1)
    lengths = [encode(request.record, request.images, tiny_processor, generate=True).num_tokens for request in requests]
    limit = min(a + b for a, b in itertools.pairwise(lengths))
    engine, packs = Local(lively, tiny_processor, prefill_tokens=limit), []
    read = engine._read
    engine._read = lambda prompts, features: packs.append([len(p.ids) for p in prompts]) or read(prompts, features)
    answers(engine, requests)
    assert [length for pack in packs for length in pack] == lengths
    assert all(sum(pack) <= limit or len(pack) == 1 for pack in packs)
    for pack, after in itertools.pairwise(packs):
        assert sum(pack) + after[0] > limit
    assert {len(pack) for pack in packs} >= {1, 2}


def test_repeated_pictures_are_seen_once(lively, tiny_processor) -> None:
    engine = Local(lively, tiny_processor)
    first = ask(4, "tiled", max_new_tokens=3)
    (picture,) = first.images
    twice = Record(
        id="twice",
        messages=(Message(role="user", text="the same?"),),
        pictures=(Picture(width=168, height=60, ref=None),) * 2,
    )
    both = Request(id="twice", record=twice, images=[picture, picture.copy()], sampling=Sampling(max_new_tokens=3))
    tiles = encode(first.record, first.images, tiny_processor, generate=True).num_tiles
    found = answers(engine, [first, both])
    assert (engine.encoded_tiles, engine.reused_tiles) == (tiles, 2 * tiles)
    assert answers(engine, [both])["twice"] == found["twice"]
    assert (engine.encoded_tiles, engine.reused_tiles) == (tiles, 4 * tiles)
    cold = Local(lively, tiny_processor, feature_cache_mb=0)
    assert answers(cold, [first, both]) == found
    assert answers(cold, [both])["twice"] == found["twice"]
    assert (cold.encoded_tiles, cold.reused_tiles) == (2 * tiles, 3 * tiles)


def test_what_makes_a_picture_another(lively, tiny_processor) -> None:
    engine = Local(lively, tiny_processor)
    rng = random.Random(0)
    pixels = rng.randbytes(56 * 56)
    grey = Image.frombytes("L", (56, 56), pixels)
    palette = Image.frombytes("P", (56, 56), pixels)
    palette.putpalette(rng.randbytes(768))
    other = palette.copy()
    other.putpalette(rng.randbytes(768))
    shape = Image.frombytes("L", (112, 28), pixels)
    for number, (image, frame) in enumerate(
        [(grey, False), (palette, False), (other, False), (shape, True), (grey, True)], 1
    ):
        picture = Picture(width=image.width, height=image.height, ref=None, frame=frame)
        record = Record(id="q", messages=(Message(role="user", text="what?"),), pictures=(picture,))
        answer(engine, Request(id="q", record=record, images=[image], sampling=Sampling(max_new_tokens=1)))
        assert (engine.encoded_tiles, engine.reused_tiles) == (number, 0)


def test_the_store_of_features_is_bounded_and_follows_the_weights(tiny_model, tiny_processor) -> None:
    model = copy.deepcopy(tiny_model)
    a, b = ask(0, "one", max_new_tokens=2), ask(1, "one", max_new_tokens=2)
    engine = Local(model, tiny_processor, feature_cache_mb=1.5 * 4 * 64 * 4 / 2**20)  # room for one tile of 4 tokens
    for request in (a, a, b, b, a):
        answer(engine, request)
    assert (engine.encoded_tiles, engine.reused_tiles) == (3, 2)
    with torch.no_grad():  # what an optimizer does
        for weight in model.model.vision_tower.parameters():
            weight.add_(0.1)
    assert answer(engine, a) == answer(Local(model, tiny_processor), a)
    assert engine.encoded_tiles == 4
    for weight in model.model.multi_modal_projector.parameters():
        weight.data = weight.data * 2
    assert answer(engine, a) == answer(Local(model, tiny_processor), a)
    assert engine.encoded_tiles == 5
    engine.close()
    answer(engine, a)
    assert engine.encoded_tiles == 6


def test_policies_reach_the_tiles(pairs) -> None:
    for kind in ("dense", "anyres"):
        model, processor = pairs[kind]
        engine, counts = Local(model, processor), []
        for policy in (ImagePolicy(), ImagePolicy(max_tiles=1), ImagePolicy(msac=True), ImagePolicy(upscale=2)):
            request = ask(3, "tiled", policy, max_new_tokens=3)
            before = engine.encoded_tiles
            found = answer(engine, request)
            expected = generated(model, processor, request, 3, engine.end_ids, engine.banned)
            assert list(found.ids) == expected
            counts.append(engine.encoded_tiles - before)
        assert counts[0] == encode(request.record, request.images, processor, generate=True).num_tiles > counts[1]
        assert counts[3] >= counts[0]  # enlarged, it is another picture


def test_training_mode_and_attention_are_given_back(tiny_model, tiny_processor) -> None:
    model = copy.deepcopy(tiny_model).train()
    text = model.model.language_model.config
    text._attn_implementation = "sdpa"
    engine = Local(model, tiny_processor)
    assert engine.step() == []
    found = answers(engine, mixed(max_new_tokens=3))
    assert model.training and model.model.vision_tower.training and text._attn_implementation == "sdpa"
    assert found == answers(Local(tiny_model, tiny_processor), mixed(max_new_tokens=3))


def test_sliding_windows_and_no_capacity_are_refused(tiny_model, tiny_processor) -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        Local(tiny_model, tiny_processor, capacity=0)
    model = copy.deepcopy(tiny_model)
    model.config.text_config.sliding_window = 16
    with pytest.raises(ValueError, match="sliding windows"):
        Local(model, tiny_processor)


def test_bf16(tiny_model, tiny_processor) -> None:
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    found = answers(Local(model, tiny_processor, capacity=3), mixed(max_new_tokens=4, top_logprobs=0))
    for (completion,) in found.values():
        assert len(completion.ids) == len(completion.logprobs) > 0 and max(completion.logprobs) <= 0


def test_usage_and_empty_engines(tiny_model, tiny_processor) -> None:
    engine = Local(tiny_model, tiny_processor)
    request = ask(0, "several", max_new_tokens=2)
    (reply,) = replies(engine, [request])
    example = encode(request.record, request.images, tiny_processor, generate=True)
    assert reply.num_prompt_tokens == example.num_tokens
    assert list(replies(engine, [])) == [] and engine.step() == []
    assert isinstance(tiny_model, SailVLForConditionalGeneration)
