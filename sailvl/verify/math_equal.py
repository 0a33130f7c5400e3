r"""Are two mathematical answers equal? The rule of MathVision's published scores, and a stricter reading of it.

Three stages, each only if those before did not settle it: the same text, case and outer white space aside; both sums
in Python's spelling, where ``^`` is exclusive or; both LaTeX whose value can be written as a fraction (``\sqrt`` and
``\pi`` cannot, so they equal only themselves). The flaws are the rule's: in the sums the name a, and in the LaTeX the
names a and b, stand for the truth's and the answer's value.

LaTeX is parsed in a child process (``latex_worker``) that is killed when it takes too long or too much memory: a short
formula can ask for more digits than there are atoms.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, cast

from sailvl.verify.literal import NotArithmetic, arithmetic

TOLERANCE = 1e-6
SECONDS = 5.0
"""For one comparison of formulas; a sane one takes a twentieth of a second."""

MAX_LATEX = 1_000
"""Characters of a formula that is still parsed."""


class LatexMissing(RuntimeError):
    """The LaTeX parser is not installed."""


class Latex:
    """A child process that compares formulas, started when first needed and again after it had to be killed.

    ``seconds``: time for one comparison, SECONDS unless told; one that takes longer is "not equal". Safe to share among
    threads: questions wait for each other. Close it, or use it in a ``with`` statement.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = SECONDS if seconds is None else seconds
        self.kills = 0
        self._child: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def __enter__(self) -> Latex:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, rule: str, truth: str, answer: str, tolerance: float = TOLERANCE) -> bool:
        """Whether the rule (see ``latex_worker``) holds; False if the child gives up, dies or is too slow.

        Raises LatexMissing if the parser is not installed.
        """
        if max(len(truth), len(answer)) > MAX_LATEX:
            return False
        with self._lock:
            child = self._child if self._child is not None and self._child.poll() is None else self._start()
            line = json.dumps({"rule": rule, "truth": truth, "answer": answer, "tolerance": tolerance})
            try:
                cast(Any, child.stdin).write(line + "\n")
                cast(Any, child.stdin).flush()
                reply = self._replies.get(timeout=self.seconds)
            except (queue.Empty, OSError):
                reply = ""
            if reply not in ("0", "1"):
                self.kills += 1
                self._stop()
            return reply == "1"

    def close(self) -> None:
        """Stop the child, if there is one."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("latex2sympy2_extended") is None:
            raise LatexMissing("comparing LaTeX needs latex2sympy2-extended: pip install 'sailvl[eval]'")
        self._stop()
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(child.stdout, replies), daemon=True).start()
        try:
            ready = replies.get(timeout=60)  # Importing the parser takes a second on a quiet machine.
        except queue.Empty:
            ready = ""
        if ready != "ready":
            child.kill()
            child.wait()
            raise RuntimeError("the process that parses LaTeX did not start")
        self._child, self._replies = child, replies
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            cast(Any, child.stdin).close()


_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from sailvl.verify import latex_worker; latex_worker.main()"


def _read(pipe: Any, replies: queue.Queue[str]) -> None:
    """Hand on every line, and an empty one at the end, so that nobody waits for a dead child."""
    with pipe:
        for line in pipe:
            replies.put(line.strip())
    replies.put("")


def math_is_equal(answer: str, truth: str, latex: Latex, *, strict: bool = False) -> bool:
    r"""Whether the answer equals the truth by the rule above, within 1e-6.

    ``strict``: ``^`` is a power, names stand for nothing, and ``\sqrt``, ``\pi`` and the like are compared by value.
    Raises LatexMissing if it comes to LaTeX and the parser is not installed.
    """
    answer, truth = answer.lower().strip(), truth.lower().strip()
    if answer == truth:
        return True
    try:
        wanted = arithmetic(truth, caret_is_power=strict)
        given = arithmetic(answer, None if strict else {"a": wanted}, caret_is_power=strict)
        if abs(given - wanted) < TOLERANCE:
            return True
    except (NotArithmetic, OverflowError):
        pass
    if _hopeless(answer) and _hopeless(truth):
        return False
    return latex.ask("value" if strict else "published", truth, answer)


def _hopeless(text: str) -> bool:
    """Whether LaTeX cannot help: an option letter, or the "false" that stands for no option read."""
    return text == "false" or (len(text) == 1 and text.isascii() and text.isalpha())
