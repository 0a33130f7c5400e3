"""The OpenAI chat protocol: a request as a JSON body, and an answer out of the stream's chunks. No connections here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from PIL import Image

from sailvl.engine.base import Delta, Request
from sailvl.engine.messages import chat_messages
from sailvl.geometry import ImagePolicy, Tiling, enlarged, schemes
from sailvl.media import to_rgb
from sailvl.types import RecordError

PolicyAs: TypeAlias = Literal["fields", "mm_processor_kwargs", "none"]
"""The dialect of a server; see ``sailvl.engine.remote.Remote``."""

_FINISH: Mapping[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
}


class ServerError(Exception):
    """What the server says is wrong with one request, or an answer that cannot be read."""


# ---- requests -------------------------------------------------------------------------------------------------------


def request_body(request: Request, policy_as: PolicyAs, *, pictures: bool = True) -> dict[str, Any]:
    """The body of a streaming request, without a model name; ``pictures`` False leaves their bytes out (a check).

    What the dialect cannot express and would change the answer raises RecordError.
    """
    record, sampling, policy, images = request.record, request.sampling, request.policy, request.images

    def part(index: int) -> dict[str, Any]:
        frame, first = record.pictures[index].frame, index == 0
        image = images[index]
        if policy_as == "mm_processor_kwargs" and first and not frame and policy.upscale != 1:
            size = enlarged(image.width, image.height, Tiling(upscale=policy.upscale))
            image = to_rgb(image).resize(size, Image.Resampling.BILINEAR) if pictures else image
        url = _data_url(image) if pictures else ""
        mark = {"frame": True} if frame and policy_as == "fields" else {}
        return {"type": "image_url", "image_url": {"url": url}, **mark}

    body: dict[str, Any] = {
        "messages": chat_messages(record, part, len(images)),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # Servers of models take what is left out from the checkpoint, which may sample or penalise.
    further = {"top_k": sampling.top_k, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty}
    if policy_as == "mm_processor_kwargs":  # grounding marks are special tokens, which vLLM would drop
        body |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    if policy_as != "none":
        body |= further
    else:
        lost = [name for name, value in further.items() if value != (1 if name == "repetition_penalty" else 0)]
        lost += ["an image policy"] if policy != ImagePolicy() else []
        if lost:
            raise RecordError(
                f"record {record.id}: the plain protocol has no {', '.join(lost)}; set policy_as if the server has"
            )
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            body[name] = getattr(sampling, name)
    if sampling.n > 1:
        body["n"] = sampling.n
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    return body | _policy_fields(request, policy_as)


def _policy_fields(request: Request, policy_as: PolicyAs) -> dict[str, Any]:
    policy, images = request.policy, request.images
    if policy_as == "fields":
        named = {"max_tiles": policy.max_tiles, "msac": policy.msac, "upscale": policy.upscale}
        return {name: value for name, value in named.items() if value != getattr(ImagePolicy(), name)}
    if policy_as == "none" or not images:
        return {}
    # A server that settles pictures one by one: what depends on all of them is settled here.
    fields: dict[str, Any] = {}
    if all(picture.frame for picture in request.record.pictures):
        fields["max_tiles"] = 1
    else:
        first = schemes(Tiling(), policy, len(images))[0]
        if policy.max_tiles is not None:
            fields["max_tiles"] = first.max_tiles
        if isinstance(first, Tiling) and first.msac:
            fields["msac"] = True
    return {"mm_processor_kwargs": fields} if fields else {}


def _data_url(image: Image.Image) -> str:
    """The picture as PNG: lossless, transparent parts white as everywhere here, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- answers --------------------------------------------------------------------------------------------------------


class AnswerReader:
    """The answers of one request, chunk by chunk; chunks may be whole replies (no stream) too.

    ``begun`` says whether anything was given out, ``num_chars`` how much of it is text.
    """

    def __init__(self, id: str, n: int) -> None:
        self._id, self._n = id, n
        self._thinking = [False] * n
        self._reasons: list[str | None] = [None] * n
        self._num_prompt_tokens: int | None = None
        self.num_chars = 0
        self.begun = False

    def add(self, chunk: Any) -> list[Delta]:
        """What a chunk adds. Raises ServerError if it reports an error, or is no chunk."""
        if not isinstance(chunk, dict):
            raise ServerError(f"a chunk is {type(chunk).__name__}, not an object")
        if chunk.get("error"):
            raise ServerError(error_message(chunk))
        try:
            usage = chunk.get("usage") or {}
            if isinstance(usage.get("prompt_tokens"), int):
                self._num_prompt_tokens = usage["prompt_tokens"]
            found = [self._choice(choice) for choice in chunk.get("choices") or ()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerError(f"a chunk cannot be read ({type(error).__name__}: {error})") from error
        return [delta for delta in found if delta is not None]

    def finish(self) -> list[Delta]:
        """The last deltas, when the stream has ended. Raises ServerError if an answer is incomplete."""
        missing = [index for index, reason in enumerate(self._reasons) if reason is None]
        if missing:
            raise ServerError(
                f"the stream ended early: {len(missing)} of {self._n} answers incomplete after {self.num_chars} "
                "characters"
            )
        strange = [reason for reason in self._reasons if reason not in _FINISH]
        if strange:
            raise ServerError(f"the server ended the answer with '{strange[0]}'")
        return [
            Delta(
                id=self._id,
                index=index,
                finish_reason=_FINISH[str(reason)],
                num_prompt_tokens=self._num_prompt_tokens,
            )
            for index, reason in enumerate(self._reasons)
        ]

    def _choice(self, choice: dict[str, Any]) -> Delta | None:
        index = int(choice.get("index") or 0)
        if not 0 <= index < self._n:
            return None
        gained = choice.get("delta") or choice.get("message") or {}
        # A server may send a thought under both names: it is one thought.
        thought = gained.get("reasoning_content") or gained.get("reasoning") or ""
        content = gained.get("content") or gained.get("refusal") or ""
        text = ""
        if thought:
            text += thought if self._thinking[index] else "<think>" + thought
            self._thinking[index] = True
        if content:
            text += "</think>" + content if self._thinking[index] else content
            self._thinking[index] = False
        logprobs = tuple(float(token["logprob"]) for token in (choice.get("logprobs") or {}).get("content") or ())
        if choice.get("finish_reason") is not None:
            self._reasons[index] = str(choice["finish_reason"])
        self.num_chars += len(text)
        if not (text or logprobs):
            return None
        self.begun = True
        return Delta(id=self._id, index=index, text=text, logprobs=logprobs)


def error_message(found: Any) -> str:
    """What an error reply says, wherever the server put it."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else repr(found)
