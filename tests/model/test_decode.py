"""The lean decode step is the library's forward pass: states, tokens and cache, for rows of any lengths."""

from __future__ import annotations

import copy

import pytest
import torch

from sailvl.model import checkpoint, decode
from sailvl.model.cache import BatchCache
from sailvl.model.quant import quantize


def read(model, cache: BatchCache, lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Prompts of these lengths become rows; gives their last hidden states."""
    ids = torch.randint(0, 250, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    with cache.joining(lengths) as positions:
        hidden = model.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, cu_seq_lens_q=ends.int(),
            cu_seq_lens_k=ends.int(), max_length_q=max(lengths), max_length_k=max(lengths),
        ).last_hidden_state  # fmt: skip
    return hidden[0, ends[1:] - 1]


def library_step(model, ids_B: torch.Tensor, cache: BatchCache) -> torch.Tensor:
    with cache.stepping() as (positions, mask):
        output = model.model.language_model(
            input_ids=ids_B[:, None], position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    return output.last_hidden_state[:, 0]


def grouped(queries: int, keys: int, *, bias: bool = False):
    lm = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": queries,
        "num_key_value_heads": keys, "head_dim": 16, "vocab_size": 512, "attention_bias": bias,
    }  # fmt: skip
    model = checkpoint.build(checkpoint.config_for("nano", lm=lm), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # fresh norms are ones and fresh biases zeros, which would hide a forgotten one
        for name, value in model.model.language_model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize(("queries", "keys", "bias"), [(4, 2, False), (6, 2, True), (4, 1, False), (3, 3, False)])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 60, 1, 17]])
def test_states_and_greedy_tokens_are_the_library_s_while_the_cache_grows(queries, keys, bias, lengths) -> None:
    model = grouped(queries, keys, bias=bias)
    assert decode.supports(model)
    ours, theirs = BatchCache(8), BatchCache(8)
    with torch.inference_mode():
        token = model.lm_head(read(model, ours, lengths)).argmax(-1)
        assert torch.equal(token, model.lm_head(read(model, theirs, lengths)).argmax(-1))
        for step in range(12):
            found, right = decode.decode_step(model, token, ours), library_step(model, token, theirs)
            assert found.shape == (len(lengths), 64)
            assert torch.allclose(found, right, atol=1e-5, rtol=1e-5), step
            assert ours.lengths == theirs.lengths == [length + step + 1 for length in lengths]
            for key, other in zip(ours.keys, theirs.keys, strict=True):
                assert torch.allclose(key, other, atol=1e-5)
            token = model.lm_head(found).argmax(-1)
            assert torch.equal(token, model.lm_head(right).argmax(-1))


def test_rows_that_leave_and_join_change_no_other() -> None:
    model = grouped(4, 2)
    together, alone = BatchCache(4), BatchCache(4)
    with torch.inference_mode():
        read(model, together, [9, 4], seed=3)
        together.drop(0)  # the row of 4 takes its place
        read(model, together, [70], seed=4)
        # The same two documents, read in one pack before the others were there.
        read(model, alone, [9, 4], seed=3)
        alone.drop(0)
        for token in (5, 6, 7):
            first = decode.decode_step(model, torch.tensor([token, 9]), together)[0]
            assert torch.allclose(first, decode.decode_step(model, torch.tensor([token]), alone)[0], atol=1e-5)


def test_double_precision_agrees_to_its_own_rounding() -> None:
    model = grouped(4, 2).double()
    ours, theirs = BatchCache(2), BatchCache(2)
    with torch.inference_mode():
        read(model, ours, [6, 11]), read(model, theirs, [6, 11])
        ids = torch.tensor([1, 2])
        # The library's norms go through fp32 whatever the type.
        assert torch.allclose(decode.decode_step(model, ids, ours), library_step(model, ids, theirs), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_models_decode_as_their_own_forward_does(dtype) -> None:
    model = quantize(grouped(4, 2).to(dtype))
    assert decode.supports(model)
    ours, theirs = BatchCache(2), BatchCache(2)
    with torch.inference_mode():
        read(model, ours, [20, 30]), read(model, theirs, [20, 30])
        ids = torch.tensor([1, 2])
        found, right = decode.decode_step(model, ids, ours), library_step(model, ids, theirs)
    cosine = torch.nn.functional.cosine_similarity(found.double(), right.double(), dim=-1)
    assert cosine.min() > (1 - 1e-9 if dtype == torch.float32 else 0.999)


def test_a_wrong_number_of_rows_is_refused_and_changes_nothing(tiny_model) -> None:
    cache = BatchCache(2)
    with torch.inference_mode():
        read(tiny_model, cache, [4, 5])
    for ids in (torch.tensor([1]), torch.tensor([[1], [2]])):
        with pytest.raises(ValueError, match="for 2 rows"):
            decode.decode_step(tiny_model, ids, cache)
    assert cache.lengths == [4, 5]


def test_models_it_does_not_compute_are_named(tiny_model, tiny_processor) -> None:
    assert not decode.supports(checkpoint.build(checkpoint.config_for("nano-moe", processor=tiny_processor), seed=0))
    assert not decode.supports(copy.deepcopy(tiny_model).to("meta"))
    sliding = copy.deepcopy(tiny_model)
    sliding.model.language_model.config.layer_types = ["sliding_attention", "full_attention"]
    assert not decode.supports(sliding)
