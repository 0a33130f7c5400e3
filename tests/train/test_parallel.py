"""Several processes compute what one does, however weights and experts are shared, and none waits for ever."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from sailvl import dist
from sailvl.config import ConfigError
from sailvl.curriculum import Parallel
from sailvl.data.loader import Loader
from sailvl.model import checkpoint, moe
from sailvl.model.checkpoint import part_parameters
from sailvl.train import optim, parallel, plan
from sailvl.train.step import joined, loss_sum, train_step

ALL = ("vit", "projector", "lm")
IMAGE = 256 + 7
"""Id of <IMG_CONTEXT> in the test tokenizer."""

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 4, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def steps(sources, processor):
    """Makes the batches of the first steps of four lanes."""

    def steps(count):
        loader = Loader(sources, {"samples": 1.0}, processor, max_tokens=256, max_tiles=8, lanes=4, seed=0)
        return [next(loader) for _ in range(count)]

    return steps


@pytest.fixture
def sparse(processor):
    """Builds a small model with four experts, of which each token uses two."""
    config = checkpoint.config_for("nano-moe", processor=processor, vit=VIT, lm=LM)
    return lambda: checkpoint.build(config, seed=0)


@pytest.fixture
def dense(assets):
    return lambda: checkpoint.load(assets / "model", dtype=torch.float32)


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def prepared(build, stage, settings, dtype=torch.float64, precision="fp32"):
    model = build().to(dtype).train()
    optim.freeze(model, stage.trains)
    parallel.wrap(model, settings, precision=precision, backend="aot_eager")
    return model, optim.build(model, stage)


def trained(build, stage, settings, all_steps, dtype=torch.float64, precision="fp32"):
    """Weights and (loss, norm, tokens) of each step, after training on this process's part of ``all_steps``."""
    model, optimizer = prepared(build, stage, settings, dtype, precision)
    rows, counts = [], None
    for batches in all_steps:
        result = train_step(
            model, batches[dist.rank() :: dist.world_size()], optimizer, max_grad_norm=stage.max_grad_norm,
            precision=precision, packs_per_forward=settings.packs_per_forward, z_loss=stage.z_loss,
            balance=stage.balance_loss, expert_counts=counts,
        )  # fmt: skip
        counts = result.expert_counts
        rows.append([*result.values.tolist(), result.supervised_tokens])
    return {name: whole(p) for name, p in model.named_parameters()}, torch.tensor(rows), counts


def assert_like(found, expected, atol=1e-12):
    (weights, rows, counts), (wanted, wanted_rows, wanted_counts) = found, expected
    torch.testing.assert_close(rows, wanted_rows, rtol=0, atol=atol)
    assert weights.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert (counts is None and wanted_counts is None) or torch.equal(counts, wanted_counts)


def test_gradients_of_two_processes_are_those_of_one_bit_for_bit(dense, stage, steps, group):
    batches = steps(1)[0][:2]

    def gradients(*kinds):
        found = []
        for shard in kinds:
            model, optimizer = prepared(dense, stage(), Parallel(shard=shard), torch.float32)
            seen = {}
            optimizer.step = lambda s=seen, m=model: s.update({n: whole(p.grad) for n, p in m.named_parameters()})
            mine = batches[dist.rank() :: dist.world_size()]
            train_step(model, mine, optimizer, max_grad_norm=1e9, precision="fp32")
            found.append(seen)
        return found

    (alone,) = gradients("zero3")
    for each in (each for found in group.together(2, gradients, "zero3", "zero2") for each in found):
        assert each.keys() == alone.keys() and all(torch.equal(each[name], alone[name]) for name in alone)


CASES = {
    2: [
        (6, ALL, Parallel(checkpointing="full")),
        (2, ALL, Parallel(shard="zero2", checkpointing="selective", packs_per_forward=2)),
        (2, ("projector",), Parallel(checkpointing="selective")),
        (2, ("vit", "projector"), Parallel(shard="zero2", checkpointing="full")),
        (2, ("lm",), Parallel(replicas=2)),
        (2, ("vit",), Parallel()),
    ],
    4: [(4, ALL, Parallel(replicas=2, checkpointing="full")), (1, ALL, Parallel(shard="zero2"))],
}
"""Processes to (steps, parts that train, how weights are shared)."""


