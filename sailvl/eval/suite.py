"""The benchmarks, as values: which file, which kind of question, which rule, what was printed.

Names are those of VLMEvalKit's files. A benchmark's wording and tile limits go by its name (``eval.prompts``); here is
what else decides a score. The printed figures are those of Tables 8, 9 and 10 of the technical report (arXiv
2509.14033) and of its models alone; ``n`` is the number of questions that those figures fit: every printed score is
k / n within its rounding, so a score that is not shows dropped rows or another split.

A file that no value names is asked by its columns: options A, B ...: multiple choice; answers yes and no: yes/no;
everything else: short answers, compared as text.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sailvl.eval.prompts import options
from sailvl.eval.table import Row, Table


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    ``files``: a regular expression for the whole of its files' names, without ending. ``kind``: the toolkit's type of
    question. ``metric``: a rule of ``eval.scoring``. ``judge``: "never" asked, "rest" asked for answers that no rule
    settles, or "always". ``printed``: its column in the report's tables.
    """

    name: str
    files: str
    kind: str
    metric: str
    judge: Literal["never", "rest", "always"] = "rest"
    printed: str | None = None
    n: int | None = None


def _mcq(
    name: str, files: str = "", metric: str = "mcq", *, printed: str | None = None, n: int | None = None
) -> Benchmark:
    return Benchmark(name=name, files=files or re.escape(name), kind="MCQ", metric=metric, printed=printed, n=n)


def _vqa(
    name: str,
    metric: str,
    files: str = "",
    judge: Literal["never", "rest", "always"] = "never",
    printed: str | None = None,
    n: int | None = None,
) -> Benchmark:
    return Benchmark(
        name=name, files=files or re.escape(name), kind="VQA", metric=metric, judge=judge, printed=printed, n=n
    )


OPENCOMPASS = (
    _mcq("MMBench v1.1", "MMBench(_(DEV|TEST)_(EN|CN))?(_V11)?|CCBench", "circular", printed="MMBench_v1.1"),
    _mcq("MMStar", "MMStar(_MINI)?", printed="MMStar", n=1500),
    _mcq("AI2D", "AI2D_(TEST|MINI)(_NO_MASK)?", printed="AI2D", n=3088),
    _vqa("OCRBench", "ocrbench", "OCRBench(_MINI)?", printed="OCRBench", n=1000),
    _vqa("MMVet", "mmvet", "MMVet(_Hard)?", "always", printed="MMVet"),
    Benchmark(name="HallusionBench", files="HallusionBench", kind="Y/N", metric="hallusion", printed="HallusionBench"),
    _mcq("MMMU", "MMMU_(DEV_VAL|TEST)", "mmmu", printed="MMMU_val", n=900),
    _vqa("MathVista", "mathvista", "MathVista(_MINI)?", "rest", printed="MathVista_mini", n=1000),
)
"""The eight of the OpenCompass average."""

GENERAL = (
    Benchmark(name="MME", files="MME", kind="Y/N", metric="mme", printed="MME"),
    _mcq("RealWorldQA", printed="RealWorldQA", n=765),
    _vqa("DocVQA", "anls", "DocVQA_(VAL|TEST)", printed="DocVQA"),
    _vqa("CRPE", "crpe", "CRPE_(EXIST|RELATION)", printed="CRPE_relation"),
    Benchmark(
        name="RefCOCO",
        files=r"RefCOCO[+g]?(_(val|testA|testB|test))?",
        kind="GROUNDING",
        metric="refcoco",
        judge="never",
        printed="RefCOCO_avg",
    ),
)

REASONING = (
    _vqa("LogicVista", "logicvista", "", "always", printed="LogicVista", n=447),
    _vqa("MathVision", "mathvision", "MathVision(_MINI)?", "rest", printed="MathVision", n=3040),
    _vqa("MathVerse", "mathverse", "MathVerse_MINI.*", "always", printed="MathVerse_mini", n=3940),
    Benchmark(
        name="OlympiadBench",
        files="OlympiadBench(_(EN|CN))?",
        kind="VQA_ex_prompt",
        metric="olympiad",
        judge="never",
        printed="OlympiadBench_mini",
        n=305,
    ),
    _mcq("WeMath", "WeMath(_COT)?", "wemath", printed="WeMath", n=525),
    _vqa("DynaMath", "dynamath", "DynaMath(_noprompt)?", "rest", printed="DynaMath", n=501),
)

