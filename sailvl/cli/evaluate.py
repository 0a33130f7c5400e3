"""Verbs that judge: ask a model the questions of benchmark files, and score prediction files."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sailvl.cli.app import InputError, Json, Threads, app, find_model, print_json, progress_bar, settle_libraries

if TYPE_CHECKING:
    from sailvl.engine.base import Engine
    from sailvl.eval.judge import RemoteJudge

JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="OpenAI-compatible judge for answers that no rule can read.")
]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model name.")]
Strict = Annotated[
    bool, typer.Option("--strict-fixes", help="Repair the published rules' faults: comparable with nothing else.")
]
LmuDir = Annotated[
    Path | None,
    typer.Option(envvar="LMUData", metavar="DIR", help="Folder of the TSV files; default $LMUData, else ~/LMUData."),
]


@app.command(name="eval")
def evaluate(
    data: Annotated[str, typer.Option(metavar="NAME,...", help="Data sets by name, or paths of .tsv files.")],
    model: Annotated[Path | None, typer.Option(help="Model folder, or a run's folder.")] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible server instead.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name at that server; default the first one listed.")
    ] = None,
    lmu_dir: LmuDir = None,
    out: Annotated[Path, typer.Option(help="Folder for answers, scores and the page.")] = Path("runs/eval"),
    name: Annotated[
        str | None, typer.Option(help="What the model is called in files; default its folder's name.")
    ] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Ask for a thought before the answer.")] = False,
    no_msac: Annotated[bool, typer.Option("--no-msac", help="Cut single pictures by one grid instead of two.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default 1024, with --thinking 4096.")
    ] = None,
    num_frames: Annotated[int, typer.Option(min=1, max=64, help="Frames of a clip.")] = 16,
    video_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the clips; default videos/NAME beside the file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each set: a first look.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers in flight at once.")] = 32,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    strict_fixes: Strict = False,
    compare: Annotated[
        str, typer.Option(metavar="MODEL", help="The report's model whose figures stand beside, such as SAIL-VL2-8B.")
    ] = "",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Evaluate a model on VLMEvalKit's TSV files, with the wording and picture limits of SAIL-VL2's authors.

    Run it again to go on after an interruption: nothing is asked twice. Answers that no rule and no judge can read are
    wrong, never guessed, and counted.

    \b
    sailvl eval --model SAIL-VL2-2B --data MMStar,AI2D_TEST --lmu-dir ~/LMUData
    sailvl eval --model runs/nano --data my_questions.tsv --limit 20
    sailvl eval --base-url http://127.0.0.1:8000/v1 --data MathVista_MINI --judge-url http://... --judge-model NAME

    \b
    A table of your own has the columns index, image (base64), question, answer, and for choices A, B, C ...
    """
    from sailvl.eval.bench import Plan, evaluate_files, tables
    from sailvl.eval.suite import printed

    root = lmu_dir if lmu_dir is not None else Path.home() / "LMUData"
    names = [part.strip() for part in data.split(",") if part.strip()]
    paths, faults = tables(names, root)
    if not names:
        faults.append("--data names nothing")
    if (model is None) == (base_url is None):
        faults.append("give either --model or --base-url")
    if compare and compare not in {known for known, _ in printed()}:
        models = ", ".join(sorted({known for known, _ in printed() if known.startswith("SAIL-VL2")}))
        faults.append(f"--compare is '{compare}'; the report's own models are {models}")
    if video_dir is not None and not video_dir.is_dir():
        faults.append(f"--video-dir {video_dir}: no such folder")
    faults += _judge_faults(judge_url, judge_model)
    if faults:
        raise InputError("\n".join(faults))
    engine, called, identity = _engine(model, base_url, served_model, batch, threads)
    called = name or called
    judge = _judge(judge_url, judge_model, out / "judge.jsonl")
    plan = Plan(
        thinking=thinking,
        msac=not no_msac,
        max_new_tokens=max_new_tokens,
        num_frames=num_frames,
        limit=limit,
        strict=strict_fixes,
        video_root=video_dir,
    )
    ask = functools.partial(
        evaluate_files,
        engine,
        paths,
        plan,
        out,
        model=called,
        model_id=identity,
        judge=judge,
        judge_name=judge_model,
    )
    try:
        if not json and sys.stdout.isatty():
            with progress_bar() as progress:
                say = functools.partial(progress.console.print, markup=False, highlight=False)
                results, failed = ask(progress=progress, say=say)
        else:
            results, failed = ask(say=(lambda text: None) if json else typer.echo)
    finally:
        engine.close()
    page = _page(out / called, compare)
    if json:
        from dataclasses import asdict

        print_json({"results": [asdict(result) for result in results], "failed": failed, "page": str(page)})
    else:
        typer.echo(f"page: {page}")
    if failed:
        raise typer.Exit(1)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Predictions: .xlsx, .tsv, .json or .jsonl.")],
    data: Annotated[str, typer.Option(metavar="NAME", help="The data set's name, such as MMStar.")],
    lmu_dir: LmuDir = None,
    out: Annotated[Path | None, typer.Option(help="Folder for scores.json and verdicts.jsonl.")] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_cache: Annotated[Path | None, typer.Option(help="File that keeps the judge's replies.")] = None,
    strict_fixes: Strict = False,
    json: Json = False,
) -> None:
    """Score predictions that exist already, without a model.

    Files written by VLMEvalKit hold all that is needed. A bare file of index and prediction is joined with the data
    set's TSV file by --lmu-dir.

    \b
    sailvl score outputs/MyModel/T20260101-120000/MyModel_MMStar.xlsx --data MMStar
    sailvl score answers.jsonl --data MMStar --lmu-dir ~/LMUData --json
    """
    from dataclasses import asdict

    from sailvl.eval.assess import save, score_file
    from sailvl.eval.bench import line, open_table, tables
    from sailvl.eval.suite import find
    from sailvl.eval.table import read_predictions

    faults = _judge_faults(judge_url, judge_model)
    if not file.is_file():
        faults.append(f"{file}: no such file")
    if faults:
        raise InputError("\n".join(faults))
    table = None
    if lmu_dir is not None:
        paths, faults = tables([data], lmu_dir)
        if faults:
            raise InputError("\n".join(faults))
        table = open_table(paths[0], strict=strict_fixes)
    benchmark = find(data, table, () if table else read_predictions(file, plain=strict_fixes))
    result, verdicts, _ = score_file(
        file,
        benchmark,
        table=table,
        judge=_judge(judge_url, judge_model, judge_cache),
        judge_name=judge_model,
        strict=strict_fixes,
        data=data,
    )
    if out is not None:
        save(result, verdicts, out)
    if json:
        print_json(asdict(result))
        return
    typer.echo(line(result))
    for part, value in sorted(result.scores.items()):
        typer.echo(f"  {part:<40} {value:8.2f}")


