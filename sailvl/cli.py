"""The ``sailvl`` command. A verb reads its arguments, calls one function of the package, and says what came out.

Exit codes: 0 it worked, 1 it failed, 2 the input is wrong (arguments, recipe, files), 130 interrupted.
Wrong input is answered by one line per fault, never by a traceback; ``--debug`` shows the traceback of any failure.
Everything heavy is imported inside the verbs, so that help and plans appear at once.
"""

from __future__ import annotations

import functools
import json as json_module
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from sailvl.curriculum import Curriculum
    from sailvl.run import StageReport

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nano) or a YAML/JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as stages.pretrain.lr=1e-4."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare data; the data order is the same for any.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads for the model; 0 leaves the choice to PyTorch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")]


UsageError: Any = typer.BadParameter.__mro__[1]
"""Click's base class of wrong arguments, wherever typer keeps it: typer brought its own copy of click in 0.2x."""


class InputError(ValueError):
    """Arguments that cannot be used; one line per fault."""


@app.callback()
def sailvl(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure (accepted anywhere).")
    ] = False,
) -> None:
    """The open, complete, runnable SAIL-VL2: train it, ask it, from a laptop up.

    \b
    sailvl doctor                            is everything here?
    sailvl run nano                          the whole curriculum, on a CPU
    sailvl ask picture.png "What is this?"   ask the model it made

    \b
    Exit codes: 0 it worked, 1 it failed, 2 wrong input, 130 interrupted.
    """


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
        _print_json({"stages": rows})
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
def ask(
    words: Annotated[list[str], typer.Argument(metavar="[IMAGE]... QUESTION", help="Pictures, then the question.")],
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or a run's folder; default the newest model of runs/nano.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Ask a model a question about pictures, or about none.

    \b
    sailvl ask photo.jpg "What is this?"
    sailvl ask a.png b.png "Which shows more things?"
    sailvl ask "一加一等于几?" --model runs/nano
    """
    import time

    from sailvl.media import MediaError, open_image, to_rgb
    from sailvl.types import Message, Picture, Record

    *paths, question = words
    if not question.strip():
        raise InputError("the question is empty")
    if Path(question).is_file():
        raise InputError(f'{question} is a file: the question comes last, as in sailvl ask {question} "What is this?"')
    images, faults = [], []
    for path in paths:
        try:
            images.append(to_rgb(open_image(Path(path), name=path)))
        except (MediaError, OSError) as error:
            faults.append(str(error) if path in str(error) else f"{path}: {error}")
    if faults:
        raise InputError("\n".join(faults))
    folder = _find_model(model)
    pictures = tuple(Picture(width=i.width, height=i.height, ref=path) for i, path in zip(images, paths, strict=True))
    record = Record(id="question", messages=(Message(role="user", text=question),), pictures=pictures)
    _settle_libraries(threads)
    from sailvl.engine.local import Local
    from sailvl.run import load_model

    engine = Local(*load_model(folder), max_batch=1)
    started = time.perf_counter()
    (reply,) = engine.answer([record], [images], max_new_tokens=max_new_tokens)
    if not json:
        typer.echo(reply.text)
        return
    seconds = round(time.perf_counter() - started, 3)
    found = {"answer": reply.text, "finish_reason": reply.finish_reason, "tokens": len(reply.ids)}
    _print_json({"model": str(folder), "question": question, "images": paths, **found, "seconds": seconds})


@app.command()
def soup(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model folders of one family.")],
    out: Annotated[Path, typer.Option(help="Folder for the average; must not exist yet.")],
    json: Json = False,
) -> None:
    """Average models that branched from one trained model.

    \b
    sailvl soup runs/a/stages/01-sft-*/model runs/b/stages/01-sft-*/model --out runs/soup
    """
    faults = [f"{path}: no model folder (it would hold a config.json)" for path in models if not _is_model(path)]
    if len(models) < 2:
        faults.append("an average needs at least two models")
    if out.exists():
        faults.append(f"{out} exists; choose a new folder")
    if faults:
        raise InputError("\n".join(faults))
    from sailvl.train.soup import SoupError
    from sailvl.train.soup import soup as average

    try:
        average(models, out)
    except SoupError as error:
        raise InputError(str(error)) from error
    _print_json({"model": str(out), "of": [str(path) for path in models]}) if json else typer.echo(str(out))


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
    _print_json({"report": str(path)}) if json else typer.echo(str(path))


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
        _print_json({"ok": not broken, "findings": [vars(finding) for finding in findings]})
    else:
        colours = {"ok": "green", "note": "yellow", "broken": "red"}
        for finding in findings:
            state = typer.style(f"{finding.state:<7}", fg=colours[finding.state])
            typer.echo(f"{state} {finding.name:<14} {finding.value}")
            if finding.advice:
                typer.echo(f"{'':<23}{finding.advice}")
    if broken:
        raise typer.Exit(1)


# ---- shared by the verbs ------------------------------------------------------------------------------------------


def _read_recipe(source: str, overrides: list[str], factor: float = 1) -> Curriculum:
    from sailvl.curriculum import shrink
    from sailvl.recipes import read

    curriculum = read(source, overrides)
    return shrink(curriculum, factor) if factor > 1 else curriculum


def _run(curriculum: Curriculum, out: Path, workers: int, threads: int, json: bool) -> None:
    from sailvl.run import run as run_curriculum

    _settle_libraries(threads)
    again = f"interrupted; the same command continues where it stopped: {_command_line()}"
    try:
        if json:
            reports = run_curriculum(curriculum, out, workers=workers)
        elif sys.stdout.isatty():
            with _progress() as progress:
                say = functools.partial(progress.console.print, markup=False, highlight=False)
                reports = run_curriculum(curriculum, out, workers=workers, progress=progress, say=say)
        else:
            reports = run_curriculum(curriculum, out, workers=workers, say=_say)
    except KeyboardInterrupt:
        typer.echo(again, err=True)
        raise typer.Exit(130) from None
    if json:
        _print_json(_summary(out, reports))
        return
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f'ask it: sailvl ask picture.png "What is this?" --model {out}')


def _summary(out: Path, reports: list[StageReport]) -> dict[str, Any]:
    stages = [{"skipped": report.skipped, "model": str(report.model), **report.done} for report in reports]
    return {"out": str(out), "report": str(out / "report.html"), "stages": stages}


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )


def _say(line: str) -> None:
    typer.echo(line)


def _settle_libraries(threads: int) -> None:
    """Set the threads, and stop transformers from drawing bars for files that take a tenth of a second."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads:
        torch.set_num_threads(threads)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _find_model(given: Path | None) -> Path:
    from sailvl.run import finished_models

    if given is not None and _is_model(given):
        return given
    run_dir = given if given is not None else Path("runs/nano")
    found = finished_models(run_dir)
    if found:
        return found[0]
    if given is not None:
        raise InputError(f"{given}: neither a model folder (config.json) nor a run with a finished stage")
    raise InputError("no model yet: make one with `sailvl run nano` (minutes, on a CPU), or name one with --model DIR")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json_module.dumps(value, ensure_ascii=False))


