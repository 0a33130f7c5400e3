"""A conversation to token ids and tiles: the one definition, for training, evaluation and serving alike.

    <|im_start|>user\n<img><IMG_CONTEXT>...</img>\nWhat is this?<|im_end|><|im_start|>assistant\nA cat.<|im_end|>

The processor's own chat template writes the prompt, so training cannot drift from serving, and a checkpoint that brings
another template is trained in it. The template neutralises special strings: user and system text never becomes a
special token, an assistant's text may hold the grounding marks <ref> <box> <quad>, never chat or image tokens.
Trained on: the assistant's text and the <|im_end|> behind it; not its header, which a prompt provides. On demand only
what follows the last </think> of an answer; the ids stay the same, so sizes, order and packs do.

``measure`` gives the size ``encode`` will have, from texts and picture sizes alone; both make ids by the same function.
Cost: about 0.1 ms for a short conversation, half of it the template; decoding and cutting pictures is the rest.

The report says neither how user text is escaped nor which tokens are supervised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sailvl.data.batch import IGNORED
from sailvl.geometry import AnyRes, ImagePolicy, Scheme, grid_of, num_image_tokens, num_tiles, schemes
from sailvl.types import IMAGE_PLACEHOLDER, Example, Picture, Record, RecordError

_PLACEHOLDER = re.compile(re.escape(IMAGE_PLACEHOLDER) + "\n?")
_IMAGE_START, _IMAGE_TOKEN, _IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
# texts are escaped, so what looks like an answer's frame is one
_ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
_THOUGHT = re.compile(r".*</think>\n*", re.DOTALL)


class ImageProcessor(Protocol):
    """What is needed of the model's image processor."""

    @property
    def tiling(self) -> Scheme:
        """How pictures are cut or resized."""

    def preprocess_image(self, image: Image.Image, *, frame: bool = False, tiling: Scheme | None = None) -> np.ndarray:
        """Normalised tiles float32 [N, 3, S, S], or patches at any resolution."""


class Processor(Protocol):
    """What is needed of the model's processor (``sailvl.model.processing``); the data layer imports no model."""

    tokenizer: Any
    image_processor: Any
    system_message: str

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """A conversation as prompt text, one image token per picture, special strings in its texts neutralised."""


def _check(record: Record, generate: bool) -> None:
    roles = [message.role for message in record.messages]
    if "user" not in roles:
        raise RecordError(f"record {record.id}: no user turn among {len(roles)} messages")
    if "system" in roles[1:]:
        raise RecordError(
            f"record {record.id}: the system message must come first, not as message {roles.index('system', 1) + 1}"
        )
    if generate and roles[-1] != "user":
        raise RecordError(f"record {record.id}: a prompt must end with a user turn, this one ends with {roles[-1]}")
    if not generate and "assistant" not in roles:
        raise RecordError(f"record {record.id}: no assistant turn, so nothing to train on")
    for number, message in enumerate(record.messages, 1):
        if message.role == "assistant" and not message.text.strip():
            raise RecordError(f"record {record.id}: message {number} is an empty answer")


def _check_thoughts(record: Record) -> None:
    for number, message in enumerate(record.messages, 1):
        _, closed, answer = message.text.rpartition("</think>")
        if message.role == "assistant" and "<think>" in answer:
            raise RecordError(f"record {record.id}: message {number} has a thought without an end, so no answer")
        if message.role == "assistant" and closed and not answer.strip():
            raise RecordError(f"record {record.id}: message {number} is a thought without an answer")


