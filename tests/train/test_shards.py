import math
import random
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sailvl.curriculum import Parallel
from sailvl.model.checkpoint import CheckpointError
from sailvl.train import parallel, shards
from sailvl.train.shards import Reader, Shard, layout, named_weights, reading, write


def mixed():
    draw = torch.Generator().manual_seed(0)
    made = {
        f"{name}.{dtype}": torch.randn(3, 5, generator=draw).mul(9).to(dtype)
        for name in ("b", "a", "\u00e9")
        for dtype in shards.DTYPES
    }
    return made | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "bytes": torch.arange(7, dtype=torch.uint8)}


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    tensors = mixed()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    header, places = layout({name: (t.dtype, t.shape) for name, t in tensors.items()}, {"format": "pt"})
    ours = header + b"".join(shards.as_bytes(tensors[name]).tobytes() for name in places)
    assert ours == (tmp_path / "theirs").read_bytes()


def test_safetensors_reads_what_is_written_and_so_do_we(tmp_path):
    tensors = mixed()
    write(tmp_path / "x.safetensors", shards.shards(tensors))
    theirs = load_file(tmp_path / "x.safetensors")
    with reading(tmp_path, "x", 1) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype
            assert torch.equal(reader.read(name, (0,) * tensor.ndim, tensor.shape), tensor)


def cut(shape, draw, depth=3):
    """The box of ``shape`` in disjoint random boxes: (offsets, sizes)."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(depth * bool(shape)):
        offsets, sizes = boxes.pop(draw.randrange(len(boxes)))
        axis = draw.randrange(len(shape))
        at = draw.randint(0, sizes[axis])
        low, high = list(sizes), list(sizes)
        low[axis], high[axis] = at, sizes[axis] - at
        begin = list(offsets)
        begin[axis] += at
        boxes += [(offsets, tuple(low)), (tuple(begin), tuple(high))]
    return [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=3).map(tuple), seed=st.integers(0, 10**6))
def test_any_box_is_read_from_any_cut(tmp_path_factory, shape, seed):
    folder, draw = tmp_path_factory.mktemp("cut"), random.Random(seed)
    tensor = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    boxes = cut(shape, draw)
    for number, (offsets, sizes) in enumerate(boxes):
        part = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        shard = Shard(local=part, offsets=offsets, whole=shape, is_written=True)
        write(folder / f"{number}.safetensors", {"t": shard})
    wanted = [(o := draw.randint(0, n), draw.randint(0, n - o)) for n in shape]
    offsets, sizes = [o for o, _ in wanted], [n for _, n in wanted]
    expected = tensor[tuple(slice(o, o + n) for o, n in wanted)]
    files = [folder / f"{number}.safetensors" for number in range(len(boxes))]
    with ExitStack() as stack:
        assert torch.equal(Reader(files, stack).read("t", offsets, sizes), expected)
    if len(boxes) > 1 and expected.numel():
        with ExitStack() as stack, pytest.raises((CheckpointError, KeyError)):
            for number in range(len(boxes)):  # one file away: never silently filled with something else
                rest = [file for i, file in enumerate(files) if i != number]
                Reader(rest, stack).read("t", offsets, sizes)


def test_digits_are_never_lost_silently(tmp_path):
    exact, odd = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.1])
    write(tmp_path / "x.safetensors", shards.shards({"exact": exact, "odd": odd}))
    with reading(tmp_path, "x", 1) as reader:
        assert torch.equal(reader.read_like("exact", exact.bfloat16()), exact.bfloat16())
        assert torch.equal(reader.read_like("odd", odd.double()), odd.double())
        with pytest.raises(CheckpointError, match=r"odd is torch\.float32, and torch\.bfloat16 would lose digits"):
            reader.read_like("odd", odd.bfloat16())
        with pytest.raises(CheckpointError, match=r"odd has the shape \[2\], here it is \[3\]"):
            reader.read_like("odd", torch.zeros(3))


@pytest.mark.parametrize(
    "boxes",
    ["[]", "7", "{", '{"t": [[0], [4]]}', '{"t": [[-1, 0], [4, 4]]}', '{"t": [["a", 0], [4, 4]]}', "{}", '{"t": 5}'],
)
def test_a_hostile_file_is_named(tmp_path, boxes):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.zeros(2, 2)}, path, metadata={shards.BOXES: boxes})
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"), reading(tmp_path, "x", 1):
        pass


def test_overlapping_boxes_are_refused(tmp_path):
    for rank, begin in enumerate((0, 1)):
        shard = Shard(local=torch.zeros(2), offsets=(begin,), whole=(4,), is_written=True)
        write(tmp_path / shards.file_name("x", rank, 2), {"t": shard})
    with reading(tmp_path, "x", 2) as reader, pytest.raises(CheckpointError, match="4 of 3 elements of t"):
        reader.read("t", (0,), (3,))


def test_a_tied_head_checkpointing_and_compilation_do_not_change_names(model):
    plain = set(named_weights(model))
    assert "lm_head.weight" not in plain and "model.language_model.embed_tokens.weight" in plain
    parallel.wrap(model, Parallel(checkpointing="full", compile=True), precision="fp32", backend="eager")
    assert set(named_weights(model)) == plain
