"""The language model as one GGUF file, which llama.cpp and its relatives run.

SAIL-VL2's language model is a plain Qwen3 (or Qwen3-MoE), which llama.cpp knows; it has no encoder of the AIMv2 family,
so the file answers text, and pictures enter only where a program hands over image embeddings. Weights are written one
at a time and read back afterwards; norms and routers stay in fp32, as llama.cpp expects.

Tokens: llama.cpp splits text with its own copy of Qwen2's rule, so a tokenizer with another rule is refused. Rows of
the vocabulary without a token are named ``[PAD...]`` and marked unused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sailvl.files import force_to_disk

from . import SailVLForConditionalGeneration, SailVLProcessor
from .publish import ConvertError, Report, precision_of, refuse_existing

GGUF_TYPES = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}
"""Names of the storage types of matrices to those of the format."""

_QWEN2_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def export_gguf(
    model: SailVLForConditionalGeneration, processor: SailVLProcessor, out: Path, *, kind: str = "bf16"
) -> Report:
    """Write the language model and its tokenizer to ``out``, matrices in ``kind``.

    ``max_difference`` of the report is the largest error of a weight, relative to the largest weight of its row.
    Raises ConvertError if the format cannot hold the model, the file read back is not what was meant, or the package
    ``gguf`` is not installed; nothing is then left at ``out``.
    """
    gguf = _package()
    refuse_existing(out)
    if kind not in GGUF_TYPES:
        raise ConvertError(f"unknown GGUF type '{kind}'; types: {', '.join(GGUF_TYPES)}")
    text = model.config.text_config
    _check(model)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.converting-{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(staging, {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}[text.model_type])
        _describe(writer, gguf, model, kind, out.stem)
        _tokens(writer, gguf, processor, text)
        for name, tensor in _tensors(model):
            stored = _type_of(gguf, name, tensor, kind)
            block, size = gguf.GGML_QUANT_SIZES[stored]
            num_bytes = tensor.numel() // block * size
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), num_bytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(model):
            writer.write_tensor_data(_stored(gguf, name, tensor, _type_of(gguf, name, tensor, kind)))
        writer.close()
        difference = _read_back(gguf, staging, model, kind)
        force_to_disk(staging)
        num_bytes = staging.stat().st_size
        refuse_existing(out)
        staging.rename(out)
        force_to_disk(out.parent)
    finally:
        staging.unlink(missing_ok=True)
    number = sum(tensor.numel() for _, tensor in _tensors(model))
    left_out = ["the vision encoder and the projector: llama.cpp has no AIMv2 encoder"]
    notes = [f"matrices {precision_of(model)} -> {kind}, norms in fp32"]
    return Report(
        out=out,
        kind="gguf",
        num_parameters=number,
        num_bytes=num_bytes,
        dtype=kind,
        max_difference=difference,
        left_out=left_out,
        notes=notes,
    )


def _package() -> Any:
    try:
        import gguf  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ConvertError("writing GGUF needs a package: pip install 'sailvl[gguf]'") from error
    return gguf


def _check(model: SailVLForConditionalGeneration) -> None:
    """Refuse what the format's qwen3 cannot say."""
    config, text = model.config, model.config.text_config
    faults = []
    if text.rope_parameters.get("rope_type", "default") != "default":
        faults.append(f"rope_type '{text.rope_parameters['rope_type']}'")
    if set(getattr(text, "layer_types", None) or ()) - {"full_attention"} or text.use_sliding_window:
        faults.append("sliding windows")
    if text.attention_bias:
        faults.append("attention biases")
    if text.model_type == "qwen3_moe":
        if any(not hasattr(layer.mlp, "experts") for layer in model.model.language_model.layers):
            faults.append("dense layers between sparse ones")
        if not text.norm_topk_prob:
            faults.append("expert weights that do not sum to one (norm_topk_prob false)")
        if config.router_bias is not None:
            faults.append("a router bias")
    if faults:
        raise ConvertError(f"GGUF's {text.model_type} has no {', no '.join(faults)}: this model cannot be written")


