"""Every question is asked exactly once, whatever is killed, torn or broken in between."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sailvl.engine.fake import Fake
from sailvl.eval.predict import Asking, answer_key, current, predict, request, resume
from sailvl.eval.table import TableError, read

MCQ = Asking(kind="MCQ", max_new_tokens=16)


def b64(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def table_of(path: Path, count: int = 12, broken: tuple[int, ...] = ()) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "A", "B", "answer"])
        for i in range(count):
            image = base64.b64encode(b"\x89PNG broken" * 9).decode() if i in broken else b64((i, 0, 0))
            writer.writerow([i, image, f"question {i}?", "cat", "dog", "A"])
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_every_row_is_asked_once_and_never_again(tmp_path):
    table = read(table_of(tmp_path / "MMStar.tsv"))
    engine = Fake(lambda request: f"A {request.record.id}")
    done = predict(engine, table, MCQ, tmp_path / "out", model="m")
    assert (done.total, done.asked, done.failures) == (12, 12, {})
    assert {row["index"]: row["raw"] for row in lines(tmp_path / "out")} == {str(i): f"A MMStar/{i}" for i in range(12)}
    asked = engine.asked[0]
    assert asked.record.messages[0].text.startswith("<image>\nquestion") and asked.policy.max_tiles == 10
    assert asked.policy.msac and asked.sampling.max_new_tokens == 16

    again = Fake("B")
    assert predict(again, table, MCQ, tmp_path / "out", model="m").asked == 0 and not again.asked


def test_another_model_prompt_or_policy_asks_again_beside_the_old_answers(tmp_path):
    table = read(table_of(tmp_path / "MMStar.tsv", 3))
    for number, (asking, model) in enumerate(
        [(MCQ, "m"), (MCQ, "other"), (Asking(kind="MCQ", thinking=True), "m"), (Asking(kind="MCQ", msac=False), "m")], 1
    ):
        assert predict(Fake("A"), table, asking, tmp_path / "out", model=model).asked == 3
        assert len(lines(tmp_path / "out")) == 3 * number


def test_a_broken_picture_is_reported_and_the_rest_is_answered(tmp_path):
    table = read(table_of(tmp_path / "Set.tsv", broken=(3, 7)))
    done = predict(Fake("A"), table, MCQ, tmp_path / "out", model="m")
    assert set(done.failures) == {"3", "7"} and "row 4 (index 3)" in done.failures["3"]
    assert Counter(row.get("error", "") == "" for row in lines(tmp_path / "out")) == {True: 10, False: 2}
    assert predict(Fake("A"), table, MCQ, tmp_path / "out", model="m").asked == 0


def test_refused_and_failing_requests_are_reported(tmp_path):
    table = read(table_of(tmp_path / "Set.tsv", 3))
    engine = Fake(lambda request: ValueError("too odd") if request.record.id.endswith("/1") else "A")
    assert predict(engine, table, MCQ, tmp_path / "out", model="m").failures == {"1": "too odd"}


def test_a_torn_line_is_asked_again(tmp_path):
    table = read(table_of(tmp_path / "Set.tsv", 4))
    predict(Fake("A"), table, MCQ, tmp_path / "out", model="m")
    path = tmp_path / "out/predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert predict(Fake("B"), table, MCQ, tmp_path / "out", model="m").asked == 1
    keys = [answer_key(table, number, MCQ, "m") for number in range(4)]
    assert [row["index"] for row in current(path, table, keys)] == ["0", "1", "2", "3"]


def test_a_foreign_file_is_refused_by_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"index": 1, "key": "a"}\n{"what": 1}\n')
    with pytest.raises(TableError, match="line 2"):
        resume(path)


def test_most_work_comes_first_and_shared_pictures_together(tmp_path):
    small, large = b64((1, 2, 3)), b64((4, 5, 6), (900, 300))
    rows = [["index", "image", "question"], ["1", small, "a"], ["2", large, "b"], ["3", b64((9, 9, 9)), "c"]]
    rows += [["4", "1", "d"], ["5", "2", "e"]]
    with (tmp_path / "Set.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    engine = Fake("A", capacity=1)
    predict(engine, read(tmp_path / "Set.tsv"), Asking(kind="VQA"), tmp_path / "out", model="m")
    assert [asked.record.id[-1] for asked in engine.asked] == ["2", "5", "1", "4", "3"]


def test_clips_become_frames(tmp_path):
    import av
    import numpy as np

    (tmp_path / "videos/MVBench").mkdir(parents=True)
    with av.open(str(tmp_path / "videos/MVBench/a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "MVBench.tsv").write_text("index\tvideo\tquestion\tcandidates\n0\ta\tWhat?\t['x', 'y']\n1\tgone\tq\t\n")
    table = read(tmp_path / "MVBench.tsv")
    asked = request(table, 0, Asking(kind="Video-MCQ", num_frames=4))
    assert [picture.frame for picture in asked.record.pictures] == [True] * 4
    assert asked.record.messages[0].text.startswith("<image>\n<image>\n<image>\n<image>\nCarefully")
    done = predict(Fake("A"), table, Asking(kind="Video-MCQ"), tmp_path / "out", model="m")
    assert list(done.failures) == ["1"] and "no clip" in done.failures["1"]


SCRIPT = """
import sys
from pathlib import Path
from sailvl.engine.fake import Fake
from sailvl.eval.predict import Asking, predict
from sailvl.eval.table import read
table, out, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
predict(Fake(lambda r: "A " + r.record.id, capacity=2, seconds=seconds), read(table),
        Asking(kind="MCQ", max_new_tokens=16), out, model="m")
"""


def test_killed_at_any_moment_nothing_is_lost_or_asked_twice(tmp_path):
    path, out = table_of(tmp_path / "Set.tsv", 30), tmp_path / "out"
    for wanted in (3, 14):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, path, out, "0.02"], env={**os.environ})
        file = out / "predictions.jsonl"
        deadline = time.monotonic() + 60
        while (not file.exists() or file.read_bytes().count(b"\n") < wanted) and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = file.read_bytes().count(b"\n")
    assert 14 <= before < 30
    subprocess.run([sys.executable, "-c", SCRIPT, path, out, "0"], check=True)
    counts = Counter(row["index"] for row in lines(out))
    assert counts == Counter(str(i) for i in range(30))
