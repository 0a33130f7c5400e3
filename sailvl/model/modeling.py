"""SAIL-VL2: tiles and tokens to the next token.

The vision encoder's patch features are merged and projected to image tokens, which take the place of the placeholders
in the prompt; the language model is transformers' Qwen3 (technical report arXiv 2509.14033, section 2). Sub-module
names are those that transformers and vLLM look for; released checkpoints, whose names differ, load and save by renaming
alone.

Departures from the released code, all deliberate: ``generate`` returns prompt and new tokens like every model of the
library (the release returns new tokens only); a mismatch of placeholders and image features raises (the release cuts
the surplus with a warning); image tokens are never generated; ``AutoModel`` returns the generating class, because the
release's quick start calls ``AutoModel.from_pretrained(...).generate``.

Cost: pictures are encoded once per ``generate``, also for several return sequences and without a cache.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention import PACKED, PACKING_IMPLEMENTATIONS
from .configuration import ARCHITECTURES, SailVLConfig
from .moe import EXPERTS, set_bias
from .projector import SailVLProjector, pixel_shuffle, pixel_shuffle_ragged

RENAMES = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
"""Released tensor names to ours, applied on loading and undone on saving."""


class SailVLPreTrainedModel(PreTrainedModel):
    """What both classes tell the library about themselves."""

    config_class = SailVLConfig
    config: SailVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes: the experts are the language model's; the library searches this file for them."""
        return True


