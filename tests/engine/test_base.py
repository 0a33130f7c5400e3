import subprocess
import sys

import pytest

from sailvl.engine.base import Delta, EngineError, Request, Sampling, replies, stream
from sailvl.engine.fake import Fake
from sailvl.types import Message, Record, RecordError


def ask(id: str = "q", text: str = "what is it?", **sampling) -> Request:
    record = Record(id=id, messages=(Message(role="user", text=text),))
    return Request(id=id, record=record, sampling=Sampling(**sampling))


def test_every_wrong_value_is_named() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; it must be at least 1") as caught:
        Sampling(max_new_tokens=0, top_p=0, stop=("",), presence_penalty=3)
    for name in ("max_new_tokens", "top_p", "stop", "presence_penalty"):
        assert f"{name} is " in str(caught.value)
    for wrong in (
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"min_p": 1.0},
        {"n": 0},
        {"top_k": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_replies_come_as_they_finish_and_requests_are_drawn_lazily() -> None:
    drawn: list[int] = []

    def requests():
        for number in range(6):
            drawn.append(number)
            yield ask(f"q{number}")

    engine = Fake(lambda request: "a b c d e" if request.id == "q0" else "a", capacity=2)
    order = []
    for reply in replies(engine, requests()):
        order.append(reply.id)
        assert len(drawn) <= len(order) + 2
    assert order == ["q1", "q2", "q3", "q4", "q0", "q5"]


def test_a_refused_request_is_a_reply() -> None:
    engine = Fake({"good": "yes", "bad": RecordError("record bad: too long"), "torn": OSError("truncated")})
    found = {reply.id: reply for reply in replies(engine, [ask("good"), ask("bad"), ask("torn")])}
    assert found["good"].completions[0].text == "yes" and found["good"].error == ""
    assert (found["bad"].completions, found["bad"].error) == ((), "record bad: too long")
    assert (found["torn"].completions, found["torn"].error) == ((), "truncated")


def test_n_answers_are_gathered_in_order() -> None:
    engine = Fake([["a b c", "d", "e f"]])
    (reply,) = replies(engine, [ask(n=4, top_logprobs=0)])
    assert [c.text for c in reply.completions] == ["a b c", "d", "e f", "a b c"]
    assert [len(c.ids) for c in reply.completions] == [3, 1, 2, 3]
    assert [len(c.logprobs) for c in reply.completions] == [3, 1, 2, 3]
    assert reply.completions[0].ids == reply.completions[3].ids
    assert reply.num_prompt_tokens == 3


def test_leaving_cancels_what_is_in_flight() -> None:
    engine = Fake("a long answer of many words", capacity=3)
    pieces = replies(engine, (ask(f"q{n}", max_new_tokens=1 if n == 1 else 99) for n in range(5)))
    assert next(pieces).id == "q1"
    pieces.close()
    assert sorted(engine.cancelled) == ["q0", "q2"] and engine.step() == []


def test_an_error_of_the_caller_cancels_too() -> None:
    engine = Fake("a b c")

    def requests():
        yield ask("q0")
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(replies(engine, requests()))
    assert engine.cancelled == ["q0"] and engine.step() == []


def test_two_requests_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two requests in flight are called 'q'"):
        list(replies(Fake("a b"), [ask(), ask()]))


@pytest.mark.parametrize("way", ["replies", "stream"])
def test_an_engine_that_is_gone_is_asked_nothing_more(way: str) -> None:
    class Gone(Fake):
        steps = 0

        def step(self):
            self.steps += 1
            raise EngineError("connection lost")

    engine = Gone("x")
    with pytest.raises(EngineError, match="connection lost"):
        list(replies(engine, [ask("a"), ask("b")]) if way == "replies" else stream(engine, ask("a")))
    assert engine.steps == 1 and engine.cancelled == []


def test_stream_gives_the_pieces() -> None:
    engine = Fake("it is a cat")
    deltas = list(stream(engine, ask()))
    assert [delta.text for delta in deltas] == ["it", " is", " a", " cat"]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]
    assert len(list(stream(engine, ask(n=3)))) == 12
    with pytest.raises(RecordError, match="no answer"):
        list(stream(Fake({}), ask()))
    (failed,) = stream(Fake({"q": ValueError("no")}), ask(n=2))
    assert (failed.finish_reason, failed.error) == ("error", "no")


def test_leaving_a_stream_cancels() -> None:
    engine = Fake("it is a cat")
    for _ in stream(engine, ask()):
        break
    assert engine.cancelled == ["q"] and engine.step() == []


def test_other_requests_deltas_are_not_mixed_in() -> None:
    engine = Fake({"other": "x y z", "q": "a b"})
    engine.submit(ask("other"))
    assert {delta.id for delta in stream(engine, ask("q"))} == {"q"}


def test_no_torch() -> None:
    script = "import sys, sailvl.engine.base, sailvl.engine.fake; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_defaults_are_empty() -> None:
    assert Delta(id="q") == Delta(id="q", index=0, text="", ids=(), finish_reason=None)
