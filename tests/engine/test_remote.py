"""The remote engine against a scripted server on this machine's loopback address."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.engine.base import Delta, EngineError, Request, Sampling, replies, stream
from sailvl.engine.connection import clean_base_url, is_loopback
from sailvl.engine.remote import Remote
from sailvl.engine.sse import EventReader
from sailvl.geometry import ImagePolicy
from sailvl.types import Message, Picture, Record, RecordError

Script = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(("GET", self.path, dict(self.headers), None))
        if self.path == "/v1/models":
            self.json(200, {"object": "list", "data": [{"id": "first"}, {"id": "second"}]})
        else:
            self.json(404, {"error": {"message": f"no route {self.path}"}})

    def do_POST(self) -> None:
        self.body = body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = sum(method == "POST" for method, *_ in self.server.seen)
            self.server.seen.append(("POST", self.path, dict(self.headers), body))
            script = self.server.scripts[min(number, len(self.server.scripts) - 1)]
        script(self)

    def json(self, status: int, value: Any, **headers: str) -> None:
        self.raw(status, json.dumps(value).encode(), "application/json", **headers)

    def raw(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """Headers of a stream that ends with the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("connection", "close")
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None: ...


@dataclass
class Server:
    """A running server: what it was asked, and what it says to the first, second, ... POST (the last again)."""

    scripts: list[Script] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for method, _, _, body in self.seen if method == "POST"]


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.seen, http.scripts, http.lock = found.seen, found.scripts, threading.Lock()
    found.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff without the waiting; waits that a server asks for are kept."""
    monkeypatch.setattr("sailvl.engine.connection.random.uniform", lambda low, high: 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def chunk(index: int = 0, finish: str | None = None, logprobs: Any = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "c", "object": "chat.completion.chunk", "model": "first", "choices": [choice]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def events(*chunks: Any, done: bool = True, end: str = "\n\n") -> bytes:
    parts = [item if isinstance(item, str) else f"data: {json.dumps(item, ensure_ascii=False)}" for item in chunks]
    return "".join(part + end for part in [*parts, *(["data: [DONE]"] if done else [])]).encode()


def says(*chunks: Any, done: bool = True) -> Script:
    def script(handler: Handler) -> None:
        handler.begin()
        handler.send(events(*chunks, done=done))

    return script


def refuses(status: int, message: str, **headers: str) -> Script:
    return lambda handler: handler.json(status, {"error": {"message": message, "type": "t"}}, **headers)


ANSWER = says(chunk(role="assistant", content=""), chunk(content="a "), chunk(content="cat"), chunk(finish="stop"))


def ask(id: str = "q", text: str = "what?", images: Any = (), policy: Any = None, **sampling: Any) -> Request:
    pictures = tuple(Picture(width=i.width, height=i.height, ref=None) for i in images)
    record = Record(id=id, messages=(Message(role="user", text=text),), pictures=pictures)
    return Request(id=id, record=record, images=images, sampling=Sampling(**sampling), policy=policy or ImagePolicy())


def answer(server: Server, request: Request, **options: Any) -> Any:
    with closing(Remote(server.url, **options)) as engine:
        (reply,) = replies(engine, [request])
    return reply


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_a_server_says_which_model_it_is(server: Server) -> None:
    with closing(Remote(server.url)) as engine:
        assert engine.model_name() == "first"
    with closing(Remote(server.url, "mine")) as engine:
        assert engine.model_name() == "mine"
    assert [path for _, path, _, _ in server.seen] == ["/v1/models"]


def test_an_answer_and_what_was_asked(server: Server) -> None:
    server.scripts[:] = [
        says(chunk(role="assistant"), chunk(content="a "), chunk(content="cat"), chunk(finish="length"), USAGE)
    ]
    reply = answer(server, ask(max_new_tokens=5))
    (completion,) = reply.completions
    assert (completion.text, completion.ids, completion.finish_reason) == ("a cat", (), "length")
    assert reply.num_prompt_tokens == 7
    assert [path for _, path, _, _ in server.seen] == ["/v1/models", "/v1/chat/completions"]
    assert server.bodies == [
        {
            "model": "first",
            "messages": [{"role": "user", "content": "what?"}],
            "max_tokens": 5,
            "temperature": 0.0,
            "top_p": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    ]


def test_every_sampling_field_has_its_place(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    sampling = dict(
        max_new_tokens=9, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, seed=11,
        presence_penalty=0.5, frequency_penalty=-0.5, stop=("\n", "END"), top_logprobs=3,
    )  # fmt: skip
    answer(server, ask(**sampling), model="mine", extra={"chat_template_kwargs": {"a": 1}, "stream_options": None})
    (body,) = server.bodies
    expected = {**sampling, "max_tokens": 9, "stop": ["\n", "END"], "logprobs": True, "model": "mine", "stream": True}
    del expected["max_new_tokens"]
    expected |= {"messages": [{"role": "user", "content": "what?"}], "chat_template_kwargs": {"a": 1}}
    assert body == expected
    assert all(method == "POST" for method, *_ in server.seen), "a named model is not looked up"


def noise(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode) if mode == "RGBA" else Image.fromarray(pixels)


def sent_picture(part: dict[str, Any]) -> Image.Image:
    prefix, _, data = part["image_url"]["url"].partition(",")
    assert part["type"] == "image_url" and prefix == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_stand_where_their_placeholders_are(server: Server, tiny_processor: Any) -> None:
    """In each user turn, pixel for pixel; and our template makes of it the prompt that training sees."""
    from sailvl.data.encode import _conversation

    server.scripts[:] = [ANSWER]
    images = [noise(20, 10, 1), noise(9, 30, 2, "RGBA"), noise(14, 14, 3)]
    pictures = tuple(Picture(width=i.width, height=i.height, ref=None, frame=n == 2) for n, i in enumerate(images))
    for texts in (["<image>\nfirst <image>", "and <image>?"], ["no names here", "now?"]):
        messages = (
            Message(role="system", text="be brief"),
            Message(role="user", text=texts[0]),
            Message(role="assistant", text="yes"),
            Message(role="user", text=texts[1]),
        )
        record = Record(id="r", messages=messages, pictures=pictures)
        answer(server, Request(id="r", record=record, images=images))
        found = server.bodies[-1]["messages"]
        assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
        parts = [part for message in found if isinstance(message["content"], list) for part in message["content"]]
        sent = [part for part in parts if part["type"] == "image_url"]
        assert [part.get("frame", False) for part in sent] == [False, False, True]
        for image, part in zip(images, sent, strict=True):
            pixels = sent_picture(part)
            assert pixels.mode == "RGB" and pixels.size == image.size
            if image.mode == "RGB":
                assert pixels.tobytes() == image.tobytes()
        for part in sent:  # as a server does: bytes out, marks kept
            part["type"] = "image"
            del part["image_url"]
        shown = tiny_processor.apply_chat_template(found, tokenize=False, add_generation_prompt=True)
        trained = tiny_processor.apply_chat_template(_conversation(record), tokenize=False, add_generation_prompt=True)
        assert shown == trained


def test_policies_as_our_fields_and_as_vllms(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    image, policy = noise(20, 10, 1), ImagePolicy(max_tiles=24, msac=True, upscale=2)
    answer(server, ask(images=[image], policy=policy))
    answer(server, ask(images=[image]))
    answer(server, ask(images=[image], policy=policy), policy_as="mm_processor_kwargs")
    answer(server, ask(images=[image] * 4, policy=policy), policy_as="mm_processor_kwargs")
    answer(server, ask(images=[image]), policy_as="mm_processor_kwargs")
    ours, default, theirs, several, plain = server.bodies
    assert (ours["max_tiles"], ours["msac"], ours["upscale"]) == (24, True, 2)
    assert not {"max_tiles", "msac", "upscale", "mm_processor_kwargs"} & (default.keys() | plain.keys())
    assert sent_picture(ours["messages"][0]["content"][0]).size == (20, 10)
    # vLLM's processor sees pictures alone, so what depends on their number is said already.
    assert theirs["mm_processor_kwargs"] == {"max_tiles": 24, "msac": True} and "max_tiles" not in theirs
    assert theirs["skip_special_tokens"] is False and "skip_special_tokens" not in ours
    assert several["mm_processor_kwargs"] == {"max_tiles": 16}
    assert [sent_picture(part).size for part in several["messages"][0]["content"][:2]] == [(40, 20), (20, 10)]
    enlarged = image.resize((40, 20), Image.Resampling.BILINEAR)
    assert sent_picture(theirs["messages"][0]["content"][0]).tobytes() == enlarged.tobytes()


def test_what_a_plain_server_cannot_do_is_refused(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    with closing(Remote(server.url, model="m", policy_as="none")) as engine:
        with pytest.raises(RecordError, match=r"record q.*top_k, an image policy"):
            engine.submit(ask(top_k=4, policy=ImagePolicy(max_tiles=3)))
        (reply,) = replies(engine, [ask()])
    assert reply.completions and not {"top_k", "min_p", "repetition_penalty"} & server.bodies[0].keys()


@pytest.mark.parametrize(
    ("messages", "num_images", "message"),
    [
        ([], 0, "is empty"),
        ([("user", "a"), ("assistant", "b")], 0, "ends with assistant"),
        ([("user", "a"), ("system", "b"), ("user", "c")], 0, "not as message 2"),
        ([("user", "<image> <image>")], 1, "2 placeholders, 1 pictures"),
        ([("user", "<image>")], 0, "1 placeholders, 0 pictures"),
    ],
)
def test_broken_records_never_reach_the_server(
    server: Server, messages: list[tuple[str, str]], num_images: int, message: str
) -> None:
    images = [noise(4, 4, 0)] * num_images
    pictures = (Picture(width=4, height=4, ref=None),) * num_images
    record = Record(id="r7", messages=tuple(Message(role=r, text=t) for r, t in messages), pictures=pictures)  # type: ignore[arg-type]
    with closing(Remote(server.url)) as engine, pytest.raises(RecordError, match=f"record r7.*{message}"):
        engine.submit(Request(id="x", record=record, images=images))
    assert not server.seen


# ---- what comes back ------------------------------------------------------------------------------------------------

HARD = "naïve 模型 😀 a\u2028b\u0085c\x0bd\r\n<think>\\"


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
def test_any_cut_of_the_bytes_gives_the_same_events(end: str) -> None:
    """Cut in two at every byte, and into single bytes; raw U+2028 in the JSON is no line end."""
    data = events(": ping", chunk(content=HARD), "event: x\nid: 3\ndata: {}", chunk(content="z"), end=end)
    whole = EventReader()
    expected = whole.feed(data) + whole.finish()
    assert json.loads(expected[0])["choices"][0]["delta"]["content"] == HARD and expected[1] == "{}"
    assert len(expected) == 4 and expected[-1] == "[DONE]"
    for pieces in [(data[:at], data[at:]) for at in range(len(data))] + [tuple(bytes([b]) for b in data)]:
        reader = EventReader()
        assert [event for piece in pieces for event in reader.feed(piece)] + reader.finish() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text().map(lambda t: t.replace("\r", "").replace("\n", "")), min_size=1), st.integers(1, 7))
def test_events_survive_the_way(texts: list[str], width: int) -> None:
    data = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", "replace")
    expected = [text.encode("utf-8", "replace").decode() for text in texts]
    reader = EventReader()
    found = [event for at in range(0, len(data), width) for event in reader.feed(data[at : at + width])]
    assert found + reader.finish() == expected


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_unicode_in_pieces_over_the_socket(server: Server, width: int) -> None:
    def script(handler: Handler) -> None:
        handler.begin()
        handler.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = events(chunk(content=HARD[:9]), chunk(content=HARD[9:]), chunk(finish="stop"))
        for at in range(0, len(data), width):
            handler.send(data[at : at + width])

    server.scripts[:] = [script]
    assert answer(server, ask()).completions[0].text == HARD


def test_text_is_there_before_the_answer_is_finished(server: Server) -> None:
    go = threading.Event()

    def script(handler: Handler) -> None:
        handler.begin()
        handler.send(events(chunk(content="now"), done=False))
        assert go.wait(10)
        handler.send(events(chunk(content=" then"), chunk(finish="stop")))

    server.scripts[:] = [script]
    with closing(Remote(server.url)) as engine:
        pieces = []
        for delta in stream(engine, ask()):
            pieces.append(delta.text)
            go.set()
    assert pieces == ["now", " then", ""]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "both"])
def test_a_thought_is_put_back(server: Server, name: str) -> None:
    def thought(text: str) -> dict[str, str]:
        return {key: text for key in ("reasoning_content", "reasoning") if name in (key, "both")}

    server.scripts[:] = [
        says(chunk(**thought("hm")), chunk(**thought(", so"), content=None), chunk(content="4"), chunk(finish="stop")),
        says(chunk(**thought("hm")), chunk(finish="length")),
        says(chunk(content="<think>raw</think>5"), chunk(finish="stop")),
    ]
    texts = [answer(server, ask()).completions[0].text for _ in range(3)]
    assert texts == ["<think>hm, so</think>4", "<think>hm", "<think>raw</think>5"]


def test_several_answers_with_logprobs(server: Server) -> None:
    def sure(*values: float) -> dict[str, Any]:
        return {"content": [{"token": "t", "logprob": value, "bytes": None, "top_logprobs": []} for value in values]}

    server.scripts[:] = [
        says(
            chunk(1, content="b", logprobs=sure(-2.0)),
            chunk(0, content="a", logprobs=sure(-1.0, -0.5)),
            chunk(1, content="B", logprobs=sure(-0.25), finish="length"),
            chunk(0, finish="stop"),
            USAGE,
        )
    ]
    reply = answer(server, ask(n=2, temperature=1.0, top_logprobs=0))
    assert [(c.text, c.finish_reason, c.logprobs) for c in reply.completions] == [
        ("a", "stop", (-1.0, -0.5)),
        ("bB", "length", (-2.0, -0.25)),
    ]
    assert server.bodies[0]["n"] == 2


def test_a_server_that_does_not_stream(server: Server) -> None:
    whole = {
        "choices": [{"index": 0, "message": {"content": "cat", "reasoning_content": "hm"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3},
    }
    server.scripts[:] = [lambda handler: handler.json(200, whole)]
    reply = answer(server, ask())
    assert (reply.completions[0].text, reply.num_prompt_tokens) == ("<think>hm</think>cat", 3)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_tried_again(server: Server, status: int) -> None:
    server.scripts[:] = [refuses(status, "busy"), refuses(status, "busy"), ANSWER]
    assert answer(server, ask()).completions[0].text == "a cat"
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_enough_tries_are_enough(server: Server) -> None:
    server.scripts[:] = [refuses(503, "still loading")]
    reply = answer(server, ask(), retries=2)
    assert "HTTP 503: still loading" in reply.error and server.url in reply.error
    assert len(server.bodies) == 3


def test_the_wait_a_server_asks_for(server: Server) -> None:
    server.scripts[:] = [refuses(429, "slow down", retry_after="0.3"), ANSWER]
    started = time.monotonic()
    assert answer(server, ask()).completions
    assert 0.3 <= time.monotonic() - started < 5


def test_retry_after_in_both_forms() -> None:
    from email.utils import formatdate

    from sailvl.engine.connection import _retry_after

    assert _retry_after("2") == 2 and _retry_after("-1") == 0 and _retry_after("") is None
    assert _retry_after("soon") is None and _retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    ahead = _retry_after(formatdate(time.time() + 60, usegmt=True))
    assert ahead is not None and 50 < ahead <= 60


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 307])
def test_a_refusal_is_that_requests_error(server: Server, status: int) -> None:
    server.scripts[:] = [refuses(status, "too long: 9000 tokens", location="http://10.0.0.1/"), ANSWER]
    with closing(Remote(server.url, model="m")) as engine:
        first, second = _one_by_one(engine)
    assert f"HTTP {status}" in first.error and len(server.bodies) == 2
    assert ("too long: 9000 tokens" in first.error) == (status != 307)
    assert second.completions[0].text == "a cat"


def _one_by_one(engine: Remote) -> list[Any]:
    return [next(iter(replies(engine, [ask(id)]))) for id in ("a", "b")]


def drops(*chunks: Any) -> Script:
    """A stream that says it is longer than it is."""

    def script(handler: Handler) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("content-length", "100000")
        handler.end_headers()
        handler.send(events(*chunks, done=False))
        handler.connection.shutdown(socket.SHUT_RDWR)

    return script


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def test_lost_before_the_first_text_is_tried_again(server: Server) -> None:
    server.scripts[:] = [hangs_up, drops(chunk(role="assistant")), ANSWER]
    assert answer(server, ask()).completions[0].text == "a cat"
    assert len(server.bodies) == 3


@pytest.mark.parametrize("script", [drops(chunk(content="a dog")), says(chunk(content="a dog"), done=False)])
def test_lost_after_it_is_not(server: Server, script: Script) -> None:
    server.scripts[:] = [script, ANSWER]
    reply = answer(server, ask())
    assert "after 5 characters" in reply.error and len(server.bodies) == 1 and not reply.completions


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk(content="a"), {"error": {"message": "out of memory", "code": 500}}], "out of memory"),
        ([{"error": "plain"}], "plain"),
        (["data: {nonsense"], "not JSON: '{nonsense'"),
        (["data: [1]"], "a chunk is list"),
        ([chunk(content=5)], "cannot be read"),
        ([{"choices": [7]}], "cannot be read"),
        ([chunk(content="a")], "1 of 1 answers incomplete after 1 char"),
        ([chunk(content="a", finish="content_filter")], "ended the answer with 'content_filter'"),
    ],
)
def test_bad_streams_are_errors_of_the_request(server: Server, chunks: list[Any], message: str) -> None:
    server.scripts[:] = [says(*chunks), ANSWER]
    with closing(Remote(server.url)) as engine:
        first, second = _one_by_one(engine)
    assert message in first.error and second.completions[0].text == "a cat"


def test_fewer_answers_than_asked_for(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    assert "1 of 2 answers incomplete" in answer(server, ask(n=2, temperature=1.0)).error


def test_silence_ends_with_an_error(server: Server) -> None:
    over = threading.Event()

    def script(handler: Handler) -> None:
        over.wait(10)
        handler.close_connection = True

    server.scripts[:] = [script]
    started = time.monotonic()
    reply = answer(server, ask(), model="m", timeout_s=0.2)
    over.set()
    assert "no answer within 0.2 s" in reply.error and time.monotonic() - started < 5 and len(server.bodies) == 1


def test_a_dead_server_is_the_engines_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with closing(Remote(f"http://127.0.0.1:{port}", retries=2)) as engine:
        with pytest.raises(EngineError, match=rf"http://127.0.0.1:{port}/v1: no server can be reached"):
            list(replies(engine, [ask("a"), ask("b")]))
        assert engine.step() == []


@pytest.mark.parametrize("begun", [True, False], ids=["while it streams", "before it answers"])
def test_cancel_closes_the_connection(server: Server, begun: bool) -> None:
    asked, gone = threading.Event(), threading.Event()

    def script(handler: Handler) -> None:
        if begun:
            handler.begin()
            handler.send(events(chunk(content="a"), done=False))
        asked.set()
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            gone.set()
        handler.close_connection = True

    server.scripts[:] = [script, ANSWER]
    with closing(Remote(server.url)) as engine:
        engine.submit(ask("a", n=2, temperature=1.0))
        assert asked.wait(10)
        deltas = engine.step() if not begun else []
        while begun and not deltas:
            deltas = engine.step()
        started = time.monotonic()
        engine.cancel("a")
        engine.cancel("unknown")
        assert gone.wait(5) and time.monotonic() - started < 1
        ends = [Delta(id="a", index=index, finish_reason="cancelled") for index in (0, 1)]
        assert engine.step() == ends and engine.step() == []
        (reply,) = replies(engine, [ask("a")])  # the id is free again
    assert reply.completions[0].text == "a cat"


def test_many_at_once_and_none_mixed_up(server: Server) -> None:
    together = threading.Barrier(8, timeout=10)

    def own(handler: Handler) -> None:
        text = handler.body["messages"][0]["content"]
        together.wait()
        handler.begin()
        handler.send(events(chunk(content="re: "), chunk(content=text), chunk(finish="stop")))

    server.scripts[:] = [own]
    with closing(Remote(server.url, capacity=8)) as engine:
        found = {
            reply.id: reply.completions[0].text for reply in replies(engine, (ask(str(n), str(n)) for n in range(16)))
        }
    assert sorted(found.values()) == sorted(f"re: {n}" for n in range(16))


def test_ids_in_flight_are_taken(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    engine = Remote(server.url)
    engine.submit(ask())
    with pytest.raises(ValueError, match="'q' is in flight"):
        engine.submit(ask())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ask())


# ---- keys and addresses ---------------------------------------------------------------------------------------------

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_the_key_is_sent_and_never_told(server: Server, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    server.scripts[:] = [refuses(401, f"Incorrect API key provided: {KEY}")]
    if given == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with closing(Remote(server.url, api_key=KEY if given == "argument" else None)) as engine:
        (reply,) = replies(engine, [ask()])
        shown = repr(engine)
    sent = [{name.lower(): value for name, value in headers.items()} for _, _, headers, _ in server.seen]
    assert [headers["authorization"] for headers in sent] == [f"Bearer {KEY}"] * 2
    assert "Incorrect API key provided: [key]" in reply.error and KEY not in reply.error + shown


def test_no_key_no_header(server: Server) -> None:
    server.scripts[:] = [ANSWER]
    answer(server, ask())
    assert not any(name.lower() == "authorization" for _, _, headers, _ in server.seen for name in headers)


def test_a_key_that_cannot_be_sent_is_refused_unsaid() -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        Remote("http://127.0.0.1:1", api_key="sk-秘密")
    assert "秘密" not in str(caught.value)


def test_proxies_do_not_stand_before_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    server.scripts[:] = [ANSWER]
    assert answer(server, ask()).completions[0].text == "a cat"
    assert answer(server, ask(), model="m").completions
    own = ("localhost:1", "[::1]:8", "127.9.9.9", "10.0.0.1", "h.de")
    assert [is_loopback(f"http://{host}/v1") for host in own] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        (" https://h/v1/ ", "https://h/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/proxy", "https://h/proxy/v1"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_addresses(given: str, expected: str) -> None:
    assert clean_base_url(given) == expected


@pytest.mark.parametrize("given", ["", "h:8000", "ftp://h", "http://", "http://u:pw@h", "http://h?key=1", "file:///x"])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match="base_url") as caught:
        Remote(given)
    assert "pw" not in str(caught.value)


def test_clients_start_without_torch() -> None:
    import subprocess
    import sys

    code = "import sailvl.engine.remote, sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
