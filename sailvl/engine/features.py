"""Image tokens of pictures, each picture seen once.

A picture that was seen before, in whatever request, costs a hash: its image tokens are kept, the least recently used
ones dropped beyond a budget. The key is what the encoder is given: pixels, size and mode of the decoded picture, and
the scheme that cuts it. Weights that changed since (a training step in between) empty the store.

Pictures of one prefill are encoded together, in runs of at most ``MAX_TILES`` tiles. On a CPU the runs are short: large
tiles gain nothing from company there (one 448-pixel tile at a time is as fast as five), small ones do.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sailvl.geometry import AnyRes, Scheme, grid_of, num_image_tokens, num_tiles
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.types import RecordError

MAX_TILES = 64
"""Tiles that go through the vision encoder at once: bounds memory, not the batch."""

CPU_PATCHES = 1024
"""Patches that go through it at once on a CPU (at least one tile)."""


@dataclass(frozen=True, eq=False)
class View:
    """A picture and how it is seen. ``name`` is for messages: the record and the picture's number in it."""

    name: str
    image: Image.Image
    scheme: Scheme
    frame: bool = False


class Features:
    """Image tokens on demand; keeps up to ``budget_mb`` MiB of them (0: none).

    ``encoded_tiles`` and ``reused_tiles`` count the tiles that went through the encoder and those that did not have to.
    At any resolution they count areas of a tile's size, rounded up.
    """

    def __init__(
        self, model: SailVLForConditionalGeneration, processor: SailVLProcessor, *, budget_mb: float = 256
    ) -> None:
        self.model, self.processor, self.budget = model, processor, int(budget_mb * 2**20)
        self.encoded_tiles = self.reused_tiles = 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._num_bytes = 0
        self._weights: tuple[int, ...] = ()

    def forget(self) -> None:
        """Drop what is kept. Call it after changing weights in a way that torch does not count (``.data``)."""
        self._kept.clear()
        self._num_bytes = 0

    def see(self, groups: Sequence[Sequence[View]]) -> list[torch.Tensor | Exception | None]:
        """For each group (a request's pictures) its image tokens [tokens, D], None if it has no pictures.

        What went wrong with a group's pictures is given in its place, whatever it is: a picture may be a file that is
        read only now. Errors of the model are raised.
        """
        weights = self._fingerprint()
        if weights != self._weights:
            self.forget()
            self._weights = weights
        found: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, tuple[View, torch.Tensor]] = {}
        outcomes: list[list[bytes] | Exception] = []
        for group in groups:
            fresh: dict[bytes, tuple[View, torch.Tensor]] = {}
            reused = 0
            try:
                keys = [key_of(view) for view in group]
                for view, key in zip(group, keys, strict=True):
                    if key in self._kept:
                        self._kept.move_to_end(key)
                        found[key] = self._kept[key]
                    if key in found or key in missing or key in fresh:
                        reused += tiles_of(view)
                    else:
                        fresh[key] = (view, self._pixels(view))
            except Exception as error:  # noqa: BLE001  (libraries that read pictures raise anything; see above)
                outcomes.append(error)
                continue
            missing |= fresh
            self.reused_tiles += reused
            outcomes.append(keys)
        for key, tokens in self._encode(missing):
            found[key] = tokens
            self._keep(key, tokens)
        return [
            keys if isinstance(keys, Exception) else torch.cat([found[key] for key in keys]) if keys else None
            for keys in outcomes
        ]

    def _pixels(self, view: View) -> torch.Tensor:
        pixels = self.processor.image_processor.preprocess_image(view.image, frame=view.frame, tiling=view.scheme)
        planned = _num_pixels(view)
        if len(pixels) != planned:
            raise RecordError(f"{view.name}: {planned} tiles were planned and {len(pixels)} cut")
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def _encode(self, missing: dict[bytes, tuple[View, torch.Tensor]]) -> Iterator[tuple[bytes, torch.Tensor]]:
        """Keys and image tokens [tokens, D] of pictures, in their order."""
        model, limit = self.model, self._limit()
        for run in _runs(missing, limit):
            pixels = torch.cat([pixels for _, _, pixels in run]).to(model.device, model.dtype)
            if isinstance(run[0][1].scheme, AnyRes):
                grids = torch.tensor([_grid(view) for _, view, _ in run])
                tokens = model.get_image_features(pixels, image_grid_hw=grids).pooler_output
            else:  # a picture of very many tiles is a run by itself, and is parted
                parts = pixels.split(limit)  # type: ignore[no-untyped-call]
                tokens = torch.cat([model.get_image_features(part).pooler_output for part in parts]).flatten(0, 1)
            counts = [_num_tokens(view) for _, view, _ in run]
            for (key, view, _), part in zip(run, tokens.split(counts), strict=True):
                self.encoded_tiles += tiles_of(view)
                # A copy, or a small part would keep its whole run in memory.
                yield key, part.clone() if len(run) > 1 else part

    def _limit(self) -> int:
        """Rows of pixels at once: tiles, or patches at any resolution."""
        scheme = self.processor.image_processor.tiling
        per_tile = (scheme.side // scheme.patch) ** 2
        most = CPU_PATCHES if self.model.device.type == "cpu" else MAX_TILES * per_tile
        return most if isinstance(scheme, AnyRes) else min(MAX_TILES, max(1, most // per_tile))

    def _keep(self, key: bytes, tokens: torch.Tensor) -> None:
        if tokens.nbytes > self.budget:
            return
        self._kept[key] = tokens
        self._num_bytes += tokens.nbytes
        while self._num_bytes > self.budget:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= dropped.nbytes

    def _fingerprint(self) -> tuple[int, ...]:
        """Changes when an optimizer steps or weights are loaded: torch counts every change of a tensor in place."""
        parts = (self.model.model.vision_tower, self.model.model.multi_modal_projector)
        weights = [weight for part in parts for weight in part.parameters()]
        counts = (0 if weight.is_inference() else weight._version for weight in weights)
        return (sum(counts), hash(tuple(weight.data_ptr() for weight in weights)), hash(self.model.dtype))


def key_of(view: View) -> bytes:
    """What the encoder's input depends on, hashed: about a millisecond a megapixel."""
    image = view.image
    pixels = image.tobytes()  # reads the file of a picture that was only opened
    palette = bytes(image.getpalette() or ()) if image.mode in ("P", "PA") else b""
    said = (image.size, image.mode, view.scheme, view.frame, palette, image.info.get("transparency"))
    return hashlib.blake2b(repr(said).encode() + b"\0" + pixels, digest_size=16).digest()


def tiles_of(view: View) -> int:
    """Tiles of a picture; at any resolution its area in tiles, rounded up."""
    return num_tiles(view.image.width, view.image.height, view.scheme, view.frame)


def _num_tokens(view: View) -> int:
    """Image tokens without the tags."""
    return num_image_tokens(view.image.width, view.image.height, view.scheme, view.frame) - 2


def _grid(view: View) -> tuple[int, int]:
    """(rows, columns) in patches."""
    if not isinstance(view.scheme, AnyRes):
        raise TypeError(f"{view.name}: only pictures at any resolution have a grid of patches")
    return grid_of(view.image.width, view.image.height, view.scheme, view.frame)


def _num_pixels(view: View) -> int:
    """Rows of pixels: tiles, or patches at any resolution."""
    return math.prod(_grid(view)) if isinstance(view.scheme, AnyRes) else tiles_of(view)


def _runs(
    missing: dict[bytes, tuple[View, torch.Tensor]], limit: int
) -> Iterator[list[tuple[bytes, View, torch.Tensor]]]:
    """Pictures in runs of at most ``limit`` rows of pixels together, at least one picture each."""
    run: list[tuple[bytes, View, torch.Tensor]] = []
    for key, (view, pixels) in missing.items():
        if run and sum(len(part) for _, _, part in run) + len(pixels) > limit:
            yield run
            run = []
        run.append((key, view, pixels))
    if run:
        yield run
