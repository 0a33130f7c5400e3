"""The GGUF file, read back with the format's own reader: names, shapes, hyper-parameters, tokens, weights."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailvl.model import checkpoint, gguf_export
from sailvl.model.convert import ConvertError
from sailvl.model.gguf_export import export_gguf

gguf = pytest.importorskip("gguf")

BLOCK = {
    "attn_norm": (64,),
    "ffn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_q_norm": (16,),
    "attn_k_norm": (16,),
    "attn_output": (64, 64),
}
DENSE = {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
SPARSE = {
    "ffn_gate_inp": (8, 64),
    "ffn_gate_exps": (8, 32, 64),
    "ffn_up_exps": (8, 32, 64),
    "ffn_down_exps": (8, 64, 32),
}


def build(processor: Any, *, moe: bool = False, **lm: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "max_position_embeddings": 2048, "moe_intermediate_size": 32} if moe else {}
    sizes |= {"head_dim": 16, "max_position_embeddings": 2048}
    vit = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = "nano-moe" if moe else "nano"
    return checkpoint.build(checkpoint.config_for(size, processor=processor, vit=vit, lm={**sizes, **lm}), seed=0)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, weights, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("kind", "stored", "tolerance"), [("bf16", "BF16", 2**-8), ("q8_0", "Q8_0", 2**-7)])
def test_what_is_in_the_file(
    tiny_processor: Any, tmp_path: Path, moe: bool, kind: str, stored: str, tolerance: float
) -> None:
    model = build(tiny_processor, moe=moe)
    report = export_gguf(model, tiny_processor, tmp_path / "lm.gguf", kind=kind)
    fields, weights, types = read(tmp_path / "lm.gguf")
    arch = "qwen3moe" if moe else "qwen3"
    expected = {
        "general.architecture": arch,
        f"{arch}.context_length": 2048,
        f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 128,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 16,
        f"{arch}.attention.value_length": 16,
        f"{arch}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tiny_processor.tokenizer.eos_token_id,
    }
    if moe:
        expected |= {f"{arch}.expert_count": 8, f"{arch}.expert_used_count": 2}
        expected |= {f"{arch}.expert_feed_forward_length": 32}
    assert {name: fields.get(name) for name in expected} == expected
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.chat_template"] == tiny_processor.chat_template
    # Names and shapes, written down independently; a tied head has no tensor of its own.
    rows = model.config.text_config.vocab_size
    shapes = {"token_embd.weight": (rows, 64), "output_norm.weight": (64,)}
    for index in range(2):
        shapes |= {f"blk.{index}.{name}.weight": size for name, size in {**BLOCK, **(SPARSE if moe else DENSE)}.items()}
    assert {name: value.shape for name, value in weights.items()} == shapes
    assert all(types[name] == ("F32" if len(size) == 1 or "inp" in name else stored) for name, size in shapes.items())
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE if moe else gguf.MODEL_ARCH.QWEN3, 2)
    assert {known.get_name(name.removesuffix(".weight")) for name in weights} == {
        n.removesuffix(".weight") for n in shapes
    }
    # Weights, from the model's own modules.
    layer = model.model.language_model.layers[1]
    pairs = {
        "token_embd.weight": model.model.language_model.embed_tokens.weight,
        "blk.1.attn_q.weight": layer.self_attn.q_proj.weight,
        "blk.1.attn_k_norm.weight": layer.self_attn.k_norm.weight,
        "blk.1.attn_output.weight": layer.self_attn.o_proj.weight,
    }
    if moe:
        pairs["blk.1.ffn_gate_inp.weight"] = layer.mlp.gate.weight
        pairs["blk.1.ffn_gate_exps.weight"] = layer.mlp.experts.gate_up_proj[:, :32]
        pairs["blk.1.ffn_up_exps.weight"] = layer.mlp.experts.gate_up_proj[:, 32:]
        pairs["blk.1.ffn_down_exps.weight"] = layer.mlp.experts.down_proj
    else:
        pairs["blk.1.ffn_gate.weight"] = layer.mlp.gate_proj.weight
        pairs["blk.1.ffn_up.weight"] = layer.mlp.up_proj.weight
        pairs["blk.1.ffn_down.weight"] = layer.mlp.down_proj.weight
    for name, value in pairs.items():
        largest = float(value.detach().abs().max())
        np.testing.assert_allclose(weights[name], value.detach().numpy(), atol=tolerance * largest, err_msg=name)
    assert 0 < report.max_difference < tolerance and report.dtype == kind
    assert [path.name for path in tmp_path.iterdir()] == ["lm.gguf"]


def test_an_untied_head_and_tokens(tiny_processor: Any, tmp_path: Path) -> None:
    model = build(tiny_processor, tie_word_embeddings=False)
    export_gguf(model, tiny_processor, tmp_path / "lm.gguf", kind="f16")
    fields, weights, _ = read(tmp_path / "lm.gguf")
    np.testing.assert_allclose(weights["output.weight"], model.lm_head.weight.detach().numpy(), atol=1e-3)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokenizer = tiny_processor.tokenizer
    assert len(tokens) == len(types) == model.config.text_config.vocab_size == 384
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert tokens[len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), 384)]
    kinds = gguf.TokenType
    for token, kind in (
        ("<IMG_CONTEXT>", kinds.CONTROL),
        ("<|im_end|>", kinds.CONTROL),
        ("<think>", kinds.USER_DEFINED),
        ("e", kinds.NORMAL),
    ):
        assert types[tokens.index(token)] == kind, token
    assert set(types[len(tokenizer) :]) == {kinds.UNUSED}
    # Byte-pair merging by hand, with the file's tokens and merges alone, gives the tokenizer's ids.
    merges = {tuple(pair.split(" ")): rank for rank, pair in enumerate(fields["tokenizer.ggml.merges"])}
    ids = []
    for word in re.findall(r" ?[a-z]+|[.?]", "what is in the picture? a red square"):
        parts = ["Ġ" if char == " " else char for char in word]
        while len(parts) > 1:
            ranks = [(merges.get(pair, 1 << 30), index) for index, pair in enumerate(itertools.pairwise(parts))]
            rank, index = min(ranks)
            if rank == 1 << 30:
                break
            parts[index : index + 2] = ["".join(parts[index : index + 2])]
        ids += [tokens.index(part) for part in parts]
    assert ids == tokenizer("what is in the picture? a red square").input_ids


def test_what_the_format_cannot_say(tiny_processor: Any, tmp_path: Path) -> None:
    out = tmp_path / "lm.gguf"
    model = build(tiny_processor)
    yarn = copy.deepcopy(model)
    yarn.config.text_config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(ConvertError, match="rope_type 'yarn'"):
        export_gguf(yarn, tiny_processor, out)
    sparse = build(tiny_processor, moe=True, norm_topk_prob=False)
    sparse.config.router_bias = [[0.1] * 8] * 2
    with pytest.raises(ConvertError, match=r"norm_topk_prob false\), no a router bias"):
        export_gguf(sparse, tiny_processor, out)
    with pytest.raises(ConvertError, match="unknown GGUF type 'q4'"):
        export_gguf(model, tiny_processor, out, kind="q4")
    narrow = build(tiny_processor, hidden_size=48)
    with pytest.raises(ConvertError, match="rows of 48 do not part into blocks of 32"):
        export_gguf(narrow, tiny_processor, out, kind="q8_0")
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ConvertError, match=r"blk.0.ffn_up.weight: weights do not fit into f16"):
        export_gguf(huge, tiny_processor, out, kind="f16")
    assert list(tmp_path.iterdir()) == []


def test_another_way_to_split_text_is_refused(tiny_processor: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    processor = copy.deepcopy(tiny_processor)
    stored = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stored))
    with pytest.raises(ConvertError, match="does not split text as Qwen's does"):
        export_gguf(build(tiny_processor), processor, tmp_path / "lm.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_refused(
    tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf_export._stored

    def wrong(package: Any, name: str, tensor: torch.Tensor, kind: Any) -> np.ndarray:
        changed = tensor.detach() * 1.05 if name == "blk.1.attn_v.weight" else tensor
        return real(package, name, changed, kind)

    monkeypatch.setattr(gguf_export, "_stored", wrong)
    with pytest.raises(ConvertError, match=r"blk.1.attn_v.weight is off by"):
        export_gguf(build(tiny_processor), tiny_processor, tmp_path / "lm.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(tiny_processor: Any, tmp_path: Path) -> None:
    (tmp_path / "lm.gguf").write_text("mine")
    with pytest.raises(ConvertError, match="exists"):
        export_gguf(build(tiny_processor), tiny_processor, tmp_path / "lm.gguf")
    assert (tmp_path / "lm.gguf").read_text() == "mine"


def test_without_the_package(tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConvertError, match=r"pip install 'sailvl\[gguf\]'"):
        export_gguf(build(tiny_processor), tiny_processor, tmp_path / "lm.gguf")