def _conversation(record: Record) -> list[dict[str, Any]]:
    """Messages for the chat template: every picture a part of a user message, in place of its placeholder."""
    pictures = iter(record.pictures)
    num_named = sum(message.text.count(IMAGE_PLACEHOLDER) for message in record.messages if message.role == "user")
    if num_named not in (0, len(record.pictures)):
        raise RecordError(f"record {record.id}: {num_named} placeholders, {len(record.pictures)} pictures")
    conversation: list[dict[str, Any]] = []
    for message in record.messages:
        content: Any = message.text
        if message.role == "user" and record.pictures:
            before, *behind = _PLACEHOLDER.split(message.text)
            content = [{"type": "image", "frame": picture.frame} for picture in pictures] if not num_named else []
            content.append({"type": "text", "text": before})
            for text in behind:
                content.append({"type": "image", "frame": next(pictures).frame})
                content.append({"type": "text", "text": text})
        conversation.append({"role": message.role, "content": content})
    return conversation


def _schemes(record: Record, processor: Processor, policy: ImagePolicy | None) -> list[Scheme]:
    """How each of the record's pictures is seen."""
    return schemes(processor.image_processor.tiling, policy, len(record.pictures))


def _num_tiles(picture: Picture, scheme: Scheme) -> int:
    return num_tiles(picture.width, picture.height, scheme, picture.frame)


