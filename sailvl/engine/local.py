"""Answer prompts with a model in this process, many at once.

Prompts are made by ``data.encode``, the function that made the training samples, so evaluation asks in the very form
that training taught. Waiting prompts are packed into one sequence without padding, whose keys and values go to a cache
of rows with lengths of their own; then every answer in flight gains a token a step. Answers leave and join at any step.
Pictures are encoded once, also for several answers to one prompt and for pictures seen before. What is asked together
changes an answer by rounding alone.

An answer cannot contain image tokens or open a chat turn; the grounding marks <ref>, <box> and <quad> are part of it.
Log-probabilities are the model's own over the tokens it may say, before penalties and temperature.

One thread drives an engine: nothing here is locked. Outside ``step`` the model is as it was, training mode included,
and its weights may change between steps when nothing is in flight.

Cost: memory is rows times the longest answer in flight, so prompts wait while that exceeds ``cache_mb``; a prefill
computes no padding, a step of shorter rows beside a long one attends over its length. On a GPU, serve with vLLM.

Difference from the report: it evaluates with an unpublished engine; greedy decoding is what the authors' adapter uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sailvl.data.encode import prompt_ids
from sailvl.engine.answers import Answer, Prompt, sayable
from sailvl.engine.base import Delta, EngineError, Request
from sailvl.engine.features import Features, View
from sailvl.engine.sampling import choose
from sailvl.geometry import num_image_tokens, schemes
from sailvl.model import decode
from sailvl.model.attention import PACKED
from sailvl.model.cache import BatchCache
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.types import RecordError


class Local:
    """A model and its processor, ready to answer; ``capacity`` answers at once.

    ``prefill_tokens``: prompts of so many tokens together are read in one step (a longer one alone). ``cache_mb``:
    MiB of keys and values beyond which prompts wait, if anything is in flight. ``feature_cache_mb``: MiB of image
    tokens kept for pictures that come again. Raises ValueError for a capacity below 1 or a language model with sliding
    windows.
    """

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        *,
        capacity: int = 32,
        prefill_tokens: int = 2048,
        cache_mb: float = 4096,
        feature_cache_mb: float = 256,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        self.model, self.processor, self.capacity, self.prefill_tokens = model, processor, capacity, prefill_tokens
        text = model.config.text_config
        layers = set(getattr(text, "layer_types", None) or ["full_attention"])
        if layers != {"full_attention"} or text.sliding_window:
            raise ValueError("the language model attends through sliding windows, which this engine does not do")
        size, eos_ids = model.config.text_config.vocab_size, model.generation_config.eos_token_id
        self.end_ids, self.banned = sayable(processor, size, eos_ids)
        self.max_length = text.max_position_embeddings
        self._banned = torch.tensor(self.banned)
        self.features = Features(model, processor, budget_mb=feature_cache_mb)
        position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
        self._max_padded = int(cache_mb * 2**20 / position)
        self._cache = BatchCache(capacity)
        self._waiting: deque[Prompt] = deque()
        self._running: list[Answer] = []  # in the order of the cache's rows
        self._ended: list[Delta] = []

    @property
    def encoded_tiles(self) -> int:
        """Tiles that went through the vision encoder."""
        return self.features.encoded_tiles

    @property
    def reused_tiles(self) -> int:
        """Tiles of pictures that were known, and did not."""
        return self.features.reused_tiles

    def submit(self, request: Request) -> None:
        """Take a request; its pictures are cut and encoded when its turn comes.

        Raises RecordError naming the record that cannot be asked: no user turn last, pictures that do not fit, a prompt
        too long for the model, more answers than ``capacity``. Raises ValueError if its id is in flight.
        """
        record, sampling = request.record, request.sampling
        if any(prompt.request.id == request.id for prompt in self._waiting) or any(
            answer.request.id == request.id for answer in self._running
        ):
            raise ValueError(f"request {request.id!r} is in flight already")
        if len(request.images) != len(record.pictures):
            raise RecordError(
                f"record {record.id}: {len(record.pictures)} pictures, {len(request.images)} images given"
            )
        if sampling.n > self.capacity:
            raise RecordError(
                f"record {record.id}: {sampling.n} answers are asked for, and {self.capacity} fit at once"
            )
        chosen = schemes(self.processor.image_processor.tiling, request.policy, len(record.pictures))
        views = []
        for number, (picture, image, scheme) in enumerate(zip(record.pictures, request.images, chosen, strict=True), 1):
            planned = num_image_tokens(picture.width, picture.height, scheme, picture.frame)
            if image.size != (picture.width, picture.height) and planned != num_image_tokens(
                *image.size, scheme, picture.frame
            ):
                raise RecordError(
                    f"record {record.id}: picture {number} was {picture.width} x {picture.height} and is "
                    f"{image.width} x {image.height}, which takes another number of image tokens than {planned - 2}"
                )
            views.append(View(f"record {record.id}: picture {number}", image, scheme, picture.frame))
        ids = prompt_ids(record, self.processor, request.policy)
        if len(ids) + sampling.max_new_tokens > self.max_length:
            raise RecordError(
                f"record {record.id}: {len(ids)} prompt tokens and {sampling.max_new_tokens} new ones exceed the "
                f"model's {self.max_length}: shorten the prompt, allow fewer tiles, or ask for a shorter answer"
            )
        self._waiting.append(Prompt(request, ids, views))

    def step(self) -> list[Delta]:
        """A token for every answer in flight, then the first tokens of prompts that wait, as far as there is room.

        A request whose pictures fail ends with an "error"; raises EngineError if the model fails (out of memory): then
        nothing is in flight any more.
        """
        deltas, self._ended = self._ended, []
        if not self._running and not self._waiting:
            return deltas
        try:
            with torch.inference_mode(), self._ready():
                if self._running:
                    deltas += self._extend(self._next_hidden(), 0)
                if self._waiting:
                    deltas += self._prefill()
        except BaseException as error:
            self._drop()
            if isinstance(error, Exception):
                raise EngineError(f"the model failed: {type(error).__name__}: {error}") from error
            raise
        return deltas

    def cancel(self, id: str) -> None:
        """End a request now; the next step tells."""
        for prompt in [prompt for prompt in self._waiting if prompt.request.id == id]:
            self._waiting.remove(prompt)
            answers = (Answer(prompt, index, self._decode) for index in range(prompt.request.sampling.n))
            self._ended += [answer.end("cancelled") for answer in answers]
        with torch.inference_mode():  # the cache's buffers were made so
            for row in reversed(range(len(self._running))):
                if self._running[row].request.id == id:
                    self._ended.append(self._running[row].end("cancelled"))
                    self._leave(row)

    def close(self) -> None:
        """Let go of everything but the model."""
        self._drop()
        self._ended = []
        self.features.forget()

    # ---- steps --------------------------------------------------------------------------------------------------
    # What runs the language model elsewhere replaces ``_next_hidden``, ``_admit``, ``_read`` and the cache of rows.

    def _next_hidden(self) -> torch.Tensor:
        """The last token of every running answer through the language model: hidden states [B, D]."""
        ids_B = torch.tensor([answer.last for answer in self._running], device=self.model.device)
        if decode.supports(self.model):
            return decode.decode_step(self.model, ids_B, self._cache)
        with self._cache.stepping() as (positions_B1, mask):
            output = self.model.model.language_model(
                input_ids=ids_B[:, None],
                position_ids=positions_B1,
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state[:, 0]
        return hidden

    def _prefill(self) -> list[Delta]:
        """Read the prompts there is room for, as one pack, and say their first tokens."""
        prompts, deltas = [], []
        admitted = self._admit()
        seen = self.features.see([prompt.views for prompt in admitted])
        features: list[torch.Tensor] = []
        for prompt, tokens in zip(admitted, seen, strict=True):
            given = 0 if tokens is None or isinstance(tokens, Exception) else len(tokens)
            planned = prompt.ids.count(self.processor.image_token_id)
            if isinstance(tokens, Exception) or given != planned:
                error = (
                    f"{given} image tokens for {planned} placeholders" if not isinstance(tokens, Exception) else tokens
                )
                deltas.append(Delta(id=prompt.request.id, finish_reason="error", error=str(error) or repr(error)))
                continue
            prompts.append(prompt)
            features += [tokens] if tokens is not None else []
        if not prompts:
            return deltas
        hidden_D = self._read(prompts, features)
        first = len(self._running)
        self._running += [Answer(prompt, 0, self._decode) for prompt in prompts]
        rows = [*range(len(prompts))]
        for row, prompt in enumerate(prompts):
            copies = range(1, prompt.request.sampling.n)
            if copies:
                self._cache.repeat(first + row, len(copies))
                self._running += [Answer(prompt, index, self._decode) for index in copies]
                rows += [row] * len(copies)
        return deltas + self._extend(hidden_D[rows], first)

    def _admit(self) -> list[Prompt]:
        """The prompts that are read next, in the order they came; the first in any case if nothing is in flight."""
        taken: list[Prompt] = []
        lengths: list[int] = []
        while self._waiting:
            prompt = self._waiting[0]
            more = [len(prompt.ids)] * prompt.request.sampling.n
            if len(self._running) + len(lengths) + len(more) > self.capacity:
                break
            if taken and sum(len(other.ids) for other in taken) + len(prompt.ids) > self.prefill_tokens:
                break
            if (taken or self._running) and self._cache.padded([*lengths, *more]) > self._max_padded:
                break
            taken.append(self._waiting.popleft())
            lengths += more
        return taken

    def _read(self, prompts: Sequence[Prompt], features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prompts become rows of the cache; gives the hidden states [documents, D] of their last tokens."""
        device = self.model.device
        lengths = [len(prompt.ids) for prompt in prompts]
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        with self._cache.joining(lengths, device) as positions_1T:
            output = self.model.model(
                input_ids=torch.tensor([[id for prompt in prompts for id in prompt.ids]], device=device),
                position_ids=positions_1T,
                image_features=torch.cat(list(features)) if features else None,
                past_key_values=self._cache,
                use_cache=True,
                cu_seq_lens_q=ends.int(),
                cu_seq_lens_k=ends.int(),
                max_length_q=max(lengths),
                max_length_k=max(lengths),
            )
        hidden: torch.Tensor = output.last_hidden_state[0, ends[1:] - 1]
        return hidden

    def _extend(self, hidden_BD: torch.Tensor, first: int) -> list[Delta]:
        """A token for every running answer from ``first`` on; those that end leave."""
        answers = self._running[first:]
        self._banned = self._banned.to(hidden_BD.device)
        logits_BV = self.model.lm_head(hidden_BD).index_fill_(-1, self._banned, float("-inf"))
        choices = choose(logits_BV, [answer.chooser for answer in answers])
        deltas = [answer.take(choice, self.end_ids) for answer, choice in zip(answers, choices, strict=True)]
        for row in reversed(range(first, len(self._running))):
            if deltas[row - first].finish_reason is not None:
                self._leave(row)
        return deltas

    # ---- state --------------------------------------------------------------------------------------------------

    def _leave(self, row: int) -> None:
        """Take a row out of the batch; the last one takes its place, as in the cache."""
        self._cache.drop(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last

    def _drop(self) -> None:
        self._waiting.clear()
        self._running.clear()
        self._cache.clear()

    def _decode(self, ids: list[int]) -> str:
        text: str = self.processor.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model in evaluation mode, with the attention that knows packs; as it was afterwards."""
        model, text = self.model, self.model.model.language_model.config
        was_training, chosen = model.training, text._attn_implementation
        if was_training:
            model.train(False)
        if chosen != PACKED:
            text._attn_implementation = PACKED
        try:
            yield
        finally:
            if chosen != PACKED:
                text._attn_implementation = chosen
            if was_training:
                model.train(True)