def _judge_faults(url: str | None, model: str | None) -> list[str]:
    return ["--judge-url and --judge-model belong together"] if (url is None) != (model is None) else []


def _judge(url: str | None, model: str | None, cache: Path | None) -> RemoteJudge | None:
    from sailvl.eval.judge import RemoteJudge

    return RemoteJudge(url, model, cache=cache) if url is not None and model is not None else None


def _engine(
    model: Path | None, base_url: str | None, served_model: str | None, batch: int, threads: int
) -> tuple[Engine, str, str]:
    """The engine, what its model is called in files, and what tells its answers from another's."""
    if base_url is not None:
        from sailvl.engine.remote import Remote

        remote = Remote(base_url, served_model, capacity=batch)
        called = served_model or remote.model_name()
        return remote, _file_name(called), f"{base_url} {called}"
    folder = find_model(model)
    settle_libraries(threads)
    from sailvl.engine.local import Local
    from sailvl.model.checkpoint import fingerprint
    from sailvl.run import load_model

    called = folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
    return Local(*load_model(folder), capacity=batch), _file_name(called), fingerprint(folder)


def _file_name(name: str) -> str:
    """A model's name as part of a file's."""
    return "".join(sign if sign.isalnum() or sign in "-_.+" else "-" for sign in name).strip(".-") or "model"


def _page(folder: Path, compare: str) -> Path:
    from sailvl.eval import bench_report

    page = folder / "report.html"
    bench_report.write(folder, page, compare=compare)
    return page
