"""SAIL-ViT: pixels of square tiles, or of pictures of any size, to patch features.

An AIMv2 encoder (technical report arXiv 2509.14033, section 2.1): patch convolution, RMSNorm, learned absolute position
table, pre-norm blocks with a fused ``qkv`` and a SwiGLU, final RMSNorm, no biases but the convolution's. Module names
are those of the released checkpoints, so that loading only renames tensors and never converts them: servers honour
renames alone.

At any resolution (section 2.1, "SAIL-ViT-AnyRes"; the report says that pre-trained position embeddings are resized to
the picture, its figure says "Interpolate 2D RoPE") the tensors are the same: the position table is stretched to each
picture's grid, and queries and keys are turned by row and column. All pictures go through the encoder as one sequence
of patches, none of which sees another picture.

Cost: 1.55 TFLOP per 448-pixel tile at SAIL-ViT-Huge; 16 times the patches, and 256 times the attention, at 1792 pixels.
The activation after the patch convolution is made contiguous once; left strided, that layout survives every residual
addition and costs about a tenth of the time.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import PACKED, PACKING_IMPLEMENTATIONS, eager_attention, packed_attention
from .configuration import SailViTConfig
from .positions import sincos, stretched, turn, turns


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
    """Tiles [N, 3, S, S] to normed patch embeddings [N, P, D]; patches cut already, [P, 3, p, p], to [1, P, D]."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.norm = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels: torch.Tensor, are_patches: bool = False) -> torch.Tensor:
        if are_patches:  # the convolution as a matrix product, 3 times as fast
            embedded = nn.functional.linear(pixels.flatten(1), self.proj.weight.flatten(1), self.proj.bias)
            return self.norm(embedded[None])
        return self.norm(self.proj(pixels).flatten(2).transpose(1, 2).contiguous())


