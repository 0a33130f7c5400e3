"""Model folders out of others: exported, cast, with an adapter merged in, the encoder alone, or new from parts.

There is one layout: what ``checkpoint.save`` writes has the tensor names and configuration keys of the releases, so
"official" and "native" are the same folder, and exporting is copying, parting into files, casting, and describing.
Everything is written, proved and named by ``publish``.

Cost: weights are mapped from the files, so an export holds no copy of the model in memory, and casting holds one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from . import SailVLConfig, SailVLForConditionalGeneration, SailVLProcessor
from .attention import PACKED
from .card import card, licence_of, record_beside
from .checkpoint import load, reset_projector
from .lora import AdapterError, open_adapter
from .parts import grow_vocabulary, read_json, read_lm, read_tokenizer, read_vision
from .projector import SailVLProjector
from .publish import (
    ConvertError,
    Report,
    cast,
    compare,
    facts_of,
    name_of,
    place,
    precision_of,
    probe,
    probe_picture,
    refuse_existing,
    strip,
    write,
)
from .tiles import SailViTImageProcessor, SailVLImageProcessor

__all__ = ["ConvertError", "Report", "export", "export_vit", "from_parts", "merge_adapter"]


def export(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    adapter: Path | None = None,
    max_shard_size: int | str = "5GB",
    licence: str | None = None,
) -> Report:
    """Write the model folder ``source`` to ``out``: hub-ready, in ``dtype`` or the stored one, an adapter merged in.

    Raises ConvertError or CheckpointError; nothing is then left at ``out``.
    """
    refuse_existing(out)
    model, processor = load(source).eval(), SailVLProcessor.from_pretrained(source)
    notes, made_from = [], [f"converted from `{_title(source)}`"]
    if adapter is not None:
        difference = merge_adapter(model, adapter, processor)
        notes.append(f"adapter merged: rounding changed the probe's logits by at most {difference:.3g}")
        made_from.append(f"adapter `{adapter.name}` merged in")
    stored = precision_of(model)
    cast(model, dtype)
    if precision_of(model) != stored:
        notes.append(f"weights cast from {stored} to {precision_of(model)}")
    text = dict(made_from=made_from, record=record_beside(source), licence=licence or licence_of(source))
    return write(model, processor, out, max_shard_size=max_shard_size, notes=notes, **text)


def _title(folder: Path) -> str:
    """A folder's name; of a model in a run, whose folder is called ``model``, its stage's."""
    folder = folder.absolute()
    return folder.parent.name if folder.name == "model" else folder.name


def from_parts(
    vision: Path,
    lm: Path,
    out: Path,
    *,
    seed: int = 0,
    side: int = 448,
    any_resolution: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    licence: str | None = None,
) -> Report:
    """A new model of a pre-trained encoder and language model, with a fresh projector of ``seed``.

    ``dtype`` defaults to the language model's. Raises ConvertError or CheckpointError; nothing is then left at ``out``.
    """
    refuse_existing(out)
    encoder, left_out, notes = read_vision(vision, side=side, any_resolution=any_resolution)
    patch = encoder.config.patch_size
    if side % (2 * patch):
        raise ConvertError(f"side {side}: tiles must be a multiple of two patches of {patch} pixels")
    own_end = read_json(lm / "generation_config.json") if (lm / "generation_config.json").is_file() else {}
    language = read_lm(lm)
    tokenizer, added = read_tokenizer(lm)
    if added:
        notes.append(f"{len(added)} tokens added to the tokenizer: {' '.join(added)}")
    old = language.config.vocab_size
    if grow_vocabulary(language, len(tokenizer), seed):
        notes.append(f"vocabulary grown from {old} to {language.config.vocab_size} rows (mean of the old, plus noise)")
    images = SailVLImageProcessor(side=side, patch=patch, any_resolution=any_resolution)
    processor = SailVLProcessor(images, tokenizer, system_message="")
    language.config.eos_token_id, language.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = SailVLConfig(
        text_config=language.config,
        vision_config=encoder.config,
        select_layer=-1,
        ps_version="v2",
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_token_id=processor.image_token_id,
        **({} if any_resolution else {"min_dynamic_patch": images.min_tiles, "max_dynamic_patch": images.max_tiles}),
    )
    model = _assemble(config, encoder, language)
    reset_projector(model, seed)
    # Either end token of the language model stops generation: a base model knows only the end of a text.
    ends = own_end.get("eos_token_id", [])
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    cast(model, dtype or name_of(language.dtype))
    notes.append(f"projector fresh (seed {seed}); pixels are normalised with ImageNet's mean and deviation")
    made_from = [f"vision encoder `{vision.name}`", f"language model `{lm.name}`", *notes]
    found = {licence_of(vision), licence_of(lm)}
    licence = licence or (found.pop() if len(found) == 1 else "other")
    return write(
        model,
        processor,
        out,
        max_shard_size=max_shard_size,
        notes=notes,
        left_out=left_out,
        made_from=made_from,
        licence=licence,
    )


def _assemble(config: SailVLConfig, encoder: nn.Module, language: PreTrainedModel) -> SailVLForConditionalGeneration:
    """The whole model around modules that exist; nothing is copied."""
    with torch.device("meta"):
        model = SailVLForConditionalGeneration._from_config(config, attn_implementation=PACKED)
    model.model.vision_tower, model.model.language_model = encoder, language.model
    model.lm_head = language.lm_head
    model.model.multi_modal_projector = SailVLProjector(
        config.vision_config.hidden_size, config.text_config.hidden_size, config.merge
    )
    for part in (encoder, language.model):
        part.set_attn_implementation(PACKED)
    return model.eval()


def export_vit(source: Path, out: Path, *, dtype: str | None = None, licence: str | None = None) -> Report:
    """Write the encoder of ``source`` (a model, or an AIMv2 or SAIL-ViT folder) by itself, under the released names.

    It loads with ``AutoModel`` and ``AutoImageProcessor``. Raises ConvertError or CheckpointError.
    """
    refuse_existing(out)
    values = read_json(source / "config.json")
    any_resolution = bool((values.get("vision_config") or values).get("any_resolution"))
    encoder, left_out, notes = read_vision(source, any_resolution=any_resolution)
    cast(encoder, dtype)
    if values.get("model_type") == "sailvl":
        own = SailVLImageProcessor.from_pretrained(source)
        stats = {"image_mean": own.image_mean, "image_std": own.image_std}
    elif (source / "preprocessor_config.json").is_file():
        stats = read_json(source / "preprocessor_config.json")
    else:
        stats = {}
    images = SailViTImageProcessor(
        side=encoder.config.image_size,
        patch=encoder.config.patch_size,
        any_resolution=any_resolution,
        **{name: stats[name] for name in ("image_mean", "image_std") if name in stats},
    )
    facts = [*facts_of(encoder), ("tile", f"{encoder.config.image_size} px, patches of {encoder.config.patch_size} px")]
    text = card(
        out.name,
        facts=facts,
        alone=True,
        licence=licence or licence_of(source),
        made_from=[f"encoder of `{_title(source)}`", *notes],
        record=record_beside(source),
    )
    inputs = images(probe_picture(), return_tensors="pt")
    inputs.pop("num_tiles")

    @torch.no_grad()
    def see(model: Any) -> torch.Tensor:
        return model(**inputs).last_hidden_state.float()

    def store(staging: Path) -> float:
        encoder.save_pretrained(staging)
        images.save_pretrained(staging)
        strip(staging)
        again, info = AutoModel.from_pretrained(staging, dtype="auto", output_loading_info=True)
        if any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ConvertError(f"{out}: the written encoder is not whole: {info}")
        return compare(out, encoder, again.eval(), see)

    return place(encoder, out, store, text, kind="encoder", left_out=left_out, notes=notes)


def merge_adapter(
    model: SailVLForConditionalGeneration, adapter: Path, processor: SailVLProcessor | None = None
) -> float:
    """Merge a LoRA folder (``peft``) into ``model``, in place; the probe's largest logit difference by merging.

    The difference is what rounding the sum of weight and update costs; without ``processor`` the probe is text alone.
    Raises ConvertError if the adapter is not one, belongs to another model, or ``peft`` is not installed.
    """
    try:
        wrapped = open_adapter(model, adapter)
    except AdapterError as error:
        raise ConvertError(str(error)) from error
    before = probe(model, processor)
    wrapped.merge_and_unload(safe_merge=True)
    model.eval()
    difference = float((probe(model, processor) - before).abs().max())
    allowed = (1e-3 if model.dtype == torch.float32 else 0.1) * float(before.abs().max())
    if not difference <= allowed:
        raise ConvertError(
            f"{adapter}: merging changed the probe's logits by {difference:.3g}, more than {allowed:.3g}"
        )
    return difference
