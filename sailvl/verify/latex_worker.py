r"""The process that parses LaTeX: one JSON line in, "1" or "0" out. It is meant to be killed.

Rules: ``published`` compares as MathVision's published scores do (a formula's value must print as a fraction; the names
a and b mean the parsed truth and answer), ``value`` compares numbers by value and expressions by their difference,
``equation`` compares two equations up to a whole factor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from sailvl.verify.literal import NotArithmetic, arithmetic

MEMORY = 2 << 30
"""Bytes of address space the process may use, where the system can limit it."""


def main() -> None:
    """Answer questions until the input ends."""
    try:
        import resource  # noqa: PLC0415  (not on Windows)

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    from latex2sympy2_extended import latex2sympy  # noqa: PLC0415  (optional; only this process needs it)

    replies, sys.stdout = sys.stdout, sys.stderr  # The parser prints now and then.
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            rule = _RULES[question["rule"]]
            holds = bool(rule(latex2sympy, question["truth"], question["answer"], question["tolerance"]))
        except Exception:  # noqa: BLE001  (a parser built from a grammar raises everything; it means "no")
            holds = False
        replies.write("1\n" if holds else "0\n")
        replies.flush()


def _published(parse: Callable[[str], Any], truth: str, answer: str, tolerance: float) -> bool:
    a, b = parse(truth), parse(answer)
    names = {"a": a, "b": b}
    try:
        if abs(arithmetic(str(a), names) - arithmetic(str(b), names)) < tolerance:
            return True
    except NotArithmetic:
        return False
    return bool(abs(a - b) < tolerance)


def _value(parse: Callable[[str], Any], truth: str, answer: str, tolerance: float) -> bool:
    import sympy  # noqa: PLC0415  (loaded by the parser already)

    wanted, given = (sympy.sympify(parse(text.rpartition("=")[2])).doit() for text in (truth, answer))
    if wanted == given:
        return True
    if wanted.free_symbols or given.free_symbols:
        if bool(wanted.free_symbols) != bool(given.free_symbols):
            return False
        return bool(abs(sympy.simplify(wanted - given).evalf()) < 1e-3)
    return bool(abs(wanted.evalf() - given.evalf()) <= tolerance * 1.01)


def _equation(parse: Callable[[str], Any], truth: str, answer: str, tolerance: float) -> bool:
    import sympy  # noqa: PLC0415  (loaded by the parser already)

    (left, right), (other_left, other_right) = truth.split("="), answer.split("=")
    wanted = sympy.simplify(parse(left) - parse(right))
    given = sympy.simplify(parse(other_left) - parse(other_right))
    ratios = (sympy.simplify(wanted / given), sympy.simplify(given / wanted))
    return any(ratio.is_Integer and ratio != 0 for ratio in ratios)


_RULES: dict[str, Callable[[Callable[[str], Any], str, str, float], bool]] = {
    "published": _published,
    "value": _value,
    "equation": _equation,
}

if __name__ == "__main__":
    main()
