"""vLLM: its plug-in for our architectures, and an engine in this process that keeps the protocol.

vLLM runs the very classes of ``sailvl.model`` inside its transformers backend, with its own attention, paged cache and
batching, so there is no second model to keep right. ``register`` is the entry point of its plug-in group
(``vllm.general_plugins``); with it ``vllm serve DIR`` works too, without ``--trust-remote-code``, and must not be given
``--model-impl transformers``, which looks for the class in transformers alone.

Prompts are ours, token by token (``data.encode``), with one image token per picture, which vLLM repeats: text that
looks like a special token is never read as one. vLLM remembers processed pictures one by one and shows the processor
only those it has not seen, so what depends on all pictures of a prompt is settled here, before: the shared tile limit,
the enlarged first picture, frames of one tile.

Departures: seeds are vLLM's (answers of one seed repeat here, but are not those of the local engine), log-probabilities
are those before bans, and an answer cut inside a character ends before it. Checked with vLLM 0.32
(tests/parity/test_vllm.py). vLLM changes the classes of transformers in the process its core is in: build other models
before, or give the core a process of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from safetensors import SafetensorError, safe_open

from sailvl.data.encode import prompt_ids
from sailvl.engine.answers import sayable
from sailvl.engine.base import Delta, EngineError, Request, Sampling
from sailvl.geometry import AnyRes, Scheme, Tiling, enlarged, grid_of, num_image_tokens, schemes
from sailvl.media import to_rgb
from sailvl.model.configuration import SailVLConfig
from sailvl.model.processing import SailVLProcessor
from sailvl.types import RecordError

_BACKEND = "vllm.model_executor.models.transformers"
ARCHITECTURES = {
    "SailVLForConditionalGeneration": f"{_BACKEND}:TransformersMultiModalForCausalLM",
    "SailVLMoeForConditionalGeneration": f"{_BACKEND}:TransformersMultiModalMoEForCausalLM",
}
"""Architecture names in our ``config.json`` to vLLM's classes, as text: importing them early would start CUDA."""

_BAN = -100.0  # the lowest bias it takes
_REASONS: dict[str, Literal["stop", "length", "cancelled", "error"]] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
}


def register() -> None:
    """Make vLLM know our architectures. vLLM calls this in each of its processes, some of them twice."""
    registry = import_module("vllm").ModelRegistry
    for name, target in ARCHITECTURES.items():
        registry.register_model(name, target)


