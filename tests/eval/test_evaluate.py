import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sailvl.engine.base import EngineError, Request
from sailvl.engine.fake import Fake
from sailvl.eval.evaluate import evaluate
from sailvl.eval.pictures import picture_name
from sailvl.media import MediaError
from sailvl.types import Message, Picture, Question, Record, RecordError


def make_question(number: int, family: str = "colour", truth: str = "red") -> Question:
    record = Record(
        id=f"{family}-{number}",
        messages=(Message(role="user", text=f"<image>\nWhich colour, {number}?"),),
        pictures=(Picture(width=8, height=6, ref=None),),
    )
    lang = "zh" if number % 2 else "en"
    return Question(record=record, truth=truth, family=family, lang=lang, verifier="exact", chance=0.25)


def pictures(record: Record) -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), "red")]


def colours(bad: tuple[str, ...] = (), seconds: float = 0.0, **options) -> Fake:
    """Says "red" to questions with an even number, "blue" to the others, and refuses the ids in ``bad``."""

    def answer(request: Request) -> str | Exception:
        if request.id in bad:
            return RecordError(f"record {request.id}: 3 placeholders, 1 picture")
        return "red" if int(request.id.rpartition("-")[2]) % 2 == 0 else "blue"

    return Fake(answer, seconds=seconds, **options)


def ids(engine: Fake) -> list[str]:
    return [request.id for request in engine.asked]


def test_scores_rows_and_pictures(tmp_path: Path) -> None:
    questions = [make_question(n) for n in range(10)] + [make_question(n, "shape", "red") for n in range(0, 8, 2)]
    scores = evaluate(colours(), questions, pictures, tmp_path, max_new_tokens=4, keep_pictures=4)
    assert scores.families["colour"].n == 10 and scores.families["colour"].accuracy == 0.5
    assert scores.families["colour"].corrected == pytest.approx(1 / 3)
    assert scores.families["shape"].accuracy == 1
    assert scores.headline.mean == pytest.approx((1 / 3 + 1) / 2)
    assert scores.langs["zh"].accuracy == 0 and scores.langs["en"].accuracy == 1
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [question.record.id for question in questions]
    assert rows[0]["question"] == "Which colour, 0?" and rows[0]["answer"] == "red" and rows[0]["truth"] == "red"
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["families"]["colour"]["accuracy"] == 0.5
    kept = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert kept == sorted(picture_name(row["id"]) for row in rows if row["picture"])
    verdicts = [(row["family"], row["score"]) for row in rows if row["picture"]]
    assert verdicts.count(("colour", 1.0)) == 2 and verdicts.count(("colour", 0.0)) == 2
    assert verdicts.count(("shape", 1.0)) == 2


def test_a_finished_evaluation_asks_nothing(tmp_path: Path) -> None:
    questions = [make_question(n) for n in range(6)]
    first = evaluate(colours(), questions, pictures, tmp_path, max_new_tokens=4)
    before = (tmp_path / "answers.jsonl").read_bytes()
    again = colours()
    assert evaluate(again, questions, pictures, tmp_path, max_new_tokens=4) == first
    assert again.asked == [] and (tmp_path / "answers.jsonl").read_bytes() == before


def test_bad_records_and_pictures_are_wrong_and_listed(tmp_path: Path) -> None:
    questions = [make_question(n) for n in range(0, 20, 2)]

    def broken(record: Record) -> list[Image.Image]:
        if record.id == "colour-8":
            raise MediaError("colour-8.png: truncated")
        return pictures(record)

    engine = colours(bad=("colour-2", "colour-14"))
    scores = evaluate(engine, questions, broken, tmp_path, max_new_tokens=4)
    assert {failure.id: failure.reason for failure in scores.failures} == {
        "colour-2": "record colour-2: 3 placeholders, 1 picture",
        "colour-8": "colour-8.png: truncated",
        "colour-14": "record colour-14: 3 placeholders, 1 picture",
    }
    assert scores.overall.n == 10 and scores.overall.accuracy == 0.7
    assert sorted(ids(engine)) == sorted({q.record.id for q in questions} - {"colour-2", "colour-8", "colour-14"})


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    questions = [make_question(0), make_question(2)]
    with pytest.raises(EngineError, match="out of memory"):
        evaluate(Fake(["red", EngineError("out of memory")]), questions, pictures, tmp_path, max_new_tokens=4)
    assert not (tmp_path / "scores.json").exists()


def test_figures_do_not_depend_on_the_order_of_answers(tmp_path: Path) -> None:
    questions = [make_question(n, family) for family in ("colour", "shape") for n in range(12)]

    def wordy(request: Request) -> str:
        number = int(request.id.rpartition("-")[2])
        return ("red" if number % 3 else "a") + " well" * ((7 * number) % 5)

    found = []
    for capacity in (1, 5):
        out = tmp_path / str(capacity)
        scores = evaluate(Fake(wordy, capacity=capacity), questions, pictures, out, max_new_tokens=9)
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        found.append(([row["id"] for row in rows], scores))
    (straight, first), (mixed, second) = found
    assert straight == [question.record.id for question in questions]
    assert sorted(mixed) == sorted(straight) and mixed != straight
    assert (first.headline, first.overall, first.families, first.langs) == (
        second.headline,
        second.overall,
        second.families,
        second.langs,
    )


