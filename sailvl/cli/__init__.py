"""The ``sailvl`` command. A verb reads its arguments, calls one function of the package, and says what came out.

Exit codes: 0 it worked, 1 it failed, 2 the input is wrong (arguments, recipe, files), 130 interrupted.
Wrong input is answered by one line per fault, never by a traceback; ``--debug`` shows the traceback of any failure.
Everything heavy is imported inside the verbs, so that help and plans appear at once.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

# The verbs, in the order of the help page: importing them adds them to the application.
from sailvl.cli import training, asking, evaluate, models  # noqa: F401  # isort: skip
from sailvl.cli.app import InputError, UsageError, app


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
    from sailvl.engine.base import EngineError
    from sailvl.eval.table import TableError
    from sailvl.lock import LockedError
    from sailvl.media import MediaError
    from sailvl.types import RecordError

    if isinstance(error, (InputError, ConfigError, MediaError, RecordError, TableError)):
        return str(error), 2
    if isinstance(error, (OSError, LockedError, EngineError)):
        return str(error), 1
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    for line in message.splitlines():
        typer.secho(line, fg="red", err=True)
    return code
