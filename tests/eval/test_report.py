import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sailvl.engine.base import Request
from sailvl.engine.fake import Fake
from sailvl.eval import report
from sailvl.eval.evaluate import evaluate
from sailvl.eval.runfolder import changes, marks, read
from sailvl.types import Message, Picture, Question, Record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} {0} %s",
    "javascript:alert('&amp;')",
    "</title></textarea>\x00\u202e<!--",
]


class Page(HTMLParser):
    """Tags with their attributes, the text of each kind of tag, and whether tags nest."""

    VOID = frozenset({"meta", "img", "rect", "circle", "path", "line", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def stage(name: str, kind: str = "train", **fields) -> dict:
    if kind == "soup":
        return {"kind": "soup", "name": name, **fields}
    data = {"shares": {"caption": 0.75, "ocr": 0.25}}
    schedule = {"kind": "adalrs", "base": {"kind": "cosine", "warmup_steps": 2}}
    base = {"kind": "train", "name": name, "init": None, "data": data, "trains": ["projector"], "fresh": []}
    return {**base, "steps": 20, "lr": 1e-3, "schedule": schedule, **fields}


def ask(number: int, family: str, words: str) -> Question:
    record = Record(
        id=f"{family}-{number}",
        messages=(Message(role="user", text=f"<image>What {words}?"),),
        pictures=tuple(Picture(width=20, height=10, ref=None) for _ in range(1 + number % 2)),
    )
    box = family == "where"
    return Question(
        record=record,
        truth="<box>[[100,200,300,400]]</box>" if box else "red",
        family=family,
        lang="en" if number % 3 else "zh",
        verifier="iou" if box else "exact",
        chance=0.25,
    )


def skilled(right: int, wrong: str = "blue") -> Fake:
    """An engine that is right on the first ``right`` of eight questions; wrong answers are ``wrong``."""

    def answer(request: Request) -> str:
        family, _, number = request.id.rpartition("-")
        truth = "<box>[[100,200,300,400]]</box>" if family == "where" else "red"
        return truth if int(number) < right else wrong

    return Fake(answer)


def pictures(record: Record) -> list[Image.Image]:
    return [Image.new("RGB", (20, 10), "red") for _ in record.pictures]


def run_stage(run: Path, number: int, spec: dict, right: int, *, words: str = "colour", wrong: str = "blue") -> Path:
    folder = run / "stages" / f"{number:02d}-{spec['name']}-0123abcd"
    folder.mkdir(parents=True)
    if spec["kind"] == "train":
        rows = [
            {"step": s, "loss": 9.0 / s, "lr": 1e-3, "scale": 1.0, "phase": "base", "event": "go"}
            | {"tokens": 100, "samples": 3, "seconds": 0.5}
            for s in range(1, 21)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [ask(n, family, words) for family in ("colour", "where") for n in range(8)]
    evaluate(skilled(right, wrong), questions, pictures, folder / "eval", max_new_tokens=64)
    surroundings = {"hardware": {"cpu": "Abacus 3"}, "versions": {"torch": "2.13.0"}, "commit": "c0ffee"}
    (folder / "done.json").write_text(json.dumps({"stage": spec["name"], "seconds": 90.0} | surroundings))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stages = [
        stage("one"),
        stage("two", init="one"),
        stage("three", init="one"),
        stage("mix", "soup", of=["two", "three"]),
    ]
    path = tmp_path / "nano"
    path.mkdir()
    (path / "curriculum.json").write_text(json.dumps({"name": "nano", "stages": stages}))
    for number, (spec, right) in enumerate(zip(stages, (2, 4, 6, 7), strict=True), 1):
        run_stage(path, number, spec, right)
    return path


def page_of(run: Path) -> tuple[str, Page]:
    report.write(run, run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [], "every tag is closed"
    return text, page


def test_a_whole_run(run: Path) -> None:
    text, page = page_of(run)
    # 7 of 8 right, chance 1/4: (0.875 - 0.25) / 0.75
    assert "83.3" in page.text and "after stage 4, mix" in page.text
    for words in ("Abacus 3", "2.13.0", "c0ffee", "adalrs on cosine", "caption 75", "6 min 0 s", "average of weights"):
        assert words in page.text, words
    assert "Not in this report" not in page.text
    # every question is in its place: two families, right and wrong ones, with all four stages' verdicts
    cards = text.split('<section id="gallery">')[1]
    assert cards.count('class="verdict right"') == 8 and cards.count('class="verdict wrong"') == 2
    assert text.count('<rect class="truth"') == text.count('<rect class="answer"') + 1
    # the change is paired, and the soup is set against the mean of its members: 7/8 - (4/8 + 6/8) / 2
    assert re.search(r"all questions.*\+25.*\+50.*\+25", page.text)


def test_the_page_stands_alone_and_runs_nothing(run: Path) -> None:
    text, page = page_of(run)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form", "input"), tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
    assert "url(" not in text and "@import" not in text
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    images = [a for t, a in page.tags if t == "img"]
    assert images and all(a["alt"] for a in images)
    for image in images:
        assert base64.b64decode(image["src"].split(",")[1]).startswith(b"\x89PNG")
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a in page.tags if t == "svg")
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    targets = {a.get("id") for _, a in page.tags}
    assert all(a["href"][1:] in targets for t, a in page.tags if t == "a")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, hostile: str) -> None:
    run = tmp_path / "run"
    spec = stage("one", data={"shares": {hostile: 1.0}}, schedule={"kind": hostile})
    other = stage("two", init=hostile, trains=[hostile])
    run.mkdir()
    (run / "curriculum.json").write_text(json.dumps({"name": hostile, "stages": [spec, other]}))
    run_stage(run, 1, spec, 2)
    folder = run_stage(run, 2, other, 2, words=hostile, wrong=hostile)
    (folder / "done.json").write_text(json.dumps({"commit": hostile, "hardware": {hostile: hostile}}))
    harmless = tmp_path / "harmless"
    harmless.mkdir()
    plain = [stage("one", data={"shares": {"x": 1.0}}, schedule={"kind": "x"}), stage("two", init="x", trains=["x"])]
    (harmless / "curriculum.json").write_text(json.dumps({"name": "x", "stages": plain}))
    run_stage(harmless, 1, plain[0], 2)
    folder = run_stage(harmless, 2, plain[1], 2, words="x", wrong="x")
    (folder / "done.json").write_text(json.dumps({"commit": "x", "hardware": {"x": "x"}}))
    tags = [(tag, sorted(attributes)) for tag, attributes in page_of(run)[1].tags]
    assert tags == [(tag, sorted(attributes)) for tag, attributes in page_of(harmless)[1].tags]


def test_hostile_text_is_shown_as_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spec = stage("one")
    run.mkdir()
    (run / "curriculum.json").write_text(json.dumps({"name": "nano", "stages": [spec]}))
    run_stage(run, 1, spec, 2, wrong=HOSTILE[0])
    assert HOSTILE[0] in page_of(run)[1].text


def test_an_unfinished_run_says_what_is_missing(run: Path) -> None:
    three, mix = sorted(run.glob("stages/*"))[2:]
    (three / "done.json").unlink()
    (three / "eval" / "scores.json").unlink()
    answers = three / "eval" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-20])
    mix.rename(run / "elsewhere")
    _, page = page_of(run)
    assert "stage 3, three, is not finished" in page.text
    assert "stage 3, three: its evaluation stopped after 15 answers" in page.text
    assert "not started: 4 mix" in page.text
    assert "after stage 2, two" in page.text and "33.3" in page.text


