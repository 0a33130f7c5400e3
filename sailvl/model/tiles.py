"""Pictures to normalised tiles, or to patches at any resolution, with Pillow and numpy alone.

``sailvl.geometry`` says where to cut and what to resize to; torchvision is never imported, because its wheels break
beside a torch of another build. A picture with transparency is composited on white and then cut;
``official_order=True`` instead repeats the published processor, which resizes in the picture's own mode and converts
each tile to RGB afterwards, so that palette pictures are resized by nearest neighbour. The two agree exactly on RGB
pictures.

Cost: about 5 ms per 448-pixel tile on one core, nearly all of it the resize.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from sailvl.geometry import (
    AnyRes,
    ImagePolicy,
    Scheme,
    Tiling,
    enlarged,
    grid_of,
    grids,
    has_thumbnail,
    num_image_tokens,
    num_tiles,
    schemes,
    tile_boxes,
)
from sailvl.media import to_rgb

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SailVLImagesKwargs(ImagesKwargs, total=False):
    """What may be said about pictures per call; ``max_tiles``, ``msac`` and ``upscale`` are an ``ImagePolicy``."""

    min_tiles: int
    max_tiles: int
    msac: bool
    upscale: float
    official_order: bool


POLICY_KEYS = ("min_tiles", "max_tiles", "msac", "upscale")
"""Those that decide how many tiles a picture becomes."""


class SailVLImageProcessor(BaseImageProcessor):
    """Pictures to normalised tiles or patches. Reads released ``preprocessor_config.json`` files and our own.

    ``any_resolution`` makes patches [patches, 3, p, p] of the picture as it is, no side above ``max_side`` pixels (by
    default four tiles); ``max_tiles`` then bounds its area in tiles of ``side``, and None does not.
    """

    valid_kwargs = SailVLImagesKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, **kwargs: Any):
        side = kwargs.get("side") or kwargs.get("image_size") or kwargs.get("force_image_size") or 448
        if isinstance(side, Mapping):
            side = side.get("height") or side.get("shortest_edge")
        super().__init__()
        self.side = int(side)
        self.patch = int(kwargs.get("patch") or 14)
        self.merge = int(kwargs.get("merge") or 2)
        self.any_resolution = bool(kwargs.get("any_resolution", False))
        most = _first(kwargs, "max_tiles", "max_patches", "max_dynamic_patch", default=None)
        if self.any_resolution:
            self.max_side = int(kwargs.get("max_side") or 4 * self.side)
            self.max_tiles = None if most is None else int(most)
        else:
            self.min_tiles = int(_first(kwargs, "min_tiles", "min_dynamic_patch", "min_patches", default=1))
            self.max_tiles = 10 if most is None else int(most)
            self.thumbnail = bool(_first(kwargs, "thumbnail", "use_thumbnail", default=True))
        self.official_order = bool(kwargs.get("official_order", False))
        self.image_mean = list(kwargs.get("image_mean") or MEAN)
        self.image_std = list(kwargs.get("image_std") or STD)

    @property
    def tiling(self) -> Scheme:
        """How pictures are cut or resized, unless a call asks otherwise."""
        sizes = {"side": self.side, "patch": self.patch, "merge": self.merge, "max_tiles": self.max_tiles}
        if self.any_resolution:
            return AnyRes(**sizes, max_side=self.max_side)
        return Tiling(**sizes, min_tiles=self.min_tiles, thumbnail=self.thumbnail)

    def schemes(
        self,
        num_pictures: int,
        *,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        msac: bool | None = None,
        upscale: float | None = None,
    ) -> list[Scheme]:
        """The scheme of each picture of one prompt (see ``geometry.schemes``); ``min_tiles`` is for tiles only.

        Raises ValueError for limits that are empty or out of range.
        """
        base = self.tiling
        if min_tiles is not None and isinstance(base, Tiling):
            # Checked against the limit that was asked for, not against what remains of it for one of many pictures.
            base = replace(base, min_tiles=min_tiles, max_tiles=base.max_tiles if max_tiles is None else max_tiles)
        policy = ImagePolicy(max_tiles=max_tiles, msac=bool(msac), upscale=1.0 if upscale is None else upscale)
        return schemes(base, policy, num_pictures)

    def preprocess_image(
        self,
        image: Image.Image,
        *,
        frame: bool = False,
        tiling: Scheme | None = None,
        official_order: bool | None = None,
    ) -> np.ndarray:
        """Normalised tiles float32 [N, 3, S, S] of one picture (``frame``: exactly one tile).

        At any resolution: patches [rows x columns, 3, p, p], row by row, of the grid ``geometry.grid_of`` gives.
        """
        tiling = tiling or self.tiling
        official = self.official_order if official_order is None else official_order
        if isinstance(tiling, AnyRes):
            return normalise(_patches(to_rgb(image), tiling, frame), self.image_mean, self.image_std)
        if not official:
            image = to_rgb(image)
        tiles = _cut(image, tiling, frame)
        pixels = np.stack([np.asarray(tile if tile.mode == "RGB" else tile.convert("RGB")) for tile in tiles])
        return normalise(pixels, self.image_mean, self.image_std)

    def preprocess(
        self,
        images: Any,
        *,
        frames: Sequence[bool] | None = None,
        counts: Sequence[int] | None = None,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        msac: bool | None = None,
        upscale: float | None = None,
        official_order: bool | None = None,
        return_tensors: Any = None,
        **ignored: Any,
    ) -> BatchFeature:
        """``pixel_values`` of all pictures, and lists with an entry per picture: ``num_tiles`` and ``num_tokens``.

        At any resolution ``image_grid_hw`` int64 [pictures, 2] too, (rows, columns) in patches. ``counts`` says how
        many pictures each prompt has, for limits that the pictures of one prompt share: without it every list of a list
        of lists is a prompt, and any other input one prompt.
        """
        flat = flatten_images(images)
        kinds = list(frames) if frames is not None else [False] * len(flat)
        if len(kinds) != len(flat):
            raise ValueError(f"{len(kinds)} frame marks for {len(flat)} images")
        counts = _prompts(images) if counts is None else counts
        if sum(counts) != len(flat):
            raise ValueError(f"prompts of {list(counts)} pictures for {len(flat)} images")
        policy = {"min_tiles": min_tiles, "max_tiles": max_tiles, "msac": msac, "upscale": upscale}
        chosen = [scheme for count in counts for scheme in self.schemes(count, **policy)]
        pictures = [as_image(image) for image in flat]
        sizes = [
            (image.width, image.height, scheme, kind)
            for image, scheme, kind in zip(pictures, chosen, kinds, strict=True)
        ]
        parts = [
            self.preprocess_image(image, frame=kind, tiling=scheme, official_order=official_order)
            for image, scheme, kind in zip(pictures, chosen, kinds, strict=True)
        ]
        edge = self.patch if self.any_resolution else self.side
        pixels = np.concatenate(parts) if parts else np.zeros((0, 3, edge, edge), np.float32)
        values = torch.from_numpy(pixels) if return_tensors == "pt" else pixels
        found = {
            "pixel_values": values,
            "num_tiles": [num_tiles(*size) for size in sizes],
            "num_tokens": [num_image_tokens(*size) - 2 for size in sizes],
        }
        if self.any_resolution:
            grids = np.array([grid_of(*size) for size in sizes], np.int64).reshape(-1, 2)
            found["image_grid_hw"] = torch.from_numpy(grids) if return_tensors == "pt" else grids
        return BatchFeature(found)


class SailViTImageProcessor(SailVLImageProcessor):
    """For an encoder by itself: every picture is one tile, stretched, without thumbnail (or patches, as above).

    Reads the sizes of other encoders' ``preprocessor_config.json`` too (``crop_size``, ``size``).
    """

    def __init__(self, **kwargs: Any):
        if not kwargs.get("side"):
            sizes = (kwargs.get(name) for name in ("image_size", "crop_size", "size"))
            kwargs["image_size"] = next((size for size in sizes if size), None)
        if not kwargs.get("any_resolution"):
            kwargs |= {"min_tiles": 1, "max_tiles": 1, "thumbnail": False}
        super().__init__(**kwargs)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S], scaled to 0..1, then by the channels' mean and deviation."""
    out = np.ascontiguousarray(np.moveaxis(pixels, -1, 1)).astype(np.float32)
    out /= np.float32(255)
    out -= np.asarray(mean, np.float32).reshape(1, 3, 1, 1)
    out /= np.asarray(std, np.float32).reshape(1, 3, 1, 1)
    return out


