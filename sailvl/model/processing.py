"""Pictures and text to model inputs: tiles, image tokens, chat format.

The chat format is ChatML without newlines after ``<|im_end|>`` (technical report arXiv 2509.14033, published
processor). Released folders carry the chat template of another model; a template whose special tokens are not in the
vocabulary is replaced by ours with a warning. Differences from the published processor: all texts of a batch are used,
tensors stay on the CPU, and no ``eos_token_id`` is returned as a model input.

Trust: special strings in conversations given to ``apply_chat_template`` are neutralised (``escape``); text given to the
processor directly is taken to be a rendered prompt and trusted.
Annotations must stay real objects (no postponed evaluation): the library inspects them.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData

from sailvl.geometry import Tiling, num_tiles
from sailvl.types import IMAGE_PLACEHOLDER

from .chat import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    OFFICIAL_SYSTEM,
    chat_template_for,
    escape,
    escape_message,
    unusable,
)
from .configuration import SailVLConfig
from .tiles import SailVLImageProcessor, SailVLImagesKwargs, flatten_images

__all__ = ["SailVLImageProcessor", "SailVLProcessor", "build_processor", "escape"]

logger = logging.getLogger(__name__)


class SailVLProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat format of one model."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        system_message: str = OFFICIAL_SYSTEM,
    ):
        for token in (IMAGE_START, IMAGE_END, IMAGE_TOKEN):
            if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
                raise ValueError(f"the tokenizer has no token '{token}': it does not belong to a SAIL-VL2 model")
        self.image_token = IMAGE_TOKEN
        self.image_start_token_id, self.image_end_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids(
            [IMAGE_START, IMAGE_END, IMAGE_TOKEN]
        )
        self.system_message = system_message
        tokenizer.padding_side = "left"
        template = chat_template or tokenizer.chat_template
        reason = unusable(template, tokenizer)
        if template is not None and reason:
            logger.warning("The checkpoint's chat template %s; using SAIL-VL2's own.", reason)
        if reason:
            template = chat_template_for(system_message)
        # The tokenizer's copy would otherwise be saved beside ours, and win on the next load.
        tokenizer.chat_template = template
        super().__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "SailVLProcessor":
        """Load from a folder or hub repository; keywords may override tiling limits and ``system_message``.

        The parts are loaded by class: released folders name an image processor that only their remote code has, and the
        Auto class would ask to run it. Raises ValueError if the model configuration beside it (of a folder) has another
        image token than the tokenizer: such files belong to different models.
        """
        own = {name: kwargs.pop(name) for name in ("system_message", "chat_template") if name in kwargs}
        stored, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        images = SailVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        own = {**{name: stored[name] for name in ("system_message", "chat_template") if name in stored}, **own}
        processor = cls(images, tokenizer, **own)
        folder = Path(pretrained_model_name_or_path)
        if (folder / "config.json").is_file():
            values, _ = PreTrainedConfig.get_config_dict(folder)
            expected = values.get("image_token_id", SailVLConfig.image_token_id)
            if values.get("model_type") == "sailvl" and expected != processor.image_token_id:
                raise ValueError(
                    f"{folder}: config.json says image_token_id {expected}, the tokenizer has "
                    f"{processor.image_token_id} for {IMAGE_TOKEN}: the two files belong to different models"
                )
        return processor

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_start_token_id, self.image_token_id, self.image_end_token_id]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one placeholder of picture ``image_idx`` expands to."""
        count = image_inputs["num_tiles"][image_idx] * self.image_processor.tiling.tokens_per_tile
        return f"{IMAGE_START}{IMAGE_TOKEN * count}{IMAGE_END}"

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation (or several) to a prompt; every special string in its texts is neutralised.

        Contents are strings, or lists of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``;
        an image with ``"frame": True`` is a video frame. See ``ProcessorMixin.apply_chat_template`` for the rest.
        """
        template = chat_template or self.chat_template
        if isinstance(template, str) and "system_message" in template:
            kwargs.setdefault("system_message", self.system_message)
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats = conversation if batched else [conversation]
        safe = [[escape_message(message) for message in chat] for chat in chats]
        return super().apply_chat_template(safe if batched else safe[0], chat_template=chat_template, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, *, frames: Sequence[bool] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs from rendered prompts and their pictures, in order of their placeholders.

        ``text`` is a prompt or a list of prompts, ``images`` a picture, a list, or a list of lists; ``frames`` marks
        pictures that are video frames. Tiling limits (``min_tiles``, ``max_tiles``) and ``official_order`` may be given
        here or in ``images_kwargs``; every other argument goes to the tokenizer.
        Raises ValueError if placeholders and pictures differ in number, or if truncation would cut placeholders.
        """
        options = {**kwargs.pop("images_kwargs", {}), **kwargs.pop("mm_processor_kwargs", {})}
        options |= {name: kwargs.pop(name) for name in SailVLImagesKwargs.__annotations__ if name in kwargs}
        kwargs = {**kwargs.pop("common_kwargs", {}), **kwargs, **kwargs.pop("text_kwargs", {})}
        return_tensors = options.pop("return_tensors", kwargs.pop("return_tensors", None))
        pictures = flatten_images(images)
        values: BatchFeature | dict[str, Any] = {}
        if images is not None:
            values = self.image_processor(pictures, frames=frames, return_tensors=return_tensors, **options)
        if text is None:
            return BatchFeature({name: values[name] for name in ("pixel_values",) if name in values})
        prompts = [text] if isinstance(text, str) else list(text)
        prompts = _placeholders(prompts, len(pictures))
        replacements = [self.replace_image_token(values, index) for index in range(len(pictures))]
        wants_offsets = kwargs.pop("return_text_replacement_offsets", False)
        wants_types = kwargs.pop("return_mm_token_type_ids", False)
        prompts, offsets = self.get_text_with_replacements(prompts, replacements)
        data: dict[str, Any] = dict(self._tokenise(prompts, return_tensors=return_tensors, **kwargs))
        if pictures:
            data["pixel_values"] = values["pixel_values"]
        if wants_types:
            data["mm_token_type_ids"] = _as(_types(data["input_ids"], self.image_token_ids), return_tensors)
        if wants_offsets:
            # Servers slice tiles per picture by this grid; without the offsets nobody needs it.
            data["text_replacement_offsets"] = offsets
            data["image_grid_thw"] = _as([[1, count, 1] for count in values.get("num_tiles", ())], return_tensors)
        return BatchFeature(data)

    def _tokenise(
        self, prompts: list[str], *, truncation: Any = False, max_length: int | None = None, **kwargs: Any
    ) -> Any:
        """Token ids and mask; refuses a truncation that would part a picture from its placeholders."""
        limit = max_length if max_length is not None else self.tokenizer.model_max_length
        if not truncation or limit > _NO_LIMIT:
            # The quick start asks for truncation without a limit: nothing to cut, nothing to warn about.
            return self.tokenizer(prompts, max_length=max_length, **kwargs)
        encoded = self.tokenizer(prompts, truncation=truncation, max_length=limit, **kwargs)
        for index, (prompt, ids) in enumerate(zip(prompts, encoded["input_ids"], strict=True)):
            expected, kept = prompt.count(IMAGE_TOKEN), list(ids).count(self.image_token_id)
            if kept != expected:
                raise ValueError(
                    f"prompt {index}: truncation to {limit} tokens would keep {kept} of {expected} image tokens; "
                    "raise max_length or lower max_tiles"
                )
        return encoded

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **policy: Any
    ) -> MultiModalData:
        """Tiles and prompt tokens of pictures of ``image_sizes`` (height, width), for servers that plan ahead."""
        if image_sizes is None:
            return MultiModalData()
        options = {**policy, **policy.get("images_kwargs", {})}
        limits = {name: options[name] for name in ("min_tiles", "max_tiles") if options.get(name) is not None}
        tiling = self.image_processor.policy(**limits)
        tiles = [num_tiles(width, height, tiling) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[tiling.tokens_per_tile * count + 2 for count in tiles], num_image_patches=tiles
        )


