"""Where the members of a tar archive lie: headers are read, contents are skipped.

Own, and not ``tarfile``, for its cost (a quarter, no object per member) and because contents are wanted by offset, to
read a member long after with one seek. Knows what archives of training data hold: ustar and old headers, pax records
(long and non-ASCII names, large sizes), GNU long names, sizes in base 256. Links, folders and devices are passed over:
nothing is ever unpacked to disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sailvl.types import RecordError

BLOCK = 512
_FILES, _PAX, _PAX_GLOBAL, _LONG_NAME = (b"0", b"\0", b"7"), b"x", b"g", b"L"
_MAX_EXTENSION = 1 << 20  # bytes of a pax record or long name: more is an attack on memory
_MAX_SIZE = 1 << 50


@dataclass(frozen=True, kw_only=True)
class Member:
    """A regular file: its headers begin at ``start``, its ``size`` bytes at ``data``, and it ends before ``end``."""

    name: str
    start: int
    data: int
    size: int
    end: int


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The regular files of an archive, in order; the last may reach beyond the end of a file that was cut short.

    Raises RecordError, beginning with where, at the first bytes that are no header.
    """
    at, start = 0, 0
    name: str | None = None
    size: int | None = None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if at and 0 < len(header) < BLOCK:
            raise RecordError(f"{where}: cut short at byte {at}")
        if not header.strip(b"\0"):  # an archive ends with empty blocks; some just end
            return
        _check(header, f"{where}: at byte {at}")
        kind, own = header[156:157], _number(header[124:136], f"{where}: at byte {at}")
        data, length = at + BLOCK, own if size is None else size
        at = data + -(-length // BLOCK) * BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
            if own > _MAX_EXTENSION:
                raise RecordError(f"{where}: at byte {data - BLOCK}: a header record of {own} bytes")
            extension = file.read(own)
            if kind == _LONG_NAME:
                name = _text(extension)
            elif kind == _PAX:
                records = _records(extension, f"{where}: at byte {data}")
                name = records.get("path", name)
                if records.get("size", "").isdecimal():
                    size = _number(b"%o" % int(records["size"][:20]), where)
            continue
        if kind in _FILES:
            yield Member(name=_name(header) if name is None else name, start=start, data=data, size=length, end=at)
        start, name, size = at, None, None


def _check(header: bytes, where: str) -> None:
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stated = -1
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != stated:
        raise RecordError(f"{where}: no tar header: damaged, or not a tar file (compressed ones must be unpacked)")


def _number(field: bytes, where: str) -> int:
    try:
        digits = field.strip(b" \0") or b"0"
        is_binary = field[0] & 0x80
        found = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if is_binary else int(digits, 8)
    except ValueError:
        found = -1
    if not 0 <= found < _MAX_SIZE:
        raise RecordError(f"{where}: {field!r} is no size")
    return found


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _records(data: bytes, where: str) -> dict[str, str]:
    """Pax records: "<length> <key>=<value>\\n" one after another."""
    found: dict[str, str] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 10 else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 1 < length <= len(data) or not equals:  # a length of 0 would never end
            raise RecordError(f"{where}: a broken pax record")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found
