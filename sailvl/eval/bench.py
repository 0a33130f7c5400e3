"""Evaluate a model on benchmark files: ask, export, score, keep samples to look at, one data set after the other.

    out/MODEL/SET/predictions.jsonl      every answer as it came, which is what a rerun resumes from
    out/MODEL/SET/scores.json            the result; verdicts.jsonl, samples.json, pictures/ beside it
    out/MODEL/TYYYYMMDD-HHMMSS/MODEL_SET.tsv   the answers in VLMEvalKit's layout, for scoring by the toolkit itself

A data set that cannot be used fails alone: the others are evaluated, and its reason is part of what is returned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sailvl.engine.base import Engine
from sailvl.eval.assess import Result, export, export_folder, save, score_file
from sailvl.eval.pictures import keep, picture_name
from sailvl.eval.predict import Asking, predict, request
from sailvl.eval.prompts import build
from sailvl.eval.scoring import Judge, Verdict
from sailvl.eval.suite import Benchmark, find
from sailvl.eval.table import Row, Table, TableError, read
from sailvl.files import write_text
from sailvl.media import MediaError
from sailvl.types import RecordError

SAMPLES = 12
"""Answers kept with their pictures per data set, half of them wrong ones if there are so many."""

MMBENCH_FOLDER = re.compile(r"MMBench_(DEV|TEST)_(EN|CN)_V11")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of every data set. ``max_new_tokens`` None: 1,024, or 4,096 for a thought and an answer.

    ``video_root`` holds the clips that rows name (None: a folder beside the file that is called like the set).
    """

    thinking: bool = False
    msac: bool = True
    max_new_tokens: int | None = None
    num_frames: int = 16
    limit: int | None = None
    strict: bool = False
    video_root: Path | None = None

    def asking(self, benchmark: Benchmark) -> Asking:
        """How one benchmark is asked."""
        return Asking(
            kind=benchmark.kind,
            thinking=self.thinking,
            msac=self.msac,
            max_new_tokens=self.max_new_tokens or (4096 if self.thinking else 1024),
            num_frames=self.num_frames,
        )


def tables(names: Sequence[str], lmu_dir: Path) -> tuple[list[Path], list[str]]:
    """Files of the named data sets in ``lmu_dir`` (or paths to files), and a line for each name without one."""
    found, faults = [], []
    for name in names:
        tried = [lmu_dir / f"{name}_local.tsv", lmu_dir / f"{name}.tsv"]
        tried = [Path(name)] if name.endswith(".tsv") else tried
        path = next((path for path in tried if path.is_file()), None)
        if path is not None:
            found.append(path)
            continue
        near = sorted(file.stem for file in lmu_dir.glob("*.tsv") if name.lower() in file.stem.lower())
        hint = f"; there are {', '.join(near[:6])}" if near else ""
        faults.append(f"{name}: no file {tried[-1]}{hint}")
    return found, faults


def open_table(path: Path, *, limit: int | None = None, strict: bool = False) -> Table:
    """A benchmark file with its picture folder; ``limit`` keeps the first rows, for a first look."""
    name = path.stem.removesuffix("_local")
    folder = "MMBench_V11" if MMBENCH_FOLDER.fullmatch(name) else name
    table = read(path, image_root=path.parent / "images" / folder, plain=strict)
    return table if limit is None else replace(table, rows=table.rows[:limit])


