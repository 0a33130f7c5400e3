"""Adapters in peft's format: beside every part, read back by peft itself, refused where they do not belong."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sailvl.model import SailVLForConditionalGeneration, checkpoint, lora
from sailvl.model.checkpoint import CheckpointError
from sailvl.model.convert import ConvertError, merge_adapter
from sailvl.model.lora import AdapterError, attach, base_of, detach, is_adapter, load_adapted, open_adapter, targets

PARTS = ("vit", "projector", "lm")
SETS = [chosen for size in (1, 2, 3) for chosen in combinations(PARTS, size)]

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tiny_model: Any, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "base"
    checkpoint.save(tiny_model, tiny_processor, folder)
    return folder


@pytest.fixture(scope="module")
def sparse(tiny_model: Any, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = {"hidden_size": 48, "intermediate_size": 64, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16,
          "num_attention_heads": 4, "num_key_value_heads": 2, "mlp_only_layers": [0]}  # fmt: skip
    vit = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = checkpoint.config_for("nano-moe", processor=tiny_processor, vit=vit, lm=lm)
    folder = tmp_path_factory.mktemp("lora") / "sparse"
    checkpoint.save(checkpoint.build(config, seed=0), tiny_processor, folder)
    return folder


def adapted(base: Path, parts: tuple[str, ...] = PARTS, **changes: Any) -> SailVLForConditionalGeneration:
    """A model with adapters that do something, as if trained."""
    model = checkpoint.load(base)
    attach(model, parts, **{"rank": 4, "alpha": 8, "seed": 0, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def inputs(tiny_processor: Any) -> Any:
    noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    return tiny_processor(images=Image.fromarray(noise), text="<IMG_CONTEXT>how many?", return_tensors="pt")


@torch.no_grad()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    return model.eval()(**inputs).logits


def edit(folder: Path, **changes: Any) -> None:
    file = folder / lora.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_targets_are_the_linear_layers_of_the_parts(tiny_model: Any) -> None:
    linear = [name for name, module in tiny_model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {part: targets(tiny_model, [part]) for part in PARTS}
    assert sorted(name for names in found.values() for name in names) == sorted(set(linear) - {"lm_head"})
    assert {len(names) for names in found.values()} == {2 * 5, 2, 2 * 7}
    untied = checkpoint.build(
        checkpoint.config_for("nano", lm={"tie_word_embeddings": False, "num_hidden_layers": 1}), seed=0
    )
    assert len(targets(untied, ["lm"])) == 7


def test_a_fresh_adapter_changes_nothing_and_leaves_nothing(base: Path, inputs: Any) -> None:
    model = checkpoint.load(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, state = logits(model, inputs), torch.get_rng_state()
    attach(model, PARTS, rank=4, alpha=8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model, inputs), expected)
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if is_adapter(name)} and learning
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    attach(model, ["lm"], rank=2, alpha=2, seed=0)  # and again, without peft's warning of a second adapter


def test_the_seed_decides_the_first_weights(base: Path) -> None:
    def drawn(seed: int, noise: int) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        model = checkpoint.load(base)
        attach(model, PARTS, rank=4, alpha=8, seed=seed)
        return [value for name, value in model.named_parameters() if is_adapter(name)]

    first, again, other = drawn(0, 0), drawn(0, 1), drawn(1, 0)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert all(not torch.equal(*pair) for pair in zip(first, other, strict=True) if pair[0].any())
    for value in first[::2]:
        bound = value.shape[1] ** -0.5
        assert 0.8 * bound < value.abs().max() <= bound
    assert not any(value.any() for value in first[1::2])


@pytest.mark.parametrize("parts", SETS)
def test_saved_merged_and_read_by_peft_it_is_the_same(
    base: Path, inputs: Any, tiny_processor: Any, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    import peft

    model = adapted(base, parts)
    expected = logits(model, inputs)
    assert float((expected - logits(checkpoint.load(base), inputs)).abs().max()) > 0.01
    lora.save(model, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == base
    assert torch.equal(logits(load_adapted(tmp_path / "adapter"), inputs), expected)
    plain = SailVLForConditionalGeneration.from_pretrained(base)
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(read, inputs), expected, rtol=0, atol=1e-6)
    merged = checkpoint.load(base)
    merge_adapter(merged, tmp_path / "adapter", tiny_processor)
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=1e-5)
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())


def test_a_fresh_process_imports_peft_late_and_writes_the_same_folder(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    lora.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / lora.WEIGHTS)
    names = json.loads((tmp_path / "a" / lora.CONFIG).read_text())["target_modules"]
    assert names == targets(checkpoint.load(base), PARTS)
    assert stored.keys() == {f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB"}
    code = (
        "import sys, sailvl.model; assert 'sailvl.model.lora' not in sys.modules\n"
        "import sailvl.train.loop, sailvl.run, sailvl.cli; from sailvl.model import checkpoint, convert, lora\n"
        "assert 'peft' not in sys.modules, 'peft is imported when it is used, not before'\n"
        "model = checkpoint.load(sys.argv[1])\n"
        "lora.attach(model, ('vit', 'projector', 'lm'), rank=4, alpha=8, seed=0); lora.save(model, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, base, tmp_path / "b"], check=True, capture_output=True)
    fresh = checkpoint.load(base)
    attach(fresh, PARTS, rank=4, alpha=8, seed=0)
    lora.save(fresh, tmp_path / "c")
    for name in (lora.CONFIG, lora.WEIGHTS):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_alpha_over_rank_is_the_scale(base: Path, inputs: Any) -> None:
    one = adapted(base, ("lm",), rank=4, alpha=4)
    two = adapted(base, ("lm",), rank=4, alpha=8)
    with torch.no_grad():
        for name, value in one.named_parameters():
            if ".lora_B." in name:
                value.mul_(2)
    torch.testing.assert_close(logits(one, inputs), logits(two, inputs), rtol=0, atol=1e-5)


def test_a_sparse_model_adapts_attention_and_dense_blocks(
    sparse: Path, inputs: Any, tmp_path: Path, tiny_processor: Any
) -> None:
    model = adapted(sparse, ("lm",))
    names = targets(checkpoint.load(sparse), ("lm",))
    assert not any("experts" in name or "gate." in name for name in names)
    assert len([name for name in names if "self_attn" in name]) == 8 and len(names) == 8 + 3
    lora.save(model, tmp_path / "adapter")
    expected = logits(model, inputs)
    assert torch.equal(logits(load_adapted(tmp_path / "adapter"), inputs), expected)
    merged = checkpoint.load(sparse)
    merge_adapter(merged, tmp_path / "adapter", tiny_processor)
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=1e-5)


def test_generation_goes_through_the_adapter(base: Path, inputs: Any, tmp_path: Path) -> None:
    model = adapted(base, ("lm",), alpha=80)
    lora.save(model, tmp_path / "adapter")
    texts = [
        each.generate(**copy.deepcopy(inputs), max_new_tokens=8, do_sample=False).tolist()
        for each in (model, load_adapted(tmp_path / "adapter"), checkpoint.load(base).eval())
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_folder_loads_after_the_base_moved(base: Path, inputs: Any, tmp_path: Path) -> None:
    first = shutil.copytree(base, tmp_path / "first")
    model = adapted(first, ("lm",))
    lora.save(model, tmp_path / "adapter")
    shutil.move(first, tmp_path / "second")
    assert base_of(tmp_path / "adapter") is None
    with pytest.raises(AdapterError, match=r"first\) is not there; say where it is now"):
        load_adapted(tmp_path / "adapter")
    assert torch.equal(logits(load_adapted(tmp_path / "adapter", tmp_path / "second"), inputs), logits(model, inputs))


def test_a_model_that_is_in_no_folder(tiny_model: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model)
    attach(model, ["lm"], rank=2, alpha=2, seed=0)
    lora.save(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())["base_model_name_or_path"] is None
    assert base_of(tmp_path / "adapter") is None


# ---- hostile ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_shape_names_both(base: Path, sparse: Path, tmp_path: Path) -> None:
    lora.save(adapted(base, ("lm",)), tmp_path / "adapter")
    with pytest.raises(AdapterError) as caught:
        load_adapted(tmp_path / "adapter", sparse)
    said = str(caught.value)
    assert str(tmp_path / "adapter") in said and str(sparse) in said
    assert "in_features 64" in said and "[4, 128]" in said
    with pytest.raises(ConvertError, match="does not fit the model"):
        merge_adapter(checkpoint.load(sparse), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    renamed = {name.replace("layers.1.", "layers.7."): value for name, value in stored.items()}
    save_file(renamed, tmp_path / "adapter" / lora.WEIGHTS)
    with pytest.raises(AdapterError, match=r"it adapts model\.language_model\.layers\.7\..* does not have"):
        load_adapted(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "plain LoRA: megatron_config, megatron_core"),
        ({"megatron_core": "antigravity"}, "more than plain LoRA: megatron_core"),
        ({"init_lora_weights": "pissa"}, "more than plain LoRA: init_lora_weights"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "more than plain LoRA: layer_replication"),
        ({"trainable_token_indices": [1]}, "more than plain LoRA: trainable_token_indices"),
        ({"something_new": 3}, "more than plain LoRA: something_new"),
        ({"bias": "all"}, "more than plain LoRA: bias"),
        ({"peft_type": "IA3"}, "not a LoRA adapter .peft_type is IA3"),
        ({"r": 0}, "does not fit|should be a positive"),
        ({"r": 8}, "does not fit the model"),
        ({"target_modules": ["model.language_model.layers.0.self_attn.q_proj"]}, "tensors are missing or belong"),
    ],
)
def test_settings_beyond_lora_are_refused(base: Path, tmp_path: Path, changes: Any, message: str) -> None:
    lora.save(adapted(base, ("lm",)), tmp_path / "adapter")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapted(tmp_path / "adapter", base)
    assert "antigravity" not in sys.modules


def test_broken_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter here"):
        load_adapted(tmp_path, base)
    folder = tmp_path / "adapter"
    lora.save(adapted(base, ("lm",)), folder)
    (folder / lora.WEIGHTS).write_bytes((folder / lora.WEIGHTS).read_bytes()[:-9])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cannot be read"):
        load_adapted(folder, base)
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_adapted(folder, base)
    save_file({}, folder / "other.safetensors")  # what is read must be the file that was looked at
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cannot be read"):
        load_adapted(folder, base)
    (folder / lora.CONFIG).write_text("[]")
    with pytest.raises(AdapterError, match="no JSON object"):
        base_of(folder)
    (folder / lora.CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        base_of(folder)


def test_saving_is_complete_or_not_at_all(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base, ("lm",))
    lora.save(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(lora, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        lora.save(adapted(base, ("vit",)), tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_without_peft(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.save(adapted(base, ("lm",)), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match=r"pip install 'sailvl\[lora\]'"):
        attach(checkpoint.load(base), ["lm"], rank=2, alpha=2, seed=0)
    with pytest.raises(AdapterError, match=r"pip install 'sailvl\[lora\]'"):
        open_adapter(checkpoint.load(base), tmp_path / "adapter")


# ---- the command ------------------------------------------------------------------------------------------------


def ask(capsys: Any, *words: str) -> tuple[int, str, str]:
    from sailvl.cli import _main

    code = _main(["ask", "how many?", "--max-new-tokens", "4", "--json", *words], False)
    return (code, *capsys.readouterr())


def test_ask_with_an_adapter(base: Path, sparse: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "adapter"
    lora.save(adapted(base, ("lm",)), folder)
    code, out, _ = ask(capsys, "--adapter", str(folder))
    assert code == 0 and json.loads(out)["model"] == str(base)
    _, plain, _ = ask(capsys, "--model", str(base))
    merged = checkpoint.load(base)
    merge_adapter(merged, folder)
    checkpoint.save(merged, checkpoint.SailVLProcessor.from_pretrained(base), tmp_path / "merged")
    _, expected, _ = ask(capsys, "--model", str(tmp_path / "merged"))
    answers = [json.loads(text)["answer"] for text in (out, expected, plain)]
    assert answers[0] == answers[1] != answers[2]
    code, _, said = ask(capsys, "--adapter", str(folder), "--model", str(sparse))
    assert code == 2 and str(sparse) in said and str(folder) in said
    code, _, said = ask(capsys, "--adapter", str(tmp_path))
    assert code == 2 and "no adapter here" in said
    edit(folder, base_model_name_or_path="gone")
    code, _, said = ask(capsys, "--adapter", str(folder))
    assert code == 2 and "name it with --model" in said