class VLLM:
    """A model folder in vLLM, in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=1`` puts its core into another).

    ``capacity`` requests run together. ``max_tiles`` is the most that a request's policy may ask for (default: the
    processor's own), and ``msac`` says whether it may ask for two grids: vLLM sets memory aside for such a picture when
    it starts. ``adapter`` is a folder of ``sailvl.model.lora`` or peft, for the language model alone. ``options`` are
    fields of vLLM's ``EngineArgs``, such as ``max_model_len``, ``dtype``, ``gpu_memory_utilization``,
    ``tensor_parallel_size``, ``enforce_eager``.
    Raises ModuleNotFoundError without vLLM, EngineError if it cannot start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        capacity: int = 64,
        max_tiles: int | None = None,
        msac: bool = False,
        **options: Any,
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self._vllm = import_module("vllm")
        register()
        self.capacity = capacity
        self.processor = SailVLProcessor.from_pretrained(model)
        self._scheme = self.processor.image_processor.tiling
        most = self._scheme.max_tiles
        self._most, self._msac = most if most is None else max(most, max_tiles or 0), msac
        config = SailVLConfig.from_pretrained(model)
        eos_id = self.processor.tokenizer.eos_token_id
        ends, banned = sayable(self.processor, config.text_config.vocab_size, eos_id)
        self._end_ids, self._bias = sorted(ends), dict.fromkeys(banned, _BAN)
        self._adapter = None
        if adapter is not None:
            lora = import_module("vllm.lora.request")
            self._adapter = lora.LoRARequest("adapter", 1, str(Path(adapter).absolute()))
            options = {"enable_lora": True, "max_lora_rank": _rank(Path(adapter)), **options}
        try:
            arguments = self._vllm.EngineArgs(
                model=str(model),
                max_num_seqs=capacity,
                mm_processor_kwargs=({"max_tiles": self._most} if self._most else {})
                | ({"msac": True} if msac else {}),
                disable_log_stats=True,
                **options,
            )
            self._engine = self._vllm.LLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"{model}: vLLM cannot start: {error}") from error
        self._left: dict[str, set[int]] = {}
        self._most_likely: dict[str, int] = {}
        self._ended: list[Delta] = []

    def submit(self, request: Request) -> None:
        """Take a request. Raises RecordError if vLLM refuses it (too long), ValueError if its id is in flight."""
        if request.id in self._left:
            raise ValueError(f"a request called {request.id!r} is in flight")
        prompt = self._prompt(request)
        try:
            (rendered,) = self._engine.renderer.render_cmpl([prompt])
            parameters = self._parameters(request.sampling)
            self._engine.add_request(request.id, rendered, parameters, lora_request=self._adapter)
        except Exception as error:
            # vLLM's errors have no common base; where our processor raised, its message is a dump of the pictures.
            raise RecordError(f"record {request.record.id}: vLLM refuses it: {error.__cause__ or error}") from error
        self._left[request.id] = set(range(request.sampling.n))
        self._most_likely[request.id] = request.sampling.top_logprobs or 0

    def step(self) -> list[Delta]:
        """One pass of vLLM's scheduler. Raises EngineError when its core has died."""
        deltas, self._ended = self._ended, []
        if not self._left:
            return deltas
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._left.clear()
            self._most_likely.clear()
            raise EngineError(f"vLLM died: {type(error).__name__}: {error}") from error
        for output in outputs:
            for answer in output.outputs:
                if answer.index in self._left.get(output.request_id, ()):
                    prompt = len(output.prompt_token_ids or ())
                    deltas.append(self._delta(output.request_id, answer, prompt))
        return deltas

    def cancel(self, id: str) -> None:
        """End a request; unknown ids are ignored."""
        if id in self._left:
            self._engine.abort_request([id])
            self._ended += [Delta(id=id, index=index, finish_reason="cancelled") for index in sorted(self._left[id])]
            self._forget(id)

    def close(self) -> None:
        """Let go of the model."""
        self._left.clear()
        self._engine.engine_core.shutdown()

    def _prompt(self, request: Request) -> dict[str, Any]:
        """Token ids with one image token per picture, the pictures, and how to cut them."""
        record, images, policy = request.record, request.images, request.policy
        if len(images) != len(record.pictures):
            raise RecordError(f"record {record.id}: {len(record.pictures)} pictures, {len(images)} images given")
        ids = self._folded(prompt_ids(record, self.processor, policy))
        if not images:
            return {"prompt_token_ids": ids}
        wanted = schemes(self._scheme, policy, len(images))
        frames = [picture.frame for picture in record.pictures]
        most, msac = wanted[0].max_tiles, isinstance(wanted[0], Tiling) and wanted[0].msac
        if (self._most is not None and (most or 0) > self._most) or (msac and not self._msac):
            raise RecordError(
                f"record {record.id}: its policy asks for {most} tiles{' by two grids' if msac else ''}; this engine "
                f"was started for at most {self._most}{'' if self._msac else ' by one grid'}"
            )
        if any(frames) and isinstance(wanted[0], Tiling) and wanted[0].min_tiles > 1:
            raise RecordError(f"record {record.id}: vLLM cannot give its frames one tile where pictures take more")
        known = list(zip(images, wanted, frames, strict=True))
        if any(num_image_tokens(*image.size, scheme, frame) == 3 for image, scheme, frame in known):
            # It takes the most frequent of a picture's tokens for the image token, and would find <img> here.
            raise RecordError(f"record {record.id}: vLLM cannot place a picture that is one token: enlarge it")
        limits: dict[str, Any] = {"max_tiles": most, "msac": msac if self._msac else None}
        return {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": [_sized(*picture) for picture in known]},
            "mm_processor_kwargs": {name: limit for name, limit in limits.items() if limit is not None},
        }

    def _folded(self, ids: Sequence[int]) -> list[int]:
        """A prompt as training sees it, each picture's run of tokens made one image token."""
        start, image, end = self.processor.image_token_ids
        folded, is_inside = [], False
        for id in ids:
            if id == start:
                folded.append(image)
            is_inside = (is_inside or id == start) and id != end
            if not is_inside and id != end:
                folded.append(id)
        return folded

    def _parameters(self, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            stop=list(sampling.stop),
            seed=sampling.seed,
            max_tokens=sampling.max_new_tokens,
            logprobs=sampling.top_logprobs,
            stop_token_ids=self._end_ids,
            logit_bias=self._bias,
            # Grounding marks are special tokens, and part of an answer.
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )

    def _delta(self, id: str, answer: Any, num_prompt_tokens: int) -> Delta:
        """One answer's gain, and the books: a request whose answers have all ended is forgotten."""
        rows, most = answer.logprobs or (), self._most_likely[id]
        reason = None if answer.finish_reason is None else _REASONS.get(str(answer.finish_reason), "error")
        if reason is not None:
            self._left[id].discard(answer.index)
        if reason == "error" or not self._left[id]:
            self._forget(id)
        return Delta(
            id=id,
            index=answer.index,
            text=answer.text,
            ids=tuple(answer.token_ids),
            logprobs=tuple(row[token].logprob for row, token in zip(rows, answer.token_ids, strict=False)),
            top_logprobs=tuple(_likeliest(row, most) for row in rows) if most else (),
            finish_reason=reason,
            error=f"vLLM ended the answer with '{answer.finish_reason}'" if reason == "error" else "",
            num_prompt_tokens=num_prompt_tokens if reason is not None else None,
        )

    def _forget(self, id: str) -> None:
        del self._left[id], self._most_likely[id]