class Preprocessor(nn.Module):
    """Patch embeddings plus the learned absolute position table (1, P, D)."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.hidden_size))

    def forward(self, pixels: torch.Tensor, grids: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        patches = self.patchifier(pixels, are_patches=grids is not None)
        if grids is None:
            return patches + self.pos_embed
        return patches + stretched(self.pos_embed, grids) if self.config.interpolate_positions else patches


class Attention(nn.Module):
    """Full attention within a tile or picture."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_NPD: torch.Tensor,
        turned: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        max_length: int | None = None,
    ) -> torch.Tensor:
        """``offsets`` (int32 [pictures + 1]) part one row of patches into pictures; ``turned`` is from ``turns``."""
        tiles, patches, width = hidden_NPD.shape
        qkv = self.qkv(hidden_NPD).view(tiles, patches, 3, self.num_heads, self.head_size)
        query, key, value = qkv.unbind(2)
        if turned is not None:
            query, key = turn(query, turned), turn(key, turned)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if not tiles * patches:  # a pack without pictures owes every rank a (zero) gradient; attention rejects no rows
            return self.proj(value.reshape(tiles, patches, width))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        packing: dict[str, Any] = {}
        if offsets is not None:
            packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            packing |= {"max_length_q": max_length, "max_length_k": max_length}
            # Any other implementation would let pictures see each other.
            attend = attend if self.config._attn_implementation in PACKING_IMPLEMENTATIONS else packed_attention
        mixed, _ = attend(
            self,
            query,
            key,
            value,
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_size**-0.5,
            is_causal=False,
            **packing,
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

    def forward(self, hidden_NPD: torch.Tensor, **packing: Any) -> torch.Tensor:
        hidden_NPD = hidden_NPD + self.attn(self.norm_1(hidden_NPD), **packing)
        return hidden_NPD + self.mlp(self.norm_2(hidden_NPD))


class Trunk(nn.Module):
    """All blocks and the final norm."""

    def __init__(self, config: SailViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = SailViTRMSNorm(config.hidden_size, config.rms_norm_eps)


class SailViT(PreTrainedModel):
    """Tiles or pictures to patch features; see the module docstring."""

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
        if config.any_resolution and not (config.rope_2d or config.interpolate_positions):
            raise ValueError("an encoder of any resolution needs rope_2d or interpolate_positions, or sees no places")
        if config.any_resolution and config.rope_2d and config.hidden_size // config.num_attention_heads % 4:
            raise ValueError(
                f"rope_2d needs heads of a multiple of 4 features, got {config.hidden_size} / "
                f"{config.num_attention_heads}"
            )
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Preprocessor):
            init.copy_(module.pos_embed, sincos(self.config).to(module.pos_embed.dtype))

    def get_input_embeddings(self) -> nn.Module:
        return self.preprocessor.patchifier.proj

    def forward(
        self,
        pixel_values: torch.Tensor,
        select_layer: int = -1,
        image_grid_hw: Any = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Features [N, P, D] of tiles ``pixel_values`` [N, 3, S, S].

        At any resolution: features [patches, D] of patches [patches, 3, p, p], row by row, of pictures one after the
        other; ``image_grid_hw`` [pictures, 2] says how many rows and columns of patches each has.
        ``select_layer`` indexes [input of block 0, ..., input of the last block, final normed output]; blocks after a
        selected input are not run. ``output_hidden_states`` gives that list too, up to the selected one.
        Raises ValueError for pixels of another size, grids that do not add up to the patches, or an index out of range.
        """
        grids = self._grids(pixel_values, image_grid_hw)
        side = self.config.image_size if grids is None else self.config.patch_size
        layers = self.config.num_hidden_layers
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (self.config.num_channels, side, side):
            raise ValueError(
                f"pixel_values must be [tiles, {self.config.num_channels}, {side}, {side}], "
                f"got {list(pixel_values.shape)}: make them with this model's processor"
            )
        num_blocks = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 <= num_blocks <= layers:
            raise ValueError(f"select_layer {select_layer} is outside the encoder's {layers} blocks")
        hidden = self.preprocessor(pixel_values.to(self.preprocessor.pos_embed.dtype), grids)
        packing = {} if grids is None else self._packing(grids, hidden)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        inputs: list[torch.Tensor] = []
        for block in self.trunk.blocks[:num_blocks]:
            if asked:
                inputs.append(hidden)
            hidden = block(hidden, **packing)
        if num_blocks == layers:
            hidden = self.trunk.post_trunk_norm(hidden)
        hidden, *inputs = (each if grids is None else each[0] for each in (hidden, *inputs))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(*inputs, hidden) if asked else None)

    def _grids(self, pixels: torch.Tensor, image_grid_hw: Any) -> list[tuple[int, int]] | None:
        """(rows, columns) in patches of every picture; None for an encoder of tiles."""
        if not self.config.any_resolution:
            if image_grid_hw is not None:
                raise ValueError("image_grid_hw is for encoders of any resolution, and this one sees tiles")
            return None
        if image_grid_hw is None:
            raise ValueError("an encoder of any resolution needs image_grid_hw beside pixel_values")
        grids = [(int(rows), int(columns)) for rows, columns in torch.as_tensor(image_grid_hw).tolist()]
        expected = sum(rows * columns for rows, columns in grids)
        if expected != len(pixels) or min((min(grid) for grid in grids), default=1) < 1:
            raise ValueError(f"grids {grids} (rows, columns) hold {expected} patches, pixel_values has {len(pixels)}")
        return grids

    def _packing(self, grids: Sequence[tuple[int, int]], hidden: torch.Tensor) -> dict[str, Any]:
        """What the attention of every block needs to keep pictures apart and to turn queries and keys."""
        lengths = [rows * columns for rows, columns in grids]
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        chosen = self.config._attn_implementation
        if chosen in PACKING_IMPLEMENTATIONS and chosen != PACKED:  # ours reads the offsets on the host
            offsets = offsets.to(hidden.device)
        return {
            "turned": turns(self.config, grids, hidden),
            "offsets": offsets,
            "max_length": max(lengths, default=0),
        }
