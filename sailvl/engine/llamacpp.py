"""Answer prompts with llama.cpp: pictures are seen by torch, and the language model runs from a GGUF file.

The file is one that ``model.gguf_export`` wrote (``sailvl convert MODEL --gguf FILE``). llama.cpp has no encoder of the
AIMv2 family, so the encoder and the projector of the model folder make the image tokens, which are handed over as
embeddings in place of their placeholders; everything else about an answer is as in ``local``. Needs the package
``llama-cpp-python``, which compiles llama.cpp when it is installed.

Logits differ from torch's by rounding: llama.cpp rounds activations to the type of the weights. What is asked together
changes an answer by rounding alone.

Cost: the context is allocated at once, for ``context`` tokens of all answers together; a prompt waits until it and its
longest answers fit. The torch model's own language model is never touched, and its mapped weights take no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sailvl.engine.answers import Prompt
from sailvl.engine.base import EngineError, Request
from sailvl.engine.local import Local
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.types import RecordError


class LlamaCpp(Local):
    """As ``Local``, with the language model run by ``rows`` (a ``LlamaRows``). The torch model given loses its own."""

    def __init__(self, model: SailVLForConditionalGeneration, processor: SailVLProcessor, rows: Any) -> None:
        text = model.config.text_config
        if (rows.vocabulary, rows.width) != (text.vocab_size, text.hidden_size):
            raise ValueError(
                f"the GGUF file has {rows.vocabulary} tokens of width {rows.width}, the model {text.vocab_size} of "
                f"{text.hidden_size}: they belong to different models"
            )
        super().__init__(model, processor, capacity=rows.capacity)
        self.max_length = min(self.max_length, rows.context)
        self._cache = self._rows = rows
        self._read_tokens: dict[str, int] = {}
        model.model.language_model = _Elsewhere(text)
        model.lm_head = nn.Identity()  # rows give logits where ``Local`` expects hidden states

    def submit(self, request: Request) -> None:
        """As ``Local.submit``; all answers to a prompt together must fit into the context."""
        super().submit(request)
        room = _room(self._waiting[-1], request.sampling.n)
        if room > self._rows.context:
            self._waiting.pop()
            raise RecordError(
                f"record {request.record.id}: prompt and answers may take {room} tokens, and the context holds "
                f"{self._rows.context}: ask for fewer or shorter answers"
            )

    def close(self) -> None:
        """Free the file's model and its context."""
        super().close()
        self._rows.close()

    def _admit(self) -> list[Prompt]:
        running = {answer.request.id for answer in self._running}
        self._read_tokens = {id: length for id, length in self._read_tokens.items() if id in running}
        used = sum(answer.request.sampling.max_new_tokens for answer in self._running)
        used, rows = used + sum(self._read_tokens.values()), len(self._running)
        taken: list[Prompt] = []
        while self._waiting:
            number = self._waiting[0].request.sampling.n
            room = _room(self._waiting[0], number)
            if rows + number > self.capacity or used + room > self._rows.context:
                break
            taken.append(self._waiting.popleft())
            self._read_tokens[taken[-1].request.id] = len(taken[-1].ids)
            used, rows = used + room, rows + number
        return taken

    def _read(self, prompts: Sequence[Prompt], features: Sequence[torch.Tensor]) -> torch.Tensor:
        image, given = self.processor.image_token_id, iter(features)
        seen = [next(given) if image in prompt.ids else None for prompt in prompts]
        return torch.stack([self._rows.read(p.ids, tokens, image) for p, tokens in zip(prompts, seen, strict=True)])

    def _next_hidden(self) -> torch.Tensor:
        logits: torch.Tensor = self._rows.extend([answer.last for answer in self._running])
        return logits


class _Elsewhere(nn.Module):
    """Stands where the language model was."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def _room(prompt: Prompt, number: int) -> int:
    """The most tokens a prompt and its answers take: answers share the prompt's keys and values."""
    return len(prompt.ids) + number * prompt.request.sampling.max_new_tokens


