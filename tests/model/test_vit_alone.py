"""The encoder by itself: released folders load with the Auto classes, and any model gives one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoImageProcessor, AutoModel

from sailvl.model import SailViT, SailViTConfig, SailViTImageProcessor, checkpoint
from sailvl.model.convert import ConvertError, export_vit

SIDE = 56
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3}


@pytest.fixture(scope="module")
def encoder() -> SailViT:
    torch.manual_seed(0)
    model = SailViT(SailViTConfig(**SIZES, image_size=SIDE)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


@pytest.fixture
def write(encoder: SailViT, tmp_path: Path) -> Callable[..., Path]:
    """The encoder as a release has it: pointers to code that would betray being run, names with or without prefix."""

    def make(*, model_type: str = "sailvit", prefix: str = "", **pixels: Any) -> Path:
        folder = tmp_path / "release"
        folder.mkdir()
        weights = {prefix + name: value.clone() for name, value in encoder.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        code = {"AutoConfig": "configuration_sailvit.SAILViTConfig", "AutoModel": "modeling_sailvit.SAILViTModel"}
        config = {**SIZES, "image_size": SIDE, "patch_size": 14, "model_type": model_type, "auto_map": code}
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["SAILViTModel"]}))
        for name in ("configuration_sailvit", "modeling_sailvit", "image_processing"):
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
        if pixels:
            (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
        return folder

    return make


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_release_loads_by_auto_model(
    encoder: SailViT, write: Callable[..., Path], tmp_path: Path, prefix: str
) -> None:
    loaded, info = AutoModel.from_pretrained(write(prefix=prefix), output_loading_info=True)
    assert type(loaded) is SailViT and not any(info[name] for name in ("missing_keys", "unexpected_keys"))
    with torch.no_grad():
        features = loaded(pixels()).last_hidden_state
        assert torch.equal(features, encoder(pixels()).last_hidden_state)
    assert features.shape == (2, 16, 48)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_folder_that_says_aimv2(encoder: SailViT, write: Callable[..., Path], tmp_path: Path, prefix: str) -> None:
    """The library owns that type and gives another model for it: three ways around, none of which runs code."""
    folder = write(model_type="aimv2", prefix=prefix)
    config = SailViTConfig.from_pretrained(folder)
    export_vit(folder, tmp_path / "ours")
    for loaded in (
        SailViT.from_pretrained(folder),
        AutoModel.from_pretrained(folder, config=config),
        AutoModel.from_pretrained(tmp_path / "ours"),
    ):
        assert type(loaded) is SailViT
        assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), encoder.parameters(), strict=True))
    assert not (tmp_path / "executed").exists()


def test_hidden_states_are_what_select_layer_picks(encoder: SailViT) -> None:
    """Against the library's AIMv2, layer by layer, and against ``select_layer``."""
    oracle = Aimv2VisionModel(Aimv2VisionConfig(**SIZES, image_size=SIDE, patch_size=14, use_head=False)).eval()
    oracle.load_state_dict(to_library(encoder.state_dict()))
    with torch.no_grad():
        states = encoder(pixels(), output_hidden_states=True).hidden_states
        expected = [oracle.embeddings(pixels())]
        for layer in oracle.encoder.layers:
            expected.append(layer(expected[-1], None))
        expected[-1] = oracle.rms_norm(expected[-1])
        assert len(states) == len(expected) == 4
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for layer in (-1, -2, -4, 0, 2, 3):
            selected = encoder(pixels(), select_layer=layer, output_hidden_states=True)
            assert torch.equal(selected.last_hidden_state, states[layer])
            assert torch.equal(selected.hidden_states[-1], states[layer])
        assert encoder(pixels()).hidden_states is None


def test_hidden_states_at_any_resolution() -> None:
    torch.manual_seed(0)
    model = SailViT(SailViTConfig(**SIZES, image_size=SIDE, any_resolution=True)).eval()
    patches, grids = torch.randn(8 + 4, 3, 14, 14), torch.tensor([[2, 4], [2, 2]])
    with torch.no_grad():
        seen = model(patches, image_grid_hw=grids, output_hidden_states=True)
    assert [tuple(state.shape) for state in seen.hidden_states] == [(12, 48)] * 4
    assert torch.equal(seen.hidden_states[-1], seen.last_hidden_state)


