"""Planning: parameters equal real models', activations what autograd keeps, a whole step what it was measured to need.

The last one runs a case of the benchmark in a process of its own, with a bound wider than the benchmark's.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl.config import ConfigError
from sailvl.curriculum import AdaLRS, Checkpoint, Constant, Curriculum, Fresh, Jsonl, Lora, Parallel, Train
from sailvl.model import SailVLForConditionalGeneration, checkpoint
from sailvl.run import fresh_model
from sailvl.train import activations, memory, optim, plan
from sailvl.train.flops import Shape, mfu, step_flops
from sailvl.train.hardware import GPUS, recognise
from sailvl.train.memory import parameters, step_memory
from sailvl.types import Mixture

PARTS = ("vit", "projector", "lm")
ROOT = Path(__file__).parents[2]
STAGE = Train(
    name="tune", data=Mixture(shares={"mine": 1.0}), trains=PARTS, steps=1000, lanes=64, max_tokens=8192, max_tiles=32,
    lr=1e-5, schedule=Constant(),
)  # fmt: skip
PACK = Shape(lengths=(1200,) * 6 + (992,), num_tiles=16, num_supervised=2048)


def curriculum(model, **changes):
    return Curriculum(name="c", model=model, sources={"mine": Jsonl(path="x")}, stages=(replace(STAGE, **changes),))


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", checkpoint.SIZES)
def test_parameters_are_those_of_the_real_model(size):
    config = checkpoint.config_for(size)
    with torch.device("meta"):
        model = SailVLForConditionalGeneration._from_config(config)
    real = {part: sum(p.numel() for _, p in checkpoint.part_parameters(model, part)) for part in PARTS}
    assert parameters(config) == real == parameters(plan.released(size))


@pytest.mark.parametrize("size", ["nano", "nano-moe"])
def test_a_fresh_model_has_the_tokenizers_vocabulary(size):
    model = fresh_model(Fresh(size=size, side=56))[0]
    config = plan.dims(curriculum(Fresh(size=size, side=56)))
    assert sum(parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", ["nano", "nano-moe"])
def test_a_saved_folder_is_read_without_loading_it(tmp_path, size):
    config = checkpoint.config_for(size, select_layer=-2, side=56)
    model = checkpoint.build(config, seed=0)
    checkpoint.save(model, None, tmp_path / "model")
    found = plan.dims(curriculum(Checkpoint(path=str(tmp_path / "model"))))
    assert parameters(found) == parameters(config)
    assert step_flops(found, [PACK], PARTS) == step_flops(config, [PACK], PARTS)


def test_folders_that_say_too_little_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no model folder here"):
        plan.dims(curriculum(Checkpoint(path=str(tmp_path))))
    values = {"vision_config": {}, "llm_config": {"hidden_size": 8, "num_attention_heads": 2}}
    for text in ("{", json.dumps(values), "[]", json.dumps({"text_config": 3})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json: cannot be read as a SAIL-VL2 configuration"):
            plan.dims(curriculum(Checkpoint(path=str(tmp_path))))
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        plan.dims(curriculum(Fresh(tokenizer=str(tmp_path / "none.json"))))


@pytest.mark.parametrize("trains", [PARTS, ("lm",), ("vit", "projector")])
def test_adapters_have_as_many_parameters_as_peft_makes(trains):
    from sailvl.model import lora

    pytest.importorskip("peft")
    config = checkpoint.config_for("nano", side=56)
    model = checkpoint.build(config, seed=0)
    lora.attach(model, trains, rank=4, alpha=8, seed=0)
    real = sum(p.numel() for name, p in model.named_parameters() if lora.is_adapter(name))
    assert memory.adapters(config, trains, 4) == real


# ---- activations ----------------------------------------------------------------------------------------------------


def kept_by_blocks(config, trains, precision, lengths, tiles):
    """Bytes that autograd keeps in each part's last block, weights and their copies in bf16 left out."""
    model = checkpoint.build(config, seed=0)
    if precision == "bf16":
        model.bfloat16()
    optim.freeze(model, trains)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {
        shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[:-2]) + tuple(p.shape[:-3:-1]))
    }
    where, seen, total = ["elsewhere"], {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in weights or (
            precision == "autocast" and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        )
        if storage.data_ptr() not in seen and not is_weight:
            seen[storage.data_ptr()] = tensor
            total[where[0]] = total.get(where[0], 0) + storage.nbytes()
        return tensor

    def mark(module, name):
        module.register_forward_pre_hook(lambda *_: where.__setitem__(0, name))
        module.register_forward_hook(lambda *_: where.__setitem__(0, "elsewhere"))

    mark(model.model.vision_tower.trunk.blocks[-1], "vit")
    mark(model.model.language_model.layers[-1], "lm")
    tokens = sum(lengths)
    ids = torch.arange(tokens) % 100
    ids[: tiles * config.tokens_per_tile] = config.image_token_id
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    side = config.vision_config.image_size
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        model.model(
            input_ids=ids[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            pixel_values=torch.zeros(tiles, 3, side, side, dtype=model.dtype), cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets, max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False,
        )  # fmt: skip
    return total


@pytest.mark.parametrize("size", ["nano", "nano-moe"])
@pytest.mark.parametrize("trains", [PARTS, ("projector",)])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_block_keeps_what_is_said(size, trains, precision):
    # Long documents and tiles, so that attention is a fused kernel also in bf16.
    config = checkpoint.config_for(size, side=280)
    real = kept_by_blocks(config, trains, precision, (300, 420), 1)
    said = activations.lm_activations(config, trains="lm" in trains, precision=precision, sparse=size == "nano-moe")
    assert 720 * said == pytest.approx(real["lm"], rel=0.10 if size == "nano-moe" else 0.01)
    if "vit" in trains:
        said = activations.vit_activations(config, precision=precision)
        assert 400 * said == pytest.approx(real["vit"], rel=0.01)
    else:
        assert "vit" not in real


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_states_of_8b_on_8_gpus_are_16_bytes_a_parameter_shared_by_8():
    config = plan.released("8b")
    found = step_memory(config, PACK, STAGE, bf16=True, processes=8)
    count = sum(parameters(config).values())
    assert found.weights + found.gradients + found.optimizer == pytest.approx(16 * count / 8, rel=1e-6)
    assert found.weights + found.gradients + found.optimizer == pytest.approx(17.8e9, rel=0.01)
    held = replace(STAGE, parallel=Parallel(offload=True))
    offloaded = step_memory(config, PACK, held, bf16=True, processes=8)
    assert offloaded.host == pytest.approx(16 * count / 8, rel=1e-6)
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)


def test_frozen_weights_are_whole_in_bf16_and_a_projectors_states_are_small():
    config = plan.released("8b")
    found = step_memory(config, PACK, replace(STAGE, trains=("projector",)), bf16=True, processes=8)
    assert found.weights == pytest.approx(2 * (sum(parameters(config).values())), rel=0.01)
    assert found.optimizer < 1e8


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(["2b", "8b", "30b-a3b"]),
    gpus=st.sampled_from([2, 4, 8, 16, 64]),
    trains=st.sampled_from([PARTS, ("lm",), ("projector",), ("vit", "projector")]),
    bf16=st.booleans(),
)
def test_what_saves_memory_saves_memory(size, gpus, trains, bf16):
    config, stage = plan.released(size), replace(STAGE, trains=trains)

    def total(gpus=gpus, **changes):
        own = replace(stage, parallel=Parallel(**changes))
        return step_memory(config, PACK, own, bf16=bf16, processes=gpus).total

    plain = total()
    assert total(gpus=2 * gpus) <= plain <= total(shard="zero2")
    assert total(checkpointing="full") <= total(checkpointing="selective") <= plain
    assert total(offload=True) <= plain <= total(replicas=2) <= total(packs_per_forward=2, replicas=2)


