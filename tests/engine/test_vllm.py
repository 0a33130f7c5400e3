"""The plug-in and the engine around vLLM, against a stand-in for vLLM that records what it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sailvl.data.encode import encode
from sailvl.engine.base import EngineError, Request, Sampling, replies, stream
from sailvl.engine.vllm import VLLM, register
from sailvl.geometry import AnyRes, ImagePolicy, Tiling, num_image_tokens
from sailvl.model import checkpoint
from sailvl.model.configuration import ARCHITECTURES
from sailvl.model.processing import build_processor
from sailvl.types import Message, Picture, Record, RecordError


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.calls = 0

    def register_model(self, name: str, target: str) -> None:
        self.calls += 1
        self.models[name] = target


class Core:
    """What the engine uses of ``LLMEngine``; each step ends every answer with the text "ok"."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        self.arguments, self.renderer, self.engine_core = arguments, self, self
        self.added: list[Any] = []
        self.aborted: list[str] = []
        self.outputs: list[Any] = []
        self.fails: Exception | None = None
        self.is_down = False

    def render_cmpl(self, prompts: list[Any]) -> list[Any]:
        if len(prompts[0]["prompt_token_ids"]) > 900:
            raise KeyError("too long, says vLLM")
        return [("rendered", prompt) for prompt in prompts]

    def add_request(self, id: str, prompt: Any, parameters: Any, *, lora_request: Any) -> None:
        self.added.append(SimpleNamespace(id=id, prompt=prompt[1], parameters=parameters, lora=lora_request))

    def abort_request(self, ids: list[str]) -> None:
        self.aborted += ids

    def step(self) -> list[Any]:
        if self.fails:
            raise self.fails
        if self.outputs:
            return [self.outputs.pop(0)]
        return [
            SimpleNamespace(
                request_id=added.id,
                prompt_token_ids=[1] * 7,
                outputs=[said(index, "ok", finish_reason="stop") for index in range(added.parameters.n)],
            )
            for added in self.added
        ]

    def shutdown(self) -> None:
        self.is_down = True


def said(index: int, text: str, ids: tuple[int, ...] = (5,), logprobs: Any = None, finish_reason: Any = None) -> Any:
    return SimpleNamespace(index=index, text=text, token_ids=ids, logprobs=logprobs, finish_reason=finish_reason)


@dataclass
class Stub:
    registry: Registry = field(default_factory=Registry)
    cores: list[Core] = field(default_factory=list)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()

    class LLMEngine:
        @staticmethod
        def from_engine_args(arguments: SimpleNamespace) -> Core:
            if getattr(arguments, "max_model_len", 1) == 0:
                raise ValueError("max_model_len must be positive")
            found.cores.append(Core(arguments))
            return found.cores[-1]

    vllm, lora, params = ModuleType("vllm"), ModuleType("vllm.lora.request"), ModuleType("vllm.sampling_params")
    vllm.ModelRegistry, vllm.LLMEngine = found.registry, LLMEngine  # type: ignore[attr-defined]
    vllm.EngineArgs = vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    lora.LoRARequest = lambda *given: given  # type: ignore[attr-defined]
    params.RequestOutputKind = SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    for module in (vllm, lora, params):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return found


@pytest.fixture(scope="module", params=["tiles", "any resolution"])
def folder(request: pytest.FixtureRequest, tiny_tokenizer_file: Path, tmp_path_factory: Any) -> Path:
    """A folder with configuration and processor; weights are vLLM's business."""
    path = tmp_path_factory.mktemp("model")
    scheme = Tiling(side=56, max_tiles=4) if request.param == "tiles" else AnyRes(side=56, max_side=112)
    processor = build_processor(tiny_tokenizer_file, tiling=scheme)
    size = "nano" if request.param == "tiles" else "nano-anyres"
    checkpoint.config_for(size, processor=processor).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(
    id: str = "q", images: Any = (), text: str = "what?", frames: int = 0, policy: Any = None, **sampling: Any
) -> Any:
    pictures = tuple(
        Picture(width=image.width, height=image.height, ref=None, frame=index >= len(images) - frames)
        for index, image in enumerate(images)
    )
    record = Record(id=id, messages=(Message(role="user", text=text),), pictures=pictures)
    return Request(id=id, record=record, images=images, sampling=Sampling(**sampling), policy=policy or ImagePolicy())


# ---- the plug-in ----------------------------------------------------------------------------------------------------


def test_both_architectures_by_name_only(stub: Stub) -> None:
    register()
    register()  # front end, core and workers call it, some of them twice
    base = "vllm.model_executor.models.transformers"
    assert stub.registry.models == {
        "SailVLForConditionalGeneration": f"{base}:TransformersMultiModalForCausalLM",
        "SailVLMoeForConditionalGeneration": f"{base}:TransformersMultiModalMoEForCausalLM",
    }
    assert stub.registry.calls == 4
    assert set(stub.registry.models) == set(ARCHITECTURES.values()), "every name that config.json can hold"


