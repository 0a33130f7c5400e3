"""Every benchmark finds its files, and the printed figures are whole numbers of questions."""

from __future__ import annotations

import pytest

from sailvl.eval.suite import OPENCOMPASS, REASONING, SUITE, count_of, find, printed, printed_score


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("MMBench_DEV_EN_V11", "MMBench v1.1"),
        ("MMBench_TEST_CN_V11", "MMBench v1.1"),
        ("MMStar", "MMStar"),
        ("AI2D_TEST", "AI2D"),
        ("MMMU_DEV_VAL", "MMMU"),
        ("MME", "MME"),
        ("MME-RealWorld", "MME-RealWorld"),
        ("OCRBench", "OCRBench"),
        ("RefCOCO+_testA", "RefCOCO"),
        ("MathVerse_MINI_Vision_Only", "MathVerse"),
        ("Video-MME", "Video-MME"),
        ("TempCompass_YorN", "TempCompass yes/no"),
    ],
)
def test_files_are_recognised(file, name):
    assert find(file).name == name


def test_one_file_is_one_benchmarks():
    names = [benchmark.name for benchmark in SUITE]
    assert len(set(names)) == len(names)
    for benchmark in SUITE:
        for file in ("MMStar", "MME", "OCRBench", "DocVQA_VAL", "MathVista_MINI", "Video-MME"):
            if find(file) is benchmark:
                assert [other.name for other in SUITE if other is benchmark] == [benchmark.name]


@pytest.mark.parametrize(
    ("rows", "kind", "metric"),
    [
        ([{"question": "q", "A": "x", "B": "y", "answer": "A"}], "MCQ", "mcq"),
        ([{"question": "q", "answer": "Yes"}, {"question": "q", "answer": "no"}], "Y/N", "yes_no"),
        ([{"question": "q", "answer": "a cat"}], "VQA", "vqa_exact"),
        ([{"question": "q", "answer": "a cat", "video": "a.mp4"}], "Video-VQA", "vqa_exact"),
    ],
)
def test_a_file_of_ones_own_is_asked_by_its_columns(rows, kind, metric):
    found = find("my_set", rows=rows)
    assert (found.name, found.kind, found.metric) == ("my_set", kind, metric)


def test_the_opencompass_average_is_that_of_its_eight():
    for model in ("SAIL-VL2-2B", "SAIL-VL2-AnyRes-2B", "SAIL-VL2-8B"):
        scores = [printed_score(model, benchmark) for benchmark in OPENCOMPASS]
        assert len(scores) == 8 and sum(scores) / 8 == pytest.approx(printed()[model, "OpenCompass_avg"], abs=0.02)


def test_printed_scores_are_whole_numbers_of_questions():
    for benchmark in SUITE:
        if benchmark.n and benchmark.name not in ("MathVerse", "LongVideoBench", "Video-MME", "WeMath"):
            for model in ("SAIL-VL2-2B", "SAIL-VL2-8B", "SAIL-VL2-A3B"):
                score = printed_score(model, benchmark)
                assert count_of(score, benchmark.n) is not None, (benchmark.name, model, score)
    assert count_of(50.0, 3) is None


def test_table_10_has_the_thinking_models():
    assert [printed_score("SAIL-VL2-8B-Thinking", benchmark) for benchmark in REASONING] == [
        *(56.4, 46.7, 58.9, None, 54.9, 33.5),
    ]


def test_every_rule_exists():
    from sailvl.eval.scoring import METRICS

    assert {benchmark.metric for benchmark in SUITE} <= set(METRICS)
