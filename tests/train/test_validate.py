from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from sailvl import dist
from sailvl.curriculum import Validation
from sailvl.train.loop import set_up
from sailvl.train.step import loss_sum, train_step
from sailvl.train.validate import held_out, held_out_loss
from sailvl.types import Mixture


@pytest.fixture
def validated(stage):
    """A stage with a validation of so many packs; other fields by keyword."""

    def made(packs=4, **changes):
        data = Mixture(shares={"samples": 1.0})
        return stage(validation=Validation(data=data, every=1, packs=packs), **changes)

    return made


@pytest.fixture
def state(validated, model, processor, sources):
    return set_up(validated(), model, processor, sources, workers=0)


def test_it_is_the_mean_over_the_supervised_tokens_of_all_packs(state, validated, sources, processor):
    held = held_out(validated(), sources, processor)
    assert len(held.packs) == 4 and all(held.counts)
    assert len({tuple(pack.ids_T.tolist()) for pack in held.packs}) == 4
    total, tokens = 0.0, 0
    for pack in held.packs:
        for begin, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
            chosen = (pack.rows_R >= begin) & (pack.rows_R < end)
            tiles = int((pack.ids_T[begin:end] == processor.image_token_id).sum()) // 4
            first = int((pack.ids_T[:begin] == processor.image_token_id).sum()) // 4
            with torch.no_grad():
                logits = state.model(
                    input_ids=pack.ids_T[None, begin:end], pixel_values=pack.tiles_N3SS[first : first + tiles]
                ).logits[0]
            total += float(cross_entropy(logits[pack.rows_R[chosen] - begin], pack.targets_R[chosen], reduction="sum"))
            tokens += int(chosen.sum())
    assert held_out_loss(state, held) == pytest.approx(total / tokens, rel=1e-5)
    assert state.held_out == (0, held_out_loss(state, held))


def test_the_packs_are_the_same_every_time_and_every_token_counts_alike(validated, sources, processor):
    first, again = (held_out(validated(), sources, processor) for _ in range(2))
    weighted = held_out(validated(weighting="sample", lanes=8), sources, processor)
    for a, b, c in zip(first.packs, again.packs, weighted.packs, strict=True):
        assert torch.equal(a.ids_T, b.ids_T) and torch.equal(a.tiles_N3SS, b.tiles_N3SS)
        assert torch.equal(a.ids_T, c.ids_T) and c.weights_R is None


def run(state, held, validating):
    losses = []
    for _ in range(4):
        batches = next(state.loader)
        losses.append(
            train_step(state.model, batches, state.optimizer, max_grad_norm=1.0, precision="fp32").values.tolist()
        )
        if validating:
            held_out_loss(state, held, loss_sum=drawing)
    return losses, [p.detach().clone() for p in state.model.parameters()], torch.rand(3)


def drawing(model, pack, precision):
    """As a model with dropout would, it draws random numbers."""
    torch.rand(5)
    assert not model.training and not torch.is_grad_enabled()
    return loss_sum(model, pack, precision)


def test_training_is_not_disturbed_by_a_bit(validated, assets, processor, sources):
    from sailvl.model.checkpoint import load

    results = []
    for validating in (False, True):
        state = set_up(validated(), load(assets / "model", dtype=torch.float32), processor, sources, workers=0)
        state.model.model.vision_tower.eval()  # a mode of its own
        results.append(run(state, held_out(validated(), sources, processor), validating))
        assert state.model.training and not state.model.model.vision_tower.training
        assert not any(module.training for module in state.model.model.vision_tower.modules())
        assert all(p.grad is None for p in state.model.parameters())
    (losses, weights, numbers), (again, same, repeated) = results
    assert losses == again and torch.equal(numbers, repeated)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_modes_and_generators_are_put_back_after_an_error(state, validated, sources, processor):
    held, before = held_out(validated(), sources, processor), torch.get_rng_state()

    def broken(*_):
        torch.rand(1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        held_out_loss(state, held, loss_sum=broken)
    assert state.model.training and torch.equal(torch.get_rng_state(), before) and state.held_out is None


def test_nothing_supervised_is_no_loss(state, validated, sources, processor):
    held = held_out(validated(1), sources, processor)
    bare = replace(held.packs[0], rows_R=held.packs[0].rows_R[:0], targets_R=held.packs[0].targets_R[:0])
    assert held_out_loss(state, replace(held, packs=(bare,))) is None and state.held_out is None


def test_a_stage_without_validation(stage, sources, processor):
    with pytest.raises(ValueError, match="tiny has no validation"):
        held_out(stage(), sources, processor)


def shared(states, assets, stage, processor, sources):
    """The loss, how often this process called the model, and which packs it counted. Every call meets the others."""
    state = states.make(assets, stage, processor, sources)
    calls = []

    def meeting(model, pack, precision):
        calls.append(pack.lane)
        if dist.world_size() > 1:
            distributed.barrier()
        with torch.no_grad():
            return torch.tensor(float(pack.ids_T.double().mean()) * len(pack.targets_R), dtype=torch.float64)

    held = held_out(stage, sources, processor)
    loss = held_out_loss(state, held, loss_sum=meeting)
    return loss, len(calls), [pack.lane for pack, counts in zip(held.packs, held.counts, strict=True) if counts]


@pytest.mark.parametrize(("size", "packs"), [(2, 4), (2, 5), (3, 2)])
def test_any_number_of_processes_share_the_packs(group, states, assets, validated, processor, sources, size, packs):
    stage = validated(packs, lanes=6)
    one = shared(states, assets, stage, processor, sources)
    results = group.together(size, shared, states, assets, stage, processor, sources)
    assert {calls for _, calls, _ in results} == {-(-packs // size)}
    assert sorted(lane for _, _, lanes in results for lane in lanes) == list(range(packs))
    assert all(loss == results[0][0] for loss, _, _ in results)
    assert results[0][0] == pytest.approx(one[0], rel=1e-14)


def sharded(assets, stage, processor, sources):
    from sailvl.model.checkpoint import load
    from sailvl.train import optim, parallel, schedule
    from sailvl.train.state import TrainState

    model = load(assets / "model", dtype=torch.float64)
    optim.freeze(model, stage.trains)
    parallel.wrap(model, stage.parallel, precision="fp32")
    state = TrainState(
        model=model, optimizer=optim.build(model, stage), schedule=schedule.build(stage.schedule, 8), loader=None,
        precision="fp32",
    )  # fmt: skip
    held = held_out(stage, sources, processor)
    first = held_out_loss(state, held)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return first, held_out_loss(state, held)


def test_sharded_weights_are_seen_as_they_are_now(group, assets, validated, processor, sources):
    one = sharded(assets, validated(), processor, sources)
    assert one[0] != one[1]
    for found in group.together(2, sharded, assets, validated(), processor, sources):
        assert found == pytest.approx(one, rel=1e-12)
