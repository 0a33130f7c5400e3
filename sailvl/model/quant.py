"""int8 weights for answering on a CPU: half the bytes to read per token, so nearly twice the tokens.

``quantize`` replaces the language model's matrices in place: each output row of a linear layer becomes int8 times one
scale, absmax / 127. Inputs and sums keep the model's type, so nothing is calibrated; rows are off by 0.9 % of their
norm. The head is one of these matrices. The embedding table shares its rows when they are tied (a looked-up row is
dequantised), which saves the 0.6 GB that a bf16 copy of it takes in the 2B model. Vision and norms stay as they are.

How a product is computed depends on its number of rows. Below ``SWITCH`` torch's int8 kernel reads the int8 weights
alone: a decode step, bound by memory. Above, blocks of the weights are turned into the input's type, small enough to
stay in cache, and multiplied by the usual kernel: reading a prompt, bound by arithmetic, 5 to 10 % slower than
unquantised. On an AVX-512 CPU (6144 x 2048, bf16, two threads, ms): kernel 0.39, 0.41, 0.80, 1.4, 2.7 and blocks 1.3,
1.3, 1.3, 1.4, 1.9 at 1, 4, 8, 16, 32 rows. Both sides round differently, so a greedy tie may fall differently.

The kernel is private to torch. It is tried with numbers before its first use; where it is missing or wrong, blocks do
everything. It reads beyond rows whose width is not a multiple of 16, so it is not given such rows.
"""

import ctypes
import functools
import mmap
import sys

import torch
from torch import nn

from .modeling import SailVLForConditionalGeneration

SWITCH = 16
"""From this many rows on, weights are dequantised block by block."""

BLOCK = 1 << 21
"""Weights of a block: 4 MB in bf16."""

_MADV_PAGEOUT = 21

_DTYPES = (torch.bfloat16, torch.float32)


def quantize(model: SailVLForConditionalGeneration) -> SailVLForConditionalGeneration:
    """Make the language model's matrices int8, in place, one after the other; memory only ever falls.

    The result answers and is neither trained nor saved. Raises ValueError for a model that is not on a CPU, not bf16 or
    fp32, has experts (which hold nearly all of its weights, in a form the kernel does not take), or has weights that
    are not finite, in which case it is half done.
    """
    lm, head = model.model.language_model, model.lm_head
    if model.config.text_config.model_type != "qwen3":
        raise ValueError(f"int8 is for dense language models; this one is {model.config.text_config.model_type}")
    if model.device.type != "cpu":
        raise ValueError(f"int8 is for CPUs; the model is on {model.device}")
    if isinstance(head, Int8Linear):
        return model
    if head.weight.dtype not in _DTYPES:
        raise ValueError(f"the model is {head.weight.dtype}; load it with dtype=torch.bfloat16 first")
    tied = head.weight is lm.embed_tokens.weight
    model.lm_head = Int8Linear(*_int8(head.weight, "lm_head"))
    if tied:
        embedding = (model.lm_head.weight, model.lm_head.scale)
    else:
        embedding = _int8(lm.embed_tokens.weight, "embed_tokens")
    lm.embed_tokens = Int8Embedding(*embedding)
    del head
    # A file mapped into memory is let go with the last tensor that lies in it: norms move out before their neighbours.
    for parameter in lm.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.clone()
    places = [
        (parent, name)
        for parent in lm.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in places:
        linear = getattr(parent, name)
        setattr(parent, name, Int8Linear(*_int8(linear.weight, name), bias=linear.bias))
        del linear
    return model


class Int8Linear(nn.Module):
    """A linear layer of ``weight`` int8 [N, K] times ``scale`` [N], whose type is that of inputs and outputs."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        if 0 < rows.shape[0] < SWITCH and self.in_features % 32 == 0 and kernel_works(hidden.dtype):
            found = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            found = self._blocks(rows)
        if self.bias is not None:
            found = found + self.bias
        return found.view(*hidden.shape[:-1], self.out_features)

    def _blocks(self, rows: torch.Tensor) -> torch.Tensor:
        # int8 is exact in bf16; the scale comes after the sum, which spares a rounding of every weight.
        found = rows.new_empty(rows.shape[0], self.out_features)
        size = min(max(BLOCK // self.in_features, 1), self.out_features)
        scratch = rows.new_empty(size, self.in_features)
        for start in range(0, self.out_features, size):
            part = slice(start, start + size)
            block = scratch[: self.weight[part].shape[0]].copy_(self.weight[part])
            torch.mul(nn.functional.linear(rows, block), self.scale[part], out=found[:, part])
        return found


class Int8Embedding(nn.Module):
    """Rows of ``weight`` int8 [V, D] times their ``scale`` [V]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids] * self.scale[ids][..., None]


def _int8(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [N, K]: int8 [N, K] and scales [N] in the weight's own type, block by block."""
    weight = weight.detach()
    found = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=weight.dtype)
    size = max(BLOCK // 2 // weight.shape[1], 1)
    scratch = torch.empty(size, weight.shape[1])  # one for all blocks: fresh memory costs more than the arithmetic
    for start in range(0, weight.shape[0], size):
        part = slice(start, start + size)
        block = scratch[: weight[part].shape[0]].copy_(weight[part])
        largest = torch.maximum(block.amax(1), -block.amin(1))
        if not largest.isfinite().all():
            raise ValueError(f"{name}: the weights are not finite")
        # Rounded to its type before it divides, so that rounding the scale is no error of the product.
        scale[part] = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        found[part] = block.mul_(scale[part].float().reciprocal()[:, None]).round_().clamp_(-127, 127)
    _page_out(weight)
    return found, scale


def _page_out(weight: torch.Tensor) -> None:
    """Ask Linux to take back the memory of a weight that was read for the last time.

    Loaded weights are mapped from their file, which stays mapped, and in memory, as long as one tensor of it lives:
    without this, all of a 2B model would be in memory beside its int8 weights. It is advice and loses no content.
    """
    if sys.platform != "linux":
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


@functools.cache
def kernel_works(dtype: torch.dtype) -> bool:
    """Whether torch's int8 product is here and right for inputs of ``dtype``: tried once, on uneven shapes."""
    if dtype not in _DTYPES:
        return False
    generator = torch.Generator().manual_seed(0)
    for num_rows, outputs in ((1, 37), (5, 70)):
        rows = torch.randn((num_rows, 96), generator=generator).to(dtype)
        weight = torch.randint(-127, 128, (outputs, 96), generator=generator, dtype=torch.int8)
        scale = (torch.rand(outputs, generator=generator) + 0.1).to(dtype)
        try:
            found = torch.ops.aten._weight_int8pack_mm(rows, weight, scale)
        except (AttributeError, RuntimeError):
            return False
        right = rows.double() @ weight.double().T * scale.double()
        if found.shape != right.shape or not torch.allclose(
            found.double(), right, rtol=1e-2, atol=right.abs().max() / 100
        ):
            return False
    return True
