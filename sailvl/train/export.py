"""A model folder in the released layout, written from parameters that are spread over processes, a tensor at a time.

The same bytes as ``model.checkpoint.save`` writes on one process, where the weights are equal: names, order, files of
at most ``max_shard_size``, configuration and processor are the library's own, from ``save_pretrained`` without weights.
The files are laid out first, from shapes alone. Then all processes gather one parameter after the other, and the first
puts it where it belongs; a layer's experts, one parameter here, are many tensors there. (Only how a sparse model is cut
into several files differs: the library takes experts that share memory for one, and exceeds the limit.)

Memory: one whole parameter (of a sparse model: one layer's experts) above what training holds, twice on the first
process, on the device; time: reading and writing the weights once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from transformers.core_model_loading import revert_weight_conversion

from sailvl import dist
from sailvl.model import checkpoint
from sailvl.model.checkpoint import CheckpointError
from sailvl.model.lora import is_adapter
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.train.shards import as_bytes, layout, named_weights, whole

INDEX = "model.safetensors.index.json"
PATTERN = "model{suffix}.safetensors"


def export(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor | None,
    out: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model folder ``out``; an earlier one is replaced only when all is on disk. All processes must call it.

    Raises CheckpointError, in every process, if writing fails (the earlier folder is then untouched), or while
    adapters are beside the weights.
    """
    weights = named_weights(model)
    if any(is_adapter(name) for name in weights):
        raise CheckpointError(f"{out}: the model has adapters beside its weights; merge or detach them first")
    target: _Target | None = None
    fault: Exception | None = None
    for name, tensor in weights.items():
        full = whole(tensor)  # all processes, whatever befell the first
        if dist.is_main() and fault is None:
            try:
                target = target or _Target(model, weights, checkpoint.fresh_folder(out), max_shard_size)
                target.put(name, full)
            except (OSError, SafetensorError, RuntimeError) as error:
                fault = error
        del full  # or two would be in memory while the next is gathered
    if target is not None:
        try:
            target.close()
            if fault is None:
                checkpoint.put_in_place(target.folder, processor, out)
        except (OSError, SafetensorError) as error:
            fault = fault or error
    text = dist.broadcast(None if fault is None else str(fault))
    if text is not None:
        if dist.is_main():
            shutil.rmtree(checkpoint.fresh_folder(out), ignore_errors=True)
        kept = "the earlier folder is intact" if out.exists() else "nothing was left behind"
        raise CheckpointError(f"{out}: saving failed ({text}); {kept}. Free some space and save again") from fault


class _Target:
    """The folder while its weights arrive: files of the right size, and where in them each tensor goes."""

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        weights: dict[str, torch.Tensor],
        folder: Path,
        max_shard_size: int | str,
    ) -> None:
        self._model, self.folder = model, folder
        self._dtypes = {name: value.dtype for name, value in weights.items()}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.save_pretrained(folder, state_dict={})  # everything but weights
        if dist.world_size() > 1:
            self._widen()
        empty = {name: torch.empty(w.shape, dtype=self._dtypes[name], device="meta") for name, w in weights.items()}
        stored = revert_weight_conversion(model, empty)
        plan = split_state_dict_into_shards_factory(
            stored, get_storage_size=lambda value: value.nbytes, filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        for file_name, names in plan.filename_to_tensors.items():
            entries = {name: (stored[name].dtype, tuple(stored[name].shape)) for name in names}
            header, places = layout(entries, {"format": "pt"})
            file = (folder / file_name).open("wb")
            self._files.append(file)
            file.write(header)
            self._places |= {name: (file, place) for name, place in places.items()}
        if plan.is_sharded:
            metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
            index: dict[str, Any] = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _widen(self) -> None:
        """One dtype for all weights: several processes may hold frozen ones in less than one process would, exactly."""
        kinds = [dtype for dtype in self._dtypes.values() if dtype.is_floating_point]
        widest = max(kinds, key=lambda dtype: dtype.itemsize)
        self._dtypes = {name: widest if dtype in kinds else dtype for name, dtype in self._dtypes.items()}
        path = self.folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(widest).removeprefix("torch.")}
        path.write_text(json.dumps(values), encoding="utf-8")

    def put(self, name: str, full: torch.Tensor) -> None:
        """Write one parameter: one tensor of the folder, or several."""
        for stored, value in revert_weight_conversion(self._model, {name: full.to(self._dtypes[name])}).items():
            file, place = self._places[stored]
            file.seek(place)
            file.write(as_bytes(value))

    def close(self) -> None:
        """Raises the OSError of what could not be written."""
        faults = []
        for file in self._files:
            try:
                file.close()
            except OSError as error:
                faults.append(error)
        if faults:
            raise faults[0]
