import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailvl.engine.text import Detokenizer, StopText


def told(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    text = StopText(stop)
    out = "".join([*(text.add(piece) for piece in pieces), text.finish()])
    return out, text.stopped


def reference(stop: tuple[str, ...], text: str) -> tuple[str, bool]:
    """Read sign by sign; the first moment a stop string is complete ends it, the longest one if several are."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_pieces_do_not_matter(stop: tuple[str, ...], pieces: list[str]) -> None:
    whole = "".join(pieces)
    expected = reference(stop, whole)
    assert told(stop, pieces) == told(stop, [whole]) == told(stop, list(whole)) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple), st.text("abc", max_size=12))
def test_what_is_given_is_never_part_of_a_stop_string_that_comes_later(stop: tuple[str, ...], text: str) -> None:
    """At every moment, the text given so far begins the final text, and lacks only what may still be a stop string."""
    final, _ = reference(stop, text)
    given_out, stream = "", StopText(stop)
    for end, sign in enumerate(text, 1):
        given_out += stream.add(sign)
        assert final.startswith(given_out)
        if not stream.stopped:
            held = text[len(given_out) : end]
            assert not held or any(word.startswith(held) for word in stop)


def test_examples() -> None:
    assert told(("</s>",), ["a <", "/", "s", "> b"]) == ("a ", True)
    assert told(("</s>",), ["a <", "/"]) == ("a </", False)
    assert told((), ["a", "b"]) == ("ab", False)
    assert told(("bc", "abcd"), ["abcd"]) == ("a", True)
    assert told(("b", "ab"), ["xab"]) == ("x", True)


@pytest.mark.parametrize("text", ["grüße 一加一 😀!", "a\u200bb", "😀😀", "é", "\ufffd and \ufffd"])
def test_broken_characters_wait(tiny_processor, text: str) -> None:
    tokenizer = tiny_processor.tokenizer.backend_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > 1 or text == "é"
    stream = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    pieces = [stream.add(id) for id in ids]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces) and any(pieces)


@given(st.lists(st.integers(0, 333), max_size=12))
def test_any_tokens_give_the_text_of_all_at_once(tiny_processor, ids: list[int]) -> None:
    tokenizer = tiny_processor.tokenizer.backend_tokenizer
    stream = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    assert "".join(stream.add(id) for id in ids) + stream.finish() == tiny_processor.tokenizer.decode(ids)


def test_a_stop_string_inside_and_across_characters(tiny_processor) -> None:
    tokenizer = tiny_processor.tokenizer.backend_tokenizer
    ids = tokenizer.encode("是一个猫。", add_special_tokens=False).ids
    stream = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), ["个猫"])
    pieces = [stream.add(id) for id in ids]
    assert "".join(pieces) + stream.finish() == "是一" and stream.stopped
    ends = [*itertools.accumulate(pieces)]
    assert "是" in ends and "是一个" not in ends
