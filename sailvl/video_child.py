"""The decoder behind ``sailvl.video``: a program that is run by path, so that it can be bounded and killed.

It loads PyAV and nothing else (0.15 s, 33 MB). Requests come on standard input, one JSON object a line, followed by the
file itself if it has no path; replies go to standard output, one JSON object a line, a picture followed by its bytes:

    {"width", "height", "stride", "turn", "times"} + stride * height bytes   a picture, to be used ``times`` times
    {"restart": true}                       forget the pictures of this request: they come again
    {"done": true, ...}                     the end; "frames" is the real number, "decoded" what it cost
    {"error": "..."}                        the end; why this clip cannot be used

Which frames: int(i * frames / (n + 1)) for i = 1..n over the frames that really decode. Containers do not know that
number (VP8 stores frames that are never shown, headers are wrong or empty), so the packets are counted first, which
reads the file and decodes nothing. Where packets have trustworthy times and the wanted frames are far apart, the
decoder jumps to the key frames before them and checks that every frame follows its neighbour; otherwise, or if that
check fails, everything is decoded, and once more if the packets had promised another number of frames.
"""

from __future__ import annotations

import io
import json
import os
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import av
from av.video.reformatter import VideoReformatter

try:
    import resource
except ImportError:  # not on Windows: there the time limit and the pixel limit have to do
    resource = None  # type: ignore[assignment]

_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf"
"""Only containers: a playlist (HLS, concat) would have the decoder open files and addresses that it names."""

_ORDERLY = {"h264", "hevc", "vp9", "av1"}
"""Codecs whose packets hold one shown frame each in MP4 and Matroska, and whose key frames need nothing before them."""


_REFORMATTER = VideoReformatter()


class Refused(Exception):
    """This clip cannot be used; the message says why."""


class _Unsure(Exception):
    """Jumping gave frames that do not follow each other: decode everything instead."""


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    key: bool