def evaluate_file(
    engine: Engine,
    path: Path,
    plan: Plan,
    out: Path,
    exported: Path,
    *,
    model: str,
    model_id: str,
    judge: Judge | None = None,
    judge_name: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Ask, export, score and keep one data set. Raises TableError for a file that cannot be used."""
    table = open_table(path, limit=plan.limit, strict=plan.strict)
    benchmark = find(table.name, table)
    if benchmark.judge == "always" and judge is None:
        say(f"{table.name}: every answer needs a judge, and there is none: all count as unresolved")
    asking = plan.asking(benchmark)
    folder = out / model / table.name
    before = _tiles(engine)
    asked = predict(engine, table, asking, folder, model=model_id, video_root=plan.video_root, progress=progress)
    file = exported / f"{model}_{table.name}.tsv"
    failures = export(table, asking, folder / "predictions.jsonl", file, model=model_id)
    result, verdicts, rows = score_file(
        file, benchmark, judge=judge, judge_name=judge_name, strict=plan.strict, data=table.name
    )
    speed = {"asked": float(asked.asked), "seconds": asked.seconds}
    if asked.asked and asked.seconds:
        speed["answers_per_second"] = round(asked.asked / asked.seconds, 3)
    encoded, reused = (now - then for now, then in zip(_tiles(engine), before, strict=True))
    result = replace(result, failures=failures, speed={**speed, "encoded_tiles": encoded, "reused_tiles": reused})
    _keep_samples(table, asking, plan.video_root, verdicts, rows, folder)
    save(result, verdicts, folder)
    return result


def evaluate_files(
    engine: Engine,
    paths: Sequence[Path],
    plan: Plan,
    out: Path,
    *,
    model: str,
    model_id: str,
    judge: Judge | None = None,
    judge_name: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Result], list[str]]:
    """Every data set in turn; results, and a line for each that could not be used."""
    exported = export_folder(out, model)
    results, faults = [], []
    for path in paths:
        try:
            result = evaluate_file(
                engine,
                path,
                plan,
                out,
                exported,
                model=model,
                model_id=model_id,
                judge=judge,
                judge_name=judge_name,
                progress=progress,
                say=say,
            )
        except TableError as error:
            faults.append(str(error))
            say(str(error))
            continue
        results.append(result)
        say(line(result))
    return results, faults


def line(result: Result) -> str:
    """A result in one line."""
    span = f" [{result.low:.1f}, {result.high:.1f}]" if result.low is not None and result.high is not None else ""
    notes = [f"{result.unresolved} unresolved"] if result.unresolved else []
    notes += [f"{len(result.failures)} failed"] if result.failures else []
    notes += ["strict rules, not comparable"] if result.mode == "strict" else []
    return f"{result.data}: {result.score:.2f}{span}, n {result.n}" + "".join(f", {note}" for note in notes)


def _tiles(engine: Engine) -> tuple[float, float]:
    """Tiles encoded and spared so far, of engines that count them."""
    return float(getattr(engine, "encoded_tiles", 0)), float(getattr(engine, "reused_tiles", 0))


def _keep_samples(
    table: Table,
    asking: Asking,
    video_root: Path | None,
    verdicts: Sequence[Verdict],
    rows: Sequence[Row],
    folder: Path,
) -> None:
    """Some answers with their pictures, spread over the set: what a reader checks a figure by."""
    by_index = {str(verdict.index): verdict for verdict in verdicts}
    judged = [(n, by_index[str(row["index"])]) for n, row in enumerate(rows) if str(row["index"]) in by_index]
    right = [pair for pair in judged if pair[1].score >= 1]
    wrong = [pair for pair in judged if pair[1].score < 1]
    num_wrong = min(len(wrong), max(SAMPLES // 2, SAMPLES - len(right)))
    chosen = _spread(right, SAMPLES - num_wrong) + _spread(wrong, num_wrong)
    kept: list[dict[str, Any]] = []
    for number, verdict in chosen:
        row = rows[number]
        sample = {
            "index": str(row["index"]),
            "prompt": build(table.name, asking.kind, {"question": "", **table.rows[number]}, 0),
            "answer": str(row.get("prediction") or ""),
            "truth": str(row.get("answer") or ""),
            "score": verdict.score,
            "extracted": verdict.extracted,
            "detail": verdict.detail,
            "picture": None,
        }
        try:
            images = request(table, number, asking, video_root).images
            if images:
                name = picture_name(f"{table.name}-{row['index']}")
                keep(list(images)[:4], folder / "pictures" / name)
                sample["picture"] = name
        except (MediaError, RecordError) as error:
            sample["detail"] = str(error)
        kept.append(sample)
    write_text(folder / "samples.json", json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i * len(items) // count] for i in range(min(count, len(items)))] if count else []
