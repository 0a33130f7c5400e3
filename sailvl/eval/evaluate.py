"""Ask every question once, judge each answer, and keep everything a reader needs to check the figures.

``out/answers.jsonl`` has one line per answer, in the order they came, written as each is finished: a killed evaluation
goes on where it stopped and asks nothing twice. A line torn by the kill is cut off and asked again. Figures do not
depend on the order: they are made in the order of the questions.
``out/scores.json`` appears at the end, in one piece. ``out/pictures/`` keeps a few pictures per family, small, some
with right answers and some with wrong ones, so that the report can show them without the data.

A question that cannot be asked (its picture is broken, its record does not fit) scores 0 and is listed: leaving it out
would change what the others are compared with.

Difference from the report: it evaluates with an outside toolkit that rewrites its whole file after each answer.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from sailvl.engine.base import Engine, Reply, Request, Sampling, replies
from sailvl.eval.metrics import Headline, Judged, Score, by_family, headline, summarise
from sailvl.eval.pictures import keep, picture_name
from sailvl.files import whole_lines, write_text
from sailvl.media import MediaError
from sailvl.types import IMAGE_PLACEHOLDER, Question, Record, RecordError
from sailvl.verify import score

SYNC_SECONDS = 1.0
"""A power cut loses the answers of so long at most; a kill loses none that were written."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A question that could not be asked, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation found. ``seconds`` is the time spent answering, over all its runs."""

    headline: Headline
    overall: Score
    families: dict[str, Score]
    langs: dict[str, Score]
    failures: tuple[Failure, ...]
    seconds: float


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    images: Callable[[Record], Sequence[Image.Image]],
    out: Path,
    *,
    max_new_tokens: int,
    progress: Progress | None = None,
    keep_pictures: int = 8,
) -> Scores:
    """Answer, judge and record all questions in the folder ``out``; goes on with what is there already.

    Pictures are made when a question's turn comes. ``keep_pictures`` is per family. Raises ValueError for duplicate
    ids, truths that their own verifier refuses, and answers of another benchmark in ``out``; EngineError if the engine
    cannot go on.
    """
    check(questions)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "answers.jsonl"
    rows = {row["id"]: row for row in _resume(path)}
    _same_benchmark(questions, rows, path)
    pending = [question for question in questions if question.record.id not in rows]
    task = (
        progress.add_task("evaluate", total=len(questions), completed=len(questions) - len(pending))
        if progress
        else None
    )
    kept = Counter((row["family"], row["score"] >= 1) for row in rows.values() if row["picture"])
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        synced = time.monotonic()
        for row, pictures in _ask(engine, pending, images, max_new_tokens):
            verdict = (row["family"], row["score"] >= 1)
            if pictures and kept[verdict] < keep_pictures / 2:
                keep(pictures, out / "pictures" / picture_name(row["id"]))
                row["picture"] = True
                kept[verdict] += 1
            rows[row["id"]] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            if time.monotonic() - synced >= SYNC_SECONDS:
                os.fsync(file.fileno())
                synced = time.monotonic()
            if progress and task is not None:
                progress.advance(task)
        os.fsync(file.fileno())
    scores = tally([rows[question.record.id] for question in questions])
    write_text(out / "scores.json", json.dumps(asdict(scores), ensure_ascii=False, indent=1) + "\n")
    return scores


def check(questions: Sequence[Question]) -> None:
    """Raises ValueError naming the first question whose id is taken or whose truth would not score 1 against itself."""
    seen: set[str] = set()
    for question in questions:
        name = question.record.id
        if name in seen:
            raise ValueError(f"question {name}: two questions have this id; answers are kept by id")
        seen.add(name)
        try:
            own = score(question, question.truth)
        except ValueError as error:
            raise ValueError(f"question {name} ({question.verifier}): {error}") from error
        if own != 1:
            raise ValueError(f"question {name}: {question.verifier} gives its truth {question.truth!r} the score {own}")


def tally(rows: Iterable[dict[str, Any]]) -> Scores:
    """Scores of the rows of an answers file."""
    rows = list(rows)
    judged = [judgement(row) for row in rows]
    langs: dict[str, list[Judged]] = {}
    for row in judged:
        langs.setdefault(row.lang, []).append(row)
    return Scores(
        headline=headline(judged),
        overall=summarise(judged),
        families={family: summarise(group) for family, group in by_family(judged).items()},
        langs={lang: summarise(group) for lang, group in sorted(langs.items())},
        failures=tuple(Failure(id=row["id"], reason=row["error"]) for row in rows if row["error"]),
        seconds=sum(row["seconds"] for row in rows),
    )


def judgement(row: dict[str, Any]) -> Judged:
    """The part of an answer's row that figures are made of."""
    return Judged(family=row["family"], lang=row["lang"], score=row["score"], chance=row["chance"])


def _ask(
    engine: Engine,
    questions: Sequence[Question],
    images: Callable[[Record], Sequence[Image.Image]],
    max_new_tokens: int,
) -> Iterator[tuple[dict[str, Any], Sequence[Image.Image]]]:
    """Rows and pictures as they come; ``seconds`` of a row is the time since the row before, so that they add up."""
    asked: dict[str, tuple[Question, Sequence[Image.Image]]] = {}
    broken: list[Reply] = []

    def requests() -> Iterator[Request]:
        for question in questions:
            record = question.record
            try:
                pictures = images(record)
            except (MediaError, RecordError) as error:
                asked[record.id] = (question, ())
                broken.append(Reply(id=record.id, error=str(error)))
                continue
            asked[record.id] = (question, pictures)
            yield Request(
                id=record.id, record=record, images=pictures, sampling=Sampling(max_new_tokens=max_new_tokens)
            )

    def answers() -> Iterator[Reply]:
        for reply in replies(engine, requests()):
            yield from _emptied(broken)
            yield reply
        yield from _emptied(broken)

    before = time.perf_counter()
    for reply in answers():
        question, pictures = asked.pop(reply.id)
        now = time.perf_counter()
        yield _row(question, reply, now - before), pictures
        before = now


def _emptied(replies: list[Reply]) -> list[Reply]:
    """What is in the list, which is empty afterwards."""
    found = replies.copy()
    replies.clear()
    return found


def _row(question: Question, reply: Reply | None, seconds: float) -> dict[str, Any]:
    """What is written about an answer, blanks around it cut off; without a reply, what is known before."""
    given = reply.completions[0] if reply and reply.completions else None
    answer = given.text.strip() if given else ""
    asked = [message.text for message in question.record.messages if message.role == "user"]
    return {
        "id": question.record.id,
        "family": question.family,
        "lang": question.lang,
        "question": asked[-1].replace(IMAGE_PLACEHOLDER, "").strip() if asked else "",
        "answer": answer,
        "truth": question.truth,
        "score": score(question, answer) if given else 0.0,
        "chance": question.chance,
        "verifier": question.verifier,
        "tokens": len(given.ids) if given else 0,
        "finish": given.finish_reason if given else "error",
        "seconds": round(seconds, 4),
        "picture": False,
        "error": reply.error if reply else "",
    }


def _resume(path: Path) -> list[dict[str, Any]]:
    """The rows of an answers file."""
    rows = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete the file to ask again") from error
    return rows


def _same_benchmark(questions: Sequence[Question], rows: dict[str, dict[str, Any]], path: Path) -> None:
    for question in questions:
        row = rows.get(question.record.id)
        now = _row(question, None, 0.0)
        if row and any(row[key] != now[key] for key in ("question", "truth", "chance", "verifier")):
            raise ValueError(f"{path}: {now['id']} was asked in another form; delete the folder to evaluate anew")