def test_a_snapshot_lies_in_host_memory_and_an_average_beside_the_weights():
    config = plan.released("2b")
    plain = step_memory(config, PACK, STAGE, bf16=True, processes=8)
    more = replace(STAGE, schedule=AdaLRS(), ema=0.999)
    found = step_memory(config, PACK, more, bf16=True, processes=8)
    count = sum(parameters(config).values())
    assert found.host - plain.host == pytest.approx(12 * count / 8, rel=1e-6)
    assert found.total - plain.total == found.ema == pytest.approx(4 * count / 8, rel=1e-6)


def test_adapters_need_no_states_for_the_weights_beside_them():
    config = plan.released("8b")
    found = step_memory(
        config, PACK, replace(STAGE, trains=("lm",), lora=Lora(rank=16, alpha=32)), bf16=True, processes=1
    )
    assert found.optimizer < 5e8 and found.weights == pytest.approx(4 * sum(parameters(config).values()), rel=0.01)


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_days_follow_from_flops_and_peak():
    config = plan.released("2b")
    found = plan.cost(config, STAGE, 8, GPUS["h100"], 0.5)
    shape = Shape(lengths=(1200,) * 6 + (992,), num_tiles=16, num_supervised=2048)
    assert found.flops == 64 * step_flops(config, [shape], PARTS)
    assert found.days == pytest.approx(1000 * found.flops / (8 * 989.4e12 * 0.5) / 86400)
    assert mfu(found.flops, found.step_seconds, 8, GPUS["h100"].flops) == pytest.approx(0.5)
    assert mfu(1.0, 1.0, 1, None) is None and mfu(1.0, 0.0, 1, 1.0) is None


