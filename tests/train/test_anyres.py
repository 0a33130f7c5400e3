"""The nano model of any resolution goes through the loader, the loop and the FLOP count as the fixed one does."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sailvl.train.loop as loop
from sailvl import log
from sailvl.curriculum import Fresh
from sailvl.data.loader import Loader
from sailvl.data.source import JsonlSource
from sailvl.geometry import AnyRes
from sailvl.model import checkpoint as model_checkpoint
from sailvl.model.processing import build_processor
from sailvl.run import fresh_model
from sailvl.train import checkpoint, optim
from sailvl.train.flops import Shape, shape_of, step_flops
from sailvl.train.loop import train
from sailvl.train.state import count_step
from sailvl.train.step import loss_sum, train_step

PARTS = ("vit", "projector", "lm")


@pytest.fixture(scope="module")
def any_processor(assets):
    return build_processor(assets / "tokenizer.json", tiling=AnyRes(side=56, max_side=112))


@pytest.fixture
def any_model(assets):
    return model_checkpoint.anyres_from_fixed(model_checkpoint.load(assets / "model", dtype=torch.float32))


@pytest.fixture
def any_batches(sources, any_processor):
    return next(loader(sources, any_processor))


def loader(sources, processor, **changes):
    terms = {"max_tokens": 256, "max_tiles": 8, "lanes": 2, "seed": 0, **changes}
    return Loader(sources, {"samples": 1.0}, processor, **terms)


def test_batches_hold_patches_and_grids(sources, any_processor):
    shapes = set()
    for _, step in zip(range(10), loader(sources, any_processor), strict=False):
        for batch in step:
            assert batch.tiles_N3SS.shape[1:] == (3, 14, 14) and not batch.rejects
            assert len(batch.tiles_N3SS) == int(batch.grids_N2.prod(1).sum())
            tokens = (batch.ids_T == any_processor.image_token_id).sum()
            assert tokens == len(batch.tiles_N3SS) // 4
            assert batch.num_tiles == sum(-(-r * c // 16) for r, c in batch.grids_N2.tolist()) <= 8
            shapes |= {tuple(grid) for grid in batch.grids_N2.tolist()}
            counts = count_step([batch], 1.0, 1.0, 1, seconds=1.0)
            assert counts.tiles == batch.num_tiles
    assert len(shapes) > 5, "pictures of many shapes share the batches"


def test_a_broken_picture_keeps_its_slot(assets, any_processor, tmp_path):
    """The plan is made from headers; the blank that takes a broken picture's place has the planned sizes."""
    for path in [*assets.glob("*.png"), assets / "data.jsonl"]:
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == "2-0.png" else content)
    broken = loader({"samples": JsonlSource(tmp_path / "data.jsonl", "samples")}, any_processor)
    whole = loader({"samples": JsonlSource(assets / "data.jsonl", "samples")}, any_processor)
    masked = 0
    for _, now, was in zip(range(20), broken, whole, strict=False):
        for damaged, intact in zip(now, was, strict=True):
            assert len(damaged.ids_T) == len(intact.ids_T) and damaged.num_tiles == intact.num_tiles
            assert torch.equal(damaged.cu_seqlens, intact.cu_seqlens)
            assert (damaged.ids_T == any_processor.image_token_id).sum() == len(damaged.tiles_N3SS) // 4
            masked += len(damaged.rejects)
    assert masked


def test_a_packed_step_equals_its_pictures_one_by_one(any_model, any_batches):
    """Documents alone, in fp64: neither attention lets pictures or documents see each other."""
    any_model.double()
    batch = next(batch for batch in any_batches if len(batch.grids_N2) > 2)
    packed = loss_sum(any_model, batch, "fp32")
    patches = batch.tiles_N3SS.double().split(batch.grids_N2.prod(1).tolist())
    features = [
        any_model.get_image_features(part, image_grid_hw=grid[None]).pooler_output
        for part, grid in zip(patches, batch.grids_N2, strict=True)
    ]
    tokens = iter(torch.cat(features).split(1))
    total = 0.0
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.ids_T[begin:end]
        count = int((ids == any_model.config.image_token_id).sum())
        seen = torch.cat([next(tokens) for _ in range(count)]) if count else None
        logits = any_model(ids[None], image_features=seen).logits[0]
        inside = (batch.rows_R >= begin) & (batch.rows_R < end)
        rows, targets = batch.rows_R[inside] - begin, batch.targets_R[inside]
        total += torch.nn.functional.cross_entropy(logits[rows], targets, reduction="sum").item()
    assert packed.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("trains", [PARTS, ("projector",), ("vit",), ("projector", "lm")])
