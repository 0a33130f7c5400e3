"""How evenly a model with experts uses them on a file of text records and a file of records with pictures.

The figures are those of the technical report's "distribution-aware tuning" (arXiv 2509.14033, section 2): the entropy
of every layer's expert load. ``sailvl.model.balance`` computes them and evens out the load; here records become its
inputs. Every token of a conversation counts, prompt and answer, image tokens included.

Cost: pictures are encoded once and kept as image tokens (2 KB a token at 2B width in bf16), because the router bias
changes nothing before the language model; each measurement is then one pass of the language model over all records.
"""

from __future__ import annotations

from typing import Any

import torch

from sailvl.data.encode import encode
from sailvl.data.source import Source
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.types import RecordError


@torch.no_grad()
def inputs(
    model: SailVLForConditionalGeneration, processor: SailVLProcessor, source: Source, *, pictures: bool
) -> list[dict[str, Any]]:
    """Forward-pass arguments for every record of ``source``, one pass each, on the model's device.

    A record that ends with a user turn is taken as a prompt. Raises RecordError or MediaError naming a record that
    cannot be used: a broken one, and one with pictures unless ``pictures``, without them if so.
    """
    device, made = model.lm_head.weight.device, []
    for row in range(len(source)):
        record = source.record(row)
        if bool(record.pictures) != pictures:
            wanted = "at least one picture" if pictures else "text alone"
            raise RecordError(f"{source.name}: record {record.id} has {len(record.pictures)} pictures, not {wanted}")
        is_prompt = record.messages[-1].role == "user"
        example = encode(record, source.images(record), processor, generate=is_prompt)
        arguments: dict[str, Any] = {"input_ids": torch.from_numpy(example.ids_T)[None].to(device)}
        if pictures:
            grids = {} if example.grids_N2 is None else {"image_grid_hw": torch.from_numpy(example.grids_N2).to(device)}
            tiles = torch.from_numpy(example.tiles_N3SS).to(device, model.dtype)
            arguments["image_features"] = model.get_image_features(tiles, **grids).pooler_output
        made.append(arguments)
    return made
