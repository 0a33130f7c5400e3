"""A reference SAIL-VL2 out of transformers' own parts, and folders in the released layout written from it.

The reference shares no code with the package: AIMv2 and Qwen3 are the library's, the pixel shuffle is InternVL's, the
projector a plain ``Sequential``, placeholders are filled row by row, and greedy decoding recomputes all per token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.internvl.modeling_internvl import InternVLModel

SIDE, IMAGE, EOS = 56, 327, 301
VIT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 3}
LM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 384,
    "max_position_embeddings": 1024,
}
KIMI = (
    "{%- for message in messages -%}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>"
    "{% for part in message.content %}{% if part.type == 'image' %}<|media_start|>image<|media_pad|><|media_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{%- endfor -%}"
)


class Reference:
    """The reference model; weights are large enough that greedy answers differ from prompt to prompt."""

    def __init__(self, *, tied: bool, select_layer: int, seed: int = 0):
        torch.manual_seed(seed)
        vit_config = Aimv2VisionConfig(**VIT, image_size=SIDE, patch_size=14, use_head=False)
        self.vit = Aimv2VisionModel(vit_config).eval()
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * 48), nn.Linear(4 * 48, 64), nn.GELU(), nn.Linear(64, 64))
        self.lm = Qwen3ForCausalLM(Qwen3Config(**LM, tie_word_embeddings=tied, rope_theta=1e6)).eval()
        self.tied, self.select_layer = tied, select_layer
        with torch.no_grad():
            for module in (self.vit, self.mlp1, self.lm):
                for name, value in module.named_parameters():
                    value.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.15)
            self.mlp1[0].weight.normal_(1.0, 0.1)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch features of the selected layer, by hand over the library's modules."""
        inputs = [self.vit.embeddings(pixels)]
        for layer in self.vit.encoder.layers:
            inputs.append(layer(inputs[-1], None))
        return [*inputs[:-1], self.vit.rms_norm(inputs[-1])][self.select_layer]

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.features(pixels)
        square = hidden.reshape(len(hidden), SIDE // 14, SIDE // 14, -1).contiguous()
        merged = InternVLModel.pixel_shuffle(None, square, 0.5)
        return self.mlp1(merged.reshape(len(hidden), -1, merged.shape[-1]))

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
        """Logits [T, V] of one unpadded row."""
        embeds = self.lm.model.embed_tokens(torch.tensor(ids))
        where = [position for position, token in enumerate(ids) if token == IMAGE]
        if where:
            embeds[where] = self.image_tokens(pixels).reshape(-1, embeds.shape[-1])
        return self.lm(inputs_embeds=embeds[None], use_cache=False).logits[0]

    def greedy(self, ids: list[int], pixels: torch.Tensor | None, steps: int) -> list[int]:
        new: list[int] = []
        while len(new) < steps and EOS not in new:
            scores = self.logits(ids + new, pixels)[-1]
            scores[IMAGE - 2 : IMAGE + 1] = -torch.inf
            new.append(int(scores.argmax()))
        return new

    def official_weights(self, *, stored_head: bool) -> dict[str, torch.Tensor]:
        """Tensors under their released names."""
        vit, out = self.vit.state_dict(), {}
        out["preprocessor.patchifier.proj.weight"] = vit["embeddings.patch_embed.weight"]
        out["preprocessor.patchifier.proj.bias"] = vit["embeddings.patch_embed.bias"]
        out["preprocessor.patchifier.norm.weight"] = vit["embeddings.rms_norm.weight"]
        out["preprocessor.pos_embed"] = vit["embeddings.position_embedding.weight"][None]
        out["trunk.post_trunk_norm.weight"] = vit["rms_norm.weight"]
        for index in range(VIT["num_hidden_layers"]):
            theirs, ours = f"encoder.layers.{index}.", f"trunk.blocks.{index}."
            qkv = [vit[f"{theirs}attention.{part}_proj.weight"] for part in "qkv"]
            out[f"{ours}attn.qkv.weight"] = torch.cat(qkv)
            for new, old in (
                ("attn.proj", "attention.out_proj"),
                ("norm_1", "rms_norm1"),
                ("norm_2", "rms_norm2"),
                ("mlp.fc1", "ffn.gate_proj"),
                ("mlp.fc3", "ffn.up_proj"),
                ("mlp.fc2", "ffn.down_proj"),
            ):
                out[f"{ours}{new}.weight"] = vit[f"{theirs}{old}.weight"]
        weights = {f"vision_model.{name}": value for name, value in out.items()}
        weights |= {f"mlp1.{name}": value for name, value in self.mlp1.state_dict().items()}
        weights |= {f"language_model.{name}": value for name, value in self.lm.state_dict().items()}
        if self.tied and not stored_head:
            weights.pop("language_model.lm_head.weight", None)
        return {name: value.clone().contiguous() for name, value in weights.items()}


def official_config(reference: Reference, **changes: Any) -> dict[str, Any]:
    """``config.json`` in the released spelling, remote code pointers and all."""
    return {
        "_commit_hash": None,
        "architectures": ["SAILVLModel"],
        "auto_map": {"AutoConfig": "configuration_sailvl.SAILVLConfig", "AutoModel": "modeling_sailvl.SAILVLModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "image_token_id": IMAGE,
        "llm_config": {
            **LM,
            "_name_or_path": "",
            "architectures": ["Qwen3ForCausalLM"],
            "attn_implementation": "flash_attention_2",
            "auto_map": {"AutoConfig": "configuration_qwen3.Qwen3Config"},
            "eos_token_id": EOS,
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": reference.tied,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.3",
            "use_bfloat16": True,
        },
        "image_start_token_id": IMAGE - 2,
        "image_end_token_id": IMAGE - 1,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "sailvl",
        "ps_version": "v2",
        "select_layer": reference.select_layer,
        "template": "univl-chat",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            **VIT,
            "architectures": ["SAILViTModel"],
            "auto_map": {"AutoConfig": "configuration_sailvit.SailViTConfig"},
            "image_size": SIDE,
            "model_type": "sailvit",
            "patch_size": 14,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        },
        **changes,
    }


@pytest.fixture
def write_official(tmp_path: Path, tiny_tokenizer_file: Path) -> Callable[..., Path]:
    """Write a folder as the authors publish it."""

    def write(reference: Reference, *, stored_head: bool = False, **changes: Any) -> Path:
        folder = tmp_path / "official"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(official_config(reference, **changes)))
        weights = reference.official_weights(stored_head=stored_head)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(tiny_tokenizer_file, folder / "tokenizer.json")
        tokenizer = {
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": KIMI,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 8192,
            "auto_map": {"AutoProcessor": "processing_sailvl.SAILVLProcessor"},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        pixels = {
            "auto_map": {"AutoImageProcessor": "image_processing_sailvl.SAILVLImageProcessor"},
            "image_processor_type": "SAILVLImageProcessor",
            "image_size": SIDE,
            "max_patches": 4,
            "pad_input": True,
            "patch_size": 14,
            "use_msac": False,
            "use_thumbnail": True,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
        return folder

    return write


@pytest.fixture(scope="session")
def make_reference() -> Callable[..., Reference]:
    return Reference
