"""Folders: atomic saving, refusing pickles, parts, fresh projectors."""

from __future__ import annotations

import copy
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sailvl.model import SailVLForConditionalGeneration, SailVLProcessor, checkpoint


def same(one: SailVLForConditionalGeneration, other: SailVLForConditionalGeneration) -> bool:
    names, others = dict(one.named_parameters()), dict(other.named_parameters())
    return names.keys() == others.keys() and all(torch.equal(names[name], others[name]) for name in names)


def test_a_saved_folder_is_complete(tiny_model, tiny_processor, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "deep" / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "deep" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "deep" / "model")
    assert same(loaded, tiny_model) and isinstance(processor, SailVLProcessor)
    assert processor.image_processor.tiling == tiny_processor.image_processor.tiling
    assert processor.chat_template == tiny_processor.chat_template
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"], "nothing temporary is left"


def test_saving_over_an_earlier_folder_replaces_it(tiny_model, tiny_processor, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("from before")
    changed = copy.deepcopy(tiny_model)
    checkpoint.reset_projector(changed, 5)
    checkpoint.save(changed, tiny_processor, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert same(checkpoint.load(tmp_path / "model"), changed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("limit", [20_000, 3_000], ids=["weights do not fit", "not even the configuration"])
def test_a_full_disk_leaves_the_earlier_folder_intact(tiny_model, tiny_processor, tmp_path: Path, limit: int) -> None:
    """A limit on file sizes stands for the full disk."""
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    changed = copy.deepcopy(tiny_model)
    checkpoint.reset_projector(changed, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"saving failed .*the earlier folder is intact"):
            checkpoint.save(changed, tiny_processor, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"only pickled weights \(pytorch_model.bin\)"),
        (["model.pt", "other.pth"], r"only pickled weights \(model.pt, other.pth\)"),
        ([], "no weights"),
    ],
)
def test_pickles_are_refused(tiny_model, tmp_path: Path, files: list[str], message: str) -> None:
    tiny_model.config.save_pretrained(tmp_path)
    for name in files:
        torch.save({}, tmp_path / name)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no such model folder"):
        checkpoint.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cannot be read"),
        ("missing tensor", "1 missing tensors, first model.multi_modal_projector.linear_1.weight"),
        ("wrong shape", "1 mismatched tensors"),
        ("surplus tensor", "1 unexpected tensors, first mlp1.9.weight"),
    ],
)
def test_damaged_weights_are_not_loaded_in_silence(tiny_model, tmp_path: Path, damage: str, message: str) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint.save(tiny_model, None, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        tensors = load_file(path)
        if damage == "missing tensor":
            del tensors["mlp1.1.weight"]
        else:
            tensors["mlp1.9.weight" if damage == "surplus tensor" else "mlp1.1.weight"] = torch.zeros(3, 3)
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(tmp_path / "model")


def test_building_depends_on_the_seed_alone(tiny_model) -> None:
    torch.manual_seed(77)
    state = torch.get_rng_state()
    again = checkpoint.build(tiny_model.config, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is untouched"
    assert same(again, tiny_model)
    assert not same(checkpoint.build(tiny_model.config, seed=1), tiny_model)


def test_a_fresh_position_table_tells_all_patches_apart(tiny_model) -> None:
    (table,) = tiny_model.model.vision_tower.preprocessor.pos_embed.detach()
    distances = torch.cdist(table, table)
    assert distances[~torch.eye(len(table), dtype=torch.bool)].min() > 0.05 and table.abs().max() <= 1


def test_parts_hold_every_parameter_once(tiny_model) -> None:
    parts = [name for part in checkpoint.PARTS for name, _ in checkpoint.part_parameters(tiny_model, part)]
    assert sorted(parts) == sorted(name for name, _ in tiny_model.named_parameters())
    with pytest.raises(ValueError, match="unknown part 'llm'; parts: vit, projector, lm"):
        checkpoint.part_parameters(tiny_model, "llm")


def test_resetting_the_projector(tiny_model, tiny_processor, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    model = checkpoint.load(tmp_path / "model")
    checkpoint.reset_projector(model, 4)
    for name, value in model.named_parameters():
        fresh = name.startswith("model.multi_modal_projector.linear") and name.endswith("weight")
        assert torch.equal(value, dict(tiny_model.named_parameters())[name]) != fresh
    other = checkpoint.load(tmp_path / "model")
    checkpoint.reset_projector(other, 4)
    assert same(other, model)
    checkpoint.reset_projector(other, 5)
    assert not same(other, model)


def test_loading_in_another_type(tiny_model, tiny_processor, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    assert checkpoint.load(tmp_path / "model", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert checkpoint.load(tmp_path / "model").dtype == torch.float32