@pytest.mark.parametrize("size", CASES)
def test_clipped_steps_are_those_of_one_process(dense, stage, steps, group, size):
    """However weights are shared and whatever is frozen; with a tied head and z-loss, in fp64."""
    batches = steps(6)

    def run(alone):
        return [
            trained(dense, stage(trains=trains, max_grad_norm=0.05, z_loss=1e-4), Parallel() if alone else own,
                    batches[:count])
            for count, trains, own in CASES[size]
        ]  # fmt: skip

    expected = run(True)
    for found in group.together(size, run, False, seconds=120):
        for outcome, wanted in zip(found, expected, strict=True):
            assert_like(outcome, wanted)


def test_what_is_too_large_is_shared_and_summed_at_once(dense, stage, steps, group):
    """Whole gradients do not wait for the last pass, and frozen weights are sharded too, above these limits."""
    batches, chosen = steps(1), (ALL, ("projector",))
    expected = [trained(dense, stage(trains=trains), Parallel(), batches) for trains in chosen]

    def run():
        parallel.MAX_WAITING_GRADIENTS = parallel.MAX_REPLICATED = 0
        model, _ = prepared(dense, stage(trains=("projector",)), Parallel())
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return [trained(dense, stage(trains=trains), Parallel(), batches) for trains in chosen]

    for found in group.together(2, run):
        for outcome, wanted in zip(found, expected, strict=True):
            assert_like(outcome, wanted)


def texts(batches):
    """The documents without pictures of some batches, each as a batch."""
    found = []
    for batch in batches:
        for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            inside = (batch.rows_R >= begin) & (batch.rows_R < end)
            alone = replace(
                batch, ids_T=batch.ids_T[begin:end], positions_T=batch.positions_T[begin:end],
                cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32), max_length=end - begin,
                tiles_N3SS=batch.tiles_N3SS[:0], rows_R=batch.rows_R[inside] - begin, targets_R=batch.targets_R[inside],
            )  # fmt: skip
            found += [alone] if IMAGE not in alone.ids_T else []
    return found


@pytest.mark.parametrize("trains", [ALL, ("projector",)])
def test_processes_without_pictures_neither_hang_nor_change_the_result(dense, stage, steps, group, trains):
    drawn = steps(1)[0]
    first, *others = texts(drawn)
    cases = [[drawn[0], first], [first, joined(others)]]
    assert drawn[0].num_tiles and not first.num_tiles

    def run():
        settings = Parallel(checkpointing="full")
        return [trained(dense, stage(trains=trains), settings, [case] * 2) for case in cases]

    expected = run()
    for found in group.together(2, run, seconds=20):
        for outcome, wanted in zip(found, expected, strict=True):
            assert_like(outcome, wanted)


def test_shared_experts_are_the_same_experts(sparse, stage, steps, group):
    """Also where a process keeps only experts that nobody chooses, and with copies of each set of experts."""
    batches, own = steps(2), stage(max_grad_norm=0.05, balance_loss=0.1)

    def lopsided():
        model = sparse()
        moe.set_bias(model, [[9.0, 9.0, 0.0, 0.0]] * 2)
        return model

    def both(settings):
        return [trained(build, own, settings, batches) for build in (sparse, lopsided)]

    expected = both(Parallel())
    assert expected[1][2][:, 2:].sum() == 0, "the second half of the experts has nothing to do"
    for size, settings in ((2, Parallel(experts=2, checkpointing="full")), (4, Parallel(experts=2, replicas=2))):
        for found in group.together(size, both, settings):
            for outcome, wanted in zip(found, expected, strict=True):
                assert_like(outcome, wanted)


