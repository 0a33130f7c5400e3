import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sailvl.train
from sailvl.model.checkpoint import part_parameters
from sailvl.train import optim
from sailvl.train.step import loss_sum, resolve_precision, train_step

ALL = ("vit", "projector", "lm")


def alone(batch, tokens_per_tile):
    """Every document of a batch as a batch of its own."""
    tiles = 0
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.ids_T[begin:end]
        number = int((ids == ids.new_tensor(IMAGE)).sum()) // tokens_per_tile
        inside = (batch.rows_R >= begin) & (batch.rows_R < end)
        yield replace(
            batch,
            ids_T=ids,
            positions_T=batch.positions_T[begin:end],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
            max_length=end - begin,
            tiles_N3SS=batch.tiles_N3SS[tiles : tiles + number],
            rows_R=batch.rows_R[inside] - begin,
            targets_R=batch.targets_R[inside],
        )
        tiles += number


IMAGE = 256 + 7
"""Id of <IMG_CONTEXT> in the test tokenizer: 256 bytes, then the special tokens."""


def gradients(model, parts):
    model.zero_grad()
    total = sum(loss_sum(model, part, "fp32") for part in parts)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_pack_trains_exactly_like_its_documents_alone(model, batches):
    model.double()
    batch = batches[0]
    documents = list(alone(batch, model.config.tokens_per_tile))
    assert len(documents) > 2 and {len(d.tiles_N3SS) > 0 for d in documents} == {True, False}
    packed_loss, packed = gradients(model, [batch])
    loss, separate = gradients(model, documents)
    assert packed_loss == pytest.approx(loss, rel=1e-13)
    assert packed.keys() == separate.keys() == dict(model.named_parameters()).keys()
    for name in packed:
        torch.testing.assert_close(packed[name], separate[name], rtol=0, atol=1e-12)


def test_the_loss_is_the_models_own_loss_with_labels(model, batches):
    model.double()
    batch = batches[0]
    theirs = 0.0
    for document in alone(batch, model.config.tokens_per_tile):
        labels = torch.full_like(document.ids_T, -100)
        labels[document.rows_R + 1] = document.targets_R
        output = model(input_ids=document.ids_T[None], pixel_values=document.tiles_N3SS, labels=labels[None])
        theirs += output.loss.item() * len(document.rows_R)
    # transformers computes its loss in fp32 whatever the model is in.
    assert loss_sum(model, batch, "fp32").item() == pytest.approx(theirs, rel=1e-6)


def cross_gradient(model, batch):
    """Largest gradient of the last document's loss in the embedded tokens of the earlier ones."""
    begin = int(batch.cu_seqlens[-2])
    last = batch.rows_R >= begin
    embeds = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeds.append(output))
    loss = loss_sum(model, replace(batch, rows_R=batch.rows_R[last], targets_R=batch.targets_R[last]), "fp32")
    hook.remove()
    (grad,) = torch.autograd.grad(loss, embeds[0])
    assert grad[0, begin:].abs().max() > 0
    return grad[0, :begin].abs().max().item()


def test_no_gradient_crosses_documents_and_a_plain_causal_mask_is_caught(model, batches):
    batch = batches[0]
    assert cross_gradient(model, batch) == 0.0
    model.model._check_packed = lambda *_: None
    whole = torch.tensor([0, len(batch.ids_T)], dtype=torch.int32)
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(**{**inputs, "cu_seq_lens_q": whole, "cu_seq_lens_k": whole})
    assert cross_gradient(model, batch) > 0.0


def one_step(model, batches, stage):
    optim.freeze(model, stage.trains)
    optimizer = optim.build(model, stage)
    return optimizer, train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")