class LlamaRows:
    """A GGUF model and the keys and values of its answers in flight, row by row; rows are llama.cpp's sequences.

    Dropping a row puts the last one in its place. Raises EngineError if the package is missing or the file unusable.
    """

    def __init__(self, path: Path, *, capacity: int = 4, context: int = 8192, threads: int = 0) -> None:
        try:
            import llama_cpp  # noqa: PLC0415  (compiled when installed; not a dependency)
        except ImportError as error:
            raise EngineError("running GGUF files needs a package: pip install llama-cpp-python") from error
        self._lib, self.capacity, self.context = llama_cpp, capacity, context
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise EngineError(f"{path}: llama.cpp cannot read this file")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = context, capacity, True
        options.n_batch = options.n_ubatch = self._batch = min(512, context)
        threads = threads or torch.get_num_threads()
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise EngineError(f"{path}: llama.cpp cannot make a context of {context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.width = llama_cpp.llama_model_n_embd(self._model)
        self._sequences: list[int] = []
        self._lengths: list[int] = []

    def read(self, ids: Sequence[int], image_tokens: torch.Tensor | None, placeholder: int) -> torch.Tensor:
        """A prompt becomes a row; logits [V] of its last token. ``image_tokens`` [I, D] are for its placeholders."""
        sequence = min(set(range(self.capacity)) - set(self._sequences))
        self._sequences.append(sequence)
        self._lengths.append(len(ids))
        used = 0
        start = 0
        while start < len(ids):
            is_image, end = ids[start] == placeholder, start
            while end < len(ids) and end - start < self._batch and (ids[end] == placeholder) == is_image:
                end += 1
            given: Any = ids[start:end]
            if is_image:
                if image_tokens is None:
                    raise ValueError("placeholders without image tokens")
                given = image_tokens[used : used + end - start]
                used += end - start
            places = [(start + index, sequence) for index in range(end - start)]
            self._decode(given, places, wanted=[end - start - 1] if end == len(ids) else [])
            start = end
        return self._logits(-1)

    def extend(self, ids: Sequence[int]) -> torch.Tensor:
        """The next token of every row; logits [rows, V]."""
        places = list(zip(self._lengths, self._sequences, strict=True))
        self._decode(list(ids), places, wanted=list(range(len(ids))))
        self._lengths = [length + 1 for length in self._lengths]
        return torch.stack([self._logits(row) for row in range(len(ids))])

    def repeat(self, row: int, times: int) -> None:
        """Add ``times`` copies of a row at the end."""
        for _ in range(times):
            fresh = min(set(range(self.capacity)) - set(self._sequences))
            self._lib.llama_memory_seq_cp(self._memory, self._sequences[row], fresh, -1, -1)
            self._sequences.append(fresh)
            self._lengths.append(self._lengths[row])

    def drop(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        self._lib.llama_memory_seq_rm(self._memory, self._sequences[row], -1, -1)
        for values in (self._sequences, self._lengths):
            last = values.pop()
            if row < len(values):
                values[row] = last

    def clear(self) -> None:
        """Free all rows."""
        self._lib.llama_memory_clear(self._memory, True)
        self._sequences, self._lengths = [], []

    def close(self) -> None:
        """Free everything; the rows cannot be used any more."""
        if self._context:
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._context = self._model = None

    def _decode(self, given: Any, places: Sequence[tuple[int, int]], wanted: Sequence[int]) -> None:
        """Token ids or embeddings [n, D] at (position, sequence) ``places``; logits are kept for ``wanted``."""
        size, is_ids = len(places), isinstance(given, list)
        batch = self._lib.llama_batch_init(size, 0 if is_ids else self.width, 1)
        try:
            batch.n_tokens = size
            for index, (position, sequence) in enumerate(places):
                batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = position, 1, sequence
                batch.logits[index] = index in wanted
                if is_ids:
                    batch.token[index] = given[index]
            if not is_ids:
                values = np.ascontiguousarray(given.detach().float().cpu().numpy())
                ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _logits(self, index: int) -> torch.Tensor:
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).copy())
