import hashlib

import pytest
import torch

from sailvl.train import ema, optim
from sailvl.train.export import export
from sailvl.train.shards import named_parameters


def drift(model, step):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.sin(parameter * 7 + step))


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_it_is_the_warmed_up_average_of_the_trained_weights(model, decay):
    optim.freeze(model, ("projector", "lm"))
    average = ema.start(model, decay)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert average.weights.keys() == trained and "lm_head.weight" not in trained
    expected = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    for t in range(1, 40):
        drift(model, t)
        ema.update(average, model)
        d = min(decay, (1 + t) / (10 + t))
        for name, p in model.named_parameters():
            if name in expected:
                expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    assert average.updates == 39
    for name, value in average.weights.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_averages_of_half_precision_weights_are_fp32(model):
    model.bfloat16()
    average = ema.start(model, 0.999)
    assert all(value.dtype == torch.float32 for value in average.weights.values())


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_that_is_none(model, decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ema.start(model, decay)


def test_swapped_the_model_has_the_average_and_then_its_own_bits(model):
    optim.freeze(model, ("projector",))
    average = ema.start(model, 0.5)
    drift(model, 1)
    ema.update(average, model)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: value.clone() for name, value in average.weights.items()}
    with pytest.raises(KeyboardInterrupt), ema.swapped(average, model):
        for name, p in model.named_parameters():
            assert torch.equal(p, kept.get(name, own[name]))
            assert name not in kept or not torch.equal(p, own[name])
        raise KeyboardInterrupt
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in average.weights.items())


def averaged(states, assets, stage, processor, sources, out):
    """Bytes of the exported average after weights that do not depend on how they are spread."""
    state = states.make(assets, stage(ema=0.9, lanes=6), processor, sources, dtype=torch.float32)
    for t in range(5):
        for name, p in named_parameters(state.model):
            seed = int(hashlib.sha256(f"{name}{t}".encode()).hexdigest()[:8], 16)
            with torch.no_grad():
                p.mul_(1 + seed / 2**32)
        ema.update(state.ema, state.model)
    with ema.swapped(state.ema, state.model):
        export(state.model, processor, out)
    return states.digests(state)


def test_sharded_it_is_the_same_bit_for_bit(group, states, assets, stage, processor, sources, tmp_path):
    one = averaged(states, assets, stage, processor, sources, tmp_path / "one" / "ema")
    for size in (2, 3):
        out = tmp_path / str(size) / "ema"
        every = group.together(size, averaged, states, assets, stage, processor, sources, out)
        assert all(each == one for each in every)
        assert {f.name: f.read_bytes() for f in out.iterdir()} == {
            f.name: f.read_bytes() for f in (tmp_path / "one" / "ema").iterdir()
        }
