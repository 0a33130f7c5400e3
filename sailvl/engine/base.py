"""Answering prompts: the protocol every engine keeps, and how people use one.

An engine takes requests (``submit``) and advances all of them together (``step``); text comes out in pieces. That is
what batching, streaming, cancelling and serving need, and nothing else: ``replies`` and ``stream`` below are loops over
those two calls, and work with every engine.

    for reply in replies(engine, requests):      # as they finish, requests drawn lazily
        print(reply.id, reply.completions[0].text)

No torch here, so that clients of remote engines start at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from sailvl.geometry import ImagePolicy
from sailvl.types import Completion, Record, RecordError


class EngineError(RuntimeError):
    """The engine as a whole cannot go on (a server that is gone); single requests fail by their ``Reply.error``."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. The defaults are greedy.

    ``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 leave all. ``n`` answers per prompt, the
    i-th drawn with its own generator made of (``seed``, i): the same on every run and in any company. ``seed`` None is
    random. ``stop`` strings end an answer and are cut off. ``top_logprobs`` None asks for no log-probabilities, 0 for
    those of the answer's tokens, k for the k most likely beside each.
    Raises ValueError for values out of range.
    """

    max_new_tokens: int = 1024
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p < 1, "0 or more and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("stop", all(self.stop), "without empty strings"),
            ("top_logprobs", self.top_logprobs is None or self.top_logprobs >= 0, "0 or more"),
        )
        wrong = [f"{name} is {getattr(self, name)!r}; it must be {rule}" for name, holds, rule in ranges if not holds]
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question: a record that ends with a user turn, its pictures decoded and in order, and how to answer it.

    ``id`` names the request among those in flight.
    """

    id: str
    record: Record
    images: Sequence[Image.Image] = ()
    sampling: Sampling = field(default_factory=Sampling)
    policy: ImagePolicy = field(default_factory=ImagePolicy)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one answer gained in a step: answer ``index`` of request ``id``.

    ``text`` is final: incomplete characters and the beginning of a stop string are held back until they are decided.
    ``top_logprobs`` holds, for each of ``ids``, (token id, log-probability) pairs, the most likely first. A last delta
    has a ``finish_reason``, and ``num_prompt_tokens`` where the engine knows it; "error" ends all answers of the
    request at once, and ``error`` says what is wrong with it.
    """

    id: str
    index: int = 0
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    error: str = ""
    num_prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """All answers to one request, or the reason why there is none."""

    id: str
    completions: tuple[Completion, ...] = ()
    error: str = ""
    num_prompt_tokens: int | None = None


class Engine(Protocol):
    """What an engine does. ``capacity`` is how many requests in flight keep it busy."""

    @property
    def capacity(self) -> int: ...

    def submit(self, request: Request) -> None:
        """Take a request. Raises RecordError if it cannot be answered (too long, pictures that do not fit)."""

    def step(self) -> list[Delta]:
        """Advance the requests in flight, and give what they gained; [] when there are none, or nothing came yet.

        Raises EngineError when the engine cannot go on; nothing is in flight then.
        """

    def cancel(self, id: str) -> None:
        """End a request; each of its unfinished answers gets a last delta "cancelled". Unknown ids are ignored."""

    def close(self) -> None:
        """Let go of processes and connections."""


def replies(engine: Engine, requests: Iterable[Request]) -> Iterator[Reply]:
    """Replies as they finish; at most ``engine.capacity`` requests are in flight, and the next is drawn only then.

    A request that cannot be answered gives a Reply with ``error``; text is as the model wrote it, blanks included.
    Leaving the iteration cancels what is in flight. Raises EngineError when the engine cannot go on.
    """
    waiting, parts = iter(requests), dict[str, _Parts]()
    exhausted = False
    try:
        while parts or not exhausted:
            while not exhausted and len(parts) < engine.capacity:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                if request.id in parts:
                    raise ValueError(f"two requests in flight are called {request.id!r}")
                try:
                    engine.submit(request)
                except RecordError as error:
                    yield Reply(id=request.id, error=str(error))
                else:
                    parts[request.id] = _Parts(request.sampling.n)
            for delta in engine.step() if parts else ():
                if delta.id in parts and parts[delta.id].add(delta):
                    yield parts.pop(delta.id).reply(delta.id)
    except EngineError:
        parts.clear()
        raise
    finally:
        for id in parts:
            engine.cancel(id)
        if parts:
            engine.step()  # their last deltas, which nobody waits for


def stream(engine: Engine, request: Request) -> Iterator[Delta]:
    """The pieces of one request's answers, as they come. Leaving the iteration cancels it.

    Raises RecordError if it cannot be answered.
    """
    engine.submit(request)
    left = request.sampling.n
    try:
        while left:
            for delta in engine.step():
                if delta.id == request.id:
                    left = 0 if delta.finish_reason == "error" else left - (delta.finish_reason is not None)
                    yield delta
    except EngineError:
        left = 0
        raise
    finally:
        if left:
            engine.cancel(request.id)
            engine.step()


class _Parts:
    """The answers of one request, while they grow."""

    def __init__(self, n: int) -> None:
        self.texts: list[list[str]] = [[] for _ in range(n)]
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[float]] = [[] for _ in range(n)]
        self.reasons: list[Literal["stop", "length", "cancelled"] | None] = [None] * n
        self.error = ""
        self.num_prompt_tokens: int | None = None

    def add(self, delta: Delta) -> bool:
        """Whether the request is finished."""
        if delta.finish_reason == "error":
            self.error = delta.error or "unknown error"
            return True
        if delta.num_prompt_tokens is not None:
            self.num_prompt_tokens = delta.num_prompt_tokens
        self.texts[delta.index].append(delta.text)
        self.ids[delta.index] += delta.ids
        self.logprobs[delta.index] += delta.logprobs
        if delta.finish_reason is not None:
            self.reasons[delta.index] = delta.finish_reason
        return all(self.reasons)

    def reply(self, id: str) -> Reply:
        if self.error:
            return Reply(id=id, error=self.error)
        rows = zip(self.texts, self.ids, self.logprobs, self.reasons, strict=True)
        done = tuple(
            Completion(text="".join(text), ids=tuple(ids), logprobs=tuple(logprobs), finish_reason=reason)
            for text, ids, logprobs, reason in rows
            if reason is not None
        )
        return Reply(id=id, completions=done, num_prompt_tokens=self.num_prompt_tokens)
