"""A tiny model, a byte tokenizer, and a file of mixed samples, on disk as a user would have them."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor

from sailvl.curriculum import Cosine, Train
from sailvl.data.source import JsonlSource
from sailvl.geometry import Tiling
from sailvl.model import checkpoint
from sailvl.model.processing import build_processor
from sailvl.types import Mixture

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<img>", "</img>", "<IMG_CONTEXT>",
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="session")
def group():
    """``tests/train/group.py``, which runs functions in several processes."""
    return importlib.import_module("tests.train.group")


@pytest.fixture(scope="session")
def states():
    """``tests/train/states.py``, which makes the state of a stage, sharded where there are several processes."""
    return importlib.import_module("tests.train.states")


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder with ``model`` (weights and processor) and ``data.jsonl``."""
    folder = tmp_path_factory.mktemp("assets")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tiling = Tiling(side=56, patch=14, merge=2, max_tiles=3)
    processor = build_processor(folder / "tokenizer.json", tiling=tiling)
    config = checkpoint.config_for("nano", processor=processor, vit=VIT, lm=LM)
    checkpoint.save(checkpoint.build(config, seed=0), processor, folder / "model")
    _write_samples(folder)
    return folder


def _write_samples(folder: Path, count: int = 40) -> None:
    draw = random.Random(0)
    lines = []
    for row in range(count):
        colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(row % 3)]
        for i, colour in enumerate(colours):
            Image.new("RGB", (draw.randrange(20, 160), draw.randrange(20, 160)), colour).save(folder / f"{row}-{i}.png")
        turns = []
        for turn in range(1 + row % 2):
            text = "<image>" * len(colours) * (turn == 0) + f"say {row} " * draw.randrange(1, 4)
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": f"{row} " * 4}]
        lines.append({"id": f"r{row}", "images": [f"{row}-{i}.png" for i in range(len(colours))], "messages": turns})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def tiny_config(processor):
    """Makes the model's configuration; keyword arguments go to ``config_for``."""
    return lambda **changes: checkpoint.config_for("nano", processor=processor, vit=VIT, lm=LM, **changes)


@pytest.fixture(scope="session")
def processor(assets):
    return AutoProcessor.from_pretrained(assets / "model")


@pytest.fixture
def model(assets):
    return checkpoint.load(assets / "model", dtype=torch.float32)


@pytest.fixture
def sources(assets):
    return {"samples": JsonlSource(assets / "data.jsonl", "samples")}


@pytest.fixture
def stage():
    """Makes a small stage; keyword arguments replace its fields."""
    base = Train(
        name="tiny", data=Mixture(shares={"samples": 1.0}), trains=("vit", "projector", "lm"), steps=8, lanes=2,
        max_tokens=256, max_tiles=8, lr=3e-3, schedule=Cosine(warmup_steps=2), precision="fp32", save_every=4,
        log_every=1,
    )  # fmt: skip
    return lambda **changes: replace(base, **changes)


@pytest.fixture
def batches(sources, processor):
    """The first step of two lanes."""
    from sailvl.data.loader import Loader

    return next(Loader(sources, {"samples": 1.0}, processor, max_tokens=256, max_tiles=8, lanes=2, seed=0))
