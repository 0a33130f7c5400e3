"""Answers from a script, without a model: for tests of what asks engines, and for trying a server or a page.

    Fake("a cat")                                   # the same answer to everything
    Fake({"q1": "a cat", "q2": RecordError("...")}) # by request id
    Fake(["a cat", "a dog"])                        # one after the other, then again
    Fake(lambda request: request.record.messages[-1].text.upper())

A token is a word with the blanks in front of it (or a piece of ``token_chars`` characters), a step gives every answer
in flight one token, and ids are running numbers of the words seen, so equal words have equal ids. ``max_new_tokens``,
``stop``, ``n`` and cancelling do what they do elsewhere; log-probabilities are those of a model that is sure. A script
that gives several answers (a list or tuple) gives answer i of ``n`` the i-th, round and round.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from sailvl.engine.base import Delta, EngineError, Request
from sailvl.engine.text import StopText
from sailvl.types import RecordError

Answer: TypeAlias = str | Sequence[str] | Exception
"""A text, one text for each of n answers, or what goes wrong: RecordError refuses the request when it is submitted,
EngineError ends the engine, every other exception fails the request."""

Script: TypeAlias = str | Mapping[str, Answer] | Sequence[Answer] | Callable[[Request], Answer]


class Fake:
    """An engine that says what ``script`` says; each step takes ``seconds``.

    ``asked`` holds every request that was taken, ``cancelled`` the ids that were ended early, ``closed`` whether
    ``close`` was called.
    """

    def __init__(self, script: Script, *, capacity: int = 8, seconds: float = 0.0, token_chars: int = 0) -> None:
        self.capacity, self.seconds, self.token_chars = capacity, seconds, token_chars
        self.asked: list[Request] = []
        self.cancelled: list[str] = []
        self.closed = False
        self._script = script
        self._running: dict[str, list[_Answer]] = {}
        self._ended: list[Delta] = []
        self._ids: dict[str, int] = {}

    def submit(self, request: Request) -> None:
        """Take a request; raises RecordError if the script says so, ValueError if its id is in flight."""
        if request.id in self._running:
            raise ValueError(f"request {request.id!r} is in flight already")
        answer = self._answer(request)
        if isinstance(answer, RecordError):
            raise answer
        self.asked.append(request)
        if isinstance(answer, EngineError):
            self._running[request.id] = [_Answer(request, 0, [], answer)]
            return
        if isinstance(answer, Exception):
            self._ended.append(Delta(id=request.id, finish_reason="error", error=str(answer)))
            return
        texts = [answer] if isinstance(answer, str) else list(answer)
        self._running[request.id] = [
            _Answer(request, index, self._split(texts[index % len(texts)])) for index in range(request.sampling.n)
        ]

    def _answer(self, request: Request) -> Answer:
        script = self._script
        if isinstance(script, str):
            return script
        if callable(script):
            return script(request)
        if isinstance(script, Mapping):
            return script[request.id] if request.id in script else RecordError(f"no answer for request {request.id!r}")
        return script[len(self.asked) % len(script)]

    def _split(self, text: str) -> list[str]:
        if self.token_chars:
            return [text[at : at + self.token_chars] for at in range(0, len(text), self.token_chars)]
        return re.findall(r"\s*\S+|\s+$", text)

    def step(self) -> list[Delta]:
        """A token for every answer in flight, and its last delta when it has no more."""
        if self._running:
            time.sleep(self.seconds)
        deltas, self._ended = self._ended, []
        for name, answers in list(self._running.items()):
            for answer in answers:
                if answer.error is not None:
                    self._running.clear()
                    raise answer.error
                if answer.running:
                    deltas.append(answer.step(self._ids))
            if not any(answer.running for answer in answers):
                del self._running[name]
        return deltas

    def cancel(self, id: str) -> None:
        """End a request; its unfinished answers say so in the next step."""
        if id in self._running:
            self.cancelled.append(id)
            self._ended += [answer.cancel() for answer in self._running.pop(id) if answer.running]

    def close(self) -> None:
        """Nothing to let go of."""
        self.closed = True


class _Answer:
    """One answer, told token by token."""

    def __init__(self, request: Request, index: int, words: list[str], error: EngineError | None = None) -> None:
        self.request, self.index, self.words, self.error = request, index, words, error
        self.running = True
        self._told = 0
        self._text = StopText(request.sampling.stop)

    def step(self, ids: dict[str, int]) -> Delta:
        sampling = self.request.sampling
        if self._told == len(self.words):  # an empty answer
            return self._end("stop", "")
        word = self.words[self._told]
        self._told += 1
        id = ids.setdefault(word, len(ids))
        text = self._text.add(word)
        sure = sampling.top_logprobs is not None
        told = {
            "ids": (id,),
            "logprobs": (0.0,) if sure else (),
            "top_logprobs": ((((id, 0.0),) if sampling.top_logprobs else ()),) if sure else (),
        }
        if self._text.stopped or self._told == len(self.words):
            return self._end("stop", text, **told)
        if self._told == sampling.max_new_tokens:
            return self._end("length", text, **told)
        return Delta(id=self.request.id, index=self.index, text=text, **told)  # type: ignore[arg-type]

    def cancel(self) -> Delta:
        return self._end("cancelled", "")

    def _end(self, reason: str, text: str, **told: object) -> Delta:
        self.running = False
        text += self._text.finish()
        prompt = sum(len(message.text.split()) for message in self.request.record.messages)
        return Delta(
            id=self.request.id,
            index=self.index,
            text=text,
            finish_reason=reason,  # type: ignore[arg-type]
            num_prompt_tokens=prompt,
            **told,  # type: ignore[arg-type]
        )