def _command_line() -> str:
    import shlex

    return shlex.join(["sailvl", *sys.argv[1:]])


def main() -> None:
    """Run the command and leave with its exit code."""
    # Threads that wait for each other spin briefly, then sleep: spinning on, they lose a whole scheduler slice at each
    # of a step's thousands of parallel regions whenever anything else runs. Read when torch loads its OpenMP library.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = sys.argv[1:]
    ends = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:ends]
    arguments = [word for index, word in enumerate(arguments) if index >= ends or word != "--debug"]
    code = _main(arguments or ["--help"], debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `sailvl plan nano | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _main(arguments: list[str], debug: bool) -> int:
    try:
        result = app(arguments, prog_name="sailvl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UsageError as error:
        usage = f"\n{error.ctx.get_usage()}" if error.ctx else ""
        return _fail(f"{error.format_message()}{usage}", 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130, debug)
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001  (the outermost place: a user gets a line and an exit code)
        return _fail(*_explain(error), debug)


def _explain(error: Exception) -> tuple[str, int]:
    from sailvl.config import ConfigError
    from sailvl.lock import LockedError
    from sailvl.media import MediaError
    from sailvl.types import RecordError

    if isinstance(error, (InputError, ConfigError, MediaError, RecordError)):
        return str(error), 2
    if isinstance(error, (OSError, LockedError)):
        return str(error), 1
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    for line in message.splitlines():
        typer.secho(line, fg="red", err=True)
    return code
