"""Model soup: the uniform average of models that branched from one trained model.

The report merges homologous SFT models this way (section 4.4 of arXiv 2509.14033); averaging models without a common
trained ancestor gives noise, which ``curriculum.check`` refuses.

One tensor of each model is in memory at a time: the result's files have the layout of the first model's files, whose
safetensors header is copied and followed by averaged tensors. Sums are one precision wider than what is stored (bf16
and fp16 in fp32, fp32 in fp64), so that the average of equal models is that model, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sailvl.train.checkpoint import atomic_folder

WEIGHTS = ".safetensors"


class SoupError(ValueError):
    """Models that cannot be averaged; the message names the folders and the tensors."""


def soup(paths: Sequence[Path], out: Path) -> Path:
    """Average the models in ``paths`` into the folder ``out``, with the first one's config and processor files.

    Raises SoupError when tensors differ in name, shape, or dtype, or when integer tensors differ in value.
    """
    if not paths:
        raise SoupError("a soup needs at least one model")
    with ExitStack() as stack:
        models = [_open(path, stack) for path in paths]
        _check(paths, models)
        with atomic_folder(out) as temporary:
            for file in sorted(paths[0].iterdir()):
                if file.name.endswith(WEIGHTS):
                    _average_file(file, temporary / file.name, models)
                elif file.is_file():
                    shutil.copy2(file, temporary / file.name)
                else:
                    shutil.copytree(file, temporary / file.name)
    return out


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it, over all files of one model."""
    files = sorted(path.glob(f"*{WEIGHTS}"))
    if not files:
        raise SoupError(f"{path} holds no {WEIGHTS} file")
    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}


def _check(paths: Sequence[Path], models: list[dict[str, Any]]) -> None:
    first = models[0]
    for path, model in zip(paths[1:], models[1:], strict=True):
        if model.keys() != first.keys():
            raise SoupError(
                f"{paths[0]} and {path} hold different tensors: only the first has "
                f"{_some(first.keys() - model.keys())}, only the second {_some(model.keys() - first.keys())}"
            )
        for name in first:
            ours, theirs = (_kind(file[name], name) for file in (first, model))
            if ours != theirs:
                raise SoupError(f"{name} is {ours} in {paths[0]} but {theirs} in {path}")


def _average_file(source: Path, target: Path, models: list[dict[str, Any]]) -> None:
    """Write ``target`` like ``source``: eight bytes of header length, the header, then the tensors by offset."""
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with target.open("wb") as file:
        file.write(length + header)
        for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
            average = _average(name, [model[name].get_tensor(name) for model in models])
            file.write(average.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _average(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise SoupError(f"{name} holds integers that differ between the models: they have no average")
        return tensors[0]
    total = tensors[0].to(torch.float64 if dtype.itemsize >= 4 else torch.float32, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    return total.div_(len(tensors)).to(dtype)


def _kind(file: Any, name: str) -> str:
    part = file.get_slice(name)
    return f"{part.get_dtype()} {part.get_shape()}"


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})" if names else "none"
