import copy

import pytest
import torch

from sailvl.train import ema, optim
from sailvl.train.loop import set_up
from sailvl.train.state import Counts, count_step, roll_back, take_snapshot
from sailvl.train.step import train_step


@pytest.fixture
def state(stage, model, processor, sources):
    made = set_up(stage(), model, processor, sources, workers=0)
    advance(made, 2)
    return made


def advance(state, steps, lr=1e-3):
    losses = []
    for _ in range(steps):
        optim.set_lr(state.optimizer, lr)
        result = train_step(state.model, next(state.loader), state.optimizer, max_grad_norm=1.0, precision="fp32")
        losses.append(result.values.tolist())
        state.step += 1
    return losses


def bits(state):
    weights = [p.detach().clone() for p in state.model.parameters()]
    return weights + [v.clone() for s in state.optimizer.state.values() for v in s.values()] + [torch.get_rng_state()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rolling_back_restores_weights_moments_step_counts_and_generators(state):
    before = bits(state)
    state.snapshot = take_snapshot(state)
    torch.rand(5)
    advance(state, 3, lr=1.0)
    changed = [not torch.equal(a, b) for a, b in zip(before, bits(state), strict=True)]
    assert all(changed), "a test in which nothing had changed would prove nothing"
    assert roll_back(state, rewind=False) == 3
    assert equal(before, bits(state)) and state.snapshot is None
    assert {float(s["step"]) for s in state.optimizer.state.values()} == {2.0}
    assert state.step == 5, "the step counter runs on"


def test_a_rewound_run_repeats_itself_bit_for_bit(state):
    state.snapshot = take_snapshot(state)
    losses = advance(state, 4)
    after = bits(state)
    assert roll_back(state, rewind=True) == 4 and state.step == 2
    assert advance(state, 4) == losses and equal(after, bits(state))


def test_without_rewind_the_data_runs_on(state):
    state.snapshot = take_snapshot(state)
    first = advance(state, 2)
    roll_back(state, rewind=False)
    assert advance(state, 2) != first


def test_two_rollbacks_in_a_row_do_not_share_memory_with_the_live_state(state):
    for _ in range(2):
        before = bits(state)
        state.snapshot = take_snapshot(state)
        advance(state, 1, lr=1.0)
        roll_back(state, rewind=False)
        assert equal(before, bits(state))


def test_a_snapshot_holds_trained_weights_only(stage, model, processor, sources):
    made = set_up(stage(trains=("projector",)), model, processor, sources, workers=0)
    advance(made, 1)
    assert all("projector" in name for name in take_snapshot(made).weights)


def test_a_rollback_without_snapshot_is_an_error(state):
    with pytest.raises(RuntimeError, match="no snapshot"):
        roll_back(state, rewind=False)


def test_counts(batches):
    one = count_step(batches, 2.0, 1.0, 10, seconds=0.5)
    assert one.samples == sum(len(b.cu_seqlens) - 1 for b in batches) and one.loss == 2.0
    bad = count_step(batches, float("nan"), 1.0, 10, seconds=0.5)
    assert (bad.loss, bad.supervised_tokens, bad.skipped_updates, bad.tokens) == (None, 0, 1, one.tokens)
    total = Counts()
    for counts in (one, bad, count_step(batches, 5.0, 1.0, 20, seconds=1.0)):
        total.add(copy.copy(counts))
    assert (total.loss, total.seconds, total.supervised_tokens) == (4.0, 2.0, 30)


def test_host_buffers_are_made_once(state):
    first = take_snapshot(state)
    places = {name: buffer.data_ptr() for name, buffer in state.host.items()}
    advance(state, 1)
    second = take_snapshot(state)
    assert places == {name: buffer.data_ptr() for name, buffer in state.host.items()}
    assert all(value.data_ptr() == first.weights[name].data_ptr() for name, value in second.weights.items())
    before = bits(state)
    state.snapshot = second
    advance(state, 1, lr=1.0)
    roll_back(state, rewind=False)
    assert equal(before, bits(state))


def test_the_average_and_the_counts_of_experts_go_back_too(state):
    state.ema, state.expert_counts = ema.start(state.model, 0.9), torch.arange(4)
    advance(state, 1)
    ema.update(state.ema, state.model)
    before = {name: value.clone() for name, value in state.ema.weights.items()}
    state.snapshot = take_snapshot(state)
    advance(state, 1)
    ema.update(state.ema, state.model)
    state.expert_counts = state.expert_counts + 1
    assert not equal(before.values(), state.ema.weights.values())
    roll_back(state, rewind=True)
    assert equal(before.values(), state.ema.weights.values()) and state.ema.updates == 1
    assert torch.equal(state.expert_counts, torch.arange(4))


def test_a_snapshot_from_before_the_first_step(stage, model, processor, sources):
    made = set_up(stage(), model, processor, sources, workers=0)
    made.snapshot = take_snapshot(made)
    losses = advance(made, 2)
    roll_back(made, rewind=True)
    assert not made.optimizer.state and advance(made, 2) == losses


def there_and_back(states, assets, stage, processor, sources):
    state = states.make(assets, stage(ema=0.9), processor, sources)
    found = []
    for _ in range(2):  # the second time over the same buffers
        states.move(state)
        before = states.digests(state)
        state.snapshot = take_snapshot(state)
        states.move(state, 2)
        moved = states.digests(state)
        roll_back(state, rewind=False)
        found.append((states.digests(state) == before, all(moved[name] != before[name] for name in before)))
    sizes = sum(buffer.numel() for name, buffer in state.host.items() if name.startswith("snapshot.weights"))
    return found, sizes


def test_each_process_copies_its_shard_and_goes_back_bit_for_bit(group, states, assets, stage, processor, sources):
    results = group.together(2, there_and_back, states, assets, stage, processor, sources)
    assert all(found == [(True, True)] * 2 for found, _ in results)
    whole = there_and_back(states, assets, stage, processor, sources)[1]
    assert sum(size for _, size in results) == whole, "no weight is copied twice"