def _describe(writer: Any, gguf: Any, model: SailVLForConditionalGeneration, kind: str, name: str) -> None:
    text = model.config.text_config
    writer.add_name(name)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_vocab_size(text.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{GGUF_TYPES[kind]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if text.model_type == "qwen3_moe":
        writer.add_expert_count(text.num_experts)
        writer.add_expert_used_count(text.num_experts_per_tok)
        writer.add_expert_feed_forward_length(text.moe_intermediate_size)


def _tokens(writer: Any, gguf: Any, processor: SailVLProcessor, text: Any) -> None:
    tokenizer = processor.tokenizer
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = [
        part.get("pattern", {}).get("Regex")
        for part in (stored.get("pre_tokenizer") or {}).get("pretokenizers", [])
        if part.get("type") == "Split"
    ]
    if stored["model"]["type"] != "BPE" or len(rules) != 1 or rules[0] not in _QWEN2_SPLITS:
        raise ConvertError("the tokenizer does not split text as Qwen's does: llama.cpp would read other tokens")
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if index < text.vocab_size}
    tokens = [f"[PAD{index}]" for index in range(text.vocab_size)]
    types = [gguf.TokenType.UNUSED] * text.vocab_size
    added = tokenizer.added_tokens_decoder
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = gguf.TokenType.NORMAL
        if index in added:
            types[index] = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if processor.chat_template:
        writer.add_chat_template(processor.chat_template)


def _tensors(model: SailVLForConditionalGeneration) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the language model under the format's names, one after the other."""
    lm = model.model.language_model
    yield "token_embd.weight", lm.embed_tokens.weight
    yield "output_norm.weight", lm.norm.weight
    if not model.config.text_config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    for index, layer in enumerate(lm.layers):
        block, attention = f"blk.{index}.", layer.self_attn
        yield f"{block}attn_norm.weight", layer.input_layernorm.weight
        yield f"{block}ffn_norm.weight", layer.post_attention_layernorm.weight
        for part in "qkv":
            yield f"{block}attn_{part}.weight", getattr(attention, f"{part}_proj").weight
        yield f"{block}attn_q_norm.weight", attention.q_norm.weight
        yield f"{block}attn_k_norm.weight", attention.k_norm.weight
        yield f"{block}attn_output.weight", attention.o_proj.weight
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts
            gate, up = experts.gate_up_proj.chunk(2, dim=1)
            yield f"{block}ffn_gate_inp.weight", layer.mlp.gate.weight
            yield f"{block}ffn_gate_exps.weight", gate
            yield f"{block}ffn_up_exps.weight", up
            yield f"{block}ffn_down_exps.weight", experts.down_proj
        else:
            for part in ("gate", "up", "down"):
                yield f"{block}ffn_{part}.weight", getattr(layer.mlp, f"{part}_proj").weight


def _type_of(gguf: Any, name: str, tensor: torch.Tensor, kind: str) -> Any:
    """Vectors and routers in fp32, matrices in ``kind``."""
    if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        return gguf.GGMLQuantizationType.F32
    stored = gguf.GGMLQuantizationType[GGUF_TYPES[kind]]
    block, _ = gguf.GGML_QUANT_SIZES[stored]
    if tensor.shape[-1] % block:
        raise ConvertError(f"{name}: rows of {tensor.shape[-1]} do not part into blocks of {block}, as {kind} needs")
    return stored


def _stored(gguf: Any, name: str, tensor: torch.Tensor, kind: Any) -> np.ndarray:
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    with np.errstate(over="ignore"):
        array = gguf.quants.quantize(values, kind)
    if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(array).all():
        raise ConvertError(f"{name}: weights do not fit into f16: its range is too small")
    return np.ascontiguousarray(array)


def _read_back(gguf: Any, path: Path, model: SailVLForConditionalGeneration, kind: str) -> float:
    """The largest error of a weight, relative to its row's largest; raises ConvertError if the file is another."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    allowed = {"bf16": 2**-8, "f16": 2**-10, "q8_0": 0.6 / 127}[kind]
    worst = 0.0
    for name, tensor in _tensors(model):
        entry = found.pop(name, None)
        if entry is None or tuple(entry.shape) != tuple(reversed(tensor.shape)):
            raise ConvertError(f"{path.name}: {name} is missing, or of another shape than was written")
        back = torch.from_numpy(np.array(gguf.quants.dequantize(entry.data, entry.tensor_type)))
        wide = tensor.detach().to(torch.float32)
        largest = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
        error = float(((back.reshape(wide.shape) - wide) / largest).abs().max())
        if not error <= allowed:
            raise ConvertError(f"{path.name}: {name} is off by {error:.3g} of its row's largest weight")
        worst = max(worst, error)
    if found:
        raise ConvertError(f"{path.name}: {len(found)} tensors are left over, first {sorted(found)[0]}")
    return worst
