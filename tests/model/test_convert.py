"""Conversions: what is written equals what was read, whatever is wrong is refused, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModel,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sailvl.model import SailVLForConditionalGeneration, checkpoint, publish
from sailvl.model.convert import ConvertError, export, from_parts, merge_adapter
from sailvl.model.parts import SAIL_TOKENS, grow_vocabulary, read_vision

SIDE = 56
VIT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3}
LM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 299,  # <|endoftext|>, as base models have it
}


def picture(width: int = 130, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def randomise(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def source(tiny_model: Any, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "model"
    checkpoint.save(tiny_model, tiny_processor, folder)
    (folder.parent / "done.json").write_text(json.dumps({"stage": "sft", "steps": 80, "loss": 3.5}))
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---- export -------------------------------------------------------------------------------------------------------


def test_an_export_is_ready_for_a_hub(source: Path, tiny_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    report = export(source, tmp_path / "hub", max_shard_size="100KB", licence="apache-2.0")
    assert report.max_difference == 0 and report.dtype == "fp32"
    assert report.num_parameters == sum(value.numel() for value in tiny_model.parameters())
    files = {file.name for file in (tmp_path / "hub").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "processor_config.json"} <= files
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert same(checkpoint.load(tmp_path / "hub"), tiny_model)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["llm_config"]["model_type"] == "qwen3" and "text_config" not in config
    assert config["force_image_size"] == SIDE and config["template"] == "univl-chat" and config["use_thumbnail"]
    assert json.loads((tmp_path / "hub" / "generation_config.json").read_text())["eos_token_id"] is not None
    page = (tmp_path / "hub" / "README.md").read_text()
    assert page.startswith('---\nlicense: "apache-2.0"\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n')
    assert "- stage: sft" in page and "- loss: 3.5" in page
    names = {name for file in (tmp_path / "hub").glob("*.safetensors") for name in load_file(file)}
    assert {name.split(".")[0] for name in names} == {"vision_model", "mlp1", "language_model"}
    # The page's own code, as somebody would paste it.
    monkeypatch.chdir(tmp_path)
    picture().save("picture.png")
    exec(page.split("```python\n")[1].split("```")[0].replace("=128", "=3"), {})
    # An export of the export is the same folder, but for what the page says of its origin.
    again = export(tmp_path / "hub", tmp_path / "again", max_shard_size="100KB")
    assert again.num_parameters == report.num_parameters
    for file in files - {"README.md"}:
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert 'license: "apache-2.0"' in (tmp_path / "again" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hub", "picture.png"]


def test_another_precision(source: Path, tiny_model: Any, tmp_path: Path) -> None:
    report = export(source, tmp_path / "half", dtype="bf16")
    assert report.dtype == "bf16" and report.max_difference == 0 and "cast from fp32 to bf16" in report.notes[0]
    half = checkpoint.load(tmp_path / "half")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert all(
        torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(half.parameters(), tiny_model.parameters(), strict=True)
    )
    rotary = half.model.language_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and torch.equal(rotary, tiny_model.model.language_model.rotary_emb.inv_freq)
    export(tmp_path / "half", tmp_path / "wide", dtype="fp32")
    wide = checkpoint.load(tmp_path / "wide")
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), wide.parameters(), strict=True))
    with pytest.raises(ConvertError, match="unknown dtype 'int4'"):
        export(source, tmp_path / "four", dtype="int4")


def test_weights_beyond_fp16_are_refused(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    import copy

    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = 1e6
    checkpoint.save(model, tiny_processor, tmp_path / "model")
    with pytest.raises(ConvertError, match="do not fit into fp16"):
        export(tmp_path / "model", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="exists; choose a new place"):
        export(source, tmp_path / "out")


def test_code_in_a_folder_is_never_run_nor_passed_on(source: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "release", tmp_path / "executed"
    shutil.copytree(source, folder)
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    pointers = {name: "code.X" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {**pointers, "AutoTokenizer": ["code.X", None]}
        for part in ("vision_config", "llm_config", "image_processor"):
            if part in values:
                values[part]["auto_map"] = pointers
        (folder / name).write_text(json.dumps(values))
    export(folder, tmp_path / "out")
    assert not marker.exists()
    for file in (tmp_path / "out").iterdir():
        assert b"auto_map" not in file.read_bytes(), file.name
        assert file.suffix != ".py"


def test_pickles_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(checkpoint.CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        export(folder, tmp_path / "out")
    with pytest.raises(checkpoint.CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        from_parts(folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a tensor less", "a tensor more", "a changed weight", "a full disk"])
def test_a_folder_that_reads_back_otherwise_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def broken_save(model: Any, processor: Any, path: Path, **options: Any) -> None:
        checkpoint.save(model, processor, path, **options)
        if damage == "a full disk":
            raise OSError(28, "No space left on device")
        weights = load_file(path / "model.safetensors")
        name = "vision_model.trunk.blocks.1.mlp.fc2.weight"
        if damage == "a tensor less":
            weights.pop(name)
        elif damage == "a tensor more":
            weights["vision_model.trunk.blocks.9.mlp.fc2.weight"] = weights[name].clone()
        else:
            weights[name][0, 0] += 1e-3
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(publish, "save", broken_save)
    message = {
        "a tensor less": "1 missing tensors",
        "a tensor more": "1 unexpected tensors",
        "a changed weight": "1 tensors read back differ from those written, first model.vision_tower.trunk.blocks.1",
        "a full disk": "No space left",
    }[damage]
    with pytest.raises((ConvertError, checkpoint.CheckpointError), match=message):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- a new model of parts -----------------------------------------------------------------------------------------


def apple_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' AIMv2 names to those of its authors, written down independently of the package's rules."""
    out = {
        "preprocessor.patchifier.proj.weight": weights["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": weights["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": weights["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": weights["embeddings.position_embedding.weight"][None],
        "trunk.post_trunk_norm.weight": weights["rms_norm.weight"],
    }
    for index in range(VIT["num_hidden_layers"]):
        theirs, ours = f"encoder.layers.{index}.", f"trunk.blocks.{index}."
        out[f"{ours}attn.qkv.weight"] = torch.cat(
            [weights[f"{theirs}attention.{part}_proj.weight"] for part in ("q", "k", "v")]
        )
        out[f"{ours}attn.proj.weight"] = weights[f"{theirs}attention.out_proj.weight"]
        out[f"{ours}norm_1.weight"] = weights[f"{theirs}rms_norm1.weight"]
        out[f"{ours}norm_2.weight"] = weights[f"{theirs}rms_norm2.weight"]
        for new, old in (("fc1", "gate_proj"), ("fc2", "down_proj"), ("fc3", "up_proj")):
            out[f"{ours}mlp.{new}.weight"] = weights[f"{theirs}ffn.{old}.weight"]
    return {name: value.clone().contiguous() for name, value in out.items()}


def write_vision(folder: Path, layout: str, side: int = SIDE) -> Aimv2VisionModel:
    """An AIMv2 folder in one of the layouts that are about; the encoder itself, without pooling head."""
    torch.manual_seed(0)
    config = Aimv2VisionConfig(**VIT, image_size=side, patch_size=14, use_head=True)
    pooled = randomise(Aimv2VisionModel(config))
    folder.mkdir(parents=True)
    if layout == "library, two towers":
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        towers = Aimv2Model(Aimv2Config(vision_config=config, text_config=text, projection_dim=8))
        towers.vision_model.load_state_dict(pooled.state_dict())
        towers.save_pretrained(folder)
    elif layout == "library":
        pooled.save_pretrained(folder)
    else:
        weights = apple_names(pooled.state_dict())
        if layout == "apple, two towers":
            weights = {f"image_encoder.{name}": value for name, value in weights.items()}
            weights |= {"image_encoder.head.cls_token": torch.ones(1, 1, 48), "text_encoder.x.weight": torch.ones(2)}
            weights |= {"image_projector.weight": torch.ones(3), "log_logit_scale": torch.ones(1)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        code = {"AutoModel": "modeling_aimv2.AIMv2Model"}
        values = {**VIT, "image_size": side, "patch_size": 14, "model_type": "aimv2", "auto_map": code}
        values |= {"qkv_bias": False, "use_bias": False, "projection_dropout": 0.0, "rms_norm_eps": 1e-5}
        inner = {"vision_config": values} if layout == "apple, two towers" else values
        (folder / "config.json").write_text(json.dumps({"model_type": "aimv2", **inner}))
    alone = Aimv2VisionModel(Aimv2VisionConfig(**VIT, image_size=side, patch_size=14, use_head=False)).eval()
    alone.load_state_dict({name: v for name, v in pooled.state_dict().items() if not name.startswith("head.")})
    return alone


def write_lm(folder: Path, tokenizer_file: Path, *, rows: int, moe: bool = False, tied: bool = True) -> Any:
    """A Qwen3 folder whose tokenizer knows nothing of SAIL-VL2."""
    torch.manual_seed(1)
    fields = {**LM, "vocab_size": rows, "tie_word_embeddings": tied}
    if moe:
        sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, **sparse))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**fields))
    randomise(model).save_pretrained(folder)
    stored = json.loads(tokenizer_file.read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] not in SAIL_TOKENS]
    plain = folder / "tokenizer.json"
    plain.write_text(json.dumps(stored))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(plain), eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model, tokenizer


