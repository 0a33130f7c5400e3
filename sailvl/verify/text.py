"""Compare short answers as text: exact match, numbers, edit distance; and find the answer inside a reply.

Everything is compared after one fold: Unicode NFKC (full-width forms, Chinese too), case, runs of white space, and
punctuation around the answer. Folding is deliberately small: an article, a synonym or a half sentence is another
answer. Each function costs time linear in the reply, so a reply of any length is safe to judge.

Difference from the report: it scores with an evaluation toolkit whose rules differ by data set; these are the rules of
the synthetic families, whose truths are exact by construction.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_WORDS += " seventeen eighteen nineteen twenty"
_ENGLISH = {word: Decimal(value) for value, word in enumerate(_WORDS.split())}
_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}

# Thousands must come in groups of three, so that "1,2" stays two numbers; a sign after a digit is a range or a minus.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"(?:e[-+]?[0-9]{1,3}(?![0-9a-z])|[十百千万亿])?"
    rf"|[{''.join(_CHINESE)}{''.join(_UNITS)}]+"
    rf"|\b(?:{'|'.join(_ENGLISH)})\b(?!\s+(?:hundred|thousand|million)\b)"
)


def final_answer(reply: str) -> str:
    r"""The part of a reply that is judged: after the last ``</think>``, inside its last balanced ``\boxed{}`` if any.

    A thought that was opened and never closed has no answer: what stands in it was not said.
    """
    if "</think>" in reply:
        reply = reply.rpartition("</think>")[2]
    if "<think>" in reply:
        return ""
    boxed = _last_boxed(reply)
    return (reply if boxed is None else boxed).strip()


def _last_boxed(text: str) -> str | None:
    """The content of the balanced ``\\boxed{`` that starts last, in one pass; an escaped brace does not count."""
    if "\\boxed{" not in text:
        return None
    open_braces: list[int] = []
    found: tuple[int, int] | None = None
    skip = False
    for place, sign in enumerate(text):
        if skip:
            skip = False
        elif sign == "\\":
            skip = True
        elif sign == "{":
            open_braces.append(place)
        elif sign == "}" and open_braces:
            start = open_braces.pop()
            if text.endswith("\\boxed", 0, start) and (found is None or start > found[0]):
                found = start, place
    return None if found is None else text[found[0] + 1 : found[1]]


def fold(text: str) -> str:
    """NFKC, lower case, single spaces, no punctuation or white space around."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(text)
    while start < end and _is_edge(text[start]):
        start += 1
    while end > start and _is_edge(text[end - 1]):
        end -= 1
    return text[start:end]


def _is_edge(sign: str) -> bool:
    """Punctuation and white space, but not the signs that change a value: -, %, #, &, @ and the symbols + < > $."""
    return (unicodedata.category(sign)[0] in "PZ" and sign not in "-%#&@") or sign == "`"


def exact(answer: str, truth: str) -> float:
    """1 if both fold to the same non-empty text, or are the same text."""
    folded = fold(answer)
    if not folded and not fold(truth):
        return float(answer.strip() == truth.strip())
    return float(folded == fold(truth))


def number(answer: str, truth: str) -> float:
    """1 if the answer names exactly one number, and it is the true one.

    Digits (any width, thousands separators, decimals), the words zero to twenty, and Chinese numerals count.
    Units and a percent sign are ignored. Raises ValueError if the truth does not name exactly one number.
    """
    wanted = numbers(truth)
    if len(wanted) != 1:
        raise ValueError(f"the truth {truth!r} names {len(wanted)} numbers; a number question needs exactly one")
    return float(numbers(answer) == wanted)


def numbers(text: str) -> set[Decimal]:
    """The distinct numbers a text names."""
    # NFKC would glue a raised digit to the one before it: 5² is not 52. The word 一共 (in all) names no number.
    text = re.sub(r"(?=[⁰¹²³⁴-⁹₀-₉½¼¾])", " ", text).replace("一共", "").replace("\N{MINUS SIGN}", "-")
    text = unicodedata.normalize("NFKC", text).casefold()
    return {_value(found) for found in _NUMBER.findall(text)}


def _value(found: str) -> Decimal:
    if found in _ENGLISH:
        return _ENGLISH[found]
    if found[0] in _CHINESE or found[0] in _UNITS:
        return _chinese(found)
    unit = _UNITS.get(found[-1], 1)
    return Decimal(found.rstrip("".join(_UNITS)).replace(",", "")) * unit


def _chinese(numeral: str) -> Decimal:
    """两千零二十四 and 二〇二四 are both 2024."""
    if not any(sign in _UNITS for sign in numeral):
        return Decimal("".join(str(_CHINESE[sign]) for sign in numeral))
    total, section, digit = 0, 0, 0
    for sign in numeral:
        if sign in _CHINESE:
            digit = _CHINESE[sign]
        elif _UNITS[sign] >= 10**4:
            total, section, digit = (total + section + digit) * _UNITS[sign], 0, 0
        else:
            section, digit = section + (digit or 1) * _UNITS[sign], 0
    return Decimal(total + section + digit)


def edit(answer: str, truth: str) -> float:
    """1 - edit distance / length of the longer text, on folded text: 1 for equal, 0 for nothing in common."""
    answer, truth = fold(answer), fold(truth)
    longest = max(len(answer), len(truth))
    return 1.0 - edit_distance(answer, truth) / longest if longest else 1.0


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance by Myers' bit vectors (J. ACM 46, 1999): a column of the table is one Python integer.

    100,000 signs against 100 take about 0.1 s; the plain table would take seconds.
    """
    if len(left) > len(right):
        left, right = right, left
    if not left:
        return len(right)
    places: dict[str, int] = {}
    for place, sign in enumerate(left):
        places[sign] = places.get(sign, 0) | 1 << place
    full, last = (1 << len(left)) - 1, 1 << (len(left) - 1)
    up, down, distance = full, 0, len(left)
    for sign in right:
        equal = places.get(sign, 0)
        diagonal = (((equal & up) + up) ^ up) | equal
        rises, falls = down | ~(diagonal | up), up & diagonal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = rises << 1 | 1, falls << 1
        equal |= down
        up, down = (falls | ~(equal | rises)) & full, rises & equal & full
    return distance
