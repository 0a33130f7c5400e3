"""Shared fixtures: a tiny processor and model, small enough to run forward and backward in milliseconds.

``tiny_processor``: byte-level BPE of 256 bytes, a few merges and all 35 added tokens of the released tokenizer, in its
order and with its flags (334 in all); tiles of 56 pixels (4 tokens each), at most 4 and a thumbnail; no system message.
``tiny_model``: 2 encoder blocks, 2 language model layers, tied head, fp32, packed attention, seed 0.
Both are built once per test run: a test that changes one must copy it (``copy.deepcopy``).
``tiny_tokenizer_file`` is the tokenizer's file. Torch runs on one thread.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sailvl.geometry import Tiling
from sailvl.model import SailVLForConditionalGeneration, SailVLProcessor, checkpoint
from sailvl.model.processing import build_processor
from tests.tiny import LM, VIT

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NOT_SPECIAL = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
SAIL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips() -> ModuleType:
    """``tests/clips.py``, which makes tiny clips; what needs it is skipped without PyAV."""
    pytest.importorskip("av")
    return importlib.import_module("tests.clips")


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["what is in the picture? a red square and a blue circle. how many?"] * 2, trainer)
    added = [AddedToken(text, normalized=False, special=True) for text in SPECIAL]
    added += [AddedToken(text, normalized=False, special=False) for text in NOT_SPECIAL]
    added += [AddedToken(text, normalized=False, special=True) for text in SAIL]
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer_file: Path) -> SailVLProcessor:
    return build_processor(tiny_tokenizer_file, tiling=Tiling(side=56, max_tiles=4))


@pytest.fixture(scope="session")
def tiny_model(tiny_processor: SailVLProcessor) -> SailVLForConditionalGeneration:
    config = checkpoint.config_for("nano", processor=tiny_processor, vit=VIT, lm=LM)
    return checkpoint.build(config, seed=0).eval()