VIDEO = (
    Benchmark(
        name="Video-MME", files="Video-?MME", kind="Video-MCQ", metric="videomme", printed="Video-MME_wo_sub", n=2700
    ),
    Benchmark(
        name="LongVideoBench",
        files="LongVideoBench.*",
        kind="Video-MCQ",
        metric="longvideobench",
        printed="LongVideoBench_val",
        n=1337,
    ),
    Benchmark(name="MVBench", files="MVBench(_MP4)?", kind="Video-MCQ", metric="mvbench"),
    Benchmark(name="TempCompass", files="TempCompass_MCQ", kind="Video-MCQ", metric="tempcompass"),
    Benchmark(name="TempCompass yes/no", files="TempCompass_YorN", kind="Video-Y/N", metric="tempcompass"),
    Benchmark(
        name="TempCompass captioning",
        files="TempCompass_Captioning",
        kind="Video-VQA",
        metric="tempcompass",
        judge="always",
    ),
)

FURTHER = (
    Benchmark(name="POPE", files="POPE", kind="Y/N", metric="pope"),
    Benchmark(name="AMBER", files="AMBER", kind="Y/N", metric="yes_no"),
    _mcq("MMIU", printed="MMIU"),
    _mcq("SEEDBench", "SEEDBench.*"),
    _mcq("BLINK", "BLINK"),
    _mcq("MUIRBench"),
    _mcq("ScienceQA", "ScienceQA_(VAL|TEST)"),
    _mcq("HRBench", "HRBench[48]K"),
    _mcq("MME-RealWorld", "MME-RealWorld(-CN|-Lite)?", "mme_realworld"),
    _vqa("InfoVQA", "anls", "InfoVQA_(VAL|TEST)"),
    _vqa("ChartQA", "chartqa", "ChartQA_TEST.*"),
    _vqa("TextVQA", "vqa", "TextVQA_VAL"),
    _vqa("OCRVQA", "ocrvqa", "OCRVQA_TEST(CORE)?"),
    _vqa("GQA", "gqa", "GQA_TestDev_Balanced"),
)

SUITE: tuple[Benchmark, ...] = (*OPENCOMPASS, *GENERAL, *REASONING, *VIDEO, *FURTHER)


def find(name: str, table: Table | None = None, rows: Sequence[Row] = ()) -> Benchmark:
    """The benchmark a data set's name stands for; one made from the table's columns if no value names it."""
    for benchmark in SUITE:
        if re.fullmatch(benchmark.files, name):
            return benchmark
    return _by_columns(name, table.rows if table is not None else rows)


def _by_columns(name: str, rows: Sequence[Row]) -> Benchmark:
    columns = set().union(*rows) if rows else set()
    file = re.escape(name)
    clip = "Video-" if {"video", "video_path"} & columns else ""
    if any(options(row) for row in rows):
        return Benchmark(name=name, files=file, kind=f"{clip}MCQ", metric="mcq")
    answers = {str(row.get("answer")).strip().lower() for row in rows}
    if answers and answers <= {"yes", "no"}:
        return Benchmark(name=name, files=file, kind=f"{clip}Y/N", metric="yes_no")
    return Benchmark(name=name, files=file, kind=f"{clip}VQA", metric="vqa_exact", judge="never")


@cache
def printed() -> dict[tuple[str, str], float]:
    """The report's figures in percent, by (model, column of its tables); Table 10's columns for Thinking models."""
    path = Path(__file__).with_name("report_tables.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["value"]]
    return {(row["model"], row["benchmark"]): float(row["value"]) for row in rows}


def printed_score(model: str, benchmark: Benchmark) -> float | None:
    """What the report prints for a model (its name there, such as "SAIL-VL2-2B"); None if it prints nothing."""
    return printed().get((model, benchmark.printed or ""), printed().get((model, benchmark.name)))


def count_of(score: float, n: int, decimals: int = 2) -> int | None:
    """The k for which 100 k / n is ``score`` (in percent) rounded to ``decimals``; None if there is none."""
    k = round(score * n / 100)
    return k if abs(round(100 * k / n, decimals) - score) < 10**-decimals / 2 else None
