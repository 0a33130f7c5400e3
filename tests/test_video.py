from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sailvl import video
from sailvl.media import MediaError
from sailvl.video import video_frames, video_size

LIMITS = {"max_pixels": video.MAX_PIXELS, "max_seconds": video.MAX_SECONDS}


def formula(frames: int, n: int) -> list[int]:
    return [int(i * frames / (n + 1)) for i in range(1, n + 1)]


def cost(data: bytes, n: int) -> dict[str, Any]:
    """What the decoder says about its work."""
    request = {"op": "frames", "num_frames": n, "jump": True, **LIMITS}
    return video._ask(data, request, 1 << 30, 30, "")[1]


def agrees(data: bytes, every: list[np.ndarray], n: int) -> None:
    frames = video_frames(data, n)
    assert [frame.mode for frame in frames] == ["RGB"] * n
    for frame, index in zip(frames, formula(len(every), n), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])


KINDS: list[tuple[str, str, dict[str, str]]] = [
    ("mpeg4", "mp4", {}),
    ("mpeg4", "avi", {}),
    ("mpeg4", "matroska", {}),
    ("gif", "gif", {}),
    ("mpeg1video", "mpegts", {}),
    ("flv1", "flv", {}),
    ("mjpeg", "mov", {}),
    ("libx264", "mp4", {}),
    ("libx264", "mpegts", {}),
    ("libx264", "matroska", {"x264-params": "open-gop=1"}),
    ("libx264", "mp4", {"intra-refresh": "1"}),
    ("libx265", "mp4", {"x265-params": "open-gop=1:log-level=none"}),
    ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}),  # writes packets that show nothing
]


@pytest.mark.parametrize(("codec", "container", "options"), KINDS)
def test_frames_are_those_of_decoding_everything(
    clips: ModuleType, codec: str, container: str, options: dict[str, str]
) -> None:
    av = pytest.importorskip("av")
    try:
        av.Codec(codec, "w")
    except av.error.FFmpegError:
        pytest.skip(f"this PyAV cannot write {codec}")
    data = clips.clip(61, codec=codec, container=container, key_every=6, **options)
    every = clips.every_frame(data)
    assert len(every) == 61
    for n in (1, 3, 16, 61, 100):
        agrees(data, every, n)
    size = video_size(data)
    assert (size.width, size.height) == (64, 48) and size.frames in (0, 61)
    assert size.seconds == pytest.approx(61 / 25, abs=0.1)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_far_frames_are_reached_by_key_frames(clips: ModuleType, container: str) -> None:
    av = pytest.importorskip("av")
    try:
        av.Codec("libx264", "w")
    except av.error.FFmpegError:
        pytest.skip("this PyAV cannot write H.264")
    data = clips.clip(240, codec="libx264", container=container, key_every=8)
    every = clips.every_frame(data)
    for n in (1, 2, 5, 12):
        agrees(data, every, n)
        assert cost(data, n)["decoded"] <= 16 * n < 240
    assert cost(data, 60)["decoded"] == 240  # near ones are not


def test_times_do_not_matter_only_order_does(clips: ModuleType) -> None:
    times = [0, 1, 2, 3, 40, 41, 42, 43, 100, 300, 301, 302]
    for codec in ("mpeg4", "mjpeg"):
        data = clips.clip(12, codec=codec, container="matroska", times=times)
        agrees(data, clips.every_frame(data), 5)
    assert video_size(data).seconds == pytest.approx(302 / 25, abs=0.2)


def test_a_short_clip_repeats_frames(clips: ModuleType) -> None:
    for frames in (1, 2, 5):
        data = clips.clip(frames)
        every = clips.every_frame(data)
        assert len(every) == frames
        agrees(data, every, 16)


