"""Figures are made from the exported file, say what they rest on, and have honest intervals."""

from __future__ import annotations

import json
import random

import pytest

from sailvl.engine.fake import Fake
from sailvl.eval.assess import export, export_folder, interval, save, score_file
from sailvl.eval.predict import Asking, predict
from sailvl.eval.scoring import score
from sailvl.eval.suite import find
from sailvl.eval.table import TableError, read, read_predictions, write_tsv
from tests.eval.test_predict import table_of

MCQ = Asking(kind="MCQ")


def test_from_answers_to_a_figure(tmp_path):
    table = read(table_of(tmp_path / "MMStar.tsv", 20, broken=(4,)))
    engine = Fake(lambda request: "A" if int(request.record.id.split("/")[1]) % 2 else "The answer is B.")
    predict(engine, table, MCQ, tmp_path / "out", model="m")
    folder = export_folder(tmp_path, "m")
    failures = export(table, MCQ, tmp_path / "out/predictions.jsonl", folder / "m_MMStar.tsv", model="m")
    assert list(failures) == ["4"]
    result, verdicts, rows = score_file(folder / "m_MMStar.tsv", find("MMStar"), data="MMStar")
    assert (result.score, result.n, result.missing) == (50.0, 20, 1)
    assert result.low < 50 < result.high and result.printed["SAIL-VL2-2B"] == 64.07
    assert [verdict.score for verdict in verdicts] == [float(i % 2) for i in range(20)]
    assert set(rows[0]) >= {"index", "question", "A", "answer", "prediction"} and "image" not in rows[0]
    save(result, verdicts, tmp_path / "scores")
    assert json.loads((tmp_path / "scores/scores.json").read_text())["score"] == 50.0
    assert len((tmp_path / "scores/verdicts.jsonl").read_text().splitlines()) == 20


def test_thoughts_are_kept_apart(tmp_path):
    table = read(table_of(tmp_path / "MMStar.tsv", 2))
    asking = Asking(kind="MCQ", thinking=True)
    predict(Fake("<think>B or C?</think>\\boxed{A}"), table, asking, tmp_path / "out", model="m")
    export(table, asking, tmp_path / "out/predictions.jsonl", tmp_path / "p.tsv", model="m")
    assert [(row["prediction"], row["thinking"]) for row in read_predictions(tmp_path / "p.tsv")] == [
        ("A", "B or C?")
    ] * 2


def test_a_bare_prediction_file_is_joined_with_its_table(tmp_path):
    table = read(table_of(tmp_path / "MMStar.tsv", 4))
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"index": i, "prediction": "A"}) + "\n" for i in (2, 0, 1)))
    result, _, rows = score_file(path, find("MMStar"), table=table)
    assert (result.score, result.missing) == (75.0, 1) and [row["index"] for row in rows] == [0, 1, 2, 3]
    path.write_text(json.dumps({"index": 9, "prediction": "A"}) + "\n")
    with pytest.raises(TableError, match="first index 9"):
        score_file(path, find("MMStar"), table=table)


def test_a_file_without_the_columns_is_refused_by_name(tmp_path):
    write_tsv(tmp_path / "p.tsv", [{"index": 1, "prediction": "A"}], ["index", "prediction"])
    with pytest.raises(TableError, match=r"p\.tsv.*answer"):
        score_file(tmp_path / "p.tsv", find("MMStar"))


def rows_of(count: int, right: float, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [
        {"index": i, "question": "q", "A": "x", "B": "y", "answer": "A", "prediction": "AB"[draw.random() >= right]}
        for i in range(count)
    ]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        rows = rows_of(150, 0.7, seed)
        low, high = interval("mcq", rows, score("mcq", rows))
        covered += low <= 70 <= high
    assert 180 <= covered <= 199


def test_half_samples_agree_with_the_closed_form(monkeypatch):
    rows = rows_of(400, 0.6, 1)
    scored = score("mcq", rows)
    low, high = interval("mcq", rows, scored)
    shifted = type(scored)(
        main=scored.main + 1e-3, scores={}, verdicts=scored.verdicts, n=scored.n, unresolved=scored.unresolved
    )
    half_low, half_high = interval("mcq", rows, shifted)  # no longer the mean of its verdicts: half samples it is
    assert half_high - half_low == pytest.approx(high - low, rel=0.25)
    assert (half_low + half_high) / 2 == pytest.approx(scored.main, abs=0.1)


def test_no_answers_no_interval():
    rows = rows_of(3, 1.0, 0)
    scored = score("mcq", rows)
    assert interval("mcq", rows, type(scored)(main=0.0, scores={}, verdicts=[], n=0, unresolved=0)) == (None, None)


def test_intervals_of_sums_and_groups_stay_in_range_and_keep_groups_whole():
    rows = [
        {"index": i, "answer": "['a']", "category": "Doc-oriented VQA", "prediction": "ab"[i % 2]} for i in range(40)
    ]
    scored = score("ocrbench", rows)  # 20 hits, which count as 2 of 100 whatever the number of rows
    low, high = interval("ocrbench", rows, scored)
    assert scored.main == 2.0 and 100 * low / 4 == pytest.approx(35.2, abs=0.1) and low + high == pytest.approx(4.0)

    # a group of four is right or wrong as a whole: the spread is that of 16 draws, not of 64
    rows = [{"index": i, "answer": "A", "category": "subject", "prediction": "BA"[i // 4 % 2]} for i in range(64)]
    low, high = interval("crpe", rows, score("crpe", rows))
    assert 20 < low < 30 and 70 < high < 80

    said = ["Yes", *["No"] * 31]
    rows = [{"index": i, "answer": "Yes", "category": "random", "prediction": text} for i, text in enumerate(said)]
    low, high = interval("pope", rows, score("pope", rows))
    assert low == 0.0 < high < 100.0
    rows = [{**row, "prediction": "No"} for row in rows]
    assert interval("pope", rows, score("pope", rows)) == (None, None)