def test_importing_needs_no_vllm_and_registers_the_auto_classes() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import sailvl.engine.vllm\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('sailvl', ps_version='v2')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "SailVLConfig", done.stderr


# ---- what vLLM is told ----------------------------------------------------------------------------------------------


def test_start(stub: Stub, folder: Path) -> None:
    engine = VLLM(folder, capacity=5, max_tiles=9, msac=True, dtype="float32")
    (core,) = stub.cores
    given = vars(core.arguments)
    assert (given["model"], given["max_num_seqs"], given["dtype"]) == (str(folder), 5, "float32")
    is_tiles = isinstance(engine.processor.image_processor.tiling, Tiling)
    assert given["mm_processor_kwargs"] == ({"max_tiles": 9, "msac": True} if is_tiles else {"msac": True})
    assert stub.registry.models and "trust_remote_code" not in given and "model_impl" not in given
    engine.close()
    assert core.is_down
    with pytest.raises(EngineError, match="vLLM cannot start: max_model_len must be positive"):
        VLLM(folder, max_model_len=0)


def test_the_prompt_is_the_trained_one_with_one_token_per_picture(stub: Stub, folder: Path) -> None:
    """Unfolded by picture sizes, as vLLM does, it is what ``encode`` makes, for pixels and ids alike."""
    engine = VLLM(folder, max_tiles=9, msac=True)
    processor, core = engine.processor, stub.cores[0]
    start, image, end = processor.image_token_ids
    cases = [
        ask("none", text="<img> and <IMG_CONTEXT>"),
        ask("two", [noise(130, 60), noise(40, 170, 1)], "<image>a<image>\nb"),
        ask("limited", [noise(130, 60), noise(60, 130, 1)], policy=ImagePolicy(max_tiles=2)),
        ask("raised", [noise(300, 290)], policy=ImagePolicy(max_tiles=9)),
        ask("larger", [noise(40, 60), noise(40, 60)], policy=ImagePolicy(upscale=3)),
        ask("grids", [noise(130, 60)], policy=ImagePolicy(msac=True)),
        ask("clip", [noise(130, 60), noise(130, 60), noise(130, 60)], frames=2),
    ]
    for case in cases:
        engine.submit(case)
        prompt = core.added[-1].prompt
        example = encode(case.record, case.images, processor, generate=True, policy=case.policy)
        pictures = prompt.get("multi_modal_data", {}).get("image", [])
        limits = prompt.get("mm_processor_kwargs", {})
        assert not {"upscale"} & limits.keys() and len(pictures) == len(case.images)
        # One by one: what vLLM's cache of pictures leaves of a prompt.
        alone = [processor.image_processor(picture, **limits) for picture in pictures]
        ids: list[int] = []
        counts = iter(found["num_tokens"][0] for found in alone)
        for id in prompt["prompt_token_ids"]:
            ids += [start, *[image] * next(counts), end] if id == image else [id]
        assert ids == example.ids_T.tolist(), case.id
        tiles = np.concatenate([found["pixel_values"] for found in alone]) if alone else example.tiles_N3SS
        np.testing.assert_array_equal(tiles, example.tiles_N3SS)


def test_sampling_and_bans(stub: Stub, folder: Path) -> None:
    engine = VLLM(folder)
    sampling = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
                    frequency_penalty=0.4, n=2, seed=3)  # fmt: skip
    engine.submit(ask(max_new_tokens=33, stop=("x",), top_logprobs=4, **sampling))
    given = vars(stub.cores[0].added[0].parameters)
    bias, ends = given.pop("logit_bias"), given.pop("stop_token_ids")
    own = dict(max_tokens=33, stop=["x"], logprobs=4, skip_special_tokens=False, output_kind="delta")
    assert given == {**sampling, **own, "spaces_between_special_tokens": False}
    number = engine.processor.tokenizer.convert_tokens_to_ids
    assert set(number(["<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|vision_start|>"])) <= bias.keys()
    assert not {*number(["<box>", "</ref>", "<think>", "a", "<|im_end|>"])} & bias.keys()
    assert {*number(["<|im_end|>", "<|endoftext|>"])} == {*ends} and set(bias.values()) == {-100.0}


def write_adapter(path: Path, names: list[str], **settings: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 12, **settings}))
    save_file(
        {f"base_model.model.{n}.lora_A.weight": np.zeros((2, 2)) for n in names}, path / "adapter_model.safetensors"
    )
    return path


