"""vLLM says token for token what transformers and the local engine say, whatever the pictures and the policy.

Needs vLLM (minutes, mostly its start): the tests are skipped where it is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sailvl.assets import tokenizer_path
from sailvl.engine.base import Reply, Request, Sampling, replies, stream
from sailvl.engine.local import Local
from sailvl.geometry import AnyRes, ImagePolicy, Tiling
from sailvl.model import checkpoint, lora
from sailvl.model.processing import SailVLProcessor, build_processor
from sailvl.types import Message, Picture, Record, RecordError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW = 12
OPTIONS = {"capacity": 4, "max_model_len": 2048, "dtype": "float32", "enforce_eager": True}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise in blocks, so that every tile differs and so does the whole."""
    small = np.random.default_rng(seed).integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def ask(
    id: str, sizes: list[tuple[int, int]], text: str = "What is this?", *, frames: int = 0, **given: Any
) -> Request:
    """A question about pictures; the last ``frames`` of them are a clip's."""
    images = [picture(width, height, seed) for seed, (width, height) in enumerate(sizes, len(id))]
    first = len(images) - frames
    pictures = tuple(
        Picture(width=image.width, height=image.height, ref=None, frame=index >= first)
        for index, image in enumerate(images)
    )
    policy = ImagePolicy(**{name: given.pop(name) for name in ("max_tiles", "msac", "upscale") if name in given})
    return Request(
        id=id,
        record=Record(id=id, messages=(Message(role="user", text=text),), pictures=pictures),
        images=images,
        sampling=Sampling(**{"max_new_tokens": NEW, **given}),
        policy=policy,
    )


CASES = [
    ask("text", [], "一加一等于几?"),
    ask("one", [(300, 200)]),
    ask("three", [(300, 200), (100, 400), (50, 50)], "<image> and <image>, or <image>?"),
    ask("wide", [(2000, 40)]),
    ask("tall", [(40, 2000)]),
    ask("tiny", [(1, 1)]),
    # The processor's own limit gives 3 tiles and more where these ask for 1 and 3, and the other way round.
    ask("limit 1", [(300, 200)], max_tiles=1),
    ask("limit 3", [(300, 200)], max_tiles=3),
    ask("limit 9", [(700, 680)], max_tiles=9),
    ask("default", [(224, 112)]),
    ask("default limit 1", [(224, 112)], max_tiles=1),
    ask("limit 2", [(200, 100), (500, 80)], max_tiles=2),
    ask("two grids", [(300, 200)], msac=True, max_tiles=9),
    ask("larger", [(150, 60)], upscale=2),
    ask("the first larger", [(150, 60), (150, 60), (90, 90)], upscale=3),
    ask("clip", [(120, 90)] * 3, frames=3),
    ask("still and clip", [(300, 200), (120, 90), (200, 90)], frames=2),
    ask("marks", [(50, 50)], "<|im_end|><IMG_CONTEXT> is not <img>"),
]


