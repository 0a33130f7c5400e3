"""Whether models can be averaged: the same tensors, and branches of one trained model.

A model's task vector is its weights minus those of the base that all branched from. Two facts tell strangers from
branches, and both are read off the files, one tensor of each model in memory at a time:

- the length of the task vector beside that of the base's weights. Fine-tuning moves weights by a small part of their
  length; a model of another origin is an unrelated vector of about the same length, at sqrt(2) = 1.41 or a little less,
  because the weights of norms are near 1 in all models (1.09 between two untrained nano models). Above ``FAR`` (0.5,
  between the two) there is a warning.
- the cosine of two task vectors. Branches trained alike move alike; unrelated directions of n weights have a cosine
  within a few 1/sqrt(n) of 0, below 0.001 for a million. Under ``APART`` (0.05) there is a warning: averaging shrinks
  such vectors by half, and opposed ones cancel. Branches of very different tasks may be there too and yet be averaged
  well, so it is a warning and no more. Between models that are far away a cosine says nothing: two strangers have 0.5,
  because the base they both lack is in both vectors.

The thresholds are ours: the report (arXiv 2509.14033, section 4.4) gives only what a heterologous merge cost, 74.54
points down to 12.86.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

WEIGHTS = ".safetensors"
FAR = 0.5
APART = 0.05


class SoupError(ValueError):
    """Models that cannot be averaged; the message names the folders and the tensors."""


@dataclass(frozen=True, kw_only=True)
class Homology:
    """``distances`` [models] are lengths of task vectors over that of the base; ``cosines`` [models, models] between
    them (NaN where a model equals the base)."""

    paths: tuple[Path, ...]
    base: Path
    distances: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]

    def faults(self) -> list[str]:
        """Reasons not to average these models; empty if they look like branches of the base."""
        found = [
            f"{path} is {distance:.2f} times the length of {self.base} away from it (branches are near 0, "
            "strangers above 1): an average with it is likely to be noise"
            for path, distance in zip(self.paths, self.distances, strict=True)
            if not distance <= FAR
        ]
        near = [i for i, distance in enumerate(self.distances) if distance <= FAR]
        return found + [
            f"{self.paths[i]} and {self.paths[j]} moved from {self.base} in directions with cosine "
            f"{self.cosines[i][j]:.3f}: their average may be worse than either"
            for i in near
            for j in near
            if i < j and self.cosines[i][j] < APART
        ]


def homology(paths: Sequence[Path], base: Path) -> Homology:
    """Measure how the models in ``paths`` lie to each other, seen from ``base``. Integer tensors do not count.

    Raises SoupError when tensors differ in name, shape or dtype.
    """
    with ExitStack() as stack:
        first, *models = [open_model(path, stack) for path in (base, *paths)]
        check_alike((base, *paths), (first, *models))
        dots = torch.zeros(len(models), len(models), dtype=torch.float64)
        length = 0.0
        for name, file in first.items():
            origin = file.get_tensor(name)
            if not origin.dtype.is_floating_point:
                continue
            origin = origin.double().flatten()
            length += float(origin @ origin)
            moved = [model[name].get_tensor(name).double().flatten() - origin for model in models]
            for i, ours in enumerate(moved):
                for j, theirs in enumerate(moved[: i + 1]):
                    dots[i, j] += ours @ theirs
    dots = dots + dots.tril(-1).T
    norms = dots.diagonal().sqrt()
    return Homology(
        paths=tuple(paths),
        base=base,
        distances=tuple(float(norm) / math.sqrt(length) if length else math.inf for norm in norms),
        cosines=tuple(tuple(row) for row in (dots / torch.outer(norms, norms)).tolist()),
    )


def open_model(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it, over all files of one model."""
    files = sorted(path.glob(f"*{WEIGHTS}"))
    if not files:
        raise SoupError(f"{path} holds no {WEIGHTS} file")
    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}


def check_alike(paths: Sequence[Path], models: Sequence[dict[str, Any]]) -> None:
    """Raise SoupError unless all models have tensors of the same names, shapes and dtypes."""
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


def _kind(file: Any, name: str) -> str:
    part = file.get_slice(name)
    return f"{part.get_dtype()} {part.get_shape()}"


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})" if names else "none"
