"""Answer prompts with a model in this process: greedy, in batches of similar length.

Prompts are made by ``data.encode``, the function that made the training samples, so evaluation asks in the very form
that training taught. A batch is padded on the left and its pictures are encoded once. An answer cannot contain image
tokens or open a chat turn; the grounding marks <ref>, <box> and <quad> are part of it.

The library's ``generate`` decodes. An own loop that lets ended rows leave the batch gained 12 to 15 % on mixed answer
lengths at the nano size and nothing on equal ones, too little to keep. Batches of 32 give about seven times the answers
of single prompts there: 20 to 30 a second, 24 tokens each, on one core of a busy machine. On a GPU, serve with vLLM.

Difference from the report: it evaluates with an unpublished engine; greedy decoding is what the authors' adapter uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from sailvl.data.encode import encode
from sailvl.geometry import num_image_tokens
from sailvl.model.chat import GROUNDING_TOKENS, IMAGE_END, IMAGE_START, IMAGE_TOKEN
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.types import Completion, Example, Record, RecordError

MAX_TILES = 64
"""Tiles that go through the vision encoder at once: bounds memory, not the batch."""


class Local:
    """A model and its processor, ready to answer; batches hold at most ``max_batch`` records."""

    def __init__(
        self, model: SailVLForConditionalGeneration, processor: SailVLProcessor, *, max_batch: int = 32
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        self.model, self.processor, self.max_batch = model, processor, max_batch
        text = model.config.text_config
        ends = model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends]) - {None}
        tokenizer = processor.tokenizer
        self.end_ids |= {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")} - {None}
        self.pad_id = tokenizer.pad_token_id
        self.max_length = text.max_position_embeddings
        # The tokenizer's own list of specials holds only those with a role; every token marked special counts here, the
        # image tokens whatever their mark, and rows of the embedding that no token uses: a fresh model would say them.
        banned = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        banned |= {*tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_TOKEN, IMAGE_END, "<|im_start|>"])}
        banned |= set(range(len(tokenizer), text.vocab_size))
        banned -= {*tokenizer.convert_tokens_to_ids(list(GROUNDING_TOKENS)), *self.end_ids}
        self.banned = sorted(token for token in banned if token < text.vocab_size)

    def answer(
        self, records: Sequence[Record], images: Sequence[Sequence[Image.Image]], *, max_new_tokens: int
    ) -> list[Completion]:
        """Completions of at most ``max_new_tokens`` tokens, in the records' order; ``images`` are theirs, decoded.

        Raises RecordError naming the record that cannot be asked: no user turn last, pictures that do not fit, or a
        prompt too long for the model. Nothing is answered then.
        """
        if len(records) != len(images):
            raise ValueError(f"{len(records)} records, but pictures for {len(images)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        order = sorted(range(len(records)), key=lambda index: self._length(records[index]))
        answers: dict[int, Completion] = {}
        was_training = self.model.training
        self.model.train(False)
        try:
            for start in range(0, len(order), self.max_batch):
                batch = order[start : start + self.max_batch]
                examples = [self._encode(records[index], images[index], max_new_tokens) for index in batch]
                answers |= zip(batch, self._generate(examples, max_new_tokens), strict=True)
        finally:
            self.model.train(was_training)
        return [answers[index] for index in range(len(records))]

    def _length(self, record: Record) -> int:
        """About how many tokens a record takes: exact for pictures, three signs a token for text."""
        tiling = self.processor.image_processor.tiling
        pictures = sum(num_image_tokens(p.width, p.height, tiling, p.frame) for p in record.pictures)
        return pictures + sum(len(message.text) for message in record.messages) // 3

    def _encode(self, record: Record, images: Sequence[Image.Image], max_new_tokens: int) -> Example:
        example = encode(record, images, self.processor, generate=True)
        if example.num_tokens + max_new_tokens > self.max_length:
            raise RecordError(
                f"record {record.id}: {example.num_tokens} prompt tokens and {max_new_tokens} new ones exceed the "
                f"model's {self.max_length}: shorten the prompt, allow fewer tiles, or ask for a shorter answer"
            )
        return example

    @torch.inference_mode()
    def _generate(self, examples: Sequence[Example], max_new_tokens: int) -> list[Completion]:
        """Greedy answers of one batch."""
        ids_BT, mask_BT = (tensor.to(self.model.device) for tensor in self._pad(examples))
        # Spelled out, because what is left open is taken from the checkpoint, which may sample or penalise.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=sorted(self.end_ids),
            pad_token_id=self.pad_id,
            suppress_tokens=self.banned,
        )
        model: Any = self.model  # the library types ``generate`` for its own classes only
        found = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            image_features=self._features(examples),
            generation_config=config,
        )
        return [self._completion(row) for row in found[:, ids_BT.shape[1] :].tolist()]

    def _pad(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, both int64 [B, T], padded on the left."""
        longest = max(example.num_tokens for example in examples)
        ids_BT = torch.full((len(examples), longest), self.pad_id)
        mask_BT = torch.zeros((len(examples), longest), dtype=torch.long)
        for row, example in enumerate(examples):
            ids_BT[row, longest - example.num_tokens :] = torch.from_numpy(example.ids_T)
            mask_BT[row, longest - example.num_tokens :] = 1
        return ids_BT, mask_BT

    def _features(self, examples: Sequence[Example]) -> torch.Tensor | None:
        """Image features of all tiles of a batch, [N, tokens per tile, D]; None without pictures."""
        tiles = [torch.from_numpy(example.tiles_N3SS) for example in examples if example.num_tiles]
        if not tiles:
            return None
        parts = torch.cat(tiles).to(self.model.device, self.model.dtype).split(MAX_TILES)  # type: ignore[no-untyped-call]
        return torch.cat([self.model.get_image_features(part).pooler_output for part in parts])

    def _completion(self, row: Sequence[int]) -> Completion:
        """A row up to its first end token; what follows is padding."""
        ends = next((place for place, token in enumerate(row) if token in self.end_ids), None)
        text = self.processor.tokenizer.decode(row[:ends], skip_special_tokens=False)
        ids = tuple(row) if ends is None else tuple(row[: ends + 1])
        return Completion(text=text.strip(), ids=ids, finish_reason="length" if ends is None else "stop")
