import time

import pytest

from sailvl.engine.base import EngineError, Request, Sampling, replies
from sailvl.engine.fake import Fake
from sailvl.types import Message, Record, RecordError


def ask(id: str = "q", text: str = "what is it?", **sampling) -> Request:
    record = Record(id=id, messages=(Message(role="user", text=text),))
    return Request(id=id, record=record, sampling=Sampling(**sampling))


def answer(engine: Fake, request: Request):
    (reply,) = replies(engine, [request])
    assert not reply.error
    return reply.completions[0]


def test_scripts() -> None:
    assert answer(Fake("a cat"), ask()).text == "a cat"
    assert answer(Fake(lambda request: request.record.messages[0].text.upper()), ask()).text == "WHAT IS IT?"
    turns = Fake(["one", "two"])
    assert [answer(turns, ask(str(n))).text for n in range(3)] == ["one", "two", "one"]
    with pytest.raises(RecordError, match="no answer for request 'q'"):
        Fake({"p": "x"}).submit(ask())


def test_text_is_exact_and_tokens_are_words() -> None:
    text = "  two\n\nlines , 一加一 \t"
    found = answer(Fake(text), ask())
    assert found.text == text and len(found.ids) == 5 and found.finish_reason == "stop"
    assert answer(Fake(text, token_chars=4), ask()).text == text
    assert len(answer(Fake("abcdefghi", token_chars=4), ask()).ids) == 3
    same = answer(Fake("a b a b"), ask())
    assert same.ids[1] == same.ids[3] != same.ids[0]


def test_limits() -> None:
    cut = answer(Fake("one two three"), ask(max_new_tokens=2))
    assert (cut.text, cut.finish_reason, len(cut.ids)) == ("one two", "length", 2)
    whole = answer(Fake("one two three"), ask(max_new_tokens=3))
    assert (whole.text, whole.finish_reason) == ("one two three", "stop")
    stopped = answer(Fake("one two three", token_chars=2), ask(stop=("wo t",)))
    assert (stopped.text, stopped.finish_reason) == ("one t", "stop")
    held = answer(Fake("one two"), ask(stop=("two!",)))
    assert (held.text, held.finish_reason) == ("one two", "stop")


def test_an_empty_answer_ends() -> None:
    found = answer(Fake(""), ask())
    assert (found.text, found.ids, found.finish_reason) == ("", (), "stop")


def test_cancelling_takes_effect_within_a_step() -> None:
    engine = Fake("a b c d")
    engine.submit(ask("one", n=2))
    engine.submit(ask("two"))
    assert len(engine.step()) == 3
    engine.cancel("one")
    engine.cancel("nobody")
    deltas = engine.step()
    assert [(d.id, d.index, d.finish_reason) for d in deltas if d.finish_reason] == [
        ("one", 0, "cancelled"),
        ("one", 1, "cancelled"),
    ]
    assert [d.text for d in deltas if d.id == "two"] == [" b"]
    assert {d.id for d in engine.step()} == {"two"}


def test_an_id_can_be_used_again_but_not_twice_at_once() -> None:
    engine = Fake("a")
    engine.submit(ask())
    with pytest.raises(ValueError, match="in flight"):
        engine.submit(ask())
    engine.step()
    engine.submit(ask())


def test_the_engine_may_fail() -> None:
    engine = Fake(["fine so far", EngineError("gone")])
    engine.submit(ask("a"))
    engine.step()
    engine.submit(ask("b"))
    with pytest.raises(EngineError, match="gone"):
        engine.step()
    assert engine.step() == []


def test_logprobs_delay_and_close() -> None:
    engine = Fake("a b", seconds=0.02)
    started = time.perf_counter()
    engine.submit(ask(top_logprobs=1))
    first, second = engine.step(), engine.step()
    assert time.perf_counter() - started >= 0.04
    assert first[0].logprobs == (0.0,) and first[0].top_logprobs == (((first[0].ids[0], 0.0),),)
    assert second[0].finish_reason == "stop"
    engine.close()
    assert engine.closed
