"""vLLM with an adapter trained here says token for token what the model with the adapter beside its weights says.

Needs vLLM (minutes, mostly its start): skipped where it is not installed.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sailvl.assets import tokenizer_path
from sailvl.curriculum import Constant, Jsonl, Lora, Train
from sailvl.data.source import JsonlSource
from sailvl.engine.base import Request, Sampling, replies
from sailvl.engine.local import Local
from sailvl.geometry import Tiling
from sailvl.model import checkpoint
from sailvl.model.lora import load_adapted
from sailvl.model.processing import SailVLProcessor, build_processor
from sailvl.types import Message, Mixture, Picture, Record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TEXTS = ("What is this?", "一加一等于几?", "<image> How many things are there?", "Is it <image> or not?")


def questions() -> list[Request]:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((300, 200), Image.Resampling.NEAREST)
    picture = Picture(width=300, height=200, ref=None)
    return [
        Request(
            id=text,
            record=Record(
                id=text, messages=(Message(role="user", text=text),), pictures=(picture,) * text.count("<image>")
            ),
            images=[image] * text.count("<image>"),
            sampling=Sampling(max_new_tokens=12),
        )
        for text in TEXTS
    ]


def answers(engine: Any) -> dict[str, tuple[int, ...]]:
    with closing(engine):
        found = {reply.id: reply for reply in replies(engine, questions())}
    assert not any(reply.error for reply in found.values())
    return {id: reply.completions[0].ids for id, reply in found.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The nano model with large weights, whose answers differ from prompt to prompt, and an adapter trained on it."""
    from sailvl.train.loop import train

    root = tmp_path_factory.mktemp("trained")
    processor = build_processor(tokenizer_path(), tiling=Tiling(side=112, max_tiles=6))
    model = checkpoint.build(checkpoint.config_for("nano", processor=processor), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "vision_tower" not in name:
                weight.mul_(4)
    checkpoint.save(model, processor, root / "base")
    turns = '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a red cat and a blue dog"}]'
    (root / "data.jsonl").write_text(f'{{"messages": {turns}}}\n' * 8)
    value = Jsonl(path=str(root / "data.jsonl"))
    stage = Train(
        name="tune", data=Mixture(shares={"mine": 1.0}), trains=("lm",), lora=Lora(rank=5, alpha=10), steps=12,
        max_tokens=256, max_tiles=2, lr=1e-2, schedule=Constant(), precision="fp32",
    )  # fmt: skip
    result = train(
        stage, checkpoint.load(root / "base"), processor, {"mine": JsonlSource(Path(value.path), "mine")}, root / "out"
    )
    assert result.adapter is not None
    return root / "base", result.adapter


def test_greedy_ids_are_those_of_the_unmerged_model(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from sailvl.engine.vllm import VLLM

    processor = SailVLProcessor.from_pretrained(base)
    ours = answers(Local(load_adapted(adapter).eval(), processor, capacity=1))
    plain = answers(Local(checkpoint.load(base).eval(), processor, capacity=1))
    assert all(ours[text] != plain[text] for text in TEXTS), "the adapter must matter"
    options = {"capacity": 4, "max_model_len": 512, "dtype": "float32", "enforce_eager": True}
    assert answers(VLLM(base, adapter=adapter, **options)) == ours
