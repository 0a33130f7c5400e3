"""Replies with a form of their own: DynaMath's JSON, WeMath's letter, TempCompass, CRPE, LogicVista, MathVista.

The rules behind published figures (VLMEvalKit's), one function or two per set. Where that toolkit stops with an
exception (an empty reply to CRPE, a number where DynaMath wants text) the reply is wrong here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Literal

from sailvl.verify.literal import list_literal
from sailvl.verify.text import exact

# ---- DynaMath -------------------------------------------------------------------------------------------------


def json_part(reply: str) -> str:
    """From the first ``{`` to the last ``}`` if there is that, else all; without its backslashes."""
    start, end = reply.find("{"), reply.rfind("}")
    return (reply[start : end + 1] if 0 <= start < end else reply).replace("\\", "")


def short_answer(part: str) -> object:
    """The value of "short answer" in the JSON object, or None."""
    try:
        found = json.loads(part, strict=False)
    except (ValueError, RecursionError):
        return None
    return found.get("short answer") if isinstance(found, dict) else None


def typed(answer: object, kind: str) -> float | str | None:
    """The answer as its kind wants it, or None if it cannot be read so.

    "float": its first word as a number, where pi may follow; "multiple choice": one sign, or the only one of A to E it
    holds; anything else: text, taken as it is.
    """
    if not isinstance(answer, str):
        return None
    if kind == "float":
        return _float(answer if answer.isdigit() else answer.split(" ")[0])
    if kind == "multiple choice":
        if len(answer) == 1:
            return answer.upper()
        held = [letter for letter in "ABCDE" if letter in answer.upper()]
        return held[0] if len(held) == 1 else None
    return answer


def _float(text: str) -> float | None:
    try:
        return float(text.split("π")[0]) * math.pi if "π" in text else float(text)
    except ValueError:
        return None


def dynamath_right(given: float | str | None, truth: object, kind: str, part: str, *, strict: bool = False) -> bool:
    """Whether a typed answer is right. ``part``: the text it came from, whose beginning decides unreadable choices.

    A number may be 0.001 off. Text is right if the truth contains it, case aside, so that an empty one is right;
    ``strict``: empty text, and a lone period, is wrong.
    """
    if kind == "float":
        wanted = _float(str(truth))
        return isinstance(given, float) and wanted is not None and abs(given - wanted) <= 0.001
    if kind == "multiple choice":
        return given == str(truth) if given is not None else str(truth) in part[:3].upper()
    if not isinstance(given, str) or (strict and not given.strip(" .\n")):
        return False
    return given.lower() in str(truth).lower()


# ---- WeMath ---------------------------------------------------------------------------------------------------


def wemath_letter(reply: str) -> str | None:
    """The first sign after the last "Answer", marks aside, if it is a letter from A to H."""
    tail = re.sub("[<>:.]", "", reply.rpartition("Answer")[2].strip()).strip()
    return tail[0] if tail[:1] and tail[0] in "ABCDEFGH" else None


# ---- TempCompass ----------------------------------------------------------------------------------------------

Rating = Literal[0, 1]


def tempcompass_choice(reply: str, truth: str) -> Rating | None:
    """1 or 0 for the truth itself ("B. text"), a letter alone, or a letter before ``.`` or ``)``; else None."""
    if reply == truth:
        return 1
    if reply[:1] in tuple("ABCD") and (len(reply) == 1 or reply[1] in ".)"):
        return 1 if reply[0] == truth[:1] else 0
    return None


def tempcompass_matching(reply: str, truth: str, candidates: Sequence[str]) -> Rating | None:
    """1 or 0 for a candidate ("Caption A: text"), its text, its label or the label's last part; else None."""
    parts = [candidate.split(": ") for candidate in candidates]
    labels = [part[0] for part in parts]
    labels += [label.replace("Sentence ", "").replace("Option ", "").replace("Caption ", "") for label in labels]
    sentences = [part[1] for part in parts if len(part) > 1]
    after = reply.split(") ")[1] if ") " in reply else None
    taken = None
    if reply in candidates:
        taken = reply
    for sentence in sentences:
        if sentence in (reply, after):
            taken = sentence
    for label in labels:
        if label in (reply, reply.replace(".", "")):
            taken = label
    if taken is None:
        return None
    right = [truth, truth.split(":")[0], *truth.split(": ")[1:2], *truth.split(": ")[0].split()[1:2]]
    return 1 if taken in right else 0


# ---- CRPE -----------------------------------------------------------------------------------------------------


def crpe_right(reply: str, truth: str) -> bool:
    """First letters equal, for one sign or a reply that begins with A to D; else the truth's text is in the reply.

    The text is what follows the truth's fourth sign, so for a bare letter it is empty and in every reply.
    """
    if not reply or not truth:
        return False
    if len(reply) == 1 or reply[0] in "ABCD":
        return reply[0] == truth[0]
    return truth[4:].lower() in reply.lower()


# ---- LogicVista, MathVista ------------------------------------------------------------------------------------


def letters_match(letters: str, truth: str) -> bool:
    """Whether option letters, in any order, are those of the truth ("C, D")."""
    return sorted(letters.lower()) == sorted(truth.lower().replace(", ", ""))


def mathvista_value(answer: object, kind: str) -> int | float | None:
    """The answer as an "integer" or a "float", read as Python reads them; None for other kinds and other texts."""
    try:
        if kind == "integer":
            return int(answer)  # type: ignore[call-overload,no-any-return]
        return float(answer) if kind == "float" else None  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return None


def same_value(answer: str, truth: str) -> bool:
    """Whether two free answers say the same: lists item by item, other texts after the fold of ``text.exact``."""
    given, wanted = list_literal(answer), list_literal(truth)
    if given is not None and wanted is not None:
        return given == wanted
    return exact(answer, truth) == 1.0
