"""Building, loading and saving models.

A saved folder is complete (weights, configuration, processor), named in the released layout, and loads with the Auto
classes. It is written beside its place, flushed to disk and then renamed, so a crash or a full disk leaves the earlier
folder as it was. Pickled weights are refused: loading one runs whatever code it holds.

Sizes: SAIL-ViT-Huge with Qwen3-0.6B, 1.7B, 8B and 30B-A3B (technical report arXiv 2509.14033, section 2), with a
sparse model of 16 B parameters, and ``nano`` and ``nano-moe``, the same graphs for a CPU; ``2b-anyres`` and
``nano-anyres`` see pictures as they are instead of tiles.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn

from sailvl.files import force_to_disk, replace_folder
from sailvl.geometry import AnyRes, Scheme, Tiling
from sailvl.sizes import SIZES

from . import SailVLConfig, SailVLForConditionalGeneration, SailVLProcessor
from .attention import PACKED

PARTS = ("vit", "projector", "lm")
"""What a training stage may train; the head, tied or not, belongs to the language model."""


class CheckpointError(OSError):
    """A model folder that cannot be read or written; the message names it and what to do."""


def config_for(
    size: str,
    *,
    vocab_size: int | None = None,
    processor: SailVLProcessor | None = None,
    side: int | None = None,
    select_layer: int = -1,
    vit: Mapping[str, Any] | None = None,
    lm: Mapping[str, Any] | None = None,
) -> SailVLConfig:
    """The configuration of a size (a key of ``SIZES``), with overrides.

    ``processor`` sets the vocabulary size (rounded up to 64), all token ids and the tile side. Without one the ids are
    those of the packaged tokenizers: 26 tokens of Qwen3 and then 9 of SAIL-VL2 end the vocabulary (nano), or stand
    where the release has them. ``vit`` and ``lm`` override fields of ``SailViTConfig`` and ``Qwen3Config`` (or
    ``Qwen3MoeConfig``).
    Raises ValueError for an unknown size, or a processor that cuts tiles for an encoder of any resolution (or does not
    for one of tiles).
    """
    if size not in SIZES:
        raise ValueError(f"unknown model size '{size}'; sizes: {', '.join(SIZES)}")
    base_side, base_vit, base_lm = SIZES[size]
    text = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, **base_lm, **(lm or {})}
    tiles: dict[str, Any] = {}
    if processor is not None:
        tiling = processor.image_processor.tiling
        base_side = tiling.side
        is_any = {**base_vit, **(vit or {})}.get("any_resolution", False)
        if is_any != isinstance(tiling, AnyRes):
            kind = "any resolution" if is_any else "tiles"
            raise ValueError(f"size '{size}' sees {kind}, and the processor makes pixels for {type(tiling).__name__}")
        if isinstance(tiling, Tiling):
            tiles = {"min_dynamic_patch": tiling.min_tiles, "max_dynamic_patch": tiling.max_tiles}
        text["vocab_size"] = math.ceil(len(processor.tokenizer) / 64) * 64
    if vocab_size is not None:
        text["vocab_size"] = vocab_size
    ids = _token_ids(processor, 151643 if not size.startswith("nano") else text["vocab_size"] - 35)
    text |= {"bos_token_id": ids["pad"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    return SailVLConfig(
        text_config={"model_type": "qwen3", **text},
        vision_config={**base_vit, "image_size": side or base_side, "patch_size": 14, **(vit or {})},
        select_layer=select_layer,
        ps_version="v2",
        image_start_token_id=ids["start"],
        image_end_token_id=ids["end"],
        image_token_id=ids["image"],
        **tiles,
    )


def scheme_for(size: str, *, side: int | None = None, max_tiles: int | None = None) -> Scheme:
    """How a model of this size sees pictures, for ``build_processor``; None leaves the size's own values."""
    base_side, vit, _ = SIZES[size]
    side = base_side if side is None else side
    if vit.get("any_resolution"):
        return AnyRes(side=side, max_side=4 * side, max_tiles=max_tiles)
    return Tiling(side=side) if max_tiles is None else Tiling(side=side, max_tiles=max_tiles)


def _token_ids(processor: SailVLProcessor | None, first: int) -> dict[str, int]:
    """Ids of the tokens the model must know; ``first`` is the id of the first added token."""
    if processor is None:
        return {"pad": first, "eos": first + 2, "start": first + 26, "end": first + 27, "image": first + 28}
    return {
        "pad": processor.tokenizer.pad_token_id,
        "eos": processor.tokenizer.eos_token_id,
        "start": processor.image_start_token_id,
        "end": processor.image_end_token_id,
        "image": processor.image_token_id,
    }