class SailVLModel(SailVLPreTrainedModel):
    """Encoder, projector and language model without the head."""

    def __init__(self, config: SailVLConfig):
        super().__init__(config)
        if config.ps_version != "v2":
            raise ValueError(f"ps_version is '{config.ps_version}'; only pixel shuffle 'v2' is supported")
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = SailVLProjector(
            config.vision_config.hidden_size, config.text_config.hidden_size, config.merge
        )
        if hasattr(config.text_config, "num_experts") and config.text_config._experts_implementation is None:
            config.text_config._experts_implementation = EXPERTS
        self.language_model = AutoModel.from_config(config.text_config)
        if config.router_bias is not None:
            set_bias(self, config.router_bias)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load the *generating* class: the release's quick start generates with what ``AutoModel`` returns."""
        return SailVLForConditionalGeneration.from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hw: Any = None, image_grid_thw: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Image tokens of tiles ``pixel_values`` [N, 3, S, S]: ``pooler_output`` [N, tokens per tile, D].

        At any resolution: ``pooler_output`` [tokens, D] of patches [patches, 3, p, p], with ``image_grid_hw``
        [pictures, 2] their (rows, columns) in patches. Servers give ``image_grid_thw`` [pictures, 3] alone, by which
        they part tiles (and do not need it here) or patches; then ``pooler_output`` is a tuple with one [tokens, D] per
        picture.
        """
        select, merge = self.config.select_layer, self.config.merge
        if not self.config.vision_config.any_resolution:
            seen = self.vision_tower(pixel_values, select_layer=select, image_grid_hw=image_grid_hw)
            hidden = seen.last_hidden_state
            tokens = self.multi_modal_projector(pixel_shuffle(hidden, merge))
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=tokens)
        is_served = image_grid_hw is None and image_grid_thw is not None
        if is_served:
            image_grid_hw = torch.as_tensor(image_grid_thw)[:, 1:]
        hidden = self.vision_tower(pixel_values, select_layer=select, image_grid_hw=image_grid_hw).last_hidden_state
        grids = [(rows, columns) for rows, columns in torch.as_tensor(image_grid_hw).tolist()]
        tokens = self.multi_modal_projector(pixel_shuffle_ragged(hidden, grids, merge))
        pooled = tokens.split([rows * columns // merge**2 for rows, columns in grids]) if is_served else tokens
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def _place(self, input_ids: torch.Tensor, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Put image tokens [N, tokens, D] or [tokens, D] where the placeholders are; counts must match."""
        mask = input_ids == self.config.image_token_id
        placeholders, tokens = int(mask.sum()), features.shape[:-1].numel()
        if placeholders != tokens:
            made = f" from {features.shape[0]} tiles of {features.shape[1]}" if features.ndim == 3 else ""
            raise ValueError(
                f"{placeholders} image placeholders in input_ids, but {tokens} image tokens{made}: "
                "prepare text and images with one processor call"
            )
        return embeds.masked_scatter(mask[..., None], features.to(embeds.device, embeds.dtype))

    def _check_packed(self, rows: int, attention_mask: Any, position_ids: torch.Tensor | None) -> None:
        chosen = self.config.text_config._attn_implementation
        if chosen not in PACKING_IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation '{chosen}' ignores cu_seq_lens and would mix documents; "
                f"load the model with one of {PACKING_IMPLEMENTATIONS}"
            )
        if rows != 1 or attention_mask is not None or position_ids is None:
            raise ValueError("a pack is one row with position_ids and without attention_mask")
        text = self.config.text_config
        if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"} or text.sliding_window:
            raise ValueError("packs need full attention in every layer; this configuration has sliding windows")

    def _no_mask(self, embeds: torch.Tensor) -> Any:
        """What keeps the language model from building a T x T mask from a pack's restarting positions.

        The dense model takes ready-made masks by layer type. The sparse one takes a ready-made mask of four dimensions,
        handed on as it is: an empty one, which packed attention ignores. Flash attention wants None and builds nothing.
        """
        if hasattr(self.config.text_config, "layer_types"):
            return {"full_attention": None}
        return embeds.new_empty(1, 1, 0, 0) if self.config.text_config._attn_implementation == PACKED else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_grid_hw: Any = None,
        image_grid_thw: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] of a padded batch, or of one pack [1, T, D].

        Images come as tiles ``pixel_values`` [N, 3, S, S] (N may be 0), as patches with ``image_grid_hw``, or as
        ``image_features`` made earlier by ``get_image_features``, in the order of their placeholders. A pack brings
        ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32 offsets), ``max_length_q``, ``max_length_k`` and ``position_ids``
        that restart in every document. Raises ValueError if placeholders and image tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("give either pixel_values or image_features")
            image_features = self.get_image_features(pixel_values, image_grid_hw).pooler_output
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if image_features is not None:
                inputs_embeds = self._place(input_ids, inputs_embeds, image_features)
            elif past_key_values is None or past_key_values.get_seq_length() == 0:
                missing = int((input_ids == self.config.image_token_id).sum())
                if missing:
                    raise ValueError(f"{missing} image placeholders in input_ids, but no images were given")
        elif image_features is not None:
            raise ValueError("images need input_ids: placeholders cannot be found in inputs_embeds")
        if kwargs.get("cu_seq_lens_q") is not None:
            self._check_packed(inputs_embeds.shape[0], attention_mask, position_ids)
            # Ready-made mask: none. The attention keeps documents apart. No cache unless asked for (``cache.joining``).
            attention_mask = self._no_mask(inputs_embeds)
            kwargs.setdefault("use_cache", False)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class SailVLForConditionalGeneration(SailVLPreTrainedModel, GenerationMixin):
    """The model with its head: logits, loss and ``generate``.

    A configuration with experts makes a ``SailVLMoeForConditionalGeneration``, however this class is called.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, SailVLConfig) and cls is SailVLForConditionalGeneration:
            name = ARCHITECTURES[config.text_config.model_type]
            cls = cls if name == cls.__name__ else SailVLMoeForConditionalGeneration
        return super().__new__(cls)

    def __init__(self, config: SailVLConfig):
        super().__init__(config)
        self.model = SailVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.complete_generation_config()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub repository, in the released or in our layout."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.complete_generation_config()
        if model.config.router_bias is not None:  # weights are loaded into a model built without memory for buffers
            set_bias(model, model.config.router_bias)
        return loaded

    def complete_generation_config(self) -> None:
        """Fill in what releases leave out, or generation never stops: end and padding tokens; ban image tokens.

        A ``generation_config.json`` without an end token replaces the language model's, hence after loading too.
        """
        text, chosen = self.config.text_config, self.generation_config
        if chosen.eos_token_id is None:
            chosen.eos_token_id = text.eos_token_id
        if chosen.pad_token_id is None:
            eos = chosen.eos_token_id
            chosen.pad_token_id = text.pad_token_id if text.pad_token_id is not None else eos
        banned = {self.config.image_start_token_id, self.config.image_end_token_id, self.config.image_token_id}
        banned = {token for token in banned if token < text.vocab_size}
        chosen.suppress_tokens = sorted(banned.union(chosen.suppress_tokens or ()))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """As ``SailVLModel.get_image_features``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_grid_hw: Any = None,
        image_grid_thw: Any = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (of the last ``logits_to_keep`` positions, 0 = all) and, given ``labels``, the loss.

        All else is as in ``SailVLModel.forward``. The catch-all must be named ``kwargs``: generation looks for it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_features=image_features,
            image_grid_hw=image_grid_hw,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        image_features: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs: image features go with the prompt only, or with every step when nothing is cached."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        inputs.pop("image_grid_thw", None)
        if "pixel_values" not in inputs:  # the pictures are encoded already
            inputs.pop("image_grid_hw", None)
        if image_features is not None and (is_first_iteration or not use_cache):
            inputs["image_features"] = image_features
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Encode the pictures once, and repeat each row's image features with the row.

        The inherited method repeats tiles one by one, which keeps the count right and gives rows each other's tiles.
        """
        pixels, features = kwargs.pop("pixel_values", None), kwargs.pop("image_features", None)
        grids, _ = kwargs.pop("image_grid_hw", None), kwargs.pop("image_grid_thw", None)
        if pixels is not None and features is not None:
            raise ValueError("give either pixel_values or image_features")
        if pixels is not None:
            features = self.get_image_features(pixels, image_grid_hw=grids).pooler_output
        if features is not None and expand_size > 1:
            features = features.reshape(-1, features.shape[-1])
            counts = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            if sum(counts) != len(features):
                raise ValueError(f"rows hold {counts} image placeholders, but {len(features)} image tokens were given")
            rows = [part for part in features.split(counts) for _ in range(expand_size)]
            features = torch.cat(rows)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if features is not None:
            kwargs["image_features"] = features
        return input_ids, kwargs


class SailVLMoeForConditionalGeneration(SailVLForConditionalGeneration):
    """The same with a Qwen3-MoE language model, under the name by which servers tell sparse from dense."""

    def __init__(self, config: SailVLConfig):
        if ARCHITECTURES[config.text_config.model_type] != type(self).__name__:
            raise ValueError(f"a language model of type '{config.text_config.model_type}' has no experts")
        super().__init__(config)


# The experts' tensors (one per expert and matrix) are merged, and split again on saving, by the library's own mapping
# for the language model, which is applied after these names.
register_checkpoint_conversion_mapping(
    "sailvl", [WeightRenaming(source, target) for source, target in RENAMES], overwrite=True
)
