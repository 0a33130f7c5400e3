"""Configuration of SAIL-VL2, read from the released ``config.json`` as it is.

A release names its language model ``llm_config`` and points to remote code by ``auto_map``; here it becomes
``text_config`` and the remote code is ignored. Keys a release leaves out take the *published class defaults*
(``select_layer`` -4, ``ps_version`` v1, an encoder of width 1024), not the values of the 2B model: a folder that relies
on them must be read as its authors' code reads it. Only pixel shuffle v2 exists here; another version is refused when a
model is built, so that the bare default configuration can still be made (saving compares against it).

Cost: none. Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

ARCHITECTURES = {"qwen3": "SailVLForConditionalGeneration", "qwen3_moe": "SailVLMoeForConditionalGeneration"}
"""Language model type to the architecture name written to ``config.json``; releases have one name for both."""

_FOREIGN_KEYS = (
    "architectures",
    "attn_implementation",
    "torch_dtype",
    "auto_map",
    "_name_or_path",
    "transformers_version",
)


class SailViTConfig(PreTrainedConfig):
    """SAIL-ViT: an AIMv2 encoder. Defaults are those of the published class; SAIL-ViT-Huge is 24 x 1536.

    ``any_resolution`` sees pictures as they are instead of tiles. It knows where a patch lies by the learned table,
    stretched to the picture (``interpolate_positions``), and by a rotary embedding of rows and columns (``rope_2d``).
    """

    model_type = "sailvit"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    rms_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    projection_dropout: float | int = 0.0
    qkv_bias: bool = False
    use_bias: bool = False
    initializer_range: float = 0.02
    any_resolution: bool = False
    interpolate_positions: bool = True
    rope_2d: bool = True
    rope_theta: float = 10_000.0

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size // self.patch_size) ** 2


class SailVLConfig(PreTrainedConfig):
    """A vision encoder, a projector and a language model.

    ``select_layer`` -1 takes the encoder's normed output, another index the input of that block. The three image token
    ids are absent from releases: their defaults are the released tokenizer's, and a processor checks them.
    ``router_bias`` [sparse layers][experts] is added to the routers' scores where experts are chosen (see ``moe``).
    """

    model_type = "sailvl"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: Any = None
    vision_config: Any = None
    select_layer: int = -4
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    image_start_token_id: int = 151669
    image_end_token_id: int = 151670
    image_token_id: int = 151671
    tie_word_embeddings: bool = False
    router_bias: list[list[float]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        released = kwargs.pop("llm_config", None)
        if self.text_config is None:
            self.text_config = released
        self.text_config = _text_config(self.text_config)
        self.vision_config = _vision_config(self.vision_config)
        # The head is tied or not where the language model says so; releases repeat the key here, sometimes wrongly.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        # One released name stands for dense and sparse models alike: servers need the one that says which.
        self.architectures = [ARCHITECTURES[self.text_config.model_type]]

    @property
    def merge(self) -> int:
        """Patches per token along each axis."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens one tile takes."""
        return (self.vision_config.image_size // self.vision_config.patch_size // self.merge) ** 2


def _text_config(given: Any) -> PreTrainedConfig:
    """The language model's configuration from a release's dict; raises ValueError for a family not supported."""
    if isinstance(given, PreTrainedConfig):
        kind, config = given.model_type, given
    else:
        values = {key: value for key, value in (given or {}).items() if key not in _FOREIGN_KEYS}
        kind = values.pop("model_type", "qwen3")
        config = AutoConfig.for_model(kind, **values) if kind in ARCHITECTURES else Qwen3Config()
    if kind not in ARCHITECTURES:
        raise ValueError(f"llm_config.model_type is '{kind}'; supported language models: {sorted(ARCHITECTURES)}")
    if kind == "qwen3_moe":
        config.output_router_logits = False  # nothing here reads them, and every forward pass would keep them
    return config


def _vision_config(given: Any) -> SailViTConfig:
    if isinstance(given, SailViTConfig):
        return given
    values = {key: value for key, value in (given or {}).items() if key not in _FOREIGN_KEYS}
    kind = values.pop("model_type", "sailvit")
    # AIMv2 is the family the encoder comes from, and some folders keep its name.
    if kind not in ("sailvit", "aimv2"):
        raise ValueError(f"vision_config.model_type is '{kind}'; only 'sailvit' is supported")
    config = SailViTConfig(**values)
    if config.use_bias or config.qkv_bias:
        raise ValueError("vision_config asks for biases (use_bias, qkv_bias); SAIL-ViT has none")
    return config
