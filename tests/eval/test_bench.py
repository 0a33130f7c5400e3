"""From benchmark files to a page: broken sets and rows are reported, the rest is evaluated, and it can go on."""

from __future__ import annotations

import json
import re

import pytest

from sailvl.engine.fake import Fake
from sailvl.eval import bench_report
from sailvl.eval.bench import Plan, evaluate_files, line, open_table, tables
from sailvl.eval.table import read_predictions
from tests.eval.test_predict import table_of


def answering(request):
    return "A" if int(request.record.id.split("/")[1]) % 3 else "<script>alert(1)</script>"


def evaluate(tmp_path, paths, **changes):
    said = []
    results, faults = evaluate_files(
        Fake(answering),
        paths,
        Plan(**changes),
        tmp_path / "out",
        model="nano",
        model_id="nano-1",
        say=said.append,
    )
    return results, faults, said


def test_two_sets_and_a_broken_one(tmp_path):
    table_of(tmp_path / "MMStar.tsv", 9, broken=(1,))
    table_of(tmp_path / "mine.tsv", 6)
    (tmp_path / "bad.tsv").write_text("question\nq\n")
    paths, missing = tables(["MMStar", "mine", "bad", "MMStars"], tmp_path)
    assert len(paths) == 3 and missing == [f"MMStars: no file {tmp_path / 'MMStars.tsv'}"]
    results, faults, said = evaluate(tmp_path, paths)
    assert [result.data for result in results] == ["MMStar", "mine"] and "bad.tsv" in faults[0]
    assert results[0].n == 9 and list(results[0].failures) == ["1"] and results[0].missing == 1
    assert results[0].score == pytest.approx(100 * 5 / 9) and "1 failed" in line(results[0]) and len(said) == 3

    exported = sorted((tmp_path / "out/nano").glob("T*/nano_*.tsv"))
    assert [path.name for path in exported] == ["nano_MMStar.tsv", "nano_mine.tsv"]
    assert len(read_predictions(exported[0])) == 9

    samples = json.loads((tmp_path / "out/nano/mine/samples.json").read_text())
    assert len(samples) == 6 and {sample["score"] for sample in samples} == {0.0, 1.0}
    assert samples[0]["prompt"].startswith("question") and samples[0]["picture"]

    bench_report.write(tmp_path / "out/nano", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "over 1,500 questions, this one over 9: the two do not compare" in page and "5 / 9" in page
    assert "64.07" in page and "SAIL-VL2-8B 70.73" in page and "row 2 (index 1)" in page
    with pytest.raises(ValueError, match="no model 'GPT'"):
        bench_report.write(tmp_path / "out/nano", tmp_path / "r.html", compare="GPT")


def test_a_second_run_asks_nothing_and_scores_the_same(tmp_path):
    path = table_of(tmp_path / "MMStar.tsv", 8)
    first, _, _ = evaluate(tmp_path, [path])
    second, _, _ = evaluate(tmp_path, [path])
    assert first[0].score == second[0].score and second[0].speed["asked"] == 0


def test_a_set_that_needs_a_judge_says_so_before_it_is_asked(tmp_path):
    _, _, said = evaluate(tmp_path, [table_of(tmp_path / "MMVet.tsv", 2)])
    assert said[0] == "MMVet: every answer needs a judge, and there is none: all count as unresolved"
    assert "2 unresolved" in said[1]


def test_limit_keeps_the_first_rows(tmp_path):
    path = table_of(tmp_path / "MMStar.tsv", 8)
    assert evaluate(tmp_path, [path], limit=3)[0][0].n == 3
    assert len(open_table(path, limit=3).rows) == 3


def test_a_page_without_results_says_so(tmp_path):
    (tmp_path / "nobody").mkdir()
    bench_report.write(tmp_path / "nobody", tmp_path / "r.html")
    assert "0 data sets" in (tmp_path / "r.html").read_text()
