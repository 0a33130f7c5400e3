"""Verbs that train: run a curriculum, train on data of one's own, plan, and write the report."""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sailvl.cli.app import InputError, Json, Threads, Workers, app, print_json, progress_bar, settle_libraries

if TYPE_CHECKING:
    from sailvl.curriculum import Curriculum
    from sailvl.run import StageReport

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nano) or a YAML/JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stages.pretrain.lr=1e-4."),
]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this: a first look at the same graph.")] = 1,
    json: Json = False,
) -> None:
    """Run a curriculum: every stage that is not finished yet, then the report.

    Run it again to continue after an interruption; after a change only the changed stages and those that start from
    them are run.

    \b
    sailvl run nano
    sailvl run nano --shrink 10 --out runs/look
    sailvl run recipe.yaml stages.multitask.steps=500 --workers 2
    """
    curriculum = _read_recipe(recipe, overrides or [], shrink)
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, json)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.YAML", help="A training recipe with your own data.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    workers: Workers = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Train on your own data: one stage written flat, or a whole curriculum.

    A flat recipe has a model, sources, and the fields of one training stage. Paths in it are relative to the file.

    \b
    name: captions
    model: {kind: checkpoint, path: runs/nano/stages/12-longcot-0a1b2c3d/model}
    sources:
      mine: {kind: jsonl, path: captions.jsonl}
    trains: [projector, lm]
    steps: 200
    max_tokens: 2048
    max_tiles: 32
    lr: 1e-4

    \b
    Each line of captions.jsonl:
    {"images": ["cat.png"], "messages": [{"role": "user", "content": "What is this?"},
                                         {"role": "assistant", "content": "A cat."}]}

    \b
    To train small adapters (LoRA) of these parts instead of their weights, add a line; the stage then leaves the
    folder adapter/ beside model/, which has them merged in:
    lora: {rank: 16, alpha: 32}

    \b
    sailvl train captions.yaml
    sailvl train captions.yaml lr=5e-5 steps=400 --out runs/slow
    """
    if not recipe.is_file():
        raise InputError(f"{recipe}: no such file")
    curriculum = _read_recipe(str(recipe), overrides or [])
    _run(curriculum, out or Path("runs") / curriculum.name, workers, threads, json)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    shrink: Annotated[float, typer.Option(min=1, help="Divide all steps by this.")] = 1,
    json: Json = False,
) -> None:
    """Print a curriculum's stages, and every fault of its graph, without computing anything.

    \b
    sailvl plan nano
    sailvl plan recipe.yaml stages.multitask.steps=500
    """
    from dataclasses import asdict

    from sailvl.curriculum import plan as plan_rows

    rows = [asdict(row) for row in plan_rows(_read_recipe(recipe, overrides or [], shrink))]
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


def _run(curriculum: Curriculum, out: Path, workers: int, threads: int, json: bool) -> None:
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