def test_a_header_may_lie_about_the_number_of_frames(clips: ModuleType) -> None:
    data = clips.clip(20, container="avi")
    every = clips.every_frame(data)
    for at, lie in ((data.index(b"avih") + 24, 9999), (data.index(b"strh") + 40, 3), (data.index(b"strh") + 40, 0)):
        lying = data[:at] + lie.to_bytes(4, "little") + data[at + 4 :]
        agrees(lying, every, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_frames_are_upright(clips: ModuleType, orientation: int) -> None:
    shown = np.zeros((32, 64, 3), np.uint8)
    shown[:16, :32], shown[:16, 32:], shown[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    a, b, c, d = clips.MATRICES[orientation]
    height, width = (64, 32) if a == 0 else (32, 64)
    y, x = np.mgrid[:height, :width]  # where each stored pixel is shown, moved back into the picture
    to_x, to_y = a * x + c * y, b * x + d * y
    stored = shown[to_y - to_y.min(), to_x - to_x.min()]
    data = clips.turned(clips.clip(2, size=(width, height), pictures=[stored] * 2), (a, b, c, d))
    (frame,) = video_frames(data, 1)
    assert frame.size == (64, 32) == (video_size(data).width, video_size(data).height)
    for at in ((8, 4), (56, 4), (8, 28), (56, 28)):
        assert np.abs(np.subtract(frame.getpixel(at), shown[at[1], at[0]], dtype=int)).max() < 60, at


def test_colours_follow_the_clips_own_matrix(clips: ModuleType) -> None:
    green = np.full((48, 64, 3), (0, 200, 60), np.uint8)
    for colorspace in (1, 5):  # BT.709, BT.601
        data = clips.clip(
            1, codec="mpeg2video", container="matroska", pictures=[green], colorspace=colorspace, qscale="1"
        )
        (frame,) = video_frames(data, 1)
        assert np.abs(np.asarray(frame).astype(int) - green).max() < 12


# ---- hostile input ----------------------------------------------------------------------------------------------


def test_what_is_no_video_is_refused_by_name(clips: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "text.mp4").write_text("not a clip " * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "sound.mp4").write_bytes(clips.clip(video=False, audio=True))
    (tmp_path / "none.avi").write_bytes(clips.clip(0, container="avi"))
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {
        "picture.png": "not a video", "text.mp4": "not a video", "empty.mp4": "0 bytes", "noise.webm": "not a video",
        "sound.mp4": "no video among 1", "none.avi": "no frames|not a video", "pipe.mp4": "not a regular file",
        "absent.mp4": "no such file", ".": "not a regular file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(MediaError, match=rf"{name}: .*({reason})"):
            video_frames(tmp_path / name, 4)
    with pytest.raises(MediaError, match="my clip: "):
        video_size(b"nothing", name="my clip")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "faststart"])
@pytest.mark.parametrize("keep", [0.95, 0.6, 0.2])
def test_a_clip_cut_short_is_an_error(clips: ModuleType, container: str, keep: float) -> None:
    options = {"container": "mp4"} if container == "faststart" else {"container": container}
    data = clips.clip(60, **options)
    if container == "faststart":
        at = data.index(b"moov") - 4
        data = moov_first(data, at)
        assert len(video_frames(data, 3)) == 3
    with pytest.raises(MediaError, match=r"60f.*(cut short|damaged)"):
        video_frames(data[: int(len(data) * keep)], 3, name="60f")


def moov_first(data: bytes, at: int) -> bytes:
    """The boxes of an MP4 with the index before the data, offsets corrected."""
    begin = int.from_bytes(data[:4], "big")
    moov = bytearray(data[at:])
    chunks = moov.index(b"stco")
    for entry in range(int.from_bytes(moov[chunks + 8 : chunks + 12], "big")):
        where = chunks + 12 + 4 * entry
        moved = int.from_bytes(moov[where : where + 4], "big") + len(moov)
        moov[where : where + 4] = moved.to_bytes(4, "big")
    return data[:begin] + bytes(moov) + data[begin:at]


def test_a_damaged_clip_gives_frames_or_an_error_and_nothing_else(clips: ModuleType) -> None:
    random = np.random.default_rng(1)
    for container in ("mp4", "matroska", "avi", "gif"):
        data = clips.clip(12, codec="gif" if container == "gif" else "mpeg4", container=container)
        for _ in range(25):
            broken = bytearray(data)
            for at in random.integers(0, len(data), 8):
                broken[at] = random.integers(256)
            try:
                assert len(video_frames(bytes(broken), 3, max_pixels=100_000, timeout=20)) == 3
            except MediaError:
                continue


def test_limits(clips: ModuleType) -> None:
    data = clips.clip(3)
    with pytest.raises(MediaError, match="64 x 48 is over the limit of 3071 pixels"):
        video_frames(data, max_pixels=3071)
    assert len(video_frames(data, 2, max_pixels=3072)) == 2
    with pytest.raises(MediaError, match=rf"{len(data)} bytes is over the limit of 100"):
        video_size(data, max_bytes=100)
    for n in (0, -1, 100_000):
        with pytest.raises(ValueError, match="num_frames must be between 1 and 1024"):
            video_frames(data, n)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_ten_hours_at_a_low_rate(clips: ModuleType, container: str) -> None:
    hours = [round(index * 9000 * 25) for index in range(5)]
    if container == "avi":  # a constant rate: the header's frame rate makes it long
        data = clips.clip(5, container="avi")
        at = data.index(b"strh") + 4 + 4 + 20
        data = data[:at] + (9000).to_bytes(4, "little") + (1).to_bytes(4, "little") + data[at + 8 :]
    else:
        data = clips.clip(5, container=container, times=hours)
    with pytest.raises(MediaError, match=r"36000|45000|longer than the limit of 14400|over the limit of 14400"):
        video_frames(data, 4)
    frames = video_frames(data, 4, max_seconds=1e9)
    for frame, index in zip(frames, formula(5, 4), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), clips.every_frame(data)[index])


