"""Writing model folders that others can use, each proved before it appears at its place.

A folder is written beside its place and read back: its tensors are compared with the model in memory bit by bit, and
both answer a fixed probe of text and picture. A difference, or a tensor too few or too many, refuses the conversion
and leaves nothing behind. No ``auto_map`` is written: the folder needs no code of its own.

Cost: two short forward passes with one tile, twice, and reading what was written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from sailvl.files import force_to_disk

from . import SailVLForConditionalGeneration, SailVLProcessor
from .card import card
from .checkpoint import CheckpointError, load, save

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of the precisions that a folder can be written in."""


class ConvertError(ValueError):
    """A conversion that was refused; the message names the folder, and nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written: ``max_difference`` is the largest between probe outputs of the model in memory and on disk."""

    out: Path
    kind: str
    num_parameters: int
    num_bytes: int
    dtype: str
    max_difference: float
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    out: Path,
    *,
    max_shard_size: int | str = "5GB",
    licence: str = "unknown",
    made_from: Sequence[str] = (),
    record: dict[str, Any] | None = None,
    left_out: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Write a hub-ready folder (weights, configuration, processor, model card), prove it, and only then name it.

    Raises ConvertError if the folder read back differs from ``model``, CheckpointError if it cannot be written.
    """
    refuse_existing(out)
    vision, text = model.config.vision_config, model.config.text_config
    sees = (
        "pictures at any resolution"
        if vision.any_resolution
        else f"tiles of {vision.image_size} px, {model.config.tokens_per_tile} tokens each"
    )
    # Keys the authors' own code asks for; here the processor and the encoder know them.
    released = {"force_image_size": vision.image_size, "use_thumbnail": True, "template": "univl-chat"}
    released["dynamic_image_size"] = not vision.any_resolution
    for name, value in released.items():
        if not hasattr(model.config, name):
            setattr(model.config, name, value)
    facts = [
        *facts_of(model),
        ("vision", f"SAIL-ViT {vision.num_hidden_layers} x {vision.hidden_size}, {sees}"),
        ("language model", f"{text.model_type} {text.num_hidden_layers} x {text.hidden_size}"),
    ]
    page = card(out.name, facts=facts, licence=licence, made_from=made_from, record=record)

    def store(staging: Path) -> float:
        save(model, processor, staging, max_shard_size=max_shard_size)
        strip(staging)
        again, tokenizer = load(staging).eval(), SailVLProcessor.from_pretrained(staging)
        return compare(out, model, again, lambda each: probe(each, tokenizer if each is again else processor))

    return place(model, out, store, page, kind="model", left_out=left_out, notes=notes)


def place(
    model: PreTrainedModel,
    out: Path,
    store: Callable[[Path], float],
    page: str,
    *,
    kind: str,
    left_out: Sequence[str],
    notes: Sequence[str],
) -> Report:
    """Call ``store`` with a folder beside ``out``, add the card, and rename; whatever fails leaves nothing."""
    out = out.absolute()
    staging = out.with_name(f".{out.name}.converting-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        difference = store(staging)
        (staging / "README.md").write_text(page, encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
        refuse_existing(out)
        _sync(staging)
        staging.rename(out)
        _sync(out.parent, deep=False)
    except OSError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Report(
        out=out,
        kind=kind,
        num_parameters=sum(value.numel() for value in model.parameters()),
        num_bytes=num_bytes,
        dtype=name_of(model.dtype),
        max_difference=difference,
        left_out=list(left_out),
        notes=list(notes),
    )


def compare(out: Path, model: PreTrainedModel, again: PreTrainedModel, run: Callable[[Any], torch.Tensor]) -> float:
    """The largest difference of probe outputs; raises ConvertError if any tensor or the outputs differ."""
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise ConvertError(f"{out}: {len(odd)} tensors are missing or left over, first {odd[0]}")
    changed = [name for name in ours if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])]
    if changed:
        raise ConvertError(f"{out}: {len(changed)} tensors read back differ from those written, first {changed[0]}")
    expected, actual = run(model), run(again)
    if expected.shape != actual.shape or not bool(torch.isfinite(expected).all()):
        raise ConvertError(f"{out}: the probe's outputs are not finite, or of another shape after reading back")
    difference, largest = float((expected - actual).abs().max()), float(expected.abs().max())
    if not difference <= 1e-4 * largest:
        raise ConvertError(f"{out}: outputs of the written folder differ by {difference:.3g} (largest {largest:.3g})")
    return difference


def probe_picture() -> Image.Image:
    """A small square picture: one tile, or four tokens at any resolution."""
    rows, columns = np.mgrid[0:56, 0:56]
    return Image.fromarray(np.stack([rows * 4, columns * 4, (rows * columns) % 251], axis=-1).astype(np.uint8))


_PROBE = ("What is in the picture? 图中有什么？", "One, two, three, four,")


@torch.no_grad()
def probe(model: SailVLForConditionalGeneration, processor: SailVLProcessor | None = None) -> torch.Tensor:
    """Logits [rows, V] in fp32 of a fixed prompt with a picture and one without.

    Without a processor the prompt is made of token ids alone, for comparing a model with itself.
    """
    if processor is None:
        ids = torch.arange(3, 35)[None] % min(model.config.text_config.vocab_size, model.config.image_start_token_id)
        return model(input_ids=ids.to(model.device)).logits[0].float().cpu()
    rows = []
    for pictures, text in (([probe_picture()], _PROBE[0]), ([], _PROBE[1])):
        content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=pictures or None, text=prompt, return_tensors="pt").to(model.device)
        rows.append(model(**inputs, logits_to_keep=8).logits[0].float().cpu())
    return torch.cat(rows)


def cast(model: PreTrainedModel, dtype: str | None) -> None:
    """Cast parameters in place, one at a time; buffers (rotary frequencies) keep their precision."""
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise ConvertError(f"unknown dtype '{dtype}'; dtypes: {', '.join(DTYPES)}")
    for value in model.parameters():
        value.data = value.data.to(DTYPES[dtype])
        if not bool(torch.isfinite(value.data).all()):
            raise ConvertError(f"weights do not fit into {dtype}: its range is too small")
    parts = (getattr(model.config, name, None) for name in ("text_config", "vision_config"))
    for config in (model.config, *(part for part in parts if part is not None)):
        config.dtype = DTYPES[dtype]


def precision_of(model: PreTrainedModel) -> str:
    """The names of the precisions of the weights."""
    return ", ".join(sorted({name_of(value.dtype) for value in model.parameters()}))


def name_of(dtype: torch.dtype) -> str:
    """``bf16`` of ``torch.bfloat16``."""
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype).removeprefix("torch."))


def facts_of(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Rows for a model card."""
    total = sum(value.numel() for value in model.parameters())
    return [("parameters", f"{total:,}"), ("precision", precision_of(model))]


def refuse_existing(out: Path) -> None:
    """Raise ConvertError if ``out`` is there: conversions replace nothing."""
    if out.exists():
        raise ConvertError(f"{out} exists; choose a new place")


def strip(folder: Path) -> None:
    """Remove pointers to code from every JSON file written: a tokenizer keeps those it was read with."""
    for file in folder.glob("*.json"):
        if file.name in ("tokenizer.json", "model.safetensors.index.json"):
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and _without(values) != values:
            file.write_text(json.dumps(_without(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(part) for name, part in value.items() if name != "auto_map"}
    return [_without(part) for part in value] if isinstance(value, list) else value


def _sync(path: Path, *, deep: bool = True) -> None:
    for file in [*(path.rglob("*") if deep else ()), path]:
        force_to_disk(file)
