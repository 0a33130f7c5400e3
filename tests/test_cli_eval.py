"""`sailvl eval` and `sailvl score`, as a user meets them: wrong input, a server, a model of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sailvl import cli
from sailvl.engine.fake import Fake
from tests.clips import clip
from tests.eval.test_predict import table_of


@pytest.fixture
def sail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sailvl", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_every_fault_is_named_at_once(sail: Any) -> None:
    code, _, err = sail(
        "eval", "--data", "MMStar,Nope", "--lmu-dir", ".", "--compare", "GPT", "--judge-url", "http://x"
    )
    assert code == 2
    for part in ("MMStar: no file", "Nope: no file", "--model or --base-url", "'GPT'", "belong together"):
        assert part in err


def test_a_server_is_evaluated_and_a_second_run_asks_nothing(sail: Any, tmp_path: Path, monkeypatch: Any) -> None:
    table_of(tmp_path / "MMStar.tsv", 6, broken=(2,))
    engines: list[Fake] = []

    def remote(url: str, model: str | None, **_: Any) -> Fake:
        engines.append(Fake("A"))
        return engines[-1]

    monkeypatch.setattr("sailvl.engine.remote.Remote", remote)
    words = ("eval", "--base-url", "http://x/v1", "--served-model", "org/m", "--data", "MMStar", "--lmu-dir", ".")
    code, out, _ = sail(*words, "--out", "e")
    assert code == 0 and "MMStar: 83.33 [" in out and "1 failed" in out and "page: e/org-m/report.html" in out
    assert (tmp_path / "e/org-m/report.html").is_file()
    code, out, _ = sail(*words, "--out", "e", "--json")
    found = json.loads(out)
    assert code == 0 and found["results"][0]["score"] == pytest.approx(100 * 5 / 6) and not engines[1].asked
    assert [len(engines[0].asked), engines[0].closed] == [5, True]


def test_a_table_that_cannot_be_used_fails_alone(sail: Any, tmp_path: Path, monkeypatch: Any) -> None:
    table_of(tmp_path / "good.tsv", 2)
    (tmp_path / "bad.tsv").write_text("question\nq\n")
    monkeypatch.setattr("sailvl.engine.remote.Remote", lambda *_, **__: Fake("A"))
    code, out, _ = sail("eval", "--base-url", "http://x", "--served-model", "m", "--data", "bad,good", "--lmu-dir", ".")
    assert code == 1 and "bad.tsv" in out and "good: 100.00" in out


def test_clips_lie_in_a_folder_of_choice(sail: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(clip(20))
    (tmp_path / "MVBench.tsv").write_text("index\tvideo\tquestion\tcandidates\tanswer\n0\ta\tWhat?\t['x', 'y']\tx\n")
    monkeypatch.setattr("sailvl.engine.remote.Remote", lambda *_, **__: Fake("A"))
    words = ("eval", "--base-url", "http://x", "--served-model", "m", "--data", "MVBench", "--lmu-dir", ".")
    words += ("--video-dir",)
    code, _, err = sail(*words, "nowhere")
    assert code == 2 and "--video-dir nowhere: no such folder" in err
    code, out, _ = sail(*words, "clips")
    assert code == 0 and "failed" not in out


def test_scoring_a_file(sail: Any, tmp_path: Path) -> None:
    table_of(tmp_path / "MMStar.tsv", 3)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"index": i, "prediction": "AB"[i % 2]}) + "\n" for i in range(3))
    )
    code, out, _ = sail("score", "p.jsonl", "--data", "MMStar", "--lmu-dir", ".", "--out", "s")
    assert code == 0 and out.startswith("MMStar: 66.67 [") and (tmp_path / "s/verdicts.jsonl").is_file()
    code, out, _ = sail("score", "p.jsonl", "--data", "MMStar", "--lmu-dir", ".", "--json", "--strict-fixes")
    assert code == 0 and json.loads(out)["mode"] == "strict"
    code, _, err = sail("score", "p.jsonl", "--data", "MMStar")
    assert code == 2 and "p.jsonl" in err
    code, _, err = sail("score", "gone.tsv", "--data", "MMStar")
    assert code == 2 and "no such file" in err