def test_a_giant_canvas_is_refused_before_it_is_allocated(clips: ModuleType) -> None:
    data = clips.clip(2, codec="gif", container="gif")
    giant = data[:6] + b"\xff\xff\xff\xff" + data[10:]
    with pytest.raises(MediaError, match=r"65535 x 65535 is over the limit|damaged"):
        video_frames(giant)
    with pytest.raises(MediaError):
        video_frames(giant, max_pixels=1 << 40)
    assert len(video_frames(data, 2)) == 2


def test_a_playlist_opens_no_other_file(clips: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "clip.ts").write_bytes(clips.clip(5, codec="mpeg2video", container="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n"
    for name, text in (
        ("a.m3u8", playlist),
        ("a.mp4", playlist),
        ("a.txt", f"ffconcat version 1.0\nfile {tmp_path}/clip.ts\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match=f"{name}: .*not a video"):
            video_frames(tmp_path / name, 2)


# ---- the child --------------------------------------------------------------------------------------------------


def test_a_slow_clip_is_killed(clips: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clips.clip(5)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    video._end_all()
    monkeypatch.setattr(video, "_CHILD", tmp_path / "slow.py")
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"night.mp4: takes more than 0\.5 seconds"):
        video_frames(data, name="night.mp4", timeout=0.5)
    assert time.monotonic() - began < 10 and not video._IDLE
    monkeypatch.undo()
    assert len(video_frames(data, 2)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's here")
def test_memory_is_bounded(clips: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clips.clip(5, size=(640, 480))
    video._end_all()
    monkeypatch.setattr(video, "_MEMORY", 1 << 20)
    with pytest.raises(MediaError, match=r"big: .*(MB|memory|died|Cannot allocate)"):
        video_frames(data, name="big")


def test_children_are_used_again_and_replaced_when_they_die(clips: ModuleType) -> None:
    data = clips.clip(5)
    video._end_all()
    video_frames(data, 2)
    (child,) = video._IDLE
    with pytest.raises(MediaError):
        video_frames(b"broken", 2)
    video_size(data)
    assert [each.process.pid for each in video._IDLE] == [child.process.pid]
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    assert len(video_frames(data, 2)) == 2
    assert [each.process.pid for each in video._IDLE] != [child.process.pid]


def test_threads_and_forked_workers_decode_too(clips: ModuleType) -> None:
    data = clips.clip(30, codec="mpeg4")
    every = clips.every_frame(data)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: agrees(data, every, n), range(1, 13)))
    assert 1 <= len(video._IDLE) <= 4
    pids = {child.process.pid for child in video._IDLE}
    with multiprocessing.get_context("fork").Pool(1) as workers:
        frames, other = workers.apply(_in_worker, (data,))
    assert np.array_equal(frames, np.asarray(video_frames(data, 1)[0])) and not set(other) & pids
    assert all(child.process.poll() is None for child in video._IDLE)


def _in_worker(data: bytes) -> tuple[np.ndarray, list[int]]:
    return np.asarray(video_frames(data, 1)[0]), [child.process.pid for child in video._IDLE]


def test_children_end_with_their_parent(clips: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clips.clip(5))
    code = (
        "import os, sys; from sailvl import video; video.video_size(sys.argv[1]); "
        "print(video._IDLE[0].process.pid, flush=True); os._exit(0)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.mp4")], capture_output=True, text=True, cwd=root, check=True
    )
    for _ in range(100):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the decoder outlived its parent")


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sailvl\[video\]'"):
        video_frames(b"x")


def test_importing_loads_no_decoder() -> None:
    code = "import sys, sailvl.video; print('av' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["False", "False"]