@pytest.mark.parametrize("select_layer", [-1, -2])
def test_flops_equal_the_counter(any_model, any_batches, stage, trains, select_layer):
    any_model.config.select_layer = select_layer
    optim.freeze(any_model, trains)
    optimizer = optim.build(any_model, stage(trains=trains))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(any_model, any_batches, optimizer, max_grad_norm=1.0, precision="fp32")
    shapes = [shape_of(batch) for batch in any_batches]
    assert step_flops(any_model.config, shapes, trains, square_attention=True) == counter.get_total_flops()


def test_flops_of_pictures_of_a_tiles_size_are_those_of_tiles():
    config = model_checkpoint.config_for("2b-anyres")
    tiles = Shape(lengths=(1200,), num_tiles=4, num_supervised=100)
    pictures = Shape(lengths=(1200,), num_tiles=4, num_supervised=100, grids=((32, 32),) * 4)
    assert step_flops(config, [tiles], PARTS) == step_flops(config, [pictures], PARTS)
    one = Shape(lengths=(1200,), num_tiles=4, num_supervised=100, grids=((64, 64),))
    assert step_flops(config, [one], PARTS) > step_flops(config, [tiles], PARTS), "attention within one large picture"


def test_it_trains_stops_and_resumes_bit_for_bit(assets, any_processor, sources, stage, tmp_path, monkeypatch):
    def run(out, workers=0):
        model = model_checkpoint.anyres_from_fixed(model_checkpoint.load(assets / "model", dtype=torch.float32))
        return train(stage(steps=12), model, any_processor, sources, out, workers=workers)

    whole = run(tmp_path / "whole")
    losses = [row["loss"] for row in log.read(tmp_path / "whole" / "metrics.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    assert whole.totals.tiles > 0 and whole.totals.rejects == 0

    real, done = loop.train_step, iter(range(100))

    def interrupted(*args, **kwargs):
        if next(done) == 5:
            raise RuntimeError("pulled the plug")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path / "halves")
    monkeypatch.undo()
    run(tmp_path / "halves", workers=1)
    assert [row["loss"] for row in log.read(tmp_path / "halves" / "metrics.jsonl")] == losses
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = model_checkpoint.load(assets / "model").state_dict()["model.vision_tower.preprocessor.pos_embed"]
    assert not torch.equal(weights[0]["vision_model.preprocessor.pos_embed"], start), "the table is trained through"
    assert checkpoint.newest(tmp_path / "halves" / "checkpoints") is not None
    loaded = model_checkpoint.load(tmp_path / "whole" / "model")
    assert loaded.config.vision_config.any_resolution


def test_a_step_without_pictures_gives_the_encoder_zero_gradients(any_model, any_batches):
    """Every process of a group does the same work, whatever its batch holds."""
    batch = any_batches[0]
    image = any_model.config.image_token_id
    text = replace(
        batch,
        ids_T=torch.where(batch.ids_T == image, 0, batch.ids_T),
        tiles_N3SS=batch.tiles_N3SS[:0],
        grids_N2=batch.grids_N2[:0],
    )
    loss_sum(any_model, text, "fp32").backward()
    tower = any_model.model.vision_tower
    assert all(weight.grad is not None and not weight.grad.any() for weight in tower.parameters())


def test_bf16_autocast_trains(any_model, any_batches, stage):
    optim.freeze(any_model, PARTS)
    optimizer = optim.build(any_model, stage(trains=PARTS))
    result = train_step(any_model, any_batches, optimizer, max_grad_norm=1.0, precision="bf16")
    with torch.no_grad():
        losses = [
            float(loss_sum(any_model, batch, precision)) for batch in any_batches for precision in ("fp32", "bf16")
        ]
    assert torch.isfinite(result.values).all()
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[2] == pytest.approx(losses[3], rel=0.02)


def test_a_recipe_can_name_it():
    model, processor = fresh_model(Fresh(size="nano-anyres", max_tiles=6))
    assert processor.image_processor.tiling == AnyRes(side=112, max_side=448, max_tiles=6)
    assert model.config.vision_config.any_resolution and model.config.vision_config.image_size == 112
    assert model.config.image_token_id == processor.image_token_id