def build(config: SailVLConfig, *, seed: int, attn_implementation: str = PACKED) -> SailVLForConditionalGeneration:
    """A model with fresh weights, fp32 unless ``config.dtype`` says otherwise; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The configuration is copied: building sets the attention on it, and callers may build twice.
        return SailVLForConditionalGeneration._from_config(
            SailVLConfig.from_dict(config.to_dict()), attn_implementation=attn_implementation
        )


def anyres_from_fixed(
    model: SailVLForConditionalGeneration, *, rope_2d: bool = True, interpolate_positions: bool = True
) -> SailVLForConditionalGeneration:
    """A copy of a model of tiles that sees pictures at any resolution, with the same weights: nothing is added.

    Without ``rope_2d`` a picture of one tile's size is seen exactly as before; with it the copy needs training. Its
    processor is ``build_processor(..., tiling=AnyRes(...))`` with the same side.
    """
    values = model.config.to_dict()
    chosen = {"any_resolution": True, "rope_2d": rope_2d, "interpolate_positions": interpolate_positions}
    values["vision_config"] = {**values["vision_config"], **chosen}
    with torch.random.fork_rng(devices=[]):  # the first weights, which are overwritten, draw random numbers
        fresh = type(model)._from_config(
            SailVLConfig.from_dict(values),
            attn_implementation=model.config.text_config._attn_implementation,
            dtype=model.dtype,
        )
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return cast(SailVLForConditionalGeneration, fresh.to(model.device).train(model.training))


def load(
    path: str | Path, *, dtype: torch.dtype | str | None = None, attn_implementation: str = PACKED
) -> SailVLForConditionalGeneration:
    """A model from a folder (released or ours) or a hub repository, on the CPU, in ``dtype`` or the stored one.

    Raises CheckpointError if the folder is missing, or its weights are pickled, damaged or of another shape.
    """
    folder = Path(path)
    if folder.is_dir():
        refuse_pickles(folder)
    if not folder.exists() and str(path).count("/") != 1:
        raise CheckpointError(f"{folder}: no such model folder")
    dtype = dtype if dtype is not None else "auto"
    model = load_whole(SailVLForConditionalGeneration, path, dtype=dtype, attn_implementation=attn_implementation)
    return cast(SailVLForConditionalGeneration, model)


def load_whole(kind: Any, folder: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(folder)``. Raises CheckpointError if a tensor is unreadable, missing, odd or left over.

    The library fills such tensors with random numbers and a warning; a model loaded here is whole or not at all.
    """
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in info[problem])
        if names:
            raise CheckpointError(f"{folder}: {len(names)} {problem.replace('_keys', ' tensors')}, first {names[0]}")
    return model


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError for a folder without safetensors; pickled weights are never read."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
    found = f"only pickled weights ({', '.join(pickled)}), which can run code when loaded" if pickled else "no weights"
    raise CheckpointError(f"{folder}: {found}; convert them to safetensors first")


def save(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor | None,
    path: str | Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a complete model folder in the released layout, replacing an earlier one only when all is on disk.

    ``max_shard_size`` (bytes, or a text such as "5GB") parts the weights into files. Raises CheckpointError if writing
    fails (a full disk); the earlier folder is then untouched.
    """
    if any(buffer.dtype == torch.int8 for buffer in model.buffers()):
        raise CheckpointError(f"{path}: a model with int8 weights cannot be saved; save it before it is quantised")
    target = Path(path).absolute()
    fresh = fresh_folder(path)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(fresh, max_shard_size=max_shard_size)
        put_in_place(fresh, processor, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        kept = "the earlier folder is intact" if target.exists() else "nothing was left behind"
        raise CheckpointError(f"{target}: saving failed ({error}); {kept}. Free some space and save again") from error


def fresh_folder(path: str | Path) -> Path:
    """Where this process prepares the model folder ``path``, which ``put_in_place`` makes of it."""
    target = Path(path).absolute()
    return target.with_name(f".{target.name}.saving-{os.getpid()}")


def put_in_place(fresh: Path, processor: SailVLProcessor | None, target: str | Path) -> None:
    """Complete a folder that ``save_pretrained`` wrote, force it to disk, and let it replace ``target``."""
    _release_keys(fresh / "config.json")
    if processor is not None:
        processor.save_pretrained(fresh)
    for file in sorted(fresh.rglob("*")):
        force_to_disk(file)
    force_to_disk(fresh)
    target = Path(target).absolute()
    replace_folder(fresh, target, target.with_name(f".{target.name}.old-{os.getpid()}"))


def _release_keys(path: Path) -> None:
    """Spell a written configuration as releases do: ``llm_config``, as the authors' own code reads it too."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["llm_config"] = values.pop("text_config")
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(folder: str | Path) -> str:
    """What tells a model folder's content from another's, in milliseconds: its configuration, and of its weights the
    names, sizes and 64 blocks spread over each file (hex)."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"):
            found.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            found.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(64):
                    file.seek(block * size // 64)
                    found.update(file.read(4096))
    return found.hexdigest()[:16]


def reset_projector(model: SailVLForConditionalGeneration, seed: int) -> None:
    """Give the projector fresh weights in place: basic pre-training starts from a random one."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.text_config.initializer_range
    with torch.no_grad():
        for module in model.model.multi_modal_projector.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                fresh = torch.empty(module.weight.shape).normal_(0.0, std, generator=generator)
                module.weight.copy_(fresh)
                module.bias.zero_()


def part_parameters(
    model: SailVLForConditionalGeneration, part: Literal["vit", "projector", "lm"] | str
) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of one of ``PARTS``; together the parts hold every parameter exactly once."""
    prefixes = {
        "vit": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "lm": ("model.language_model.", "lm_head."),
    }
    if part not in prefixes:
        raise ValueError(f"unknown part '{part}'; parts: {', '.join(PARTS)}")
    return [(name, value) for name, value in model.named_parameters() if name.startswith(prefixes[part])]
