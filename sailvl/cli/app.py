"""What the verbs share: the application, common options, and small helpers around the package's functions."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def progress_bar() -> Progress:
    """A bar that leaves nothing behind, with the time that is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )


def settle_libraries(threads: int) -> None:
    """Set the threads, and stop transformers from drawing bars for files that take a tenth of a second."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads:
        torch.set_num_threads(threads)


def is_model(path: Path) -> bool:
    """Whether a folder holds a model."""
    return (path / "config.json").is_file()


def find_model(given: Path | None) -> Path:
    """A model folder, the newest model of a run, or by default that of runs/nano; InputError if there is none."""
    from sailvl.run import finished_models

    if given is not None and is_model(given):
        return given
    run_dir = given if given is not None else Path("runs/nano")
    found = finished_models(run_dir)
    if found:
        return found[0]
    if given is not None:
        raise InputError(f"{given}: neither a model folder (config.json) nor a run with a finished stage")
    raise InputError("no model yet: make one with `sailvl run nano` (minutes, on a CPU), or name one with --model DIR")


def print_json(value: dict[str, Any]) -> None:
    """One object on one line."""
    typer.echo(json_module.dumps(value, ensure_ascii=False))
