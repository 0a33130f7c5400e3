"""Ctrl-C and SIGTERM as a question the loop asks after every step, so that stopping never loses one.

The second signal stops at once. Handlers are put back afterwards. Outside of the main thread Python allows no handlers,
and the request is simply never made. Data workers inherit the handlers and so ignore a Ctrl-C typed at the terminal,
which reaches them too: the step being finished needs their data.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested:
            self.leave()
        self.number = number

    def leave(self) -> NoReturn:
        """Raise what the signal usually means: KeyboardInterrupt for Ctrl-C, else SystemExit(128 + number)."""
        if self.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = [signal.signal(number, stop.handle) for number in SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