def test_bf16_computes_in_bf16_and_keeps_fp32_and_frozen_weights_whole_only_if_that_loses_nothing(
    dense, stage, steps, group
):
    batches = steps(1)

    def rounded():
        return dense().bfloat16().float()

    def run(build, trains):
        result = trained(build, stage(trains=trains), Parallel(), batches, torch.float32, "bf16")
        model, optimizer = prepared(build, stage(trains=trains), Parallel(), torch.float32, "bf16")
        frozen = {(type(p) is torch.nn.Parameter, p.dtype) for p in model.parameters() if not p.requires_grad}
        return result[1], frozen, {p.dtype for p in optim.parameters(optimizer)}

    def all_of_it():
        return [run(rounded, ("projector",)), run(dense, ("projector",)), run(dense, ALL)]

    alone = all_of_it()
    for found in group.together(2, all_of_it):
        for (rows, _, kept), (wanted, _, _) in zip(found, alone, strict=True):
            torch.testing.assert_close(rows, wanted, rtol=0.03, atol=0.03)
            assert kept == {torch.float32}
        assert [frozen for _, frozen, _ in found[:2]] == [{(True, torch.bfloat16)}, {(False, torch.float32)}]


def test_all_processes_skip_the_same_updates(dense, stage, steps, group):
    """A step that is not finite on one of them, and one in which nobody has a supervised token."""
    batches = steps(1)[0][:2]
    poisoned = [batches[0], replace(batches[1], tiles_N3SS=batches[1].tiles_N3SS * float("nan"))]
    empty = [replace(batch, rows_R=batch.rows_R[:0], targets_R=batch.targets_R[:0]) for batch in batches]

    def run():
        model, optimizer = prepared(dense, stage(), Parallel())
        found = []
        for case in ([batches[0], empty[1]], poisoned, empty):
            mine = case[dist.rank() :: dist.world_size()]
            result = train_step(model, mine, optimizer, max_grad_norm=1.0, precision="fp32", notes=(dist.rank(), 1))
            found.append((result.values.isfinite().all().item(), result.supervised_tokens, result.notes))
            found.append(whole(model.lm_head.weight))
        return found

    expected = run()
    for found in group.together(2, run):
        for index in (1, 3, 5):
            torch.testing.assert_close(found[index], expected[index], rtol=0, atol=1e-12)
        assert [each[:2] for each in found[::2]] == [each[:2] for each in expected[::2]]
        assert [each[2] for each in found[::2]] == [(1.0, 2.0)] * 3
    assert torch.equal(expected[1], expected[3]) and torch.equal(expected[3], expected[5])


def test_a_model_made_whole_again_is_a_plain_model(dense, stage, steps, group):
    batches = steps(1)[0]

    def run():
        model, optimizer = prepared(dense, stage(), Parallel(checkpointing="full"))
        train_step(model, batches[dist.rank() :: 2], optimizer, max_grad_norm=1.0, precision="fp32")
        with torch.no_grad():
            before = loss_sum(model, batches[0], "fp32")
        parallel.make_whole(model)
        if not dist.is_main():
            return None
        with torch.no_grad():
            after = loss_sum(model, batches[0], "fp32")
        plain = {type(p) for p in model.parameters()} == {torch.nn.Parameter}
        tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
        return torch.equal(before, after), plain, tied, type(model).__name__

    assert group.together(2, run)[0] == (True, True, True, "SailVLForConditionalGeneration")


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_one_process_has_plain_tensors_and_recomputing_changes_no_bit(dense, stage, steps, checkpointing):
    batches, settings = steps(2), Parallel(checkpointing=checkpointing, replicas=1)
    model, _ = prepared(dense, stage(), settings)
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert list(dict(model.named_parameters())) == list(dict(dense().named_parameters()))
    found, expected = (trained(dense, stage(), own, batches, torch.float32) for own in (settings, Parallel()))
    assert torch.equal(found[1], expected[1]) and all(torch.equal(found[0][n], expected[0][n]) for n in found[0])