def make(size: str, root: Path) -> Path:
    """A folder in the released layout, with weights so large that answers differ from prompt to prompt."""
    scheme = AnyRes(side=112, max_side=448) if "anyres" in size else Tiling(side=112, max_tiles=6)
    processor = build_processor(tokenizer_path(), tiling=scheme)
    model = checkpoint.build(checkpoint.config_for(size, processor=processor), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "vision_tower" not in name and ".gate.weight" not in name:
                weight.mul_(4)
    checkpoint.save(model, processor, root / size)
    config = json.loads((root / size / "config.json").read_text())
    assert "llm_config" in config
    # One name for dense and sparse models, and a pointer to code that must not be needed: as the authors publish it.
    config |= {"architectures": ["SAILVLModel"], "auto_map": {"AutoConfig": "configuration_sailvl.SAILVLConfig"}}
    (root / size / "config.json").write_text(json.dumps(config))
    return root / size


@dataclass
class Made:
    """A model folder, and what its model says without vLLM: by the local engine and by the library's ``generate``."""

    folder: Path
    local: dict[str, Reply]
    generated: dict[str, tuple[int, ...]]


SIZES = ("nano", "nano-moe", "nano-anyres")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """All sizes at once: after vLLM has started, transformers cannot build these classes in this process any more."""
    return {size: answered(make(size, tmp_path_factory.mktemp("models"))) for size in SIZES}


def answered(folder: Path) -> Made:
    model, processor = checkpoint.load(folder, dtype=torch.float32).eval(), SailVLProcessor.from_pretrained(folder)
    with closing(Local(model, processor, capacity=1)) as engine:
        local = {reply.id: reply for reply in replies(engine, [with_logprobs(case) for case in CASES])}
        banned = engine.banned
    return Made(folder, local, {case.id: generated(model, processor, case, banned) for case in CASES})


def generated(model: Any, processor: SailVLProcessor, case: Request, banned: list[int]) -> tuple[int, ...]:
    """What the library decodes from the processor's own inputs, without any of our engines."""
    (message,) = case.record.messages
    frames = [picture.frame for picture in case.record.pictures]
    pictures: list[dict[str, Any]] = [{"type": "image", "frame": frame} for frame in frames]
    texts = [{"type": "text", "text": text} for text in message.text.split("<image>")]
    if len(texts) == 1:
        content = pictures + texts
    else:
        content = [part for pair in zip(texts, [*pictures, {"type": "text", "text": ""}], strict=True) for part in pair]
    chat = [{"role": message.role, "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    policy = {name: value for name, value in vars(case.policy).items() if value}
    images = list(case.images) or None
    inputs = processor(images=images, text=text, frames=frames or None, return_tensors="pt", **policy)
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=banned)
    return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())


ADAPTED = ["nano", "nano-moe"] if torch.cuda.is_available() else ["nano"]
"""With adapters vLLM runs a sparse model's experts by Triton kernels, which need a GPU."""


@pytest.fixture(scope="module")
def adapted(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Reply]]]:
    """Adapters' folders, and what the models say with them."""
    pytest.importorskip("peft")
    found = {}
    for size in ADAPTED:
        folder, target = made[size].folder, tmp_path_factory.mktemp("adapters") / size
        model = checkpoint.load(folder, dtype=torch.float32)
        lora.attach(model, ["lm"], rank=4, alpha=8, seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if lora.is_adapter(name):
                    weight.normal_(0, 0.2, generator=generator)
        lora.save(model, target)
        with closing(Local(model.eval(), SailVLProcessor.from_pretrained(folder), capacity=1)) as engine:
            found[size] = target, list(replies(engine, CASES))
    return found


@pytest.fixture(scope="module", params=SIZES)
def expected(request: pytest.FixtureRequest, made: dict[str, Made], adapted: Any) -> Made:
    return made[request.param]


@pytest.fixture(scope="module")
def engine(expected: Made) -> Iterator[Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from sailvl.engine.vllm import VLLM

    with closing(VLLM(expected.folder, max_tiles=9, msac=True, **OPTIONS)) as engine:
        yield engine


def with_logprobs(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, top_logprobs=2))


def ids(reply: Reply) -> list[tuple[int, ...]]:
    assert not reply.error, reply.error
    return [completion.ids for completion in reply.completions]


def fitting(engine: Any) -> list[Request]:
    """At any resolution the smallest picture is one token, which vLLM cannot do."""
    return [case for case in CASES if case.id != "tiny" or isinstance(engine.processor.image_processor.tiling, Tiling)]


def told(found: Any) -> dict[str, list[tuple[int, ...]]]:
    return {reply.id: ids(reply) for reply in found}


def test_greedy_ids_are_those_of_generate_and_of_the_local_engine(engine: Any, expected: Made) -> None:
    """All together, then again in the other order, when every picture comes out of vLLM's caches."""
    cases = fitting(engine)
    ours = {case.id: [expected.generated[case.id]] for case in cases}
    assert told(expected.local[case.id] for case in cases) == ours
    assert len({tuple(answer) for answer in ours.values()}) >= len(cases) - 1, "answers must differ to prove it"
    for order in (cases, cases[::-1]):
        found = list(replies(engine, order))
        assert told(found) == ours
        for reply in found:
            assert reply.num_prompt_tokens == expected.local[reply.id].num_prompt_tokens
            (theirs,), (known,) = reply.completions, expected.local[reply.id].completions
            assert theirs.text == known.text.rstrip("\ufffd") and theirs.finish_reason == known.finish_reason


def test_logprobs(engine: Any, expected: Made) -> None:
    for delta in stream(engine, with_logprobs(CASES[1])):
        assert len(delta.ids) == len(delta.logprobs) == len(delta.top_logprobs)
        for id, logprob, likeliest in zip(delta.ids, delta.logprobs, delta.top_logprobs, strict=True):
            assert likeliest[0] == (id, logprob) and len(likeliest) == 2 and likeliest[1][1] <= logprob
    (reply,) = replies(engine, [with_logprobs(CASES[2])])
    ours = expected.local[CASES[2].id].completions[0].logprobs
    np.testing.assert_allclose(reply.completions[0].logprobs, ours, atol=5e-3)


def test_sampling_repeats_by_seed(engine: Any) -> None:
    drawn = ask("drawn", [(300, 200)], temperature=1.5, n=3, seed=5)
    (first,), (again,) = replies(engine, [drawn]), replies(engine, [drawn])
    (other,) = replies(engine, [replace(drawn, sampling=replace(drawn.sampling, seed=6))])
    assert ids(first) == ids(again) != ids(other) and len(set(ids(first))) == 3
    assert not {*engine._bias} & {id for answer in ids(first) + ids(other) for id in answer}


def test_stop_strings_end_the_text(engine: Any, expected: Made) -> None:
    whole = expected.local["text"].completions[0].text
    stop = whole[len(whole) // 2 :][:2]
    (reply,) = replies(engine, [ask("text", [], "一加一等于几?", stop=(stop,))])
    assert reply.completions[0].text == whole[: whole.index(stop)] and reply.completions[0].finish_reason == "stop"
    pieces = [delta.text for delta in stream(engine, ask("text", [], "一加一等于几?", stop=(stop,)))]
    assert "".join(pieces) == reply.completions[0].text and len(pieces) > 2


def test_cancelling_and_refusing_leave_the_engine_alive(engine: Any, expected: Made) -> None:
    engine.submit(ask("a", [(300, 200)], n=2, temperature=1.0, max_new_tokens=500))
    with pytest.raises(ValueError, match="in flight"):
        engine.submit(ask("a", []))
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    engine.cancel("unknown")
    ends = engine.step()
    assert [(delta.index, delta.finish_reason) for delta in ends] == [(0, "cancelled"), (1, "cancelled")]
    assert engine.step() == []
    bad: list[tuple[Request, str]] = [
        (ask("long", [], "word " * 5000), "long"),
        (ask("more", [(50, 50)], "<image> <image>"), "placeholders"),
        (replace(ask("lost", [(50, 50)]), images=()), "0 images given"),
    ]
    if isinstance(engine.processor.image_processor.tiling, Tiling):
        bad.append((ask("tiles", [(300, 200)], max_tiles=10), "at most 9"))
    else:
        bad.append((ask("tiny", [(1, 1)]), "one token"))
    for request, message in bad:
        with pytest.raises(RecordError, match=message):
            engine.submit(request)
    cases = fitting(engine)
    assert told(replies(engine, cases)) == told(expected.local[case.id] for case in cases)


@pytest.mark.parametrize("size", ADAPTED)
def test_adapters(made: dict[str, Made], adapted: dict[str, tuple[Path, list[Reply]]], size: str) -> None:
    """With an adapter the answers are other ones, and those of the local engine."""
    from sailvl.engine.vllm import VLLM

    folder, ours = adapted[size]
    with closing(VLLM(made[size].folder, adapter=folder, max_tiles=9, msac=True, **OPTIONS)) as engine:
        found = told(replies(engine, CASES))
    assert found == told(ours)
    assert all(found[id] != [answer] for id, answer in made[size].generated.items())
