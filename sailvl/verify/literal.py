"""Lists and sums that stand in benchmark files as Python text, read without running anything.

The toolkits behind the published figures call ``eval`` on answers and on what a model said. Here a list is a literal or
it is plain text, and arithmetic is numbers, signs and brackets, with the size of every result bounded.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

MAX_LITERAL = 1_000_000
"""Characters of a list that is still parsed."""

MAX_ARITHMETIC = 1_000
"""Characters of an expression that is still evaluated."""

MAX_BITS = 1 << 16
"""Size of the whole numbers that arithmetic may give; 10**10**10 has 33 thousand million bits."""


def list_literal(cell: object) -> list[Any] | None:
    """The list that a cell spells out, or None if it spells none."""
    if isinstance(cell, list):
        return cell
    text = str(cell).strip(" \t")
    if not text.startswith("[") or not text.rstrip().endswith("]") or len(text) > MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Unknown escapes such as "\s" are kept as they stand, as they always were.
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def answers(cell: object) -> list[str]:
    """The answers a cell accepts: the items of a list literal as text, else the cell's own text."""
    found = list_literal(cell)
    return [str(cell)] if found is None else [str(item) for item in found]


def mapping_literal(cell: object) -> dict[str, Any]:
    """The dictionary that a cell spells out, or an empty one."""
    text = str(cell).strip()
    if not text.startswith("{") or len(text) > MAX_LITERAL:
        return {}
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


# ---- arithmetic -----------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"[ \t\f]*+(?:(?P<number>0[xX][0-9a-fA-F_]++|0[oO][0-7_]++|0[bB][01_]++"
    r"|(?:[0-9][0-9_]*+(?:\.[0-9_]*+)?|\.[0-9][0-9_]*+)(?:[eE][-+]?[0-9]++)?[jJ]?)"
    r"|(?P<name>[A-Za-z]\w*+)|(?P<sign>\*\*|//|<<|>>|[-+*/%^&|~()]))"
)
_LOOSEST_FIRST: tuple[dict[str, Callable[[Any, Any], Any]], ...] = (
    {"|": operator.or_},
    {"^": operator.xor},
    {"&": operator.and_},
    {"<<": operator.lshift, ">>": operator.rshift},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod},
)
_DEEPEST = 50


class NotArithmetic(ValueError):
    """A text that is no arithmetic, or whose value is out of bounds."""


def arithmetic(text: str, names: Mapping[str, Any] | None = None, *, caret_is_power: bool = False) -> Any:
    """The value of a sum written as in Python: numbers, + - * / // % ** ^ & | ~ << >> and brackets.

    ``^`` is exclusive or, as in Python, unless ``caret_is_power``. ``names`` are values the text may use. Raises
    NotArithmetic for anything else: other names, calls, comparisons, division by zero, sizes above MAX_BITS.
    """
    if len(text) > MAX_ARITHMETIC:
        raise NotArithmetic(f"{len(text)} characters are too many")
    try:
        return _Parser(text, names or {}, caret_is_power).whole()
    except (TypeError, ArithmeticError, ValueError) as error:
        raise NotArithmetic(str(error)) from error


class _Parser:
    """Reads one expression by recursive descent; Python's own order of operations."""

    def __init__(self, text: str, names: Mapping[str, Any], caret_is_power: bool) -> None:
        self.tokens: list[tuple[str, str]] = []
        place, text = 0, text.partition("#")[0].rstrip()  # What follows # is a remark, in Python.
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise NotArithmetic(f"what is {text[place : place + 10]!r}?")
            kind = found.lastgroup or ""
            token = found[kind]
            self.tokens.append((kind, "**" if token == "^" and caret_is_power else token))
            place = found.end()
        self.names, self.place, self.depth = names, 0, 0

    def whole(self) -> Any:
        value = self.level(0)
        if self.place < len(self.tokens):
            raise NotArithmetic(f"what is {self.tokens[self.place][1]!r} doing here?")
        return value

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def level(self, looseness: int) -> Any:
        """One or more operands joined by the operators of a level, from the left."""
        if looseness == len(_LOOSEST_FIRST):
            return self.signed()
        left = self.level(looseness + 1)
        operators = _LOOSEST_FIRST[looseness]
        while self.peek() in operators:
            sign = self.peek()
            self.place += 1
            left = self.bounded(sign, operators[sign], left, self.level(looseness + 1))
        return left

    def signed(self) -> Any:
        signs = []
        while self.peek() in ("-", "+", "~"):
            signs.append(self.peek())
            self.place += 1
        value = self.power()
        for sign in reversed(signs):
            value = -value if sign == "-" else ~value if sign == "~" else +value
        return value

    def power(self) -> Any:
        base = self.atom()
        if self.peek() != "**":
            return base
        self.place += 1
        self.deeper()
        exponent = self.signed()
        self.depth -= 1
        return self.bounded("**", operator.pow, base, exponent)

    def atom(self) -> Any:
        if self.place == len(self.tokens):
            raise NotArithmetic("something is missing at the end")
        kind, token = self.tokens[self.place]
        self.place += 1
        if kind == "number":
            return _number(token)
        if kind == "name" and token in self.names:
            return self.names[token]
        if token != "(":
            raise NotArithmetic(f"{token!r} is no value")
        self.deeper()
        value = self.level(0)
        self.depth -= 1
        if self.peek() != ")":
            raise NotArithmetic("a bracket is not closed")
        self.place += 1
        return value

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise NotArithmetic(f"nested deeper than {_DEEPEST}")

    def bounded(self, sign: str, apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        """The result, unless it would be larger than MAX_BITS; only powers and shifts grow faster than their text."""
        if isinstance(left, int) and isinstance(right, int) and sign in ("**", "<<"):
            bits = left.bit_length() * right if sign == "**" else left.bit_length() + right
            if abs(bits) > MAX_BITS:
                raise NotArithmetic("too large")
        return apply(left, right)


def _number(token: str) -> complex:
    """An int, float or imaginary number as Python writes them; leading zeros of whole numbers are none."""
    if token[-1] in "jJ" and token[:2] not in ("0x", "0X"):
        return complex(0, float(token[:-1]))
    try:
        return int(token, 0)
    except ValueError:
        if token.isdigit():
            raise
    value = float(token)
    if math.isnan(value):
        raise NotArithmetic("not a number")
    return value
