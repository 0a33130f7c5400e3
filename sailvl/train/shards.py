"""Tensors that several processes hold, in safetensors files that any number of processes can read again.

Every process writes the boxes (one per tensor) that it holds into files of its own; a file's metadata says where each
box begins in its tensor and how large that is. A reader copies from all files whatever intersects the box it needs, so
plain and sharded tensors, and any two numbers of processes, read each other's files bit for bit. Of replicas the first
writes; plain tensors, equal everywhere, are dealt out. Parameters that differ between processes must be DTensors.

torch.distributed.checkpoint can write safetensors too (``HuggingFaceStorageWriter(save_distributed=True)``) and also
reads them back exactly. It is not used because, in torch 2.13, it reads a set with a file missing without an error and
leaves zeros in the gap, serialises all of a process's tensors in memory before it writes, and exchanges its plans in
the group that training uses, which no background thread may do. Its own format has a pickled index, which can run code.

Writing keeps one tensor in host memory at a time; reading maps the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sailvl import dist
from sailvl.model.checkpoint import CheckpointError

BOXES = "sailvl_boxes"
"""The metadata entry: {tensor: [offsets, shape of the whole]} as JSON."""

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""What can be written, in the order in which the format ranks them: a file begins with the last ones."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape."""


def named_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Every parameter once, by its name: nothing that is done to a model for training changes one."""
    return list(model.named_parameters())


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, and the buffers that belong to a checkpoint, in the order of modules; a tied head once."""
    found: dict[str, torch.Tensor] = dict(named_parameters(model))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.setdefault(f"{prefix}.{name}" if prefix else name, buffer)
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on its own device or that of its mesh. Every process must call this for every DTensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded to the host
        tensor = tensor.to(tensor.device_mesh.device_type)
    made: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return made


def reshard(model: torch.nn.Module) -> None:
    """Let go of gathered weights, or the next forward pass would use them although the shards have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The box of a tensor that this process holds (``local``), and whether this process writes it."""

    local: torch.Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]
    is_written: bool


def shards(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shard]:
    """What this process holds of each tensor. All processes must give the same names in the same order.

    Raises CheckpointError for a tensor that holds sums not yet taken, or is not cut into boxes.
    """
    return {name: _shard(name, tensor, number) for number, (name, tensor) in enumerate(tensors.items())}


def _shard(name: str, tensor: torch.Tensor, number: int) -> Shard:
    held, shape = local(tensor), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        turn = number % dist.world_size() == dist.rank()
        return Shard(local=held, offsets=(0,) * len(shape), whole=shape, is_written=turn)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this process has no part in the tensor
        return Shard(local=held, offsets=(0,) * len(shape), whole=shape, is_written=False)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if any(isinstance(placement, Partial) for placement in placements) or tuple(sizes) != tuple(held.shape):
        raise CheckpointError(f"{name} ({list(shape)} as {placements}) is not cut into boxes and cannot be saved")
    is_first = all(at == 0 for at, place in zip(coordinate, placements, strict=True) if isinstance(place, Replicate))
    return Shard(local=held, offsets=tuple(offsets), whole=shape, is_written=is_first and held.numel() > 0)


def write(path: Path, tensors: Mapping[str, Shard]) -> None:
    """Write the boxes that are this process's to write; the file may end up without any."""
    mine = {name: shard for name, shard in tensors.items() if shard.is_written}
    boxes = json.dumps({name: [mine[name].offsets, mine[name].whole] for name in sorted(mine)})
    entries = {name: (shard.local.dtype, tuple(shard.local.shape)) for name, shard in mine.items()}
    header, places = layout(entries, {"format": "pt", BOXES: boxes})
    with path.open("wb") as file:
        file.write(header)
        for name in places:
            file.write(as_bytes(mine[name].local))


def layout(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file of these tensors begins, and where in the file each tensor does, in the file's order.

    Byte for byte what safetensors itself writes for one entry of metadata.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    order = sorted(entries, key=lambda name: (-ranks[entries[name][0]], name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = entries[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + table[name]["data_offsets"][0] for name in order}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in row-major order, copied to the host if they are elsewhere."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Reader:
    """Tensors stored as boxes over several files (``reading`` opens one). Names, shapes and dtypes are of the whole."""

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._boxes: dict[str, list[tuple[Any, Box]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._place = files[0].parent
        for path in files:
            try:
                self._add(path, stack.enter_context(safe_open(path, framework="pt")))
            except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _add(self, path: Path, file: Any) -> None:
        boxes = json.loads((file.metadata() or {}).get(BOXES, "{}"))
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        for name in file.keys():
            part = file.get_slice(name)
            size = tuple(part.get_shape())
            offsets, shape = (tuple(map(int, box)) for box in boxes[name])
            if not len(offsets) == len(size) == len(shape) or any(offset < 0 for offset in offsets):
                raise ValueError(f"{name} of {len(size)} dimensions is said to begin at {offsets} of {shape}")
            kind = (shape, kinds[part.get_dtype()])
            if (self.shapes.setdefault(name, shape), self.dtypes.setdefault(name, kind[1])) != kind:
                raise ValueError(f"{name} does not have the shape and dtype it has in the other files")
            self._boxes.setdefault(name, []).append((file, (offsets, size)))

    def read(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """One box of a tensor, on the host. CheckpointError if the files do not hold every element of it once."""
        made = torch.empty(tuple(shape), dtype=self.dtypes[name])
        found = 0
        for file, (begin, size) in self._boxes[name]:
            low = [max(a, b) for a, b in zip(offsets, begin, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, shape, begin, size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inner = tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high, strict=True))
            part = file.get_slice(name)[inner] if inner else file.get_tensor(name)
            made[tuple(slice(a - b, c - b) for a, b, c in zip(low, offsets, high, strict=True))] = part
            found += part.numel()
        if found != made.numel():
            raise CheckpointError(f"{self._place}: {found:,} of {made.numel():,} elements of {name} are stored")
        return made

    def read_like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The box of ``name`` that this process holds of ``tensor``, in its dtype.

        Frozen weights may be stored narrower than here, or wider, by a run of more or fewer processes.
        Raises CheckpointError if the shape differs, or digits would be lost.
        """
        shard = _shard(name, tensor, 0)
        if self.shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{self._place}: {name} has the shape {list(self.shapes[name])}, here it is {list(tensor.shape)}"
            )
        stored = self.read(name, shard.offsets, tuple(shard.local.shape))
        made = stored.to(tensor.dtype)
        if made.dtype != stored.dtype and not torch.equal(made.to(stored.dtype), stored):
            raise CheckpointError(
                f"{self._place}: {name} is {stored.dtype}, and {tensor.dtype} would lose digits of it"
            )
        return made


@contextmanager
def _reader(files: Sequence[Path]) -> Iterator[Reader]:
    with ExitStack() as stack:
        yield Reader(files, stack)


def reading(folder: Path, kind: str, num_files: int) -> AbstractContextManager[Reader]:
    """Open the tensors of one kind that ``num_files`` processes wrote."""
    return _reader([folder / file_name(kind, rank, num_files) for rank in range(num_files)])


def file_name(kind: str, rank: int, num_files: int) -> str:
    """The file of a process: the kind alone if there is but one."""
    return f"{kind}.safetensors" if num_files == 1 else f"{kind}-{rank + 1:05d}-of-{num_files:05d}.safetensors"