def _sized(image: Image.Image, scheme: Scheme, frame: bool) -> Image.Image:
    """The picture as it can be cut without knowing its neighbours: a frame in its one tile, the first enlarged.

    The processor finds it of that size already, so nothing is resized twice.
    """
    image = to_rgb(image)
    if isinstance(scheme, AnyRes):
        rows, columns = grid_of(image.width, image.height, scheme, frame)
        return image.resize((columns * scheme.patch, rows * scheme.patch), Image.Resampling.BICUBIC)
    if frame:
        return image.resize((scheme.side, scheme.side))
    size = enlarged(image.width, image.height, scheme)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _likeliest(row: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    pairs = sorted(((token, found.logprob) for token, found in row.items()), key=lambda pair: -pair[1])
    return tuple(pairs[:count])


def _rank(adapter: Path) -> int:
    """The rank vLLM must set aside for an adapter: the next of those it knows.

    Raises EngineError for a folder that is none, and for adapters outside the language model: vLLM passes over these
    with a warning, and would answer with half of the training.
    """
    try:
        stored = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([int(stored["r"]), *map(int, (stored.get("rank_pattern") or {}).values())])
        with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
            elsewhere = sorted(name for name in tensors.keys() if ".language_model." not in name)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise EngineError(f"{adapter}: no adapter in peft's layout ({type(error).__name__}: {error})") from error
    if elsewhere:
        raise EngineError(
            f"{adapter}: {len(elsewhere)} of its tensors are not the language model's (first {elsewhere[0]}), and vLLM "
            "would leave them out: merge the adapter into the model"
        )
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
