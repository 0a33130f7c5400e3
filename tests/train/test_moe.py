"""A model with experts trains through the same loop: learns, resumes bit for bit, freezes by parts, counts its work."""

import os
import signal
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import sailvl.train.loop as loop
from sailvl import log
from sailvl.curriculum import Fresh
from sailvl.model import SailVLMoeForConditionalGeneration, checkpoint, moe
from sailvl.train import optim
from sailvl.train.flops import Shape, shape_of, step_flops
from sailvl.train.loop import train
from sailvl.train.step import loss_sum, train_step

PARTS = ("vit", "projector", "lm")
SETS = [chosen for size in (1, 2, 3) for chosen in combinations(PARTS, size)]
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LM = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 4, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def build(processor):
    """Makes a small sparse model; keyword arguments change its language model."""

    def build(**lm):
        config = checkpoint.config_for("nano-moe", processor=processor, vit=VIT, lm={**LM, **lm})
        return checkpoint.build(config, seed=0)

    return build


@pytest.fixture
def run(build, stage, processor, sources):
    def run(out, **changes):
        return train(stage(**changes), build(), processor, sources, out)

    return run


def test_a_run_learns_and_leaves_a_sparse_model(run, build, tmp_path):
    result = run(tmp_path, steps=30, lanes=1)
    losses = [row["loss"] for row in log.read(tmp_path / "metrics.jsonl")]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
    trained = AutoModelForImageTextToText.from_pretrained(result.model)
    assert type(trained) is SailVLMoeForConditionalGeneration
    before, after = (dict(model.named_parameters()) for model in (build(), trained))
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        name = f"model.language_model.layers.1.mlp.{name}"
        assert (before[name] != after[name]).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_continued_is_never_stopped(run, tmp_path, monkeypatch, precision):
    run(tmp_path / "whole", steps=6, precision=precision)
    steps, step = iter(range(1, 100)), loop.train_step

    def interrupted(*args, **kwargs):
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", steps=6, precision=precision)
    monkeypatch.undo()
    run(tmp_path / "halves", steps=6, precision=precision)
    whole, halves = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize("trains", SETS)
def test_only_the_chosen_parts_move(build, batches, stage, trains):
    model = build()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optim.freeze(model, trains)
    optimizer = optim.build(model, stage(trains=trains))
    for _ in range(2):
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    for part in PARTS:
        moved = [name for name, value in checkpoint.part_parameters(model, part) if (value != before[name]).any()]
        assert bool(moved) == (part in trains), part
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    routers = [block.gate.weight for block in moe.sparse_layers(model).values()]
    assert all((id(router) in decayed) == ("lm" in trains) for router in routers)


def test_no_router_logits_and_no_balance_loss(build, batches):
    """The loss is the cross-entropy alone, whatever the released configuration asks for."""
    model, asked = build(), build(output_router_logits=True, router_aux_loss_coef=1.0)
    with torch.no_grad():
        losses = [loss_sum(one, batches[0], "fp32") for one in (model, asked)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("trains", SETS)
@pytest.mark.parametrize("fields", [{}, {"num_experts": 5, "num_experts_per_tok": 3, "mlp_only_layers": [0]}])
def test_flops_equal_the_counter(build, batches, stage, trains, fields):
    """With experts in a loop, which the counter sees; it counts a grouped product as nothing."""
    model = build(**fields)
    model.set_experts_implementation("eager")
    optim.freeze(model, trains)
    optimizer = optim.build(model, stage(trains=trains))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    shapes = [shape_of(batch) for batch in batches]
    assert step_flops(model.config, shapes, trains, square_attention=True) == counter.get_total_flops()


def test_flops_of_the_sparse_30b_shape():
    """8,192 tokens, half of them image tokens, documents of 1,200, a quarter supervised: about 224 TFLOP."""
    shape = Shape(lengths=(1200,) * 6 + (992,), num_tiles=16, num_supervised=2048)
    config = checkpoint.config_for("30b-a3b")
    assert step_flops(config, [shape], PARTS) == pytest.approx(224e12, rel=0.02)
    assert step_flops(config, [shape], ("projector",)) == pytest.approx(125e12, rel=0.03)


@pytest.mark.parametrize("size", ["nano-moe", "16b-a2.5b", "30b-a3b"])
def test_a_curriculum_may_start_from_every_sparse_size(size):
    assert Fresh(size=size).size in checkpoint.SIZES