def test_tokens_weigh_the_same_however_they_are_spread_over_lanes(assets, batches, stage):
    """Lanes of very different size: a mean of the lanes' means would differ."""
    from sailvl.model import checkpoint

    results = []
    small = list(alone(batches[1], 4))[:1]
    for lanes in ([batches[0], *small], [*alone(batches[0], 4), *small]):
        model = checkpoint.load(assets / "model", dtype=torch.float64)
        _, result = one_step(model, lanes, stage())
        results.append((result.values, dict(model.named_parameters())))
    assert results[0][0].tolist() == pytest.approx(results[1][0].tolist(), rel=1e-12)
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter, results[1][1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("trains", [("projector",), ("vit", "projector"), ("lm",), ("vit",), ALL])
def test_frozen_parts_get_no_gradient_no_state_and_keep_their_bits(model, batches, stage, trains):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, _ = one_step(model, batches, stage(trains=trains))
    assert {id(parameter) for parameter in optimizer.state} == {
        id(parameter) for part in trains for _, parameter in part_parameters(model, part)
    }
    for part in ALL:
        for name, parameter in part_parameters(model, part):
            assert torch.equal(parameter, before[name]) == (part not in trains), name
            assert parameter.grad is None


def test_no_graph_is_built_through_a_frozen_encoder(model, batches, stage):
    optim.freeze(model, ("projector",))
    outputs = []
    model.model.vision_tower.register_forward_hook(lambda m, i, output: outputs.append(output.last_hidden_state))
    loss_sum(model, batches[0], "fp32").backward()
    assert not outputs[0].requires_grad


def test_a_batch_without_pictures_gives_encoder_and_projector_zero_gradients(model, batches):
    text = next(d for d in alone(batches[0], 4) if not len(d.tiles_N3SS))
    _, grads = gradients(model, [text])
    images = [name for part in ("vit", "projector") for name, _ in part_parameters(model, part)]
    assert images and all(not grads[name].any() for name in images)


def test_a_step_without_supervised_tokens_changes_nothing(model, batches, stage):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    empty = [replace(b, rows_R=b.rows_R[:0], targets_R=b.targets_R[:0]) for b in batches]
    optimizer, result = one_step(model, empty, stage())
    assert result.supervised_tokens == 0 and result.values.tolist() == [0.0, 0.0] and not optimizer.state
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_one_unsupervised_lane_changes_nothing_for_the_others(assets, batches, stage):
    from sailvl.model import checkpoint

    empty = replace(batches[1], rows_R=batches[1].rows_R[:0], targets_R=batches[1].targets_R[:0])
    models = [checkpoint.load(assets / "model", dtype=torch.float64) for _ in range(2)]
    for model, lanes in zip(models, ([batches[0]], [batches[0], empty]), strict=True):
        one_step(model, lanes, stage())
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_entirely(model, batches, stage, poison):
    optimizer, _ = one_step(model, batches, stage())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    broken = replace(batches[0], tiles_N3SS=torch.full_like(batches[0].tiles_N3SS, poison))
    result = train_step(model, [broken, batches[1]], optimizer, max_grad_norm=1.0, precision="fp32")
    assert not torch.isfinite(result.values).all()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    for state, kept in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], kept[key]) for key in kept)
    train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    assert not torch.equal(model.lm_head.weight, weights["model.language_model.embed_tokens.weight"])


def test_gradients_are_clipped_and_the_norm_is_from_before(assets, batches, stage, monkeypatch):
    from sailvl.model import checkpoint

    model = checkpoint.load(assets / "model", dtype=torch.float64)
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step",
        lambda self: seen.append(torch.stack([p.grad.norm() for p in optim.parameters(self)]).norm().item()),
    )  # fmt: skip
    optim.freeze(model, ALL)
    result = train_step(model, batches, optim.build(model, stage()), max_grad_norm=0.01, precision="fp32")
    assert seen == [pytest.approx(0.01, rel=1e-4)] and result.values[1] > 0.1


def test_bf16_is_near_fp32_and_keeps_fp32_weights(model, batches):
    exact, close = (loss_sum(model, batches[0], precision) for precision in ("fp32", "bf16"))
    assert close.item() != exact.item() and close.item() == pytest.approx(exact.item(), rel=1e-2)
    close.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_auto_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=has_bf16: answer)
        assert resolve_precision("auto", cpu) == expected
    assert [resolve_precision(given, cpu) for given in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_step_never_waits_for_the_device_and_alone_calls_backward():
    waits = {"item", "cpu", "tolist", "numpy", "nonzero", "float", "bool", "int"}
    folder = Path(sailvl.train.__file__).parent
    calls = {}
    for file in folder.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        names = [n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "") for n in nodes]
        calls[file.name] = set(names)
    assert not calls["step.py"] & waits
    assert [name for name, used in calls.items() if "backward" in used] == ["step.py"]
