"""Ask a model every question of a benchmark file, once, and keep what it said.

``out/predictions.jsonl`` gains a line per answer as it comes; a killed run goes on where it stopped, asks nothing twice
and loses nothing. A line is found again by the row's index and a hash of everything that shaped the answer (model,
prompt, pictures' policy, sampling), so an answer to another prompt is never taken for this one's. A line torn by the
kill is cut off and its question asked again. The file only grows: a hundred thousand answers cost a hundred thousand
lines, where the toolkit these files come from rewrites all of them after each.

Questions are asked in order of the encoder's work, most first, so that what is answered together is alike and memory
shows its peak at once; rows that show the same picture follow each other, so that an engine which remembers features
encodes it once. Pictures are decoded ahead, in threads.

A row whose picture is broken gets a line with the reason and no answer; it counts as wrong, and is reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from rich.progress import Progress

from sailvl.engine.base import Engine, Request, Sampling, replies
from sailvl.eval import prompts
from sailvl.eval.table import Table, TableError, picture_key, pictures
from sailvl.files import whole_lines
from sailvl.geometry import ImagePolicy, Tiling, num_tiles, schemes
from sailvl.media import MediaError, image_size, open_image
from sailvl.types import Message, Picture, Record, RecordError
from sailvl.video import video_frames

SYNC_SECONDS = 1.0
"""Answers are flushed at once, which a kill of this process cannot undo, and synced to disk this often."""

DECODERS = 2
"""Threads that decode pictures ahead of the engine."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a benchmark is asked. ``kind`` is the toolkit's type of the data set (``MCQ``, ``VQA``, ``Video-MCQ`` ...).

    The defaults are those of the authors' evaluation: greedy, two grids for single pictures (``msac``), 16 frames a
    clip; ``thinking`` asks for a thought first.
    """

    kind: str
    thinking: bool = False
    msac: bool = True
    max_new_tokens: int = 1024
    num_frames: int = 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What asking came to: rows in the file, how many were asked now, failures by index, seconds of this run."""

    total: int
    asked: int
    failures: dict[str, str]
    seconds: float


