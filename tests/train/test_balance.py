"""The balance loss against its formula over all tokens, however they are split, recomputed or biased."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sailvl.model import checkpoint, moe
from sailvl.train.balance import balance_loss, fractions, router_terms

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 4, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "mlp_only_layers": [1],
}  # fmt: skip
SHAPE = (2, 4)


@pytest.fixture
def sparse(processor):
    return checkpoint.build(checkpoint.config_for("nano-moe", processor=processor, vit=VIT, lm=LM), seed=0).double()


def forward(model, batch):
    offsets = batch.cu_seqlens
    return model.model(
        input_ids=batch.ids_T[None], position_ids=batch.positions_T[None],
        pixel_values=batch.tiles_N3SS.to(model.dtype), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        max_length_q=batch.max_length, max_length_k=batch.max_length, use_cache=False,
    ).last_hidden_state  # fmt: skip


def watched(model):
    """Inputs of every router during the block, as [[layer, ...] of a forward pass, ...]."""
    seen = []
    for block in moe.sparse_layers(model).values():
        block.gate.register_forward_hook(lambda gate, args, output: seen.append((gate, args[0].detach())))
    return seen


def reference(seen, counts, num_layers=2):
    """The formula with every token of every pass in one place; differentiable in the routers' weights alone."""
    total = 0
    for layer in range(num_layers):
        gate = seen[layer][0]
        hidden = torch.cat([inputs.reshape(-1, inputs.shape[-1]) for _, inputs in seen[layer::num_layers]])
        probabilities = (hidden @ gate.weight.T).softmax(-1)
        f = counts[layer].double() / counts[layer].sum()
        total = total + len(f) * (f * probabilities.mean(0)).sum()
    return total


COUNTS = torch.tensor([[5, 1, 1, 1], [0, 10, 2, 4]])


def test_micro_batches_add_up_to_the_formula_and_only_routers_learn(sparse, batches):
    seen = watched(sparse)
    num_tokens = sum(len(batch.ids_T) for batch in batches)
    total = 0.0
    with router_terms(sparse) as terms:
        for batch in batches:
            forward(sparse, batch)
            part = balance_loss(terms.take(), fractions(COUNTS).double(), num_tokens)
            part.backward()
            total += part.item()
    found = {name: p.grad for name, p in sparse.named_parameters() if p.grad is not None}
    assert sorted(found) == [f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)]
    sparse.zero_grad()
    expected = reference(seen, COUNTS)
    expected.backward()
    # f is rounded to fp32 once
    assert total == pytest.approx(expected.item(), rel=1e-7)
    for name, grad in found.items():
        torch.testing.assert_close(grad, sparse.get_parameter(name).grad, rtol=1e-6, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    owners=st.lists(st.integers(0, 3), min_size=1, max_size=24),
    counts=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_split_over_processes_and_micro_batches_has_the_same_sum(owners, counts, seed):
    """Tokens of one step, each owned by one of up to four micro-batches (some may own none)."""
    draw = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(2, len(owners), 4, generator=draw, dtype=torch.float64).softmax(-1)
    f = fractions(torch.tensor(counts).reshape(SHAPE))
    parts = [balance_loss(probabilities[:, torch.tensor(owners) == owner].sum(1), f, len(owners)) for owner in range(4)]
    expected = sum(4 * (f[layer].double() * probabilities[layer].mean(0)).sum() for layer in range(2))
    torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=1e-12)


def test_even_use_costs_one_a_layer_and_uneven_use_more():
    even = torch.full(SHAPE, 5)
    assert balance_loss(torch.full(SHAPE, 2.5), fractions(even), 10).item() == pytest.approx(2.0)
    one = torch.tensor([[1, 0, 0, 0]] * 2)
    assert balance_loss(10.0 * one, fractions(one), 10).item() == pytest.approx(8.0)


