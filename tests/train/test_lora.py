"""Learning through adapters: the same loop, the base untouched, and a stage that leaves model and adapter behind."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import sailvl.train.loop as loop
from sailvl import log
from sailvl.config import ConfigError, load
from sailvl.curriculum import AdaLRS, Constant, Curriculum, Fresh, Jsonl, Lora, Synth, Train, check, plan, stage_hash
from sailvl.curriculum import Checkpoint as Folder
from sailvl.model import checkpoint as models
from sailvl.model import convert, lora
from sailvl.run import run as run_curriculum
from sailvl.train import checkpoint, optim
from sailvl.train.flops import shape_of, step_flops
from sailvl.train.loop import set_up, train
from sailvl.train.soup import soup
from sailvl.train.state import roll_back, take_snapshot
from sailvl.train.step import train_step
from sailvl.types import Mixture

pytest.importorskip("peft")

PARTS = ("vit", "projector", "lm")
SETS = [chosen for size in (1, 2, 3) for chosen in combinations(PARTS, size)]
RANK = Lora(rank=4, alpha=8)


@pytest.fixture
def run(stage, assets, processor, sources):
    def run(out, **changes):
        model = models.load(assets / "model", dtype=torch.float32)
        return train(stage(**{"lora": RANK, "trains": ("lm",), **changes}), model, processor, sources, out)

    return run


def bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_learns_and_leaves_a_whole_model_and_an_adapter(run, assets, tmp_path):
    result = run(tmp_path, steps=40, lanes=1, lr=2e-2)
    losses = [row["loss"] for row in log.read(tmp_path / "metrics.jsonl")]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    before, after = (load_file(path / "model.safetensors") for path in (assets / "model", result.model))
    assert before.keys() == after.keys(), "a merged model is a model"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = lora.targets(models.load(assets / "model"), ("lm",))
    assert {name.replace("language_model.model", "model.language_model").removesuffix(".weight") for name in moved} == {
        *adapted
    }
    assert result.adapter == tmp_path / "adapter"
    settings = json.loads((result.adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(assets / "model") and settings["target_modules"] == adapted
    beside, merged = lora.load_adapted(result.adapter), AutoModelForImageTextToText.from_pretrained(result.model)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, beside(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trains", SETS)
def test_only_the_adapters_of_the_chosen_parts_move(model, batches, stage, trains):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    lora.attach(model, trains, rank=4, alpha=8, seed=0)
    first = {name: value.detach().clone() for name, value in model.named_parameters() if lora.is_adapter(name)}
    optim.freeze(model, trains, adapters=True)
    optimizer = optim.build(model, stage(trains=trains))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(first)
    for _ in range(2):
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    found = dict(model.named_parameters())
    assert all((found[name] != value).any() for name, value in first.items())
    for part in PARTS:
        names = [name for name, _ in models.part_parameters(model, part)]
        assert any(lora.is_adapter(name) for name in names) == (part in trains)
    lora.detach(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_encoders_scale_holds_for_its_adapters(model, stage):
    lora.attach(model, ("vit", "lm"), rank=2, alpha=2, seed=0)
    optim.freeze(model, ("vit", "lm"), adapters=True)
    optimizer = optim.build(model, stage(trains=("vit", "lm"), vit_lr_scale=0.1))
    optim.set_lr(optimizer, 2.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert {"vision_tower" in names[id(p)] for p in group["params"]} == {group["lr"] == 0.2}


@pytest.mark.parametrize(("trains", "precision"), [(("lm",), "fp32"), (PARTS, "fp32"), (("lm",), "bf16")])
def test_stopped_and_continued_is_never_stopped(run, tmp_path, monkeypatch, trains, precision):
    run(tmp_path / "whole", steps=6, trains=trains, precision=precision)
    steps, step = iter(range(1, 100)), loop.train_step

    def interrupted(*args, **kwargs):
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", steps=6, trains=trains, precision=precision)
    monkeypatch.undo()
    assert not (tmp_path / "halves/adapter").exists()
    torch.rand(5)  # whatever was drawn before, the adapters begin as they did
    run(tmp_path / "halves", steps=6, trains=trains, precision=precision)
    for name in ("adapter", "model"):
        assert bits(tmp_path / "whole" / name) == bits(tmp_path / "halves" / name), name
    weights = [load_file(checkpoint.newest(tmp_path / name / "checkpoints") / "model.safetensors") for name in
               ("whole", "halves")]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_between_adapter_and_model_it_ends_the_same(run, tmp_path, monkeypatch):
    run(tmp_path / "whole")

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(convert, "merge_adapter", killed)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert (tmp_path / "cut/adapter").is_dir() and not (tmp_path / "cut/model").exists()
    run(tmp_path / "cut")
    for name in ("adapter", "model"):
        assert bits(tmp_path / "whole" / name) == bits(tmp_path / "cut" / name)


def test_a_checkpoint_of_full_training_is_not_continued_with_adapters(run, tmp_path):
    run(tmp_path, lora=None)
    with pytest.raises(checkpoint.CheckpointError, match="other settings"):
        run(tmp_path)


def test_a_snapshot_holds_the_adapters_alone_and_brings_them_back(model, stage, processor, sources, batches):
    state = set_up(stage(lora=RANK, trains=("lm",)), model, processor, sources, 0)
    state.snapshot = take_snapshot(state)
    assert state.snapshot.weights and all(lora.is_adapter(name) for name in state.snapshot.weights)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_step(model, batches, state.optimizer, max_grad_norm=1.0, precision="fp32")
    assert any((value != before[name]).any() for name, value in model.named_parameters())
    roll_back(state, rewind=False)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_adalrs_searches_with_adapters(run, tmp_path):
    search = AdaLRS(base=Constant(), window=3, start=0.1, stop=0.9)
    run(tmp_path, steps=30, schedule=search)
    events = {row["event"] for row in log.read(tmp_path / "metrics.jsonl")}
    assert "snapshot" in events and (tmp_path / "adapter").is_dir()


def test_stages_of_one_base_make_a_soup(run, tmp_path):
    paths = [run(tmp_path / str(seed), seed=seed, steps=3).model for seed in (0, 1)]
    out = soup(paths, tmp_path / "soup")
    assert models.load(out).config.text_config.num_hidden_layers == 2


@pytest.mark.parametrize("trains", SETS)
@pytest.mark.parametrize("size", ["nano", "nano-moe"])
def test_flops_equal_the_counter(processor, batches, stage, trains, size):
    from .conftest import LM, VIT

    sparse = {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]} if size == "nano-moe" else {}
    model = models.build(models.config_for(size, processor=processor, vit=VIT, lm={**LM, **sparse}), seed=0)
    if sparse:
        model.set_experts_implementation("eager")
    lora.attach(model, trains, rank=3, alpha=3, seed=0)
    optim.freeze(model, trains, adapters=True)
    optimizer = optim.build(model, stage(trains=trains))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, batches, optimizer, max_grad_norm=1.0, precision="fp32")
    shapes = [shape_of(batch) for batch in batches]
    counted = counter.get_total_flops()
    assert step_flops(model.config, shapes, trains, lora_rank=3, square_attention=True) == counted


# ---- in a curriculum ------------------------------------------------------------------------------------------------


def curriculum(assets, **changes):
    stage = Train(
        name="tune", data=Mixture(shares={"samples": 1.0}), trains=("lm",), lora=RANK, steps=3, max_tokens=256,
        max_tiles=8, lr=1e-2, schedule=Constant(), precision="fp32", save_every=2, log_every=1,
    )  # fmt: skip
    after = replace(stage, name="after", init="tune", lora=None, trains=("projector",))
    return replace(
        Curriculum(
            name="adapters",
            model=Folder(path=str(assets / "model")),
            sources={"samples": Jsonl(path=str(assets / "data.jsonl"))},
            stages=(stage, after),
        ),
        **changes,
    )


def test_a_later_stage_starts_from_the_merged_model(assets, tmp_path):
    lines = []
    first, second = run_curriculum(curriculum(assets), tmp_path, say=lines.append)
    assert any("trains lm by adapters of rank 4" in line for line in lines)
    assert (first.folder / "adapter/adapter_model.safetensors").is_file() and not (second.folder / "adapter").exists()
    tuned, after = (load_file(report.model / "model.safetensors") for report in (first, second))
    assert all(torch.equal(tuned[name], after[name]) for name in tuned if not name.startswith("mlp1."))
    assert all(report.skipped for report in run_curriculum(curriculum(assets), tmp_path))


def test_without_peft_nothing_is_begun(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"stages\.0\.lora: adapters need peft: pip install 'sailvl\[lora\]'"):
        run_curriculum(curriculum(assets), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faults(assets):
    good = curriculum(assets)
    assert check(good) == []
    stage = good.stages[0]
    fresh = replace(stage, trains=("projector",), fresh=("projector",))
    assert [path for path, _ in check(replace(good, stages=(fresh,)))] == ["stages.0.lora"]
    ((path, message),) = check(replace(good, model=Fresh(), stages=(stage,)))
    assert path == "stages.0.lora" and "need a trained model" in message
    values = {"name": "x", "data": {"shares": {"samples": 1.0}}, "trains": ["lm"], "steps": 1, "max_tokens": 1,
              "max_tiles": 0, "lr": 1e-3}  # fmt: skip
    assert load(Train, values | {"lora": {}}).lora == Lora()
    for wrong, said in (
        ({"rank": 0}, "lora.rank: must be greater than 0"),
        ({"rank": 1.5}, "lora.rank: must be a whole number"),
        ({"alpha": -1}, "lora.alpha: must be greater than 0"),
        ({"ranks": 8}, "lora.ranks: unknown key; did you mean 'rank'?"),
        ({"dropout": 0.1}, "lora.dropout: unknown key"),
        (True, "lora: must be keys and values"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(Train, values | {"lora": wrong})
        assert said in str(caught.value)


def test_the_plan_says_so(assets):
    assert [row.trains for row in plan(curriculum(assets))] == ["lm (lora 4)", "projector"]


def test_adapters_count_in_the_hash_and_none_leaves_it_as_it_was(assets):
    drawn = {"samples": Synth(families=("count",), size=10)}
    with_lora = curriculum(assets, model=Folder(path="base"), sources=drawn)
    without = replace(with_lora, stages=(replace(with_lora.stages[0], lora=None),))
    # Recorded before stages could learn through adapters.
    assert stage_hash(without, "tune") == "dd60d8bf74bb1814a6ee7348ed1a4d544466c19127d20707e834b2b8288337de"
    hashes = {
        stage_hash(replace(with_lora, stages=(replace(with_lora.stages[0], lora=value),)), "tune")
        for value in (None, RANK, Lora(rank=4, alpha=4), Lora(rank=8, alpha=8))
    }
    assert len(hashes) == 4


def test_a_moved_run_keeps_its_adapter(run, assets, tmp_path):
    base = shutil.copytree(assets / "model", tmp_path / "base")
    result = run(tmp_path / "out", steps=2)
    moved = shutil.move(tmp_path / "out/adapter", tmp_path / "elsewhere")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = models.load(result.model)(input_ids=ids).logits
        torch.testing.assert_close(lora.load_adapted(moved, base)(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