def predict(
    engine: Engine,
    table: Table,
    asking: Asking,
    out: Path,
    *,
    model: str,
    video_root: Path | None = None,
    progress: Progress | None = None,
) -> Asked:
    """Answer every row of ``table`` that ``out`` has no answer for yet.

    ``model`` names what answers (its folder's fingerprint, or a URL and name): another model's answers are not taken
    over. Raises TableError for a file in ``out`` that is not one of ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "predictions.jsonl"
    known = {(row["index"], row["key"]) for row in resume(path)}
    began = time.perf_counter()
    keys = [answer_key(table, number, asking, model) for number in range(len(table.rows))]
    pending = [number for number, key in enumerate(keys) if (_index(table, number), key) not in known]
    task = progress.add_task(table.name, total=len(keys), completed=len(keys) - len(pending)) if progress else None
    with path.open("ab") as file, ThreadPoolExecutor(DECODERS) as pool:
        log = _Log(file)

        def write(number: int, **fields: Any) -> None:
            log.write({"index": _index(table, number), "key": keys[number], **fields})
            if progress and task is not None:
                progress.advance(task)

        numbers = _in_order(table, pending, asking, pool)
        requests = _prepared(table, numbers, asking, video_root, pool, ahead=2 * engine.capacity, failed=write)
        for reply in replies(engine, requests):
            number = int(reply.id)
            if reply.error:
                write(number, raw="", error=reply.error)
            else:
                answer = reply.completions[0]
                write(number, raw=answer.text, finish=answer.finish_reason, tokens=len(answer.ids))
        log.sync()
    failures = {row["index"]: row["error"] for row in current(path, table, keys) if row.get("error")}
    return Asked(total=len(keys), asked=len(pending), failures=failures, seconds=round(time.perf_counter() - began, 3))


def _index(table: Table, number: int) -> str:
    return str(table.rows[number]["index"])


def answer_key(table: Table, number: int, asking: Asking, model: str) -> str:
    """A hash of all that shapes the answer to a row, except its pictures' pixels."""
    row = table.rows[number]
    text = prompts.question_text(table.name, asking.kind, row)
    policy = asdict(prompts.image_policy(table.name, asking.kind, msac=asking.msac))
    content = [model, table.name, text, policy, asdict(asking)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


# ---- the file -------------------------------------------------------------------------------------------------


class _Log:
    """Appends lines; flushes each, syncs every second."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.synced = file, time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self.file.write(line.encode("utf-8", errors="backslashreplace"))
        self.file.flush()
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()


def resume(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file, after cutting off a last line that was never finished."""
    rows = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = json.loads(line)
            rows.append({"index": str(row["index"]), "key": str(row["key"]), **row})
        except (ValueError, KeyError, TypeError) as error:
            raise TableError(f"{path}: line {number} is no prediction ({error}); move the file away") from error
    return rows


def current(path: Path, table: Table, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a predictions file that answer ``table`` under ``keys``, in the table's order."""
    found = {(row["index"], row["key"]): row for row in resume(path)}
    wanted = [(_index(table, number), key) for number, key in enumerate(keys)]
    return [found[pair] for pair in wanted if pair in found]


# ---- requests -------------------------------------------------------------------------------------------------


def _in_order(table: Table, pending: Sequence[int], asking: Asking, pool: ThreadPoolExecutor) -> list[int]:
    """Most tiles first, then rows of one picture together, then longer questions first."""

    def work(number: int) -> tuple[int, int, int]:
        text = len(str(table.rows[number].get("question") or ""))
        return -_num_tiles(table, number, asking), picture_key(table, number), -text

    return [number for _, number in sorted(zip(pool.map(work, pending), pending, strict=True))]


def _num_tiles(table: Table, number: int, asking: Asking) -> int:
    """Tiles of a row's pictures by their headers; 0 for those that cannot be read, which fail when their turn comes."""
    if prompts.is_video(asking.kind):
        return asking.num_frames
    try:
        sizes = [image_size(source) for source in pictures(table, number)]
    except MediaError:
        return 0
    policy = prompts.image_policy(table.name, asking.kind, msac=asking.msac)
    return sum(
        num_tiles(width, height, scheme)
        for (width, height), scheme in zip(sizes, schemes(Tiling(), policy, len(sizes)), strict=True)
    )


def _prepared(
    table: Table,
    numbers: Sequence[int],
    asking: Asking,
    video_root: Path | None,
    pool: ThreadPoolExecutor,
    *,
    ahead: int,
    failed: Callable[..., None],
) -> Iterator[Request]:
    """Requests in order, decoded in threads at most ``ahead`` of the engine; rows that cannot be asked go to
    ``failed`` instead."""
    waiting: deque[tuple[int, Future[Request]]] = deque()
    upcoming = iter(numbers)
    while True:
        while len(waiting) < ahead and (number := next(upcoming, None)) is not None:
            waiting.append((number, pool.submit(request, table, number, asking, video_root)))
        if not waiting:
            return
        number, future = waiting.popleft()
        try:
            yield future.result()
        except (MediaError, RecordError, TableError) as error:
            failed(number, raw="", error=str(error))


def request(table: Table, number: int, asking: Asking, video_root: Path | None = None) -> Request:
    """Row ``number`` as a request, its pictures decoded. Raises MediaError or RecordError naming the row."""
    row = table.rows[number]
    where = f"{table.path}: row {number + 1} (index {row['index']})"
    if row.get("question") is None:
        raise RecordError(f"{where}: it has no question")
    is_video = prompts.is_video(asking.kind)
    try:
        images = (
            video_frames(_clip(table, number, video_root), asking.num_frames)
            if is_video
            else [_rgb(open_image(source)) for source in pictures(table, number)]
        )
    except MediaError as error:
        raise MediaError(str(error) if str(table.path) in str(error) else f"{where}: {error}") from error
    prompt = prompts.build(table.name, asking.kind, row, len(images), thinking=asking.thinking)
    record = Record(
        id=f"{table.name}/{row['index']}",
        messages=(Message(role="user", text=prompts.message_text(prompt, len(images))),),
        pictures=tuple(Picture(width=i.width, height=i.height, ref=None, frame=is_video) for i in images),
    )
    policy = ImagePolicy() if is_video else prompts.image_policy(table.name, asking.kind, msac=asking.msac)
    sampling = Sampling(max_new_tokens=asking.max_new_tokens)
    return Request(id=str(number), record=record, images=images, policy=policy, sampling=sampling)


def _rgb(image: Image.Image) -> Image.Image:
    """As the authors' adapter converts, which drops transparency instead of blending it: parity comes first here."""
    return image.convert("RGB")


def _clip(table: Table, number: int, video_root: Path | None) -> Path:
    """A row's video file: ``video_path``, else prefix, ``video`` and suffix, below the data set's video folder."""
    row = table.rows[number]
    name = row.get("video_path")
    if name is None:
        parts = [str(row.get(column) or "") for column in ("video", "suffix")]
        name = str(Path(str(row.get("prefix") or "")) / "".join(parts))
    beside = table.path.parent
    roots = [beside / "videos" / table.name, beside / table.name]
    if video_root is not None:
        roots = [video_root / table.name, video_root]
    tried = [Path(root) / ending for root in [*roots, beside] for ending in (str(name), f"{name}.mp4")]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise MediaError(f"{table.path}: row {number + 1} (index {row['index']}): no clip {tried[0]}")
    return found