_NO_LIMIT = 10**9
"""Tokenizers without a length limit say some absurdly large number."""


def _as(values: list[Any], return_tensors: Any) -> Any:
    return torch.tensor(values) if return_tensors == "pt" else values


def _types(input_ids: Any, image_ids: Sequence[int]) -> list[list[int]]:
    """1 where a token belongs to a picture, else 0."""
    return [[int(int(token) in image_ids) for token in row] for row in input_ids]


def _placeholders(prompts: list[str], num_pictures: int) -> list[str]:
    """The prompts, ``<image>`` read as a placeholder if no other is there; raises ValueError on a count mismatch."""
    found = sum(prompt.count(IMAGE_TOKEN) for prompt in prompts)
    aliases = sum(prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts)
    if found == 0 and aliases == num_pictures:
        return [prompt.replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN) for prompt in prompts]
    if found != num_pictures:
        raise ValueError(
            f"the prompts hold {found} {IMAGE_TOKEN} and {aliases} {IMAGE_PLACEHOLDER} placeholders for {num_pictures} "
            "images: one placeholder per image, in order"
        )
    return prompts


def build_processor(tokenizer: str | Path, *, tiling: Tiling, system_message: str = "") -> SailVLProcessor:
    """A processor from a ``tokenizer.json`` file or a tokenizer folder, and a tiling.

    Raises ValueError if the tokenizer lacks the image tokens.
    """
    path = Path(tokenizer)
    if path.is_dir():
        loaded = AutoTokenizer.from_pretrained(path)
    else:
        loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = SailVLImageProcessor(
        side=tiling.side,
        patch=tiling.patch,
        merge=tiling.merge,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        thumbnail=tiling.thumbnail,
    )
    return SailVLProcessor(images, loaded, system_message=system_message)