LAYOUTS = ["library", "library, two towers", "apple", "apple, two towers"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_of_any_layout_is_the_librarys(tmp_path: Path, layout: str) -> None:
    oracle = write_vision(tmp_path / "aim", layout)
    encoder, left_out, notes = read_vision(tmp_path / "aim")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(pixels).last_hidden_state
        torch.testing.assert_close(encoder(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert notes == []
    expected_out = {
        "library": ["the pooling head"],
        "apple": [],
        "apple, two towers": [
            "the contrastive temperature",
            "the pooling head",
            "the projection of pooled pictures",
            "the text tower",
        ],
        "library, two towers": [
            "the contrastive temperature",
            "the pooling head",
            "the projection of pooled pictures",
            "the projection of texts",
            "the text tower",
        ],
    }[layout]
    assert [line.partition(":")[0] for line in left_out] == expected_out


@pytest.mark.parametrize(("moe", "tied", "rows"), [(False, True, 384), (False, False, 325), (True, False, 384)])
def test_a_new_model_of_parts(tmp_path: Path, tiny_tokenizer_file: Path, moe: bool, tied: bool, rows: int) -> None:
    """Against the library's encoder and language model, with the projector recomputed by hand."""
    oracle = write_vision(tmp_path / "aim", "library")
    lm, plain = write_lm(tmp_path / "qwen", tiny_tokenizer_file, rows=rows, moe=moe, tied=tied)
    report = from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / "new", side=SIDE, seed=7)
    assert report.max_difference <= 1e-5 and report.left_out and report.dtype == "fp32"
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "new").eval(),
        AutoProcessor.from_pretrained(tmp_path / "new"),
    )
    assert isinstance(model, SailVLForConditionalGeneration)
    # Tokens: appended in the released order, each one id; the language model's own ids are as before.
    first = len(plain)
    assert processor.tokenizer.convert_tokens_to_ids(list(SAIL_TOKENS)) == list(range(first, first + 9))
    assert processor.tokenizer("a red square").input_ids == plain("a red square").input_ids
    size = model.config.text_config.vocab_size
    assert size == (rows if rows >= first + 9 else 384)
    assert (size > rows) == any("vocabulary grown" in note for note in report.notes)
    assert model.generation_config.eos_token_id == plain.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr() or not tied
    # Logits.
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "how many?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    mlp = model.model.multi_modal_projector
    with torch.no_grad():
        hidden = oracle(inputs["pixel_values"]).last_hidden_state
        square = hidden.reshape(len(hidden), 2, 2, 2, 2, 48).permute(0, 1, 3, 2, 4, 5).reshape(len(hidden), 4, 4 * 48)
        tokens = mlp.linear_2(torch.nn.functional.gelu(mlp.linear_1(mlp.layer_norm(square))))
        ids = inputs["input_ids"][0]
        safe = ids.clamp(max=rows - 1)
        embeds = lm.get_input_embeddings()(safe)
        if size > rows:  # rows that the old model does not have
            embeds = torch.where((ids >= rows)[:, None], model.get_input_embeddings()(ids), embeds)
        embeds[ids == processor.image_token_id] = tokens.reshape(-1, 64)
        expected = lm(inputs_embeds=embeds[None]).logits[0]
        actual = model(**inputs).logits[0]
    torch.testing.assert_close(actual[:, :rows], expected, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_projector(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    write_vision(tmp_path / "aim", "apple")
    write_lm(tmp_path / "qwen", tiny_tokenizer_file, rows=384)
    weights = []
    for index, seed in enumerate((3, 3, 4)):
        from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / f"{index}", side=SIDE, seed=seed, dtype="bf16")
        weights.append(load_file(tmp_path / f"{index}" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert changed == {"mlp1.1.weight", "mlp1.3.weight"}
    assert {value.dtype for value in weights[0].values()} == {torch.bfloat16}


def test_a_position_table_for_larger_tiles(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    """From 4 x 4 patches to 8 x 8: bicubic by an independent library, and said so."""
    oracle = write_vision(tmp_path / "aim", "apple")
    encoder, _, notes = read_vision(tmp_path / "aim", side=112)
    assert notes == ["position table stretched from 4 x 4 (56 px) to 8 x 8 (112 px)"]
    assert encoder.config.image_size == 112 and encoder.preprocessor.pos_embed.shape == (1, 64, 48)
    table = oracle.embeddings.position_embedding.weight.detach().numpy().reshape(4, 4, 48)
    stretched = encoder.preprocessor.pos_embed.detach().numpy().reshape(8, 8, 48)
    # Pillow's kernel is another cubic (a = -0.5, not -0.75): alike, not equal; constants and symmetry are exact.
    plane = Image.fromarray(table[:, :, 0]).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.corrcoef(np.asarray(plane).ravel(), stretched[:, :, 0].ravel())[0, 1] > 0.98
    np.testing.assert_allclose(stretched.mean((0, 1)), table.mean((0, 1)), atol=0.1)
    write_lm(tmp_path / "qwen", tiny_tokenizer_file, rows=384)
    report = from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / "new", side=112)
    assert notes[0] in report.notes and notes[0] in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(ConvertError, match="side 70"):
        from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / "other", side=70)


def test_a_new_model_of_any_resolution(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    write_vision(tmp_path / "aim", "library")
    write_lm(tmp_path / "qwen", tiny_tokenizer_file, rows=384)
    report = from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / "new", side=SIDE, any_resolution=True)
    assert report.max_difference == 0
    model, processor = checkpoint.load(tmp_path / "new"), AutoProcessor.from_pretrained(tmp_path / "new")
    assert model.config.vision_config.any_resolution and processor.image_processor.any_resolution
    inputs = processor(images=picture(84, 56), text="<IMG_CONTEXT>what?", return_tensors="pt")
    assert inputs["image_grid_hw"].tolist() == [[4, 6]]
    assert torch.isfinite(model(**inputs).logits).all()


def test_new_rows_are_like_the_old_ones() -> None:
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**LM, vocab_size=500, tie_word_embeddings=False))
    before = lm.model.embed_tokens.weight.detach().clone()
    assert not grow_vocabulary(lm, 500, 0) and grow_vocabulary(lm, 501, 0)
    table = lm.model.embed_tokens.weight.detach()
    assert table.shape == (512, 64) and torch.equal(table[:500], before) and lm.lm_head.weight.shape == (512, 64)
    distance = (table[500:] - before.mean(0)).abs()
    assert 0 < float(distance.max()) < 0.5 * float(before.std())
    assert len({tuple(row) for row in table[500:].tolist()}) == 12


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("qwen", {"model_type": "llama"}, "model_type is 'llama'"),
        ("aim", {"qkv_bias": True}, "asks for biases"),
        ("aim", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("aim", {"hidden_size": 96}, "another shape"),
        ("aim", {"num_hidden_layers": 2}, "unknown tensors"),
        ("qwen", {"num_hidden_layers": 3}, r"config.json: .*layer_types"),
        ("qwen", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "missing tensors"),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, tiny_tokenizer_file: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    write_vision(tmp_path / "aim", "apple")
    write_lm(tmp_path / "qwen", tiny_tokenizer_file, rows=384)
    edit(tmp_path / part / "config.json", **changes)
    with pytest.raises((checkpoint.CheckpointError, ConvertError), match=message):
        from_parts(tmp_path / "aim", tmp_path / "qwen", tmp_path / "new", side=SIDE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aim", "qwen"]


# ---- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(source: Path, tmp_path: Path) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], modules_to_save=["linear_1"])
    wrapped = peft.get_peft_model(checkpoint.load(source), settings)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(0.05 * torch.randn(value.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_merged_adapter_answers_like_the_adapter(
    source: Path, adapter: Path, tiny_processor: Any, tmp_path: Path
) -> None:
    import peft

    report = export(source, tmp_path / "merged", adapter=adapter)
    assert "adapter merged" in report.notes[0] and report.max_difference == 0
    reference = peft.PeftModel.from_pretrained(checkpoint.load(source), adapter).eval()
    merged, plain = checkpoint.load(tmp_path / "merged").eval(), checkpoint.load(source).eval()
    inputs = tiny_processor(images=picture(), text="<IMG_CONTEXT>how many?", return_tensors="pt")
    with torch.no_grad():
        expected, actual, before = (model(**inputs).logits for model in (reference, merged, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert float((actual - before).abs().max()) > 0.01, "the adapter must matter for the test to bite"


def test_adapters_that_do_not_fit(source: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no adapter here"):
        export(source, tmp_path / "out", adapter=tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    for change, message in (
        ({name: None}, "1 tensors are missing or belong to another model"),
        ({f"{name}.x": weights[name].clone()}, "1 tensors are missing or belong to another model"),
        ({name: torch.ones(3, 3)}, "does not fit the model"),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConvertError, match=message):
            export(source, tmp_path / "out", adapter=adapter)
    edit(adapter / "adapter_config.json", target_modules=["no_such_module"])
    with pytest.raises(ConvertError, match="does not fit the model"):
        export(source, tmp_path / "out", adapter=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(checkpoint.CheckpointError, match="only pickled weights"):
        export(source, tmp_path / "out", adapter=adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_without_peft(source: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConvertError, match=r"pip install 'sailvl\[lora\]'"):
        merge_adapter(checkpoint.load(source), adapter)


# ---- memory and the command -----------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from sailvl.model.convert import export
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) // 1024
import sailvl.model.publish as publish
save, peak = publish.save, []
def watched(*args, **kwargs):
    before = memory(); save(*args, **kwargs); peak.append(memory())
publish.save = watched
import torch
start = memory()
export(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size="20MB")
print(peak[0] - start, memory() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_an_export_holds_no_copy_of_the_weights(tiny_processor: Any, tmp_path: Path) -> None:
    lm = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    config = checkpoint.config_for("nano", processor=tiny_processor, lm=lm, vit={"num_hidden_layers": 1})
    checkpoint.save(checkpoint.build(config, seed=0), tiny_processor, tmp_path / "big")
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) >> 20
    words = [sys.executable, "-c", PEAK, str(tmp_path / "big"), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root)
    assert size > 200 and max(int(word) for word in done.stdout.split()) < size // 4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    with safe_open(next((tmp_path / "out").glob("model-00001*")), framework="pt") as opened:
        assert len(list(opened.keys())) >= 1


def call(capsys: Any, monkeypatch: Any, *words: str) -> tuple[int, str, str]:
    from sailvl import cli

    monkeypatch.setattr(sys, "argv", ["sailvl", "convert", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command(source: Path, adapter: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, monkeypatch, str(source), "--out", "half", "--dtype", "bf16")
    assert code == 0 and "cast from fp32 to bf16" in out and out.splitlines()[-1] == str(tmp_path / "half")
    code, out, _ = call(capsys, monkeypatch, str(source), "--out", "mine", "--adapter", str(adapter), "--json")
    assert code == 0 and json.loads(out)["dtype"] == "fp32" and json.loads(out)["out"] == str(tmp_path / "mine")
    code, out, _ = call(capsys, monkeypatch, str(source), "--vit", "eyes")
    assert code == 0 and "left out: the language model" in out and (tmp_path / "eyes" / "config.json").is_file()
    code, out, _ = call(capsys, monkeypatch, str(source), "--gguf", "lm.gguf", "--gguf-type", "f16")
    assert code == 0 and (tmp_path / "lm.gguf").read_bytes()[:4] == b"GGUF"


def test_the_command_names_every_fault_at_once(source: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    words = "--vision nowhere --gguf-type q3 --dtype int4 --max-shard-size big --out there --adapter none --vit there"
    code, out, err = call(capsys, monkeypatch, str(source), *words.split())
    assert code == 2 and not out
    assert err.splitlines() == [
        "give either MODEL, or --vision and --lm for a new one",
        "give one of --out, --vit and --gguf",
        "--vision nowhere: no model folder (it would hold a config.json)",
        "--adapter none: no adapter (it would hold an adapter_config.json)",
        "there exists; choose a new place",
        "there exists; choose a new place",
        "--adapter goes with MODEL and --out",
        "--gguf-type goes with --gguf",
        "--dtype int4: bf16, fp16 or fp32",
        "--gguf-type q3: bf16, f16 or q8_0",
        "--max-shard-size big: a number and a unit, such as 5GB",
    ]
    code, _, err = call(capsys, monkeypatch, str(source), "--out", "x", "--seed", "1", "--side", "56", "--anyres")
    assert code == 2 and err.splitlines() == [f"{name} is for a new model" for name in ("--side", "--anyres", "--seed")]
    code, _, err = call(capsys, monkeypatch, "nowhere", "--out", "x")
    assert code == 2 and "nowhere" in err and not (tmp_path / "x").exists()