def test_advice_is_followed_and_then_fits():
    config = plan.released("8b")
    found = plan.cost(config, STAGE, 8, GPUS["h100"], 0.4)
    assert not found.fits and found.advice.startswith("Fits with parallel.checkpointing=full:")
    fixed = replace(STAGE, parallel=Parallel(checkpointing="full"))
    assert plan.cost(config, fixed, 8, GPUS["h100"], 0.4).advice == ""
    assert plan.cost(config, fixed, 8, GPUS["h100"], 0.4).fits
    small = plan.cost(config, fixed, 2, GPUS["a100-40"], 0.4).advice
    assert "offload=true" in small and "GB of host memory each" in small
    assert "lora" in plan.cost(config, STAGE, 1, GPUS["rtx4090"], 0.4).advice
    assert "lanes=72" in plan.cost(config, STAGE, 24, GPUS["h100"], 0.4).advice


def test_traffic_is_two_gathers_of_bf16_and_one_sum_of_fp32_a_pass():
    config = plan.released("8b")
    found = plan.cost(config, STAGE, 8, GPUS["h100"], 0.4)
    count = sum(parameters(config).values())
    assert found.traffic == pytest.approx(8 * (7 / 8) * 8 * count, rel=1e-6)  # 8 passes of 8 bytes a parameter
    assert plan.cost(config, STAGE, 1, GPUS["h100"], 0.4).traffic == 0
    across, within = (plan.cost(config, STAGE, gpus, GPUS["h100"], 0.4).traffic_share for gpus in (16, 8))
    assert across > 5 * within


# ---- hardware -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"), ("NVIDIA B200", "b200"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA A10", "a10"),
        ("NVIDIA RTX A6000", "a6000"), ("NVIDIA GH200 480GB", "gh200"), ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A800-SXM4-80GB", "a800-80"), ("NVIDIA H800", "h800"),
    ],
)  # fmt: skip
def test_known_gpus_are_recognised(name, kind):
    assert recognise(name) is GPUS[kind]


@pytest.mark.parametrize(
    "name",
    [
        "", "cpu", "Intel(R) Xeon(R)", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GB200", "Tesla V100-SXM2-16GB", "NVIDIA H100 NVL",
    ],
)  # fmt: skip
def test_others_are_unknown_rather_than_wrong(name):
    assert recognise(name) is None


def test_facts_are_plausible():
    for gpu in GPUS.values():
        assert 1e14 < gpu.flops < 1e16 and 20 <= gpu.memory <= 300 and gpu.link < gpu.bandwidth
        # A GPU has some hundreds of operations for every byte it reads: a wrong unit is off by more.
        assert 30 < gpu.flops / (gpu.bandwidth * 1e9) < 800


# ---- against a measurement ------------------------------------------------------------------------------------------


def test_planning_needs_neither_torch_nor_transformers():
    code = "import sys, sailvl.train.plan; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_measured_step_is_near_its_plan():
    benchmark = importlib.import_module("benchmarks.memory")
    case = {"size": "nano", "trains": list(PARTS), "precision": "fp32", "checkpointing": "none"}
    found = benchmark.measure({**case, "lengths": [500, 524], "tiles": 3})
    assert found["planned"] == pytest.approx(found["measured"], rel=0.2)