def test_adapters(stub: Stub, folder: Path, tmp_path: Path) -> None:
    inside = "model.language_model.layers.0.self_attn.q_proj"
    engine = VLLM(folder, adapter=write_adapter(tmp_path / "a", [inside], rank_pattern={"q_proj": 40}))
    engine.submit(ask())
    arguments = stub.cores[0].arguments
    assert (arguments.enable_lora, arguments.max_lora_rank) == (True, 64)
    assert stub.cores[0].added[0].lora == ("adapter", 1, str(tmp_path / "a"))
    outside = write_adapter(tmp_path / "b", [inside, "model.vision_tower.blocks.0.attn.qkv"])
    for path, message in ((outside, r"1 of its tensors.*vision_tower"), (tmp_path / "none", "no adapter")):
        with pytest.raises(EngineError, match=message):
            VLLM(folder, adapter=path)
    assert len(stub.cores) == 1


# ---- what vLLM says -------------------------------------------------------------------------------------------------


def test_pieces_become_deltas(stub: Stub, folder: Path) -> None:
    engine, row = VLLM(folder), {5: SimpleNamespace(logprob=-0.5), 9: SimpleNamespace(logprob=-0.25)}

    def output(*answers: Any, id: str = "q") -> Any:
        return SimpleNamespace(request_id=id, prompt_token_ids=[1] * 7, outputs=list(answers))

    engine.submit(ask(n=2, temperature=1.0, top_logprobs=1))
    stub.cores[0].outputs += [
        output(said(0, "a", logprobs=[row])),
        output(said(1, "b"), said(0, "", (9,), finish_reason="stop")),
        output(said(0, "late"), id="stranger"),
        output(said(1, "c", (5, 5), finish_reason="length")),
    ]
    first, second, nothing, last = (engine.step() for _ in range(4))
    assert (first[0].text, first[0].logprobs, first[0].top_logprobs) == ("a", (-0.5,), (((9, -0.25),),))
    assert [(d.index, d.text, d.finish_reason, d.num_prompt_tokens) for d in second] == [
        (1, "b", None, None),
        (0, "", "stop", 7),
    ]
    assert nothing == [] and last[0].ids == (5, 5) and last[0].finish_reason == "length"
    assert engine.step() == [], "vLLM is not asked when nothing is in flight"


def test_ends(stub: Stub, folder: Path) -> None:
    engine = VLLM(folder)
    (core,) = stub.cores
    assert [reply.completions[0].text for reply in replies(engine, [ask("a"), ask("b")])] == ["ok", "ok"]
    engine.submit(ask("c", n=2))
    with pytest.raises(ValueError, match="'c' is in flight"):
        engine.submit(ask("c"))
    engine.cancel("c")
    engine.cancel("c")
    assert core.aborted == ["c"] and [delta.finish_reason for delta in engine.step()] == ["cancelled"] * 2
    engine.submit(ask("d"))
    core.outputs.append(
        SimpleNamespace(request_id="d", prompt_token_ids=None, outputs=[said(0, "", (), finish_reason="repetition")])
    )
    (delta,) = engine.step()
    assert delta.finish_reason == "error" and "'repetition'" in delta.error and engine.step() == []
    core.fails = RuntimeError("EngineDeadError")
    with pytest.raises(EngineError, match="vLLM died: RuntimeError: EngineDeadError"):
        list(stream(engine, ask("e")))
    core.fails = None
    assert engine.step() == []


def test_refusals(stub: Stub, folder: Path) -> None:
    engine = VLLM(folder)
    small = noise(20, 20)
    cases = [
        (ask("long", text="a b c d " * 500), "record long: vLLM refuses it: 'too long, says vLLM'"),
        (Request(id="x", record=ask("lost", [small]).record), "record lost: 1 pictures, 0 images"),
        (ask("more", [small], text="<image><image>"), "record more: 2 placeholders, 1 pictures"),
    ]
    scheme = engine.processor.image_processor.tiling
    if isinstance(scheme, Tiling):
        cases += [
            (
                ask("tiles", [small], policy=ImagePolicy(max_tiles=5)),
                "for 5 tiles; this engine was started for at most 4",
            ),
            (ask("grids", [small], policy=ImagePolicy(msac=True)), "by two grids; .* at most 4 by one grid"),
        ]
    else:
        assert num_image_tokens(20, 20, scheme) == 3
        cases.append((ask("tiny", [small]), "one token: enlarge it"))
    for request, message in cases:
        with pytest.raises(RecordError, match=message):
            engine.submit(request)
    assert not stub.cores[0].added
    (reply,) = replies(engine, [ask("tiles", [noise(60, 60)])])
    assert reply.completions[0].text == "ok"
