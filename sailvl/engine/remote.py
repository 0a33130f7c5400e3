"""Any server that speaks the OpenAI chat protocol, as an engine: ours, vLLM, llama.cpp, a paid service.

    with closing(Remote("http://127.0.0.1:8000")) as engine:
        for reply in replies(engine, requests): ...

Requests run at the same time on one background thread, each on its own connection; pictures go as PNG data URLs in
place of their placeholders, and answers come back as event streams. Cancelling closes the connection, which every
server understands. A request is tried again (no connection, 408, 409, 429, 5xx; ``Retry-After`` is honoured) only while
nothing of its answer has arrived, so no text is ever doubled.

What remote answers lack: token ids (and with them the alternatives of ``top_logprobs``). A thought that the server
reports apart (``reasoning_content``, ``reasoning``) is put back as ``<think>...</think>`` in front of the answer; all
else is the server's text, unchanged. Text is sent unchanged too: our own server neutralises special tokens in it, a
bare vLLM server does not (``sailvl.model.chat.escape`` does).
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import httpx

from sailvl.engine.base import Delta, EngineError, Request
from sailvl.engine.connection import Connections, Tries, clean_base_url, named
from sailvl.engine.sse import EventReader
from sailvl.engine.wire import AnswerReader, PolicyAs, ServerError, request_body

_PATIENCE_S = 0.05
"""How long a step waits for something to arrive: cancelling and submitting are never further away than this."""


class Remote:
    """The server at ``base_url`` (with or without ``/v1``); ``model`` None takes the first that it lists.

    ``capacity`` requests keep it busy, each tried 1 + ``retries`` times; ``timeout_s`` bounds the server's longest
    silence. The key is ``api_key``, else ``OPENAI_API_KEY`` of the environment, and appears in no message. Proxies of
    the environment are used, except for this machine's own addresses; redirections are not followed.

    ``policy_as`` says which dialect the server speaks:
    "fields": ours. ``max_tiles``, ``msac`` and ``upscale`` beside the other fields; video frames are marked.
    "mm_processor_kwargs": vLLM's, started with ``--trust-request-mm-kwargs``. The policy goes under that name, settled
    per picture; the first picture is enlarged here. Frames cannot be marked: they are labelled as stills, one tile each
    if a prompt has frames only.
    "none": the plain protocol. Policies, ``top_k``, ``min_p`` and ``repetition_penalty`` are refused.

    ``extra`` fields are added to every request, for example ``{"chat_template_kwargs": {"enable_thinking": True}}``;
    None removes a field. Raises ValueError for an address that is not http(s) or holds a password.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        capacity: int = 16,
        timeout_s: float = 600.0,
        retries: int = 4,
        policy_as: PolicyAs = "fields",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if capacity < 1 or retries < 0 or timeout_s <= 0:
            raise ValueError(f"capacity {capacity}, retries {retries}, timeout_s {timeout_s:g}: out of range")
        self.base_url, self.capacity = clean_base_url(base_url), capacity
        self._model, self._policy_as, self._extra = model, policy_as, dict(extra or {})
        self._key = (api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")).strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("the API key holds characters that no header can carry")
        self._retries = retries
        self._events: queue.SimpleQueue[tuple[_Run, list[Delta] | EngineError]] = queue.SimpleQueue()
        self._ended: list[Delta] = []
        self._running: dict[str, _Run] = {}
        self._thread: _Thread | None = None
        self._connections = Connections(self.base_url, key=self._key, timeout_s=timeout_s, keep=capacity)
        self._naming = asyncio.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"Remote({self.base_url!r}, model={self._model!r}, capacity={self.capacity})"

    def model_name(self) -> str:
        """The model that answers, as the server calls it. Raises EngineError if the server cannot say."""
        try:
            return asyncio.run_coroutine_threadsafe(self._name(), self._running_thread().loop).result()
        except ServerError as error:
            raise EngineError(f"{self.base_url}: {error}") from error

    def submit(self, request: Request) -> None:
        """Take a request; what the server thinks of it comes as a Delta.

        Raises RecordError if it cannot be put into the protocol, ValueError if its id is in flight.
        """
        if self._closed:
            raise EngineError(f"{self.base_url}: this engine is closed")
        if request.id in self._running:
            raise ValueError(f"request {request.id!r} is in flight already")
        request_body(request, self._policy_as, pictures=False)
        run = _Run(request)
        self._running[request.id] = run
        run.task = asyncio.run_coroutine_threadsafe(self._answer(run), self._running_thread().loop)

    def step(self) -> list[Delta]:
        """What has arrived since the last step; waits for something, briefly.

        Raises EngineError when the server cannot be reached any more.
        """
        deltas, self._ended = self._ended, []
        wait = not deltas
        while self._running:
            try:
                run, found = self._events.get(timeout=_PATIENCE_S) if wait else self._events.get_nowait()
            except queue.Empty:
                break
            if self._running.get(run.request.id) is not run:
                continue  # cancelled meanwhile
            wait = False
            if isinstance(found, EngineError):
                self._stop_all()
                raise found
            for delta in found:
                run.count(delta)
            if not run.left:
                del self._running[run.request.id]
            deltas += found
        return deltas

    def cancel(self, id: str) -> None:
        """End a request and close its connection; unknown ids are ignored."""
        run = self._running.pop(id, None)
        if run is not None:
            run.task.cancel()
            self._ended += [Delta(id=id, index=index, finish_reason="cancelled") for index in sorted(run.left)]

    def close(self) -> None:
        """Close every connection and end the thread."""
        self._closed = True
        self._stop_all()
        if self._thread is not None:
            self._thread.end(self._connections)
        self._thread = None

    def _running_thread(self) -> _Thread:
        if self._thread is None:
            self._thread = _Thread()
        return self._thread

    def _stop_all(self) -> None:
        for run in self._running.values():
            run.task.cancel()
        self._running.clear()

    # ---- on the thread ----------------------------------------------------------------------------------------------

    async def _answer(self, run: _Run) -> None:
        """All of one request; whatever becomes of it is put into the queue."""
        try:
            name = await self._name()
            data = await asyncio.to_thread(self._payload, run.request, name)
            await self._ask(run, data)
        except EngineError as error:
            self._events.put((run, error))
        except Exception as error:  # noqa: BLE001  (whatever happens, a request gets its last delta)
            known = isinstance(error, ServerError)
            message = f"{self.base_url}: {error if known else f'{type(error).__name__}: {error}'}"
            text = message.replace(self._key, "[key]") if self._key else message
            self._events.put((run, [Delta(id=run.request.id, finish_reason="error", error=text)]))

    def _payload(self, request: Request, model: str) -> bytes:
        body = {"model": model, **request_body(request, self._policy_as), **self._extra}
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    async def _name(self) -> str:
        """The model to ask; the server is asked for it once."""
        async with self._naming:
            if self._model is None:
                response = await self._connections.open("GET", "/models", None, Tries(self._retries))
                async with aclosing(response):
                    await response.aread()
                try:
                    self._model = str(response.json()["data"][0]["id"])
                except (ValueError, LookupError, TypeError) as error:
                    raise ServerError("the server lists no model: name one") from error
            return self._model

    async def _ask(self, run: _Run, data: bytes) -> None:
        """Ask until an answer begins, then pass it on."""
        tries = Tries(self._retries)
        while True:
            reader = AnswerReader(run.request.id, run.request.sampling.n)
            response = await self._connections.open("POST", "/chat/completions", data, tries)
            try:
                async with aclosing(response):
                    await self._read(run, response, reader)
                return
            except httpx.TransportError as error:
                if reader.begun or isinstance(error, httpx.TimeoutException) or not await tries.more():
                    raise ServerError(
                        f"the connection was lost after {reader.num_chars} characters ({named(error)})"
                    ) from error

    async def _read(self, run: _Run, response: httpx.Response, reader: AnswerReader) -> None:
        if "text/event-stream" not in response.headers.get("content-type", ""):  # it does not stream
            await response.aread()
            self._put(run, reader.add(_parsed(response.text)) + reader.finish())
            return
        events = EventReader()
        async for chunk in response.aiter_bytes():
            for event in events.feed(chunk):
                if event == "[DONE]":
                    self._put(run, reader.finish())
                    return
                self._put(run, reader.add(_parsed(event)))
        for event in events.finish():
            if event != "[DONE]":
                self._put(run, reader.add(_parsed(event)))
        self._put(run, reader.finish())

    def _put(self, run: _Run, deltas: list[Delta]) -> None:
        if deltas:
            self._events.put((run, deltas))


class _Run:
    """One request in flight."""

    task: Future[None]

    def __init__(self, request: Request) -> None:
        self.request = request
        self.left = set(range(request.sampling.n))

    def count(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            self.left.clear()
        elif delta.finish_reason is not None:
            self.left.discard(delta.index)


class _Thread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sailvl-remote", daemon=True)
        self._thread.start()

    def end(self, connections: Connections) -> None:
        """Let cancelled requests close their connections, then stop."""

        async def last() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await connections.close()
            await self.loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(last(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerError(f"not JSON: {text[:200]!r}") from error