def _first(values: Mapping[str, Any], *names: str, default: Any) -> Any:
    """The first of ``names`` that is given: ours before the released spellings."""
    return next((values[name] for name in names if values.get(name) is not None), default)


def _cut(image: Image.Image, tiling: Tiling, frame: bool) -> list[Image.Image]:
    """Enlarge, stretch to each grid, crop row by row, add the thumbnail."""
    side = tiling.side
    if frame:
        return [image.resize((side, side))]
    size = enlarged(image.width, image.height, tiling)
    if size != (image.width, image.height):
        image = image.resize(size, Image.Resampling.BILINEAR)
    cuts = grids(image.width, image.height, tiling)
    tiles = []
    for columns, rows in cuts:
        stretched = image.resize((columns * side, rows * side))
        tiles += [stretched.crop(box) for box in tile_boxes(columns, rows, side)]
    if has_thumbnail(cuts, tiling):
        tiles.append(image.resize((side, side)))
    return tiles


def _patches(image: Image.Image, scheme: AnyRes, frame: bool) -> np.ndarray:
    """uint8 [rows x columns, p, p, 3] of an RGB picture, resized once to whole tokens."""
    (rows, columns), patch = grid_of(image.width, image.height, scheme, frame), scheme.patch
    pixels = np.asarray(image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))
    return pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)


def _prompts(images: Any) -> list[int]:
    """Pictures of each prompt: of each list in a list of lists, else all are one prompt's."""
    if isinstance(images, (list, tuple)) and images and all(isinstance(entry, (list, tuple)) for entry in images):
        return [len(flatten_images(entry)) for entry in images]
    return [len(flatten_images(images))]


def flatten_images(images: Any) -> list[Any]:
    """One flat list of pictures from one picture, a list, or a list of lists."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    return [] if images is None else [images]


def as_image(image: Any) -> Image.Image:
    """A Pillow picture from a picture or an uint8 array [H, W, 3] or [H, W]; raises TypeError for anything else.

    Paths and addresses are not opened here: decoding untrusted bytes is the business of ``sailvl.media``.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        channels_first = image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4)
        image = np.moveaxis(image, 0, -1) if channels_first else image
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    raise TypeError(f"images must be Pillow pictures or uint8 arrays, got {type(image).__name__}: open files first")