def test_an_answer_is_on_disk_before_the_next_question_is_drawn(tmp_path: Path) -> None:
    seen = []

    def watching(record: Record) -> list[Image.Image]:
        path = tmp_path / "answers.jsonl"
        seen.append(len(path.read_bytes().splitlines()) if path.exists() else 0)
        return pictures(record)

    evaluate(colours(capacity=1), [make_question(n) for n in range(5)], watching, tmp_path, max_new_tokens=4)
    assert seen == [0, 1, 2, 3, 4]


def test_a_failed_request_is_wrong_and_listed(tmp_path: Path) -> None:
    script = {"colour-0": "red", "colour-2": OSError("image file is truncated"), "colour-4": "red and"}
    questions = [make_question(n) for n in (0, 2, 4)]
    scores = evaluate(Fake(script), questions, pictures, tmp_path, max_new_tokens=1)
    assert [(failure.id, failure.reason) for failure in scores.failures] == [("colour-2", "image file is truncated")]
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert [rows[f"colour-{n}"]["finish"] for n in (0, 2, 4)] == ["stop", "error", "length"]
    assert scores.overall.n == 3 and scores.overall.accuracy == pytest.approx(2 / 3)


def test_a_torn_line_is_cut_and_asked_again(tmp_path: Path) -> None:
    questions = [make_question(n) for n in range(6)]
    whole = evaluate(colours(), questions, pictures, tmp_path, max_new_tokens=4)
    path = tmp_path / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-9])
    engine = colours()
    resumed = evaluate(engine, questions, pictures, tmp_path, max_new_tokens=4)
    assert ids(engine) == ["colour-3", "colour-4", "colour-5"]
    assert resumed.families == whole.families and resumed.headline == whole.headline
    assert len(path.read_bytes().splitlines()) == 6


def test_a_damaged_line_or_another_benchmark_is_refused(tmp_path: Path) -> None:
    questions = [make_question(n) for n in range(4)]
    evaluate(colours(), questions, pictures, tmp_path, max_new_tokens=4)
    with pytest.raises(ValueError, match="colour-0 was asked in another form"):
        evaluate(colours(), [make_question(0, truth="green")], pictures, tmp_path, max_new_tokens=4)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"id": "colour-1"', b'{"id": colour-1"'))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        evaluate(colours(), questions, pictures, tmp_path, max_new_tokens=4)


def test_faulty_questions_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    engine = colours()
    with pytest.raises(ValueError, match="colour-1: two questions"):
        evaluate(engine, [make_question(1), make_question(1)], pictures, tmp_path, max_new_tokens=4)
    boxless = Question(
        record=make_question(3).record, truth="red", family="where", lang="en", verifier="iou", chance=0.0
    )
    with pytest.raises(ValueError, match=r"colour-3 \(iou\): the truth 'red' holds no box"):
        evaluate(engine, [boxless], pictures, tmp_path, max_new_tokens=4)
    assert engine.asked == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", ".hidden", "x" * 300, "红", "a\0b", "con b"])
def test_picture_names_stay_in_their_folder(name: str) -> None:
    path = Path("/out") / picture_name(name)
    assert path.resolve().parent == Path("/out") and len(path.name) < 90 and path.name[0] != "."


def test_hostile_text_survives_the_file(tmp_path: Path) -> None:
    hostile = "\u2028 \ud800 \r\n </script> \x00"

    questions = [make_question(n) for n in range(2)]
    evaluate(Fake(hostile), questions, pictures, tmp_path, max_new_tokens=40)
    again = colours()
    evaluate(again, questions, pictures, tmp_path, max_new_tokens=4)
    assert again.asked == []
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().splitlines()]
    assert [row["answer"] for row in rows] == [hostile.strip()] * 2


SCRIPT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
questions = [here.make_question(n) for n in range(30)]
here.evaluate(here.colours(seconds=0.2, capacity=2), questions, here.pictures, Path(sys.argv[2]), max_new_tokens=4)
"""


def test_kill_and_resume_equals_never_stopped(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, __file__, str(out)], env={**os.environ})
    path = out / "answers.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size > 1500):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    done = {json.loads(line)["id"] for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert 0 < len(done) < 30 and not (out / "scores.json").exists()

    questions = [make_question(n) for n in range(30)]
    engine = colours()
    resumed = evaluate(engine, questions, pictures, out, max_new_tokens=4)
    assert set(ids(engine)) == {question.record.id for question in questions} - done
    assert len(ids(engine)) == len(set(ids(engine)))
    straight = evaluate(colours(), questions, pictures, tmp_path / "straight", max_new_tokens=4)
    assert (resumed.families, resumed.langs, resumed.headline) == (straight.families, straight.langs, straight.headline)
