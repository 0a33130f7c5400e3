"""The judge's replies are kept, its failures are not, and nothing is ever made up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sailvl.eval.judge import TRIES, RemoteJudge
from sailvl.eval.scoring import JudgeError


class Server:
    def __init__(self) -> None:
        self.script: list[tuple[int, object]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                outer.headers.append(dict(self.headers))
                status, content = outer.script.pop(0) if outer.script else (200, "fine")
                if isinstance(content, str):
                    content = {"choices": [{"message": {"content": content}}]}
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()


def judge(server: Server, **kwargs) -> RemoteJudge:
    return RemoteJudge(server.url, "j", pause=0.001, **kwargs)


def test_replies_are_kept_by_content(server, tmp_path):
    cache = tmp_path / "deep/judge.jsonl"
    first = judge(server, cache=cache, api_key="sk-1")
    assert [first("a"), first("a"), first("b"), first("a", temperature=0.5)] == ["fine"] * 4
    assert (first.asked, first.reused, len(server.bodies)) == (3, 1, 3)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "a"}] and server.bodies[2]["temperature"] == 0.5
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    again = judge(server, cache=cache)
    assert again("b") == "fine" and again.asked == 0


def test_passing_troubles_are_tried_again(server):
    server.script = [(503, {}), (429, {}), (200, {"choices": []}), (200, "B")]
    asking = judge(server)
    assert asking("q") == "B" and asking.asked == 4


def test_failures_raise_and_are_not_kept(server, tmp_path):
    server.script = [(500, {})] * TRIES
    asking = judge(server, cache=tmp_path / "j.jsonl")
    with pytest.raises(JudgeError, match="status 500"):
        asking("q")
    assert asking("q") == "fine"


def test_a_refusal_is_not_repeated(server):
    server.script = [(401, {})]
    asking = judge(server)
    with pytest.raises(JudgeError, match="status 401"):
        asking("q")
    assert asking.asked == 1


def test_nobody_there():
    with pytest.raises(JudgeError, match="ConnectError"):
        RemoteJudge("http://127.0.0.1:9/v1", "j", pause=0.001)("q")


def test_a_reply_with_an_odd_end_of_line_is_remembered(server, tmp_path):
    server.script[:] = [(200, "one\u2028two")]
    assert judge(server, cache=tmp_path / "j.jsonl")("a") == "one\u2028two"
    again = judge(server, cache=tmp_path / "j.jsonl")
    assert again("a") == "one\u2028two" and again.asked == 0


def test_a_torn_cache_is_mended(server, tmp_path):
    cache = tmp_path / "j.jsonl"
    judge(server, cache=cache)("a")
    cache.write_bytes(cache.read_bytes() + b'{"key": "x", "rep')
    judge(server, cache=cache)("b")
    again = judge(server, cache=cache)
    assert again("a") == again("b") == "fine" and again.asked == 0