def test_runs_without_evaluation_metrics_or_recipe(tmp_path: Path, run: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    _, page = page_of(empty)
    assert "curriculum.json is absent" in page.text and "No evaluation yet" in page.text
    for folder in run.glob("stages/*"):
        for path in sorted(folder.rglob("*"), reverse=True):
            if "eval" in path.parts:
                path.rmdir() if path.is_dir() else path.unlink()
    _, page = page_of(run)
    assert "no stage has been evaluated" in page.text and "Loss" in page.text
    (run / "curriculum.json").write_text("{")
    for path in run.glob("stages/*/*.json*"):
        path.write_text("[]\n{broken")
    _, page = page_of(run)
    assert "0 of 4" in page.text and "stage 2, two, is not finished" in page.text


def test_missing_pictures_leave_the_figures(run: Path) -> None:
    for path in run.glob("stages/*/eval/pictures/*"):
        path.write_bytes(b"no picture")
    text, page = page_of(run)
    assert "<img" not in text and "83.3" in page.text


def test_changes_are_not_made_up_for_other_questions(run: Path) -> None:
    whole = read(run)
    assert changes(whole.stages[1], whole)[""][0] == 0.25
    path = next(run.glob("stages/01-*/eval/answers.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    part = read(run)
    assert changes(part.stages[1], part) == {}


def test_marks_of_the_rate_search() -> None:
    def row(step: int, scale: float, phase: str = "base", event: str = "go") -> dict:
        return {"step": step, "scale": scale, "phase": phase, "event": event}

    rows = [
        *(row(1, 1.0), row(2, 1.0, event="snapshot"), row(3, 3.0, "trial"), row(4, 3.0)),  # kept
        *(row(5, 3.0, event="snapshot"), row(6, 8.9, "trial"), row(7, 3.0)),  # undecided
        *(row(8, 3.0, event="snapshot"), row(9, 8.7, "trial", "rollback"), row(10, 1.5)),
        row(11, 1.5, event="snapshot"),
    ]
    assert marks(rows) == [
        *((2, "snapshot"), (4, "kept")),
        *((5, "snapshot"), (7, "undecided")),
        *((8, "snapshot"), (9, "rollback")),
        (11, "snapshot"),
    ]
    # with coarse logging a new trial's row can be the first that shows how the last one ended
    assert marks([rows[1], row(9, 3.0, event="snapshot")]) == [(2, "snapshot"), (9, "kept"), (9, "snapshot")]
