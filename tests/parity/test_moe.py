"""Sparse models in the released layout compute what an independent model of transformers' own parts computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sailvl.model import SailVLForConditionalGeneration, SailVLMoeForConditionalGeneration, checkpoint

LM = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
}
EOS = 301
SHAPES = {"wide": (130, 60), "tall": (50, 170), "small": (30, 30)}


@pytest.fixture
def write(make_reference: Any, write_official: Callable[..., Path]) -> Callable[..., tuple[Any, Path]]:
    """Makes a reference with a Qwen3-MoE language model, and its folder as the authors would publish it."""

    class Sparse(make_reference):
        def __init__(self, tied: bool, select_layer: int, **lm: Any):
            super().__init__(tied=tied, select_layer=select_layer)
            self.fields = {**LM, **lm}
            torch.manual_seed(7)
            config = Qwen3MoeConfig(**self.fields, tie_word_embeddings=tied, rope_theta=1e6)
            config._experts_implementation = "eager"
            self.lm = Qwen3MoeForCausalLM(config).eval()
            with torch.no_grad():
                for name, value in self.lm.named_parameters():
                    value.normal_(1.0 if "norm" in name else 0.0, 0.2)

        def official_weights(self, *, stored_head: bool) -> dict[str, torch.Tensor]:
            weights = super().official_weights(stored_head=stored_head)
            for name in [name for name in weights if ".mlp.experts." in name]:
                merged, layer = weights.pop(name), name.rpartition("experts.")[0] + "experts"
                for expert, matrix in enumerate(merged):
                    halves = zip(("gate", "up"), matrix.chunk(2), strict=True)
                    parts = dict(halves) if name.endswith("gate_up_proj") else {"down": matrix}
                    for part, value in parts.items():
                        weights[f"{layer}.{expert}.{part}_proj.weight"] = value.clone()
            return weights

    def make(tied: bool, select_layer: int = -1, stored_head: bool = True, **lm: Any) -> tuple[Any, Path]:
        reference = Sparse(tied, select_layer, **lm)
        config = {
            **reference.fields,
            "architectures": ["Qwen3MoeForCausalLM"],
            "attn_implementation": "flash_attention_2",
            "decoder_sparse_step": 1,
            "eos_token_id": EOS,
            "mlp_only_layers": lm.get("mlp_only_layers", []),
            "model_type": "qwen3_moe",
            "output_router_logits": True,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
        }
        return reference, write_official(reference, stored_head=stored_head, llm_config=config)

    return make


def picture(shape: str, seed: int) -> Image.Image:
    width, height = SHAPES[shape]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


CASES = {
    "several tiles": ([("wide", 0)], "What is in the picture?"),
    "several images": ([("tall", 1), ("small", 2), ("wide", 3)], "a red square?"),
    "one tile": ([("small", 4)], "how many?"),
    "no image": ([], "a blue circle and a red one"),
}


@pytest.mark.parametrize(
    ("tied", "stored_head", "select_layer", "fields"),
    [
        (False, True, -1, {}),
        (True, True, -2, {}),
        (True, False, -2, {"norm_topk_prob": False}),
        (False, True, -1, {"num_experts_per_tok": 3, "mlp_only_layers": [1]}),
    ],
)
def test_logits_and_greedy_answers(
    write: Callable[..., tuple[Any, Path]], tied: bool, stored_head: bool, select_layer: int, fields: dict[str, Any]
) -> None:
    reference, folder = write(tied, select_layer, stored_head, **fields)
    processor = AutoProcessor.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="sailvl_packed"
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert isinstance(model, SailVLMoeForConditionalGeneration)
    answers = {}
    for name, (pictures, text) in CASES.items():
        images = [picture(*given) for given in pictures]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=images or None, text=prompt, return_tensors="pt")
        ids, pixels = inputs["input_ids"][0].tolist(), inputs.get("pixel_values")
        expected = reference.logits(ids, pixels)
        with torch.no_grad():
            actual = model(**inputs).logits[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        answers[name] = reference.greedy(ids, pixels, 6)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert out[0, len(ids) :].tolist() == answers[name], name
    assert len({tuple(answer) for answer in answers.values()}) == len(CASES), "answers must differ for the test to bite"


@pytest.mark.parametrize("tied", [True, False])
def test_saving_writes_released_names(write: Callable[..., tuple[Any, Path]], tmp_path: Path, tied: bool) -> None:
    reference, folder = write(tied, mlp_only_layers=[0])
    model, processor = checkpoint.load(folder), AutoProcessor.from_pretrained(folder)
    checkpoint.save(model, processor, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    expected = reference.official_weights(stored_head=not tied)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    again = SailVLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