def _token_ids(
    record: Record, processor: Processor, generate: bool, policy: ImagePolicy | None, answer_only: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids, and for each whether it is supervised."""
    _check(record, generate)
    prompt = processor.apply_chat_template(_conversation(record), tokenize=False, add_generation_prompt=generate)
    tokenizer, seen = processor.tokenizer.backend_tokenizer, _schemes(record, processor, policy)
    start, image, end = (tokenizer.token_to_id(token) for token in (_IMAGE_START, _IMAGE_TOKEN, _IMAGE_END))
    ids: list[int] = []
    trained: list[bool] = []
    parts = prompt.split(_IMAGE_TOKEN)
    if len(parts) != len(record.pictures) + 1:
        raise RecordError(
            f"record {record.id}: the chat template shows {len(parts) - 1} of {len(record.pictures)} pictures"
        )
    for i, part in enumerate(parts):  # cut at image tokens only, where the tokenizer would cut too
        if i:
            picture = record.pictures[i - 1]
            count = num_image_tokens(picture.width, picture.height, seen[i - 1], picture.frame)
            ids += [start, *[image] * (count - 2), end]
            trained += [False] * count
        encoding = tokenizer.encode(part, add_special_tokens=False)
        ids += encoding.ids
        trained += _supervised(part, encoding.offsets, answer_only)
    if not generate and not any(trained):
        raise RecordError(f"record {record.id}: the chat template shows no '<|im_start|>assistant' turn to train on")
    return ids, trained


def _supervised(text: str, offsets: Sequence[tuple[int, int]], answer_only: bool) -> list[bool]:
    """For each token whether it lies in an answer; one that reaches back into header or thought is theirs."""
    trained, at = [False] * len(offsets), 0
    for answer in _ANSWER.finditer(text):
        first, last = answer.span(1)
        thought = _THOUGHT.match(answer[1]) if answer_only else None
        first += thought.end() if thought else 0
        while at < len(offsets) and offsets[at][0] < first:
            at += 1
        while at < len(offsets) and offsets[at][0] < last:
            trained[at], at = True, at + 1
    return trained


def prompt_ids(record: Record, processor: Processor, policy: ImagePolicy | None = None) -> list[int]:
    """The ids of ``encode(..., generate=True)``, nothing decoded or cut. Raises RecordError as it does."""
    return _token_ids(record, processor, True, policy)[0]


def measure(record: Record, processor: Processor, policy: ImagePolicy | None = None) -> tuple[int, int]:
    """(num_tokens, num_tiles) of the record's Example, nothing decoded. Raises RecordError as ``encode`` does."""
    ids, _ = _token_ids(record, processor, False, policy)
    seen = zip(record.pictures, _schemes(record, processor, policy), strict=True)
    return len(ids), sum(_num_tiles(picture, scheme) for picture, scheme in seen)


def encode(
    record: Record,
    images: Sequence[Image.Image],
    processor: Processor,
    *,
    generate: bool = False,
    policy: ImagePolicy | None = None,
    answer_only: bool = False,
) -> Example:
    """The record as ids, targets and tiles; ``generate`` ends it with the assistant's header and supervises nothing.

    images: the record's pictures, decoded, in order; ``policy`` says how they are seen, if not as the processor's
    settings have it; ``answer_only`` leaves thoughts unsupervised, up to the last ``</think>`` of a turn and its
    newlines. Raises RecordError if the conversation cannot be trained on (or answered; with ``answer_only`` also if a
    thought has no end or no answer behind it), if placeholders and pictures differ in number, or if a picture has not
    the size the record says.
    """
    if len(images) != len(record.pictures):
        raise RecordError(f"record {record.id}: {len(record.pictures)} pictures, {len(images)} images given")
    if answer_only and not generate:
        _check_thoughts(record)
    ids, trained = _token_ids(record, processor, generate, policy, answer_only)
    seen = _schemes(record, processor, policy)
    tiles = [_no_tiles(processor)]
    grids: list[tuple[int, int]] = []
    for number, (picture, image, scheme) in enumerate(zip(record.pictures, images, seen, strict=True), 1):
        tiles.append(processor.image_processor.preprocess_image(image, frame=picture.frame, tiling=scheme))
        if isinstance(scheme, AnyRes):
            grids.append(grid_of(image.width, image.height, scheme, picture.frame))
            is_as_planned = grids[-1] == grid_of(picture.width, picture.height, scheme, picture.frame)
        else:
            is_as_planned = len(tiles[-1]) == _num_tiles(picture, scheme)
        if not is_as_planned:
            raise RecordError(
                f"record {record.id}: picture {number} was {picture.width} x {picture.height} "
                f"({num_image_tokens(picture.width, picture.height, scheme, picture.frame)} tokens) and is "
                f"{image.width} x {image.height} ({num_image_tokens(*image.size, scheme, picture.frame)} tokens)"
            )
    ids_T = np.array(ids, np.int64)
    targets_T = np.full(len(ids), IGNORED, np.int64)
    if not generate:
        targets_T[:-1] = np.where(trained[1:], ids_T[1:], IGNORED)
    return Example(
        id=record.id, ids_T=ids_T, targets_T=targets_T, tiles_N3SS=np.concatenate(tiles), **_grids(grids, processor)
    )


def blank(id: str, num_tokens: int, num_tiles: int, processor: Processor) -> Example:
    """A stand-in of the same size for a sample that broke: black tiles, their image tokens, padding, no targets.

    At any resolution it has ``num_tiles`` pictures of one token, so that both of its sizes are those planned.
    """
    tiling = processor.image_processor.tiling
    is_any = isinstance(tiling, AnyRes)
    tokenizer = processor.tokenizer
    ids_T = np.full(num_tokens, tokenizer.pad_token_id, np.int64)
    num_image_ids = num_tiles * (1 if is_any else tiling.tokens_per_tile)
    ids_T[:num_image_ids] = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    tile = _no_tiles(processor).shape[1:]
    return Example(
        id=id,
        ids_T=ids_T,
        targets_T=np.full(num_tokens, IGNORED, np.int64),
        tiles_N3SS=np.zeros((num_tiles * (tiling.merge**2 if is_any else 1), *tile), np.float32),
        **_grids([(tiling.merge, tiling.merge)] * num_tiles, processor),
    )


def _no_tiles(processor: Processor) -> np.ndarray:
    """No tile, or no patch: [0, 3, S, S]."""
    tiling = processor.image_processor.tiling
    side = tiling.patch if isinstance(tiling, AnyRes) else tiling.side
    return np.zeros((0, 3, side, side), np.float32)


def _grids(grids: Sequence[tuple[int, int]], processor: Processor) -> dict[str, Any]:
    """What an Example of any resolution says about its pictures; nothing for tiles."""
    tiling = processor.image_processor.tiling
    if not isinstance(tiling, AnyRes):
        return {}
    patches = (tiling.side // tiling.patch) ** 2
    return {"grids_N2": np.array(grids, np.int64).reshape(-1, 2), "patches_per_tile": patches}