def to_library(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to transformers', written down independently of the package's rules."""
    out = {
        "embeddings.patch_embed.weight": weights["preprocessor.patchifier.proj.weight"],
        "embeddings.patch_embed.bias": weights["preprocessor.patchifier.proj.bias"],
        "embeddings.rms_norm.weight": weights["preprocessor.patchifier.norm.weight"],
        "embeddings.position_embedding.weight": weights["preprocessor.pos_embed"][0],
        "rms_norm.weight": weights["trunk.post_trunk_norm.weight"],
    }
    for index in range(SIZES["num_hidden_layers"]):
        ours, theirs = f"trunk.blocks.{index}.", f"encoder.layers.{index}."
        for part, value in zip("qkv", weights[f"{ours}attn.qkv.weight"].chunk(3), strict=True):
            out[f"{theirs}attention.{part}_proj.weight"] = value
        out[f"{theirs}attention.out_proj.weight"] = weights[f"{ours}attn.proj.weight"]
        out[f"{theirs}rms_norm1.weight"] = weights[f"{ours}norm_1.weight"]
        out[f"{theirs}rms_norm2.weight"] = weights[f"{ours}norm_2.weight"]
        out[f"{theirs}ffn.gate_proj.weight"] = weights[f"{ours}mlp.fc1.weight"]
        out[f"{theirs}ffn.up_proj.weight"] = weights[f"{ours}mlp.fc3.weight"]
        out[f"{theirs}ffn.down_proj.weight"] = weights[f"{ours}mlp.fc2.weight"]
    return out


PIXELS = {
    "ours": {"image_processor_type": "SailViTImageProcessor", "side": SIDE},
    "nameless": {"image_size": SIDE, "use_thumbnail": True},
    "resize and crop": {"size": {"shortest_edge": 50}, "crop_size": {"height": SIDE, "width": SIDE}},
    "other stats": {"image_size": SIDE, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
}


@pytest.mark.parametrize("kind", PIXELS)
def test_the_image_processor_makes_one_tile(write: Callable[..., Path], encoder: SailViT, kind: str) -> None:
    processor = AutoImageProcessor.from_pretrained(write(**PIXELS[kind]))
    assert type(processor) is SailViTImageProcessor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 170, 3), dtype=np.uint8))
    made = processor([image, image], return_tensors="pt")
    assert made["pixel_values"].shape == (2, 3, SIDE, SIDE)
    square = np.asarray(image.resize((SIDE, SIDE)), np.float32) / 255
    mean, std = PIXELS[kind].get("image_mean"), PIXELS[kind].get("image_std")
    expected = (square - (mean or [0.485, 0.456, 0.406])) / (std or [0.229, 0.224, 0.225])
    np.testing.assert_allclose(made["pixel_values"][0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert encoder(made["pixel_values"]).last_hidden_state.shape == (2, 16, 48)


def test_any_model_gives_its_encoder(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    report = export_vit(tmp_path / "model", tmp_path / "vit")
    assert report.kind == "encoder" and report.max_difference == 0 and len(report.left_out) == 2
    assert {file.name for file in (tmp_path / "vit").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    }
    names = load_file(tmp_path / "vit" / "model.safetensors").keys()
    assert names == dict(tiny_model.model.vision_tower.named_parameters()).keys()
    loaded = AutoModel.from_pretrained(tmp_path / "vit")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    image = Image.new("RGB", (70, 30), "red")
    made = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tiny_model.get_image_features(made).last_hidden_state
        assert torch.equal(loaded(made).last_hidden_state, expected)
    with pytest.raises(ConvertError, match="exists"):
        export_vit(tmp_path / "model", tmp_path / "vit")


def test_the_card_of_an_encoder_runs(tiny_model: Any, tiny_processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint.save(tiny_model, tiny_processor, tmp_path / "model")
    export_vit(tmp_path / "model", tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 30), "red").save("picture.png")
    code = (tmp_path / "vit" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["features"].shape == (1, 16, 48) and len(scope["layers"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trunk.blocks.2.attn.qkv.weight": None}, "1 missing tensors, first trunk.blocks.2.attn.qkv.weight"),
        ({"trunk.blocks.3.norm_1.weight": torch.ones(48)}, "1 unknown tensors, first trunk.blocks.3.norm_1.weight"),
        ({"trunk.blocks.0.norm_1.weight": torch.ones(47)}, r"another shape .* \[47\] instead of \[48\]"),
        ({"preprocessor.pos_embed": None}, "no learned position table"),
        ({"preprocessor.patchifier.proj.weight": None}, "no AIMv2 encoder here"),
    ],
)
def test_an_encoder_that_is_not_whole_is_refused(
    write: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write()
    weights = {**load_file(folder / "model.safetensors"), **change}
    weights = {name: value for name, value in weights.items() if value is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=message):
        export_vit(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