def test_recomputing_forgets_activations(dense, stage, steps):
    """Autograd keeps less than half the bytes from forward to backward."""

    def kept(checkpointing):
        model, _ = prepared(dense, stage(), Parallel(checkpointing=checkpointing), torch.float32)
        weights, saved = {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_sum(model, steps(1)[0][0], "fp32")
        assert loss.requires_grad
        return sum(saved.values())

    none, full = kept("none"), kept("full")
    assert full < 0.5 * none


def test_a_frozen_encoder_is_not_recomputed(dense, stage):
    model, _ = prepared(dense, stage(trains=("projector",)), Parallel(checkpointing="full"))
    recomputed = [block for block in parallel.blocks(model) if "forward" in vars(block)]
    assert recomputed == list(model.model.language_model.layers)


def test_compiled_parts_are_one_graph_each_for_packs_of_all_sizes(dense, stage, steps):
    counter = CompileCounterWithBackend("aot_eager")
    model = dense().train()
    optim.freeze(model, ALL)
    parallel.wrap(model, Parallel(compile=True, checkpointing="full"), precision="fp32", backend=counter)
    plain, sizes = dense().train(), set()
    for batch in (batch for batches in steps(2) for batch in batches):
        loss = loss_sum(model, batch, "fp32")
        loss.backward()
        assert torch.equal(loss, loss_sum(plain, batch, "fp32"))
        sizes.add((len(batch.ids_T), len(batch.tiles_N3SS)))
    assert len(sizes) == 8 and counter.frame_count == 4, "norm and MLP of two kinds of blocks"


def test_packs_joined_are_packs_apart(dense, steps):
    model, batches = dense().double(), steps(1)[0]
    apart = sum(loss_sum(model, batch, "fp32") for batch in batches)
    weighted = [replace(b, weights_R=torch.full((len(b.rows_R),), 0.5)) for b in batches]
    assert loss_sum(model, joined(batches), "fp32").item() == pytest.approx(apart.item(), rel=1e-13)
    assert loss_sum(model, joined(weighted), "fp32").item() == pytest.approx(apart.item() / 2, rel=1e-13)
    assert joined(batches[:1]) is batches[0]


def test_what_cannot_be_shared_is_said_with_its_numbers(stage, dense, sparse):
    assert plan.unshareable(stage(lanes=4, parallel=Parallel(replicas=2, experts=2)), 4) == []
    faults = plan.unshareable(stage(lanes=4, parallel=Parallel(replicas=2, experts=2)), 3)
    assert [path for path, _ in faults] == ["lanes", "parallel.replicas", "parallel.experts"]
    assert "4 lanes" in faults[0][1] and "3 processes" in faults[0][1]
    (fault,) = plan.unshareable(stage(lanes=6, parallel=Parallel(packs_per_forward=2)), 2)
    assert fault[0] == "parallel.packs_per_forward" and "3 packs" in fault[1]
    with pytest.raises(ConfigError, match="no experts"):
        parallel.wrap(dense(), Parallel(experts=2), precision="fp32")
    with pytest.raises(ConfigError, match="4 experts do not divide evenly"):
        parallel.wrap(sparse(), Parallel(experts=3), precision="fp32")


def test_every_parameter_of_a_trained_part_is_sharded_once(dense, stage, group):
    def run():
        model, optimizer = prepared(dense, stage(trains=("vit", "projector")), Parallel(), torch.float32)
        shares = {name: isinstance(p, DTensor) for part in ALL for name, p in part_parameters(model, part)}
        return shares, sum(p.to_local().numel() for p in optim.parameters(optimizer))

    found = group.together(2, run)
    shares = found[0][0]
    assert {name.split(".")[1] for name, is_shared in shares.items() if is_shared} == {
        "vision_tower", "multi_modal_projector"
    }  # fmt: skip
    model = dense()
    total = sum(p.numel() for part in ("vit", "projector") for _, p in part_parameters(model, part))
    assert sum(count for _, count in found) == total
