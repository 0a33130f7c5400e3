"""Verbs that train: run a curriculum, train on data of one's own, plan, and write the report."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sailvl.cli.app import InputError, Json, Threads, Workers, app, print_json, progress_bar, settle_libraries

if TYPE_CHECKING:
    from sailvl.curriculum import Curriculum
    from sailvl.run import StageReport
    from sailvl.train.plan import StageCost

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nano) or a YAML/JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stages.pretrain.lr=1e-4."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Mirror the metrics to tensorboard, wandb or trackio; may be given again."),
]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this: a first look at the same graph.")] = 1,
    track: Track = None,
    json: Json = False,
) -> None:
    """Run a curriculum: every stage that is not finished yet, then the report.

    Run it again to continue after an interruption; after a change only the changed stages and those that start from
    them are run.

    \b
    sailvl run nano
    sailvl run nano --shrink 10 --out runs/look
    sailvl run recipe.yaml stages.multitask.steps=500 --workers 2
    torchrun --nproc-per-node 8 -m sailvl run recipe.yaml --track tensorboard
    """
    curriculum = _read_recipe(recipe, overrides or [], shrink)
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, track or [], json)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.YAML", help="A training recipe with your own data.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    track: Track = None,
    json: Json = False,
) -> None:
    """Train on your own data: one stage written flat, or a whole curriculum.

    A flat recipe has a model, sources, and the fields of one training stage. Paths in it are relative to the file.

    \b
    name: captions
    model: {kind: checkpoint, path: SAIL-VL2-2B}
    sources:
      mine: {kind: jsonl, path: captions.jsonl}
    trains: [projector, lm]
    steps: 200
    max_tokens: 8192
    max_tiles: 32
    lr: 1e-5

    \b
    Each line of captions.jsonl, in either of the two usual forms:
    {"images": ["cat.png"], "messages": [{"role": "user", "content": "What is this?"},
                                         {"role": "assistant", "content": "A cat."}]}
    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                           {"from": "gpt", "value": "A cat."}]}

    \b
    Other kinds of source: the same columns in Parquet files, and WebDataset shards:
      mine: {kind: parquet, path: "captions/*.parquet"}
      mine: {kind: webdataset, path: "shards/train-*.tar"}

    \b
    To train small adapters (LoRA) of these parts instead of their weights, add a line; the stage then leaves the
    folder adapter/ beside model/, which has them merged in:
    lora: {rank: 16, alpha: 32}

    \b
    sailvl train captions.yaml
    sailvl train captions.yaml lr=5e-6 steps=400 --out runs/slow --track tensorboard
    torchrun --nproc-per-node 8 -m sailvl train captions.yaml lanes=32
    """
    if not recipe.is_file():
        raise InputError(f"{recipe}: no such file")
    curriculum = _read_recipe(str(recipe), overrides or [])
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, track or [], json)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this.")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="Say what it costs on so many GPUs.")] = None,
    gpu: Annotated[str, typer.Option(help="Their kind, such as a100-80, h100, h200, b200.")] = "h100",
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Fraction of their peak that training reaches.")] = 0.4,
    json: Json = False,
) -> None:
    """Print a curriculum's stages, and every fault of its graph, without computing anything.

    With --gpus also memory, days and communication of each stage on such GPUs, and what to change where it does not
    fit.

    \b
    sailvl plan nano
    sailvl plan recipe.yaml stages.multitask.steps=500
    sailvl plan recipe.yaml --gpus 16 --gpu h100 --mfu 0.4
    """
    from dataclasses import asdict

    from sailvl.curriculum import plan as plan_rows

    curriculum = _read_recipe(recipe, overrides or [], shrink)
    rows = [asdict(row) for row in plan_rows(curriculum)]
    if gpus is not None:
        _plan_on(curriculum, rows, gpus, gpu, mfu, json)
        return
    if json:
        print_json({"stages": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "starts from", "trains"):
        table.add_column(title, overflow="fold")
    for title in ("steps", "tokens up to", "lr"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("schedule", "data"):
        table.add_column(title, overflow="fold")
    for row in rows:
        steps, tokens = (f"{row[key]:,}" if row[key] else "" for key in ("steps", "max_tokens"))
        lr = f"{row['lr']:g}" if row["lr"] is not None else ""
        table.add_row(row["name"], row["init"], row["trains"], steps, tokens, lr, row["schedule"], row["data"])
    table.add_section()
    table.add_row("total", "", "", f"{sum(r['steps'] for r in rows):,}", f"{sum(r['max_tokens'] for r in rows):,}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _plan_on(curriculum: Curriculum, rows: list[dict[str, Any]], gpus: int, kind: str, mfu: float, json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from sailvl.config import did_you_mean
    from sailvl.train.hardware import GPUS
    from sailvl.train.plan import ASSUMED, costs

    if kind not in GPUS:
        raise InputError(f"--gpu: unknown kind '{kind}'; {did_you_mean(kind, GPUS)} (known: {', '.join(GPUS)})")
    found = costs(curriculum, gpus=gpus, gpu=GPUS[kind], mfu=mfu)
    days = sum(each.days for each in found)
    if json:
        values = [asdict(each) | {"memory": asdict(each.memory) | {"total": each.memory.total}} for each in found]
        given = {"gpus": gpus, "gpu": kind, "mfu": mfu, "days": days, "gpu_hours": days * gpus * 24}
        print_json({"stages": rows, "costs": values, "assumed": list(ASSUMED)} | given)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold")
    titles = (
        "weights grads adam whole activations loss+ ema total host steps tokens TFLOP/step s/step days comm".split()
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    by_name = {row["name"]: row for row in rows}
    for each in found:
        table.add_row(*_cost_cells(each, by_name[each.name]))
    table.add_section()
    total = sum(row["max_tokens"] for row in rows)
    table.add_row("total", *[""] * 10, _count(total), "", "", f"{days:.2f}", "")
    console = Console(width=None if sys.stdout.isatty() else 160)
    memory = GPUS[kind].memory
    console.print(f"{gpus} x {kind} ({memory:g} GB) at {mfu:.0%} of its peak; GB of each, the peak of a step:")
    console.print(table)
    for each in found:
        if each.advice:
            console.print(
                f"{each.name}: {'' if each.fits else 'does not fit. '}{each.advice}", markup=False, soft_wrap=True
            )
        if each.traffic_share > 1:
            text = (
                f"{each.name}: communication takes {each.traffic_share:.1f} times the computation's time: raise lanes"
            )
            text += f" and parallel.packs_per_forward, or with {gpus} GPUs on several nodes set parallel.replicas."
            console.print(text, markup=False, soft_wrap=True)
    for line in ASSUMED:
        console.print(line, style="dim", markup=False, soft_wrap=True)


def _cost_cells(each: StageCost, row: dict[str, Any]) -> list[str]:
    """A row of the table: GB with one digit, nothing where there is nothing."""
    memory = each.memory
    own = (memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.activations, memory.loss)
    cells = [_gigabytes(size) for size in (*own, memory.ema, memory.total, memory.host)]
    cells[7] += "" if each.fits else " !"
    time = f"{each.step_seconds:.3g}", f"{each.days:.2f}", f"{each.traffic_share:.0%}" if each.traffic else ""
    return [each.name, *cells, f"{row['steps']:,}", _count(row["max_tokens"]), f"{each.flops / 1e12:,.3g}", *time]


def _count(number: int) -> str:
    """1.3 M, 5.2 B: three digits."""
    size, letter = next(((size, letter) for size, letter in ((1e9, "B"), (1e6, "M")) if number >= size), (1e3, "k"))
    return f"{number / size:.3g} {letter}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else "0" if size else ""


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, such as runs/nano.")],
    json: Json = False,
) -> None:
    """Write a run's report again: one HTML file with its figures, answers and curves.

    \b
    sailvl report runs/nano
    """
    if not (run_dir / "curriculum.json").is_file():
        raise InputError(f"{run_dir}: no run here (it would hold a curriculum.json)")
    from sailvl.eval import report as html

    html.write(run_dir, run_dir / "report.html")
    path = run_dir / "report.html"
    print_json({"report": str(path)}) if json else typer.echo(str(path))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine offers and what is missing; exit code 1 if something is broken.

    \b
    sailvl doctor
    """
    from sailvl.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if json:
        print_json({"ok": not broken, "findings": [vars(finding) for finding in findings]})
    else:
        colours = {"ok": "green", "note": "yellow", "broken": "red"}
        for finding in findings:
            state = typer.style(f"{finding.state:<7}", fg=colours[finding.state])
            typer.echo(f"{state} {finding.name:<14} {finding.value}")
            if finding.advice:
                typer.echo(f"{'':<23}{finding.advice}")
    if broken:
        raise typer.Exit(1)


