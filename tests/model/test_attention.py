"""A pack computes what its documents compute alone: the operation bitwise, the model to rounding, gradients exactly."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sailvl.model import SailVLForConditionalGeneration, checkpoint
from sailvl.model.attention import PACKED, packed_attention

LENGTHS = {"ragged": [5, 1, 17, 9], "one document": [24], "single tokens": [1, 1, 1], "with an empty one": [6, 0, 7]}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack_kwargs(lengths: list[int]) -> dict[str, object]:
    cu, longest = offsets(lengths), max(lengths)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_operation_is_bitwise_equal(lengths: list[int], dtype: torch.dtype) -> None:
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    generator = torch.Generator().manual_seed(0)
    shape = [(1, heads, sum(lengths), 16) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in shape)
    packed, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=offsets(lengths), scaling=0.25)
    start = 0
    for length in (length for length in lengths if length):
        part = [tensor[:, :, start : start + length].clone() for tensor in (query, key, value)]
        alone, _ = sdpa_attention_forward(module, *part, None, scaling=0.25)
        assert torch.equal(packed[:, start : start + length], alone)
        start += length


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("is_causal", [True, False])
def test_matrix_products_for_training_in_half_precision(lengths: list[int], is_causal: bool) -> None:
    """With bf16 gradients short documents take another path: the same numbers, bitwise alone or packed."""
    module = SimpleNamespace(is_causal=is_causal, num_key_value_groups=2, training=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 16) for heads in (4, 2, 2)]
    exact = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    half = [tensor.clone().requires_grad_() for tensor in exact]
    full = [tensor.float().requires_grad_() for tensor in exact]
    packed, _ = packed_attention(module, *half, None, cu_seq_lens_q=offsets(lengths), scaling=0.25)
    start = 0
    for length in (length for length in lengths if length):
        part = slice(start, start + length)
        alone, _ = packed_attention(module, *(tensor[:, :, part].clone() for tensor in half), None, scaling=0.25)
        assert torch.equal(packed[:, part], alone)
        fused, _ = sdpa_attention_forward(module, *(tensor[:, :, part] for tensor in full), None, scaling=0.25)
        torch.testing.assert_close(packed[:, part].float(), fused, atol=0.03, rtol=0.02)
        start += length
    weights = torch.randn(packed.shape, generator=generator)
    (packed.float() * weights).sum().backward()
    whole, _ = packed_attention(module, *full, None, cu_seq_lens_q=offsets(lengths), scaling=0.25)
    (whole * weights).sum().backward()
    for low, high in zip(half, full, strict=True):
        torch.testing.assert_close(low.grad.float(), high.grad, atol=0.1, rtol=0.05)


def document(model: SailVLForConditionalGeneration, length: int, tiles: int, seed: int) -> torch.Tensor:
    """Random ids [1, length] with placeholders for ``tiles`` tiles after the first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (1, length), generator=generator)
    ids[0, 1 : 1 + tiles * model.config.tokens_per_tile] = model.config.image_token_id
    return ids


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_model_packed_equals_unpacked(
    tiny_model: SailVLForConditionalGeneration, dtype: torch.dtype, tolerance: float, use_cache: bool | None
) -> None:
    model = copy.deepcopy(tiny_model).to(dtype)
    lengths, tiles = [19, 1, 6, 23], [2, 0, 0, 3]
    parts = [
        document(model, length, count, seed) for seed, (length, count) in enumerate(zip(lengths, tiles, strict=True))
    ]
    pixels = torch.randn(sum(tiles), 3, 56, 56, generator=torch.Generator().manual_seed(9)).to(dtype)
    extra = {} if use_cache is None else {"use_cache": use_cache}
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), pixel_values=pixels, **pack_kwargs(lengths), **extra).logits
        alone = [
            model(ids, pixel_values=part, use_cache=False).logits
            for ids, part in zip(parts, pixels.split(tiles), strict=True)
        ]
    assert (packed - torch.cat(alone, 1)).abs().max() <= tolerance


def test_no_gradient_crosses_documents(tiny_model: SailVLForConditionalGeneration) -> None:
    """Exactly zero with packed attention, and not zero with a plain causal mask: the test can tell."""
    lengths = [7, 5, 9]
    ids = torch.cat([document(tiny_model, length, 0, seed) for seed, length in enumerate(lengths)], 1)
    leaks = {}
    for name, kwargs in {"packed": pack_kwargs(lengths), "plain": {}}.items():
        embeds = tiny_model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = tiny_model(inputs_embeds=embeds, **kwargs).logits
        (gradient,) = torch.autograd.grad(logits[0, 7:12].logsumexp(-1).sum(), embeds)
        assert gradient[0, 7:12].abs().sum() > 0
        leaks[name] = float(gradient[0, :7].abs().sum() + gradient[0, 12:].abs().sum())
    assert leaks["packed"] == 0.0 and leaks["plain"] > 0.0


def test_a_pack_builds_no_mask(tiny_model: SailVLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of T x T would cost memory quadratic in the pack, and is not needed."""

    def refuse(**_: object) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, PACKED, refuse)
    tiny_model(document(tiny_model, 12, 0, 0), **pack_kwargs([5, 7]))
    with pytest.raises(AssertionError, match="a mask was built"):
        tiny_model(document(tiny_model, 12, 0, 0))


def test_packs_that_would_mix_documents_are_refused(tiny_model: SailVLForConditionalGeneration) -> None:
    ids, good = document(tiny_model, 12, 0, 0), pack_kwargs([5, 7])
    plain = checkpoint.build(tiny_model.config, seed=0, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="'sdpa' ignores cu_seq_lens"):
        plain(ids, **good)
    for wrong in ({"attention_mask": torch.ones_like(ids)}, {"position_ids": None}):
        with pytest.raises(ValueError, match="a pack is one row"):
            tiny_model(ids, **{**good, **wrong})
    with pytest.raises(ValueError, match="a pack is one row"):
        tiny_model(ids.repeat(2, 1), **good)
    with pytest.raises(ValueError, match=r"\[5, 6\] do not add up to the 12 tokens"):
        tiny_model(ids, **{**good, "cu_seq_lens_q": offsets([5, 6])})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_batches_are_as_with_other_implementations(
    tiny_model: SailVLForConditionalGeneration, implementation: str
) -> None:
    other = checkpoint.build(tiny_model.config, seed=0, attn_implementation=implementation).eval()
    ids = torch.cat([document(tiny_model, 18, 2, seed) for seed in range(2)])
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    ids[0, 4:13] = torch.tensor([9, *[tiny_model.config.image_token_id] * 8])
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (
            model(ids, attention_mask=mask, pixel_values=pixels).logits[mask.bool()] for model in (tiny_model, other)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_an_empty_picture_batch_keeps_every_parameter_in_the_graph(tiny_model: SailVLForConditionalGeneration) -> None:
    model = copy.deepcopy(tiny_model)
    model(document(model, 8, 0, 0), pixel_values=torch.zeros(0, 3, 56, 56)).logits.sum().backward()
    gradients = dict(checkpoint.part_parameters(model, "vit") + checkpoint.part_parameters(model, "projector"))
    assert all(value.grad is not None and not value.grad.any() for value in gradients.values())
    assert all(value.grad is not None for _, value in checkpoint.part_parameters(model, "lm"))
