"""Server-sent events out of bytes, however these are cut.

Lines end with LF, CR or CRLF and with nothing else: an answer may hold U+2028, at which Python's ``splitlines`` (and
with it the line reader of most clients) would tear the JSON apart.
"""

from __future__ import annotations

import codecs
import re

_LINE_END = re.compile(r"\r\n|\n|\r")


class EventReader:
    """Feed it bytes, get the data of the events that are complete."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self._rest = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Data of the events that this chunk completes; comments and other fields are dropped."""
        text = self._rest + self._decode(chunk)
        # A CR at the end may be the first half of a CRLF.
        held = "\r" if text.endswith("\r") else ""
        *lines, rest = _LINE_END.split(text.removesuffix(held))
        self._rest = rest + held
        return [event for line in lines for event in self._line(line)]

    def finish(self) -> list[str]:
        """What the end of the stream completes: servers forget the last empty line."""
        text = self._rest + self._decode(b"", True)
        self._rest = ""
        return [event for line in (*_LINE_END.split(text), "") for event in self._line(line)]

    def _line(self, line: str) -> list[str]:
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            return []
        found, self._data = self._data, []
        return ["\n".join(found)] if found else []
