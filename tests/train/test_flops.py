"""The closed form against torch's counter, under the conditions in which the counter sees everything."""

from itertools import combinations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sailvl.model import checkpoint
from sailvl.train import optim
from sailvl.train.flops import Shape, shape_of, step_flops
from sailvl.train.step import train_step

PARTS = ("vit", "projector", "lm")
SETS = [chosen for size in (1, 2, 3) for chosen in combinations(PARTS, size)]


@pytest.mark.parametrize("trains", SETS)
def test_equal_to_the_counter_for_every_set_of_trained_parts(model, batches, stage, trains):
    optim.freeze(model, trains)
    optimizer = optim.build(model, stage(trains=trains))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    shapes = [shape_of(batch) for batch in batches]
    assert step_flops(model.config, shapes, trains, square_attention=True) == counter.get_total_flops()


def test_an_earlier_feature_layer_runs_fewer_blocks(tiny_config, batches, stage):
    config = tiny_config(select_layer=-2)
    model = checkpoint.build(config, seed=0)
    optim.freeze(model, ("projector",))
    optimizer = optim.build(model, stage(trains=("projector",)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    shapes = [shape_of(batch) for batch in batches]
    assert step_flops(config, shapes, ("projector",), square_attention=True) == counter.get_total_flops()


def test_causal_attention_is_half_of_the_square(model):
    shape = Shape(lengths=(10, 30), num_tiles=0, num_supervised=5)
    text = model.config.text_config
    square = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * (10**2 + 30**2) * 3
    full, half = (step_flops(model.config, [shape], PARTS, square_attention=value) for value in (True, False))
    assert full - half == square // 2


def test_the_released_2b_shape():
    """A pack of 8,192 tokens, half of them image tokens, documents of 1,200, a quarter supervised: about 151 TFLOP."""
    shape = Shape(lengths=(1200,) * 6 + (992,), num_tiles=16, num_supervised=2048)
    config = checkpoint.config_for("2b")
    assert step_flops(config, [shape], PARTS) == pytest.approx(151e12, rel=0.02)
    assert step_flops(config, [shape], ("projector",)) == pytest.approx(76e12, rel=0.02)


def test_shape_of_a_batch(batches):
    shape = shape_of(batches[0])
    assert sum(shape.lengths) == len(batches[0].ids_T) and len(shape.lengths) == batches[0].num_samples
    assert (shape.num_tiles, shape.num_supervised) == (len(batches[0].tiles_N3SS), len(batches[0].rows_R))
    assert torch.equal(batches[0].cu_seqlens[1:], torch.tensor(shape.lengths).cumsum(0).int())