def test_fractions_sum_to_one_and_an_unused_layer_has_none():
    f = fractions(torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0]]))
    assert f.dtype == torch.float32 and f.tolist() == [[0.75, 0.25, 0, 0], [0, 0, 0, 0]]


def test_counts_are_the_choices_of_each_token_once(sparse, batches):
    with moe.record_routing(sparse) as routing, router_terms(sparse) as terms:
        for batch in batches:
            forward(sparse, batch)
    assert torch.equal(terms.counts, routing.counts)
    tokens = sum(len(batch.ids_T) for batch in batches)
    assert terms.counts.sum(1).tolist() == [2 * tokens] * 2


def test_activation_checkpointing_changes_neither_counts_nor_gradients(sparse, batches):
    def step():
        with router_terms(sparse) as terms:
            hidden = forward(sparse, batches[0])
            loss = hidden.square().mean() + balance_loss(terms.take(), fractions(COUNTS), len(batches[0].ids_T))
            loss.backward()
        grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in sparse.named_parameters()}
        sparse.zero_grad()
        return loss.item(), terms.counts, grads

    runs = []
    gate = sparse.model.language_model.layers[0].mlp.gate
    gate.register_forward_hook(lambda *_: runs.append(1))
    plain_loss, plain_counts, plain_grads = step()
    layers = sparse.model.language_model.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    loss, counts, grads = step()
    assert len(runs) == 3, "the router was not run again: nothing was tested"
    assert loss == plain_loss and torch.equal(counts, plain_counts)
    for name, grad in plain_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-14)


def test_a_router_bias_moves_choices_and_not_probabilities(sparse, batches):
    with router_terms(sparse) as terms:
        forward(sparse, batches[0])
        plain_sums, plain_counts = terms.take()[0], terms.counts.clone()
    moe.set_bias(sparse, torch.tensor([[9.0, 0, 0, 0]] * 2))
    with router_terms(sparse) as terms:
        forward(sparse, batches[0])
    assert terms.counts[0, 0] == len(batches[0].ids_T) != plain_counts[0, 0]
    assert torch.equal(terms.take()[0], plain_sums)


def test_a_frozen_router_gives_no_gradient(sparse, batches):
    sparse.requires_grad_(False)
    with router_terms(sparse) as terms:
        forward(sparse, batches[0])
        assert not balance_loss(terms.take(), fractions(COUNTS), 1).requires_grad


def test_take_empties_and_hooks_leave(sparse, batches):
    with router_terms(sparse) as terms:
        forward(sparse, batches[0])
        assert terms.take().sum() > 0 and not terms.take().any()
    counts = terms.counts.clone()
    forward(sparse, batches[0])
    assert torch.equal(terms.counts, counts) and not terms.take().any()
    assert not sparse.model.language_model._forward_pre_hooks and not sparse.model.language_model._forward_hooks


def test_a_failed_pass_leaves_the_counter_off(sparse, batches):
    layer = sparse.model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with router_terms(sparse) as terms:
        with pytest.raises(RuntimeError, match="no memory"):
            forward(sparse, batches[0])
        before = terms.counts.clone()
        sparse.model.language_model.layers[0].mlp.gate(torch.zeros(1, 32, dtype=torch.float64))
        assert torch.equal(terms.counts, before)
    handle.remove()


def test_a_dense_model_has_no_terms(model, batches):
    with router_terms(model) as terms:
        forward(model, batches[0])
    loss = balance_loss(terms.take(), fractions(terms.counts), 1)
    assert terms.counts.shape == (0, 0) and loss.item() == 0


def test_bf16_autocast_sums_in_fp32(sparse, batches):
    sparse.float()
    with torch.autocast("cpu", dtype=torch.bfloat16), router_terms(sparse) as terms:
        forward(sparse, batches[0])
    sums = terms.take()
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(1), torch.full((2,), float(len(batches[0].ids_T))), rtol=1e-4, atol=0)
