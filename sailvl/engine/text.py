"""Tokens to final text, piece by piece: what has been given out never changes.

A character's bytes may be spread over several tokens, and a stop string over several characters: both are held back
until they are decided. Law: the pieces joined are the text of all tokens decoded at once, cut at the stop string that
is complete first (the longest of those that end together), however the tokens arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character (yet)."""


class Detokenizer:
    """Text of one answer; ``decode`` makes text of token ids, and is exact for those of whole characters."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, StopText(stop)
        self._pending: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string came up; nothing is added after it."""
        return self._stop.stopped

    def add(self, id: int) -> str:
        """The text that is final now and was not before."""
        self._pending.append(id)
        text = self._decode(self._pending)
        if text.endswith(_BROKEN):
            return ""
        self._pending = []
        return self._stop.add(text)

    def finish(self) -> str:
        """What was held back, at the end."""
        text = self._decode(self._pending) if self._pending else ""
        self._pending = []
        return self._stop.add(text) + self._stop.finish()


class StopText:
    """Text that ends before the first of some strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that cannot belong to a stop string any more."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, length = min(found)
            self.stopped = True
            return self._held[: end + length]
        keep = max(
            size for stop in self._stop for size in range(len(stop)) if size == 0 or self._held.endswith(stop[:size])
        )
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """What was held back: the beginning of a stop string that did not come."""
        given, self._held = ("" if self.stopped else self._held), ""
        return given