def main() -> None:
    """Answer requests until standard input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # what a library prints must not look like a reply
    os.dup2(null, 1)
    for line in requests:
        request = json.loads(line)
        data = requests.read(request["size"])
        try:
            _limit(request["memory"] + len(data))
            with io.BytesIO(data) if request["path"] is None else open(request["path"], "rb") as file:
                done = _answer(request, file, replies)
        except (Refused, OSError, ValueError, av.error.FFmpegError) as error:
            done = {"error": _reason(error)}
        except MemoryError:
            done = {"error": f"decoding needs more than {request['memory'] >> 20} MB"}
        _send(replies, done)
        replies.flush()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    return f"damaged: {text}" if isinstance(error, av.error.FFmpegError) else text


def _limit(num_bytes: int) -> None:
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")


def _answer(request: dict[str, Any], file: BinaryIO, replies: BinaryIO) -> dict[str, Any]:
    _check_whole(file)
    if request["op"] == "size":
        return _size(request, file)
    packets = _scan(request, file)
    return _frames(request, file, packets, replies)


# ---- opening ----------------------------------------------------------------------------------------------------


def _check_whole(file: BinaryIO) -> None:
    """Raise Refused if the container says that it is longer than the file: players would show what is left."""
    end, at = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if start[:4] == b"RIFF":
        at = 8 + struct.unpack("<I", start[4:8])[0]
    elif start[:4] == b"\x1a\x45\xdf\xa3":
        at = _end_of_matroska(file)
    elif start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        while at + 8 <= end:  # boxes: size, type
            file.seek(at)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:
                size = int.from_bytes(file.read(8), "big")
            if size < 8:
                break  # 0: up to the end of the file
            at += size
            if kind not in (b"mdat", b"moov", b"moof"):
                at = min(at, end)  # nothing is lost with padding
    file.seek(0)
    if at > end:
        raise Refused(f"cut short: {end} of {at} bytes")


def _end_of_matroska(file: BinaryIO) -> int:
    """Where the one segment behind the header ends, as it says; 0 if it does not."""
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if file.read(4) != name:
            return 0
        first = file.read(1)
        length = 9 - first[0].bit_length() if first and first[0] else 0
        if not length:
            return 0
        size = int.from_bytes(first + file.read(length - 1), "big") - (1 << 7 * length)
        if size == (1 << 7 * length) - 1:  # a live recording
            return 0
        end = file.seek(size, os.SEEK_CUR)
    return end


@contextmanager
def _open(request: dict[str, Any], file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first moving stream; what the header admits is checked. Raises Refused."""
    file.seek(0)
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        opened = av.open(file, "r", container_options=options, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise Refused(f"damaged, or not a video in a known container ({_FORMATS})") from error
    with opened as container:
        # the cover picture of a song is a stream too
        moving = (stream for stream in container.streams.video if not stream.disposition.value & 0x400)
        video = next(moving, None)
        if video is None:
            raise Refused(f"holds no video among {len(container.streams)} streams")
        if video.codec_context is None:
            raise Refused("in a codec that is not known here")
        _check_pixels(request, video.codec_context.width, video.codec_context.height)
        seconds = (container.duration or 0) / 1e6
        if seconds > request["max_seconds"]:
            raise Refused(f"{seconds:.0f} seconds is over the limit of {request['max_seconds']:g}")
        video.codec_context.thread_count = 1  # more gain nothing on small clips, and every worker has a child
        yield container, video


def _check_pixels(request: dict[str, Any], width: int, height: int) -> None:
    if width * height > request["max_pixels"]:
        raise Refused(f"{width} x {height} is over the limit of {request['max_pixels']} pixels")


def _size(request: dict[str, Any], file: BinaryIO) -> dict[str, Any]:
    """Sizes from the header and the first frame, which knows how it is turned."""
    with _open(request, file) as (container, video):
        frame = next(_decode(container, video), None)
        if frame is None:
            raise Refused("holds no frame that can be decoded")
        _check_pixels(request, frame.width, frame.height)
        width, height = (frame.height, frame.width) if _turn(frame)[1] else (frame.width, frame.height)
        seconds = (container.duration or 0) / 1e6
        return {"done": True, "width": width, "height": height, "frames": int(video.frames or 0), "seconds": seconds}


def _scan(request: dict[str, Any], file: BinaryIO) -> list[_Packet]:
    """Every packet in file order, nothing decoded; without times if frames cannot be found by them."""
    packets: list[_Packet] = []
    shown, first, last = True, None, None
    with _open(request, file) as (container, video):
        limit = request["max_seconds"] / float(video.time_base or 1)
        for packet in container.demux(video):
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise Refused(f"damaged or cut short at packet {len(packets)}")
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
            shown = shown and not packet.is_discard
            if len(packets) > request["max_frames"]:
                raise Refused(f"more than {request['max_frames']} frames")
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = packet.pts if last is None else max(last, packet.pts)
                if last - first > limit:
                    raise Refused(f"longer than the limit of {request['max_seconds']:g} seconds")
        orderly = video.codec_context.name.removeprefix("lib") in (*_ORDERLY, "dav1d")
        known = len({packet.pts for packet in packets} - {None}) == len(packets)
        if not (container.format.name.split(",")[0] in ("mov", "matroska") and orderly and known and shown):
            packets = [_Packet(None, None, False)] * len(packets)
    if not packets:
        raise Refused("holds no frames")
    return packets


# ---- decoding ---------------------------------------------------------------------------------------------------


def _frames(request: dict[str, Any], file: BinaryIO, packets: list[_Packet], replies: BinaryIO) -> dict[str, Any]:
    n = request["num_frames"]

    def wanted(count: int) -> Counter[int]:
        return Counter(i * count // (n + 1) for i in range(1, n + 1))

    starts = _starts(packets, wanted(len(packets))) if request["jump"] and packets[0].pts is not None else {}
    if starts:
        try:
            decoded = _jump(request, file, packets, wanted(len(packets)), starts, replies)
            return {"done": True, "frames": len(packets), "decoded": decoded}
        except (_Unsure, OSError, ValueError, av.error.FFmpegError):
            _send(replies, {"restart": True})
    count, decoded = len(packets), 0
    for _ in range(2):
        times, found = wanted(count), 0
        with _open(request, file) as (container, video):
            for frame in _decode(container, video):
                if found in times:
                    _show(request, frame, times[found], replies)
                found += 1
        decoded += found
        if found == 0:
            raise Refused(f"none of {len(packets)} packets could be decoded")
        if found == count:
            return {"done": True, "frames": count, "decoded": decoded}
        _send(replies, {"restart": True})
        count = found
    raise Refused("decodes to another number of frames each time")


def _decode(container: Any, video: Any) -> Iterator[Any]:
    """All frames in the order they are shown. A recording may begin amid a group of pictures; later damage is one."""
    begun = False
    for packet in container.demux(video):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if begun:
                raise Refused("damaged: a frame cannot be decoded") from error
            continue
        for frame in frames:
            begun = True
            yield frame


def _starts(packets: list[_Packet], wanted: Counter[int]) -> dict[int, int]:
    """For each wanted frame the packet to decode from; {} if that would not save half of the work.

    A frame can be decoded from a key packet that comes before it both in the file and on the screen.
    """
    order = sorted(range(len(packets)), key=lambda index: packets[index].pts)  # type: ignore[arg-type, return-value]
    keys = [index for index, packet in enumerate(packets) if packet.key]
    starts, position, work = {}, 0, 0
    for frame in sorted(wanted):
        packet = order[frame]
        at = bisect_right(keys, packet) - 1
        while at >= 0 and packets[keys[at]].pts > packets[packet].pts:  # type: ignore[operator]
            at -= 1
        if at < 0:
            return {}
        starts[frame] = keys[at]
        position = max(position, keys[at])
        work += max(0, packet + 1 - position)
        position = max(position, packet + 1)
    return starts if 2 * work < len(packets) else {}


def _jump(
    request: dict[str, Any],
    file: BinaryIO,
    packets: list[_Packet],
    wanted: Counter[int],
    starts: dict[int, int],
    replies: BinaryIO,
) -> int:
    """Show the wanted frames and return how many were decoded. Raises _Unsure."""
    places = {packet.pts: index for index, packet in enumerate(packets)}
    ranks = {pts: rank for rank, pts in enumerate(sorted(places))}  # type: ignore[type-var]
    decoded, fed = 0, 0
    with _open(request, file) as (container, video):
        by_dts = container.format.name.startswith("mov")
        run: Iterator[Any] = iter(())
        expected = -1
        for frame in sorted(wanted):
            start = starts[frame]
            if expected < 0 or start > fed:
                when = packets[start].dts if by_dts and packets[start].dts is not None else packets[start].pts
                container.seek(when, stream=video)
                run, expected = _follow(container, video, places), -1
            for landed, fed, picture in run:  # noqa: B007  (the next frame asks how far this one came)
                if expected < 0:
                    if landed > start or not packets[landed].key:
                        raise _Unsure
                    expected = ranks[packets[landed].pts]
                decoded += 1
                rank = ranks.get(picture.pts, -1)
                if 0 <= rank < expected and picture.pts < packets[landed].pts:
                    continue  # shown before the key frame, and made of frames before it
                if rank != expected or picture.is_corrupt:
                    raise _Unsure
                expected += 1
                if rank == frame:
                    _show(request, picture, wanted[frame], replies)
                    break
            else:
                raise _Unsure
    return decoded


def _follow(container: Any, video: Any, places: dict[int | None, int]) -> Iterator[tuple[int, int, Any]]:
    """(packet landed on, packets fed, frame) from where the container stands."""
    landed, fed = -1, 0
    for packet in container.demux(video):
        if packet.size:
            if packet.pts not in places:
                raise _Unsure
            fed = places[packet.pts] + 1
            landed = fed - 1 if landed < 0 else landed
        for frame in packet.decode():
            yield landed, fed, frame


def _show(request: dict[str, Any], frame: Any, times: int, replies: BinaryIO) -> None:
    if frame.is_corrupt:
        raise Refused("damaged: a frame is incomplete")
    _check_pixels(request, frame.width, frame.height)
    turn = _turn(frame)
    plane = _REFORMATTER.reformat(frame, format="rgb24", threads=1).planes[0]
    size = {"width": frame.width, "height": frame.height, "stride": plane.line_size}
    _send(replies, {**size, "turn": turn, "times": times})
    replies.write(memoryview(plane)[: plane.line_size * frame.height])


def _turn(frame: Any) -> tuple[int, int, int, int]:
    """The display matrix as signs (a, b, c, d): what is stored at (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        matrix = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"])[:36])
    except KeyError:
        return 1, 0, 0, 1
    a, b, c, d = (round(matrix[index] / 65536) for index in (0, 1, 3, 4))
    quarter = (abs(a), abs(b), abs(c), abs(d)) in ((1, 0, 0, 1), (0, 1, 1, 0))
    return (a, b, c, d) if quarter else (1, 0, 0, 1)


if __name__ == "__main__":
    main()
