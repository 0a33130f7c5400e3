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
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, TextKwargs

from sailvl.geometry import Scheme, Tiling, grid_of, num_image_tokens, num_tiles
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
from .conversation import interleave, opened, spread
from .tiles import POLICY_KEYS, SailVLImageProcessor, SailVLImagesKwargs, flatten_images

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
        grids = ["image_grid_hw"] if self.image_processor.any_resolution else []
        return ["input_ids", "attention_mask", "pixel_values", *grids]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one placeholder of picture ``image_idx`` expands to."""
        return f"{IMAGE_START}{IMAGE_TOKEN * image_inputs['num_tokens'][image_idx]}{IMAGE_END}"

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        images: Any = None,
        num_frames: int | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation (or several) to a prompt; every special string in its texts is neutralised.

        Contents are strings, or lists of parts in any order: ``{"type": "text", "text": ...}``,
        ``{"type": "image", "image": ...}`` (a picture, array, path, bytes or data URL; ``"frame": True`` makes it a
        frame) and ``{"type": "video", "video": ..., "num_frames": n}`` (a path or bytes, of which ``num_frames`` frames
        are taken, 16 unless said here or in the part; or a list of pictures, all taken). See ``conversation``.

        ``tokenize`` also opens the pictures and returns ``input_ids``, or with ``return_dict`` all model inputs:
        ``images`` are those of parts that name none, and what ``__call__`` takes is taken here too. Several
        conversations are padded. Raises ValueError for what is not on this machine: nothing is fetched.
        """
        template = chat_template or self.chat_template
        if isinstance(template, str) and "system_message" in template:
            kwargs.setdefault("system_message", self.system_message)
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats, pictures, frames = [], [], []
        for chat in conversation if batched else [conversation]:
            messages, named, marks = spread(chat, num_frames)
            chats.append([escape_message(message) for message in messages])
            pictures += named
            frames += marks
        options = {name: kwargs.pop(name) for name in _CALL_KEYS if name in kwargs} | dict(processor_kwargs or {})
        kwargs.pop("sanitize_control_tokens", None)  # done, in every case
        chats = chats if batched else chats[0]
        prompts = super().apply_chat_template(chats, chat_template=chat_template, tokenize=False, **kwargs)
        if not tokenize:
            return prompts
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not supported: sailvl.data.encode marks what is trained")
        given = iter(flatten_images(images if images is not None else options.pop("images", None)))
        pictures = [next(given, None) if picture is None else picture for picture in pictures]
        if next(given, None) is not None:
            raise ValueError("more images are given than parts of the conversation need one")
        if options.get("return_tensors") == "auto":
            del options["return_tensors"]
        if batched:
            options.setdefault("padding", True)
        data = self(images=opened(pictures) if pictures else None, text=prompts, frames=frames, **options)
        return data if return_dict else data["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        *,
        frames: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs from rendered prompts and their pictures, in order of their placeholders.

        ``text`` is a prompt or a list of prompts, ``images`` a picture, a list, or a list of lists; ``frames`` marks
        pictures that are video frames. ``videos`` is a clip (pictures or [F, H, W, 3]) or a list of clips: their frames
        go to the image tokens behind ``Frame-i: ``, or in a prompt without image tokens to ``<video>``, and ``images``
        to the others. ``min_tiles``, ``max_tiles``, ``msac``, ``upscale`` and ``official_order`` may
        be given here or in ``images_kwargs``, for every prompt alike: ``upscale`` is for the first picture of each,
        ``msac`` for prompts of one, ``max_tiles`` shared by those of each (``geometry.schemes``); which picture is
        whose is told by the placeholders. Every other argument goes to the tokenizer. A model of any resolution gets
        patches, and ``image_grid_hw`` [pictures, 2] with their rows and columns.
        Raises ValueError if placeholders and pictures differ in number, or if truncation would cut placeholders.
        """
        options = {**kwargs.pop("images_kwargs", {}), **kwargs.pop("mm_processor_kwargs", {})}
        options |= {name: kwargs.pop(name) for name in SailVLImagesKwargs.__annotations__ if name in kwargs}
        kwargs = {**kwargs.pop("common_kwargs", {}), **kwargs, **kwargs.pop("text_kwargs", {})}
        return_tensors = options.pop("return_tensors", kwargs.pop("return_tensors", None))
        if videos is not None:
            if frames is not None or text is None:
                raise ValueError("videos say themselves which pictures are frames, and need a text that shows where")
            text, images, frames = interleave([text] if isinstance(text, str) else text, images, videos)
        pictures = flatten_images(images)
        values: BatchFeature | dict[str, Any] = {}
        prompts = [text] if isinstance(text, str) else list(text or ())
        if text is not None:
            prompts = _placeholders(prompts, len(pictures))
            options["counts"] = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
        if images is not None:
            values = self.image_processor(images, frames=frames, return_tensors=return_tensors, **options)
        if text is None:
            return BatchFeature({name: values[name] for name in _MODEL_INPUTS if name in values})
        replacements = [self.replace_image_token(values, index) for index in range(len(pictures))]
        wants_offsets = kwargs.pop("return_text_replacement_offsets", False)
        wants_types = kwargs.pop("return_mm_token_type_ids", False)
        prompts, offsets = self.get_text_with_replacements(prompts, replacements)
        data: dict[str, Any] = dict(self._tokenise(prompts, return_tensors=return_tensors, **kwargs))
        if pictures:
            data |= {name: values[name] for name in _MODEL_INPUTS if name in values}
        if wants_types:
            data["mm_token_type_ids"] = _as(_types(data["input_ids"], self.image_token_ids), return_tensors)
        if wants_offsets:
            # Servers slice tiles (patches) per picture by this grid; without the offsets nobody needs it. Any other
            # key they would slice as if it had a row per tile.
            data["text_replacement_offsets"] = offsets
            grids = data.pop("image_grid_hw", [[count, 1] for count in values.get("num_tiles", ())])
            grids = grids.tolist() if hasattr(grids, "tolist") else grids
            data["image_grid_thw"] = _as([[1, rows, columns] for rows, columns in grids], return_tensors)
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
        """Tiles and prompt tokens of pictures of ``image_sizes`` (height, width), for servers that plan ahead.

        The pictures are those of one prompt; ``policy`` is what a call may say about them. At any resolution patches
        are counted instead of tiles: ``num_image_patches`` are always rows of ``pixel_values``.
        """
        if image_sizes is None:
            return MultiModalData()
        options = {**policy, **policy.get("images_kwargs", {})}
        chosen = self.image_processor.schemes(
            len(image_sizes), **{name: options[name] for name in POLICY_KEYS if name in options}
        )
        sizes = [(width, height, scheme) for (height, width), scheme in zip(image_sizes, chosen, strict=True)]
        return MultiModalData(
            num_image_tokens=[num_image_tokens(*size) for size in sizes],
            num_image_patches=[
                math.prod(grid_of(*size)) if self.image_processor.any_resolution else num_tiles(*size) for size in sizes
            ],
        )


_CALL_KEYS = (
    *TextKwargs.__annotations__,
    *SailVLImagesKwargs.__annotations__,
    *("images_kwargs", "text_kwargs", "common_kwargs", "mm_processor_kwargs", "return_tensors"),
)
"""What is for the processor, not for the template."""

_MODEL_INPUTS = ("pixel_values", "image_grid_hw")

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


def build_processor(tokenizer: str | Path, *, tiling: Scheme, system_message: str = "") -> SailVLProcessor:
    """A processor from a ``tokenizer.json`` file or a tokenizer folder, and a tiling (``AnyRes``: any resolution).

    Raises ValueError if the tokenizer lacks the image tokens, or for a tiling with ``msac`` or ``upscale``.
    """
    fields = asdict(tiling)
    is_msac, upscale = fields.pop("msac", False), fields.pop("upscale")
    if is_msac or upscale != 1:
        raise ValueError("msac and upscale are asked for per call, not of a processor")
    path = Path(tokenizer)
    if path.is_dir():
        loaded = AutoTokenizer.from_pretrained(path)
    else:
        loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = SailVLImageProcessor(**fields, any_resolution=not isinstance(tiling, Tiling))
    return SailVLProcessor(images, loaded, system_message=system_message)
