"""The variable-length kernel of a GPU, without one: when it is chosen, what it is told, that offsets stay there."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sailvl.model import attention
from sailvl.model.attention import packed_attention

LENGTHS = [5, 1, 17, 9]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def heads(dtype: torch.dtype, keys: int = 2, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), size) for count in (4, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def module(is_causal: bool = True) -> Any:
    return SimpleNamespace(is_causal=is_causal, num_key_value_groups=2, training=False)


class Kernel:
    """Stands for torch's: remembers the call, attends document by document."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        self.calls.append({
            "dtypes": {x.dtype for x in (query, key, value)}, "lengths": (max_q, max_k), "scale": scale,
            "window": window_size, "gqa": enable_gqa, "offsets": (cu_seq_q, cu_seq_k), "shape": query.shape,
        })  # fmt: skip
        found = []
        for begin, end in itertools.pairwise(cu_seq_q.tolist()):
            part = [x[begin:end].transpose(0, 1)[None] for x in (query, key, value)]
            found.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *part, scale=scale, is_causal=window_size == (-1, 0), enable_gqa=enable_gqa
                )[0].transpose(0, 1)
            )
        return torch.cat(found)


def gpu_of(kernel: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_kernel_dtype", lambda query: dtype)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keys", [2, 4])
def test_the_kernel_is_told_what_the_documents_are(monkeypatch: pytest.MonkeyPatch, keys: int, is_causal: bool) -> None:
    query, key, value = heads(torch.bfloat16, keys)
    given: dict[str, Any] = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 17, "max_length_k": 17}
    given |= {"scaling": 0.3, "is_causal": is_causal}
    grouped = SimpleNamespace(is_causal=True, num_key_value_groups=4 // keys, training=False)
    expected, _ = packed_attention(grouped, query, key, value, None, **given)
    kernel = Kernel()
    gpu_of(kernel, monkeypatch, torch.bfloat16)
    found, weights = packed_attention(grouped, query, key, value, None, **given)
    (call,) = kernel.calls
    assert weights is None and found.shape == expected.shape == (1, sum(LENGTHS), 4, 16)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert call["window"] == ((-1, 0) if is_causal else (-1, -1)) and call["gqa"] == (keys == 2)
    assert call["lengths"] == (17, 17) and call["scale"] == 0.3 and call["shape"] == (sum(LENGTHS), 4, 16)
    assert all(torch.equal(x, OFFSETS) and x.dtype == torch.int32 for x in call["offsets"])


def test_what_autocast_leaves_in_fp32_is_cast_and_gradients_come_back_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = heads(torch.float32)
    query.requires_grad_(True)
    kernel = Kernel()
    gpu_of(kernel, monkeypatch, torch.bfloat16)
    packed_attention(module(), query, key, value.bfloat16(), None, cu_seq_lens_q=OFFSETS)[0].sum().backward()
    assert kernel.calls[0]["dtypes"] == {torch.bfloat16} and kernel.calls[0]["lengths"] == (sum(LENGTHS),) * 2
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_dropout_and_the_cpu_never_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    packed_attention(module(), *heads(torch.bfloat16), None, cu_seq_lens_q=OFFSETS, max_length_q=17)
    gpu_of(kernel, monkeypatch, torch.bfloat16)
    packed_attention(module(), *heads(torch.bfloat16), None, cu_seq_lens_q=OFFSETS, dropout=0.1)
    assert not kernel.calls


@pytest.mark.skipif(attention.varlen_attn is None, reason="this torch has no such kernel")
def test_torch_takes_our_arguments() -> None:
    needed = {"scale", "window_size", "enable_gqa"}
    known = inspect.signature(attention.varlen_attn).parameters.keys()
    assert attention.HAS_KERNEL == ({"window_size", "enable_gqa"} <= known)
    assert not attention.HAS_KERNEL or needed <= known


@pytest.mark.skipif(not attention.HAS_KERNEL, reason="this torch has no such kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_offset_is_read(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Fake tensors have shapes and no values: torch's own operation takes them, and reading an offset would raise."""
    monkeypatch.setattr(attention, "_kernel_dtype", lambda query: torch.bfloat16)
    with FakeTensorMode():
        shapes = [(1, count, sum(LENGTHS), 16) for count in (4, 2, 2)]
        query, key, value = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        offsets = torch.empty(len(LENGTHS) + 1, dtype=torch.int32)
        given: dict[str, Any] = {"cu_seq_lens_q": offsets, "max_length_q": 17, "scaling": 0.25}
        found, _ = packed_attention(module(), query, key, value, None, **given)
        assert found.shape == (1, sum(LENGTHS), 4, 16) and found.dtype == torch.bfloat16
        found.sum().backward()
        assert key.grad is not None and key.grad.shape == key.shape and key.grad.dtype == dtype
        monkeypatch.setattr(attention, "_kernel_dtype", lambda query: None)
        with pytest.raises(DataDependentOutputException):
            packed_attention(module(), query, key, value, None, **given)


def test_it_is_chosen_on_a_gpu_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def query(device: str, dtype: torch.dtype, size: int = 16, tokens: int = 3) -> Any:
        shape = torch.Size((1, 4, tokens, size))
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape, numel=shape.numel)

    monkeypatch.setattr(attention, "HAS_KERNEL", True)
    monkeypatch.setattr(attention, "_is_ampere", lambda device: device.index != 1)
    half = torch.bfloat16
    assert attention._kernel_dtype(query("cuda:0", half)) == half
    assert attention._kernel_dtype(query("cuda:0", torch.float16)) == torch.float16
    for refused in (
        query("cpu", half), query("cuda:0", torch.float32), query("cuda:0", half, 20), query("cuda:0", half, 512),
        query("cuda:0", half, tokens=0), query("cuda:1", half),
    ):  # fmt: skip
        assert attention._kernel_dtype(refused) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: half)
    assert attention._kernel_dtype(query("cuda:0", torch.float32)) == half
    monkeypatch.setattr(attention, "HAS_KERNEL", False)
    assert attention._kernel_dtype(query("cuda:0", half)) is None
