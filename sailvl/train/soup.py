"""Model soup: the average of models that branched from one trained model, of all of them or of those that help.

The report merges homologous SFT models this way (section 4.4 of arXiv 2509.14033): 74.91 and 74.54 points became 76.60,
and a merge of heterologous models fell to 12.86. ``curriculum.check`` refuses models without a common trained ancestor;
``sailvl.train.homology`` measures it for folders from anywhere, and ``soup`` warns when it is given their ``base``.

Greedy (``greedy_soup``; arXiv 2203.05482): from the best model on, each next one joins while the score of the average
does not fall, so that the result is never worse than the best model, where it is measured. The report's are uniform.

One tensor is in memory at a time, beside its sum, however many models there are: the result's files have the layout of
the first model's files, whose safetensors header is copied and followed by averaged tensors. Sums are one precision
wider than what is stored (bf16 and fp16 in fp32, fp32 in fp64), so that the average of equal models is that model, bit
for bit.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sailvl.train.folders import TEMPORARY, atomic_folder
from sailvl.train.homology import WEIGHTS, SoupError, check_alike, homology, open_model

__all__ = ["GreedySoup", "SoupError", "greedy_soup", "homology", "soup"]


@dataclass(frozen=True, kw_only=True)
class GreedySoup:
    """What a greedy soup is made of: ``kept`` folders in the order they joined, its ``score``, and of every model its
    own, best first."""

    kept: tuple[Path, ...]
    score: float
    scores: tuple[tuple[Path, float], ...]


def soup(paths: Sequence[Path], out: Path, *, base: Path | None = None) -> Path:
    """Average the models in ``paths`` into the folder ``out``, with the first one's config and processor files.

    Given ``base``, the model they branched from, it warns first of those that did not (``homology``).
    Raises SoupError when tensors differ in name, shape, or dtype, or when integer tensors differ in value.
    """
    if not paths:
        raise SoupError("a soup needs at least one model")
    if base is not None:
        for fault in homology(paths, base).faults():
            warnings.warn(fault, stacklevel=2)
    with ExitStack() as stack:
        models = [open_model(path, stack) for path in paths]
        check_alike(paths, models)
        with atomic_folder(out) as temporary:
            for file in sorted(paths[0].iterdir()):
                if file.name.endswith(WEIGHTS):
                    _average_file(file, temporary / file.name, models)
                elif file.is_file():
                    shutil.copy2(file, temporary / file.name)
                else:
                    shutil.copytree(file, temporary / file.name)
    return out


def greedy_soup(paths: Sequence[Path], out: Path, score: Callable[[Path], float]) -> GreedySoup:
    """Average those of ``paths`` into ``out`` that score best together; ``score`` asks a model folder, more is better.

    It is called once for every model and once for every average tried (n + n - 1 times). Equal scores keep the order
    given. Raises SoupError as ``soup`` does, or when a score is not a number.
    """
    if not paths:
        raise SoupError("a soup needs at least one model")
    scores = sorted(((path, _scored(score, path)) for path in paths), key=lambda pair: -pair[1])
    (first, best), *others = scores
    kept = [first]
    trial = out.with_name(f"{TEMPORARY}trial-{out.name}")
    try:
        for path, _ in others:
            found = _scored(score, soup([*kept, path], trial))
            if found >= best:
                kept, best = [*kept, path], found
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    soup(kept, out)
    return GreedySoup(kept=tuple(kept), score=best, scores=tuple(scores))


def _scored(score: Callable[[Path], float], path: Path) -> float:
    found = float(score(path))
    if found != found:
        raise SoupError(f"the score of {path} is not a number")
    return found


def _average_file(source: Path, target: Path, models: list[dict[str, Any]]) -> None:
    """Write ``target`` like ``source``: eight bytes of header length, the header, then the tensors by offset."""
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with target.open("wb") as file:
        file.write(length + header)
        for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
            average = _average(name, (model[name].get_tensor(name) for model in models), len(models))
            file.write(average.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _average(name: str, tensors: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    first = next(tensors)
    dtype = first.dtype
    if not dtype.is_floating_point:
        if any(not torch.equal(tensor, first) for tensor in tensors):
            raise SoupError(f"{name} holds integers that differ between the models: they have no average")
        return first
    total = first.to(torch.float64 if dtype.itemsize >= 4 else torch.float32, copy=True)
    for tensor in tensors:
        total += tensor
    return total.div_(count).to(dtype)
