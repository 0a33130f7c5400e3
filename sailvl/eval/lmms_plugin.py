"""Models of this project inside lmms-eval, under the name ``sailvl``:

    lmms-eval --model sailvl --model_args pretrained=DIR --batch_size 32 --tasks mmstar

The package announces ``manifest`` in the entry-point group ``lmms_eval.models`` and depends on nothing there: lmms-eval
is imported when it asks. Written against its version 0.7.3. The prompts are the tasks' own, which are not those of the
published SAIL-VL2 scores; for these see ``eval.bench``. Pictures may stand anywhere in user turns, clips become frames.

Model arguments: ``pretrained`` (a model folder, answered in this process) or ``base_url`` (a server; ``model`` names
one of its models); ``num_frames`` of a clip; ``max_tiles``, ``msac`` and ``upscale`` as everywhere. ``batch_size`` is
how many answers grow at once; with the tool's own default, 1, nothing is batched.

Departures from other models there: a sample that cannot be asked is answered by an empty text, and its reason is
logged; the stop string of a blank line, which lmms-eval adds to every task for few-shot prompts, is not obeyed, since
it would cut answers behind their first paragraph (its own chat models do the same); drawn answers are the same on
every run. Likelihoods are not computed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track

from sailvl.engine.base import Engine, Reply, Request, Sampling, replies
from sailvl.engine.local import Local
from sailvl.engine.remote import Remote
from sailvl.geometry import ImagePolicy
from sailvl.media import to_rgb
from sailvl.model import checkpoint
from sailvl.model.conversation import opened
from sailvl.model.processing import SailVLProcessor
from sailvl.types import IMAGE_PLACEHOLDER, Message, Picture, Record, RecordError
from sailvl.video import NUM_FRAMES

MAX_NEW_TOKENS = 1024
"""Longest answer where a task does not say."""

ALL_AT_ONCE = 32
"""Answers at once for ``batch_size=auto``."""

_NAME, _CLASS = "sailvl", "SailVL"
_FEW_SHOT = "\n\n"
_LOG = logging.getLogger(__name__)


def manifest() -> Any:
    """What lmms-eval registers: a ``ModelManifest`` that names the class below."""
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415  (it is there when it asks)

    return ModelManifest(model_id=_NAME, chat_class_path=f"{__name__}.{_CLASS}")


def __getattr__(name: str) -> Any:
    if name == _CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _model_class() -> type:
    from lmms_eval.api.instance import GenerationResult, TokenCounts  # noqa: PLC0415
    from lmms_eval.api.model import lmms  # noqa: PLC0415

    class SailVL(lmms):  # type: ignore[misc]
        """A model of this project as lmms-eval drives one: chat messages in, texts out."""

        is_simple = False

        def __init__(
            self,
            pretrained: str = "",
            base_url: str = "",
            model: str | None = None,
            batch_size: int | str = 1,
            device: str | None = None,
            num_frames: int = NUM_FRAMES,
            max_tiles: int | None = None,
            msac: bool = True,
            upscale: float = 1.0,
            engine: Engine | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            capacity = ALL_AT_ONCE if str(batch_size).startswith("auto") else int(batch_size)
            self.device = torch.device(device or _own_device())
            self.policy = ImagePolicy(max_tiles=max_tiles, msac=msac, upscale=upscale)
            self.num_frames, self.batch_size = num_frames, capacity
            self.engine = engine or _engine(
                str(pretrained), base_url, str(model) if model else None, capacity, self.device
            )

        def generate_until(self, requests: Any) -> list[Any]:
            """An answer for each request, in their order; empty for those that could not be asked."""
            found = answers(self.engine, requests, self.task_dict, policy=self.policy, num_frames=self.num_frames)
            results = []
            for request, reply in zip(requests, found, strict=True):
                text, ids = ("", ()) if reply.error else (reply.completions[0].text, reply.completions[0].ids)
                counts = TokenCounts(input_tokens=reply.num_prompt_tokens, output_tokens=len(ids))
                results.append(GenerationResult(text=text, token_counts=counts))
                self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
            return results

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError(
                "sailvl answers questions and computes no likelihoods: choose tasks of output type generate_until"
            )

        def generate_until_multi_round(self, requests: Any) -> Any:
            raise NotImplementedError("sailvl has no multi-round generation: choose tasks of type generate_until")

        def clean(self) -> None:
            """Let go of the model: a judge may need its memory."""
            self.engine.close()
            del self.engine
            super().clean()

    SailVL.__qualname__, SailVL.__module__ = _CLASS, __name__
    return SailVL


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _engine(pretrained: str, base_url: str, model: str | None, capacity: int, device: torch.device) -> Engine:
    if bool(pretrained) == bool(base_url):
        raise ValueError("sailvl needs one of pretrained=DIR and base_url=URL among its model arguments")
    if base_url:
        return Remote(base_url, model, capacity=capacity)
    folder = Path(pretrained)
    if not (folder / "config.json").is_file():
        raise ValueError(f"pretrained={pretrained}: no model folder there (it would hold a config.json)")
    loaded: Any = checkpoint.load(folder)
    return Local(loaded.to(device), SailVLProcessor.from_pretrained(folder), capacity=capacity)


# ---- from their requests to ours ------------------------------------------------------------------------------


def answers(
    engine: Engine,
    instances: Sequence[Any],
    documents: Mapping[str, Mapping[str, Any]],
    *,
    policy: ImagePolicy | None = None,
    num_frames: int = NUM_FRAMES,
) -> list[Reply]:
    """A reply for each instance, in order; those that failed hold an ``error``, which is logged.

    An instance's ``args`` are (context, doc_to_messages, generation arguments, document id, task, split), and
    ``documents[task][split][id]`` is what the messages are made of. Raises RuntimeError if every instance failed: that
    is no model's score.
    """
    found: dict[int, Reply] = {}

    def fail(number: int, reason: str) -> None:
        _, _, _, doc_id, task, split = instances[number].args
        found[number] = Reply(id=str(number), error=f"{task}/{split}/{doc_id}: {reason}")
        _LOG.warning("answered by an empty text: %s", found[number].error)

    def requests() -> Iterator[Request]:
        for number, instance in enumerate(instances):
            _, doc_to_messages, arguments, doc_id, task, split = instance.args
            try:
                messages = doc_to_messages(documents[task][split][doc_id])
                record, images = conversation(messages, f"{task}/{doc_id}", num_frames)
                drawn = sampling(arguments, seed=number)
            except Exception as error:  # noqa: BLE001  (a data set's own code, and pictures that it decodes)
                fail(number, f"{type(error).__name__}: {error}")
                continue
            yield Request(id=str(number), record=record, images=images, sampling=drawn, policy=policy or ImagePolicy())

    for reply in track(replies(engine, requests()), "sailvl", total=len(instances)):
        if reply.error:
            fail(int(reply.id), reply.error)
        else:
            found[int(reply.id)] = reply
    failed = [reply.error for _, reply in sorted(found.items()) if reply.error]
    if failed and len(failed) == len(instances):
        raise RuntimeError(f"none of {len(failed)} samples could be asked; the first: {failed[0]}")
    if failed:
        _LOG.warning("%d of %d samples were answered by an empty text", len(failed), len(instances))
    return [found[number] for number in range(len(instances))]


def conversation(
    messages: Sequence[Mapping[str, Any]], name: str, num_frames: int = NUM_FRAMES
) -> tuple[Record, list[Image.Image]]:
    """Chat messages as a record and its decoded pictures.

    Texts of one turn are joined as they are. Raises RecordError for other parts than text, image and video, and for
    pictures outside user turns; MediaError or ValueError for those that cannot be opened.
    """
    turns, pictures, images = [], [], []
    for message in messages:
        role, content = message["role"], message["content"]
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            if kind == "text":
                # a placeholder in a text is the text's own, and must not call for a picture
                texts.append(
                    part["text"].replace(IMAGE_PLACEHOLDER, "<\u200bimage>") if role == "user" else part["text"]
                )
                continue
            if kind not in ("image", "video"):
                raise RecordError(f"record {name}: a part is of type {kind!r}; known are text, image and video")
            if role != "user":
                raise RecordError(f"record {name}: a picture in a turn of the {role}; only users show pictures")
            shown = [_picture(part["url"])] if kind == "image" else _frames(part, num_frames)
            images += shown
            pictures += [Picture(width=i.width, height=i.height, ref=None, frame=kind == "video") for i in shown]
            texts.append(IMAGE_PLACEHOLDER * len(shown))
        turns.append(Message(role=role, text="".join(texts)))
    return Record(id=name, messages=tuple(turns), pictures=tuple(pictures)), images


def _picture(source: Any) -> Image.Image:
    if isinstance(source, Mapping):  # as data sets store pictures that they did not decode
        source = source.get("bytes") or source.get("path")
    (picture,) = opened([source])
    return to_rgb(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))


def _frames(part: Mapping[str, Any], num_frames: int) -> list[Image.Image]:
    """Evenly spaced frames; all of a list of at most so many."""
    clip = part["url"]
    limits = {**(clip if isinstance(clip, Mapping) else {}), **part}
    if any(limits.get(key) is not None for key in ("start_time", "end_time", "video_start", "video_end")):
        raise RecordError("a part of a clip is asked for, and only whole clips are read: cut it beforehand")
    if isinstance(clip, Mapping):
        clip = clip.get("url") or clip.get("path") or clip.get("bytes")
    if isinstance(clip, (str, Path, bytes)):
        return opened([(clip, num_frames, index) for index in range(num_frames)])
    count = len(clip)
    chosen = range(count) if count <= num_frames else [i * count // (num_frames + 1) for i in range(1, num_frames + 1)]
    return [_picture(clip[index]) for index in chosen]


def sampling(arguments: Mapping[str, Any], *, seed: int = 0) -> Sampling:
    """Generation arguments of a task as ours; ``do_sample`` without a temperature draws at 1.

    Beams are not searched: more than one is refused, since it would be another model's score. Raises ValueError.
    """
    if (arguments.get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams is {arguments['num_beams']}; beam search is not done here")
    temperature, top_p = arguments.get("temperature"), arguments.get("top_p")
    drawn = arguments.get("do_sample")
    if drawn is None:
        drawn = temperature is not None and temperature > 0
    temperature = 1.0 if temperature is None else float(temperature)
    until = arguments.get("until") or ()
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text and text != _FEW_SHOT)
    longest = int(arguments.get("max_new_tokens") or MAX_NEW_TOKENS)
    if not drawn or not temperature or top_p == 0:
        return Sampling(max_new_tokens=longest, stop=stop)
    return Sampling(
        max_new_tokens=longest,
        temperature=temperature,
        top_p=1.0 if top_p is None else float(top_p),
        top_k=int(arguments.get("top_k") or 0),
        stop=stop,
        seed=seed,
    )
