"""SAIL-ViT: pixels of square tiles to patch features.

An AIMv2 encoder (technical report arXiv 2509.14033, section 2.1): patch convolution, RMSNorm, learned absolute position
table, pre-norm blocks with a fused ``qkv`` and a SwiGLU, final RMSNorm, no biases but the convolution's. Module names
are those of the released checkpoints, so that loading only renames tensors and never converts them: servers honour
renames alone.

Cost: 1.55 TFLOP per 448-pixel tile at SAIL-ViT-Huge. The activation after the patch convolution is made contiguous
once; left strided, that layout survives every residual addition and costs about a tenth of the time.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention
from .configuration import SailViTConfig

_POSITION_AMPLITUDE = 1.0
"""Amplitude of a fresh position table: as large as the patch features, which have unit RMS."""


class SailViTRMSNorm(nn.Module):
    """RMSNorm computed in fp32, cast back, then scaled."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.float32) if hidden.dtype != torch.float64 else hidden
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(hidden.dtype) * self.weight


class Patchifier(nn.Module):
    """Tiles [N, 3, S, S] to normed patch embeddings [N, P, D]."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.norm = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(pixels).flatten(2).transpose(1, 2).contiguous())


class Preprocessor(nn.Module):
    """Patch embeddings plus the learned absolute position table (1, P, D)."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.patchifier = Patchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.hidden_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patchifier(pixels) + self.pos_embed


class Attention(nn.Module):
    """Full attention within a tile."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_NPD: torch.Tensor) -> torch.Tensor:
        tiles, patches, width = hidden_NPD.shape
        qkv = self.qkv(hidden_NPD).view(tiles, patches, 3, self.num_heads, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if tiles == 0:  # a pack without pictures still owes every rank a (zero) gradient; attention rejects no rows
            return self.proj(value.reshape(tiles, patches, width))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(
            self,
            query,
            key,
            value,
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_size**-0.5,
            is_causal=False,
        )
        return self.proj(mixed.reshape(tiles, patches, width))


class SwiGLU(nn.Module):
    """``fc2(silu(fc1 x) * fc3 x)``."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.silu(self.fc1(hidden)) * self.fc3(hidden))


class Block(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each with a residual."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.norm_1 = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm_2 = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden_NPD: torch.Tensor) -> torch.Tensor:
        hidden_NPD = hidden_NPD + self.attn(self.norm_1(hidden_NPD))
        return hidden_NPD + self.mlp(self.norm_2(hidden_NPD))


class Trunk(nn.Module):
    """All blocks and the final norm."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)


class SailViT(PreTrainedModel):
    """Tiles to patch features; see the module docstring."""

    config_class = SailViTConfig
    config: SailViTConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SailViTConfig):
        super().__init__(config)
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Preprocessor):
            init.copy_(module.pos_embed, _sincos(self.config).to(module.pos_embed.dtype))

    def get_input_embeddings(self) -> nn.Module:
        return self.preprocessor.patchifier.proj

    def forward(self, pixel_values: torch.Tensor, select_layer: int = -1, **kwargs: Any) -> BaseModelOutput:
        """Features [N, P, D] of tiles ``pixel_values`` [N, 3, S, S].

        ``select_layer`` indexes [input of block 0, ..., input of the last block, final normed output]; blocks after a
        selected input are not run. Raises ValueError for pixels of another size or an index out of range.
        """
        side, layers = self.config.image_size, self.config.num_hidden_layers
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (self.config.num_channels, side, side):
            raise ValueError(
                f"pixel_values must be [tiles, {self.config.num_channels}, {side}, {side}], "
                f"got {list(pixel_values.shape)}: make them with this model's processor"
            )
        num_blocks = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= num_blocks <= layers:
            raise ValueError(f"select_layer {select_layer} is outside the encoder's {layers} blocks")
        hidden = self.preprocessor(pixel_values.to(self.preprocessor.pos_embed.dtype))
        for block in self.trunk.blocks[:num_blocks]:
            hidden = block(hidden)
        if num_blocks == layers:
            hidden = self.trunk.post_trunk_norm(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


def _sincos(config: SailViTConfig) -> torch.Tensor:
    """A 2-D sine-cosine table (1, P, D): half the width tells the row, half the column.

    Wavelengths run from two pi patches to two pi sides: longer ones would be the same everywhere on the grid.
    """
    per_axis, count = config.image_size // config.patch_size, config.hidden_size // 4
    steps = torch.exp(-math.log(per_axis) * torch.arange(count) / max(count, 1))
    angles = torch.arange(per_axis)[:, None] * steps
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None, :].expand(per_axis, per_axis, -1)
    columns = axis[None, :, :].expand(per_axis, per_axis, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(1, per_axis * per_axis, 4 * count)
    padded = torch.zeros(1, per_axis * per_axis, config.hidden_size)
    padded[..., : 4 * count] = table
    return _POSITION_AMPLITUDE * padded