def _read_recipe(source: str, overrides: list[str], factor: float = 1) -> Curriculum:
    from sailvl.curriculum import shrink
    from sailvl.recipes import read

    curriculum = read(source, overrides)
    return shrink(curriculum, factor) if factor > 1 else curriculum


def _run(curriculum: Curriculum, out: Path, workers: int, threads: int, track: list[str], json: bool) -> None:
    from sailvl import log

    try:
        with log.tracking(track):
            _run_tracked(curriculum, out, workers, threads, json)
    except log.TrackerError as error:
        raise InputError(f"--track: {error}") from error


def _run_tracked(curriculum: Curriculum, out: Path, workers: int, threads: int, json: bool) -> None:
    from sailvl.run import run as run_curriculum

    settle_libraries(threads)
    again = f"interrupted; the same command continues where it stopped: {_command_line()}"
    try:
        if json:
            reports = run_curriculum(curriculum, out, workers=workers)
        elif sys.stdout.isatty():
            with progress_bar() as progress:
                say = functools.partial(progress.console.print, markup=False, highlight=False)
                reports = run_curriculum(curriculum, out, workers=workers, progress=progress, say=say)
        else:
            reports = run_curriculum(curriculum, out, workers=workers, say=_say)
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return
    if json:
        print_json(_summary(out, reports))
        return
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f'ask it: sailvl ask picture.png "What is this?" --model {out}')


def _summary(out: Path, reports: list[StageReport]) -> dict[str, Any]:
    stages = [{"skipped": report.skipped, "model": str(report.model), **report.done} for report in reports]
    return {"out": str(out), "report": str(out / "report.html"), "stages": stages}


def _say(line: str) -> None:
    typer.echo(line)


def _command_line() -> str:
    return shlex.join(["sailvl", *sys.argv[1:]])
