r"""Which option did a reply to a multiple-choice question take? The public rules, letter by letter and flaw by flaw.

Published scores of multiple-choice benchmarks come from one small set of rules (VLMEvalKit, which the technical report,
arXiv 2509.14033, was scored with): a letter that stands alone near the end, else the one option whose text the reply
contains. They have flaws that move scores ("The answer is about .." reads as A; `"C"` and `答案是B` as nothing), and a
score is comparable only with them. ``strict`` functions read the same replies without those flaws; they are for one's
own comparisons. Nothing is guessed: None means that no option could be read.

Every function costs time linear in the reply.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from string import ascii_uppercase

from sailvl.verify.cleanup import last_boxed

REJECTED = "Z"
"""Stands for a reply that refuses to answer: it is read, and it is wrong."""

FAILED = "Failed to obtain answer"
"""A toolkit writes a text that begins so where a model gave no reply."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACE = str.maketrans({sign: " " for sign in ".()[],:;!*#{}"})
_VERBOSE = re.compile(r"(?:correct\s++)?answer\s++is\s++\**+([ABCD])", re.IGNORECASE)


def option(answer: str, letters: Iterable[str]) -> str | None:
    """The option letter that stands alone in the reply, or REJECTED, or None.

    One distinct letter of ``letters`` among the words, first met within the last four words; else the first
    "answer is X", where X may be the beginning of a word.
    """
    letters = tuple(letters)
    if f"{FAILED} via API" in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REJECTED
    words = answer.translate(_TO_SPACE).split()
    standing = [letter for letter in letters if letter in words]
    if len(standing) == 1 and words.index(standing[0]) > len(words) - 5:
        return standing[0]
    if not standing and REJECTED in words:
        return REJECTED
    found = _VERBOSE.search(answer)
    return found[1].upper() if found and found[1].upper() in letters else None


def by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text the reply contains, case aside; replies over twice all options' length name none."""
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None


def infer(answer: str, options: Mapping[str, str], *, strict: bool = False) -> str | None:
    """The option that a reply takes, by letter, else by text; REJECTED for a refusal; None if unclear.

    ``options``: text of each option by its letter, absent ones left out.
    """
    found = strict_option(answer, options) if strict else option(answer, options)
    return found or by_text(_unwrapped(answer) if strict else answer, options)


# ---- without the flaws ------------------------------------------------------------------------------------------

_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*+)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"(?i:answer|option|choice)\s{0,20}+(?:is|:)[\s:*(\"'“]{0,20}+([A-Z])(?![A-Za-z0-9'’])")
_SAID_ZH = re.compile(r"(?:答案|选项)\s{0,20}+(?:是|为|选)?[\s:*(\"'“]{0,20}+([A-Z])(?![A-Za-z0-9])")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])(?!\s{1,20}+(?!(?:is|or|and)\b)[a-z])")


def _unwrapped(answer: str) -> str:
    r"""What stands in the last ``<answer>`` or else the last ``\boxed{}``, or all of it."""
    tagged = _TAGGED.findall(answer)
    if tagged:
        return str(tagged[-1])
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def strict_option(answer: str, letters: Iterable[str]) -> str | None:
    """The letter that a reply says is its answer, else the only option letter in it that is no article."""
    if FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REJECTED
    letters = tuple(letters)
    text = unicodedata.normalize("NFKC", _unwrapped(answer)).strip()
    if text in letters:
        return text
    for pattern in (_SAID, _SAID_ZH, _ALONE):
        named = {letter for letter in pattern.findall(text) if letter in letters}
        if len(named) == 1:
            return str(named.pop())
        if named:
            return None
    return None


# ---- sets with a rule of their own ------------------------------------------------------------------------------

_VIDEO_PHRASES = ("The best answer is", "The correct answer is", "The answer is", "The answer", "Answer:", "Option:")
_REAL_WORLD_PHRASES = (
    *_VIDEO_PHRASES[:4],
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def first_capital(answer: str, letters: str) -> str | None:
    """The first of the capital ``letters`` anywhere in a reply, stock phrases taken out: the rule of the video sets."""
    return _first(answer, _VIDEO_PHRASES, letters)


def _first(answer: str, phrases: Iterable[str], letters: str) -> str | None:
    answer = answer.strip()
    for phrase in phrases:
        answer = answer.replace(phrase, "")
    return next((sign for sign in answer if sign in letters), None)


def real_world(answer: str) -> str | None:
    """The rule of MME-RealWorld: the first capital A to E; a short reply without one may be part of "(a)" to "(e)".

    That makes an empty reply an A.
    """
    answer = answer.strip()
    for phrase in _REAL_WORLD_PHRASES:
        answer = answer.replace(phrase, "")
    found = next((sign for sign in answer if sign in "ABCDE"), None)
    if found is None and len(answer.split()) <= 10:
        return next((letter for letter in "ABCDE" if answer.lower() in f"({letter.lower()})"), None)
    return found


def question_options(question: str) -> dict[str, str]:
    """Options that stand in a question below its first line: ``A. ..`` on the second, ``B. ..`` on the third."""
    found = {}
    for letter, line in zip(ascii_uppercase, question.split("\n")[1:], strict=False):
        mark = line.find(f"{letter}.")
        if mark >= 0:
            found[letter] = line[mark + 2 :].strip(". \n")
    return found


def first_word_matches(answer: str, letter: str) -> bool:
    """The rule of MVBench: the reply's first word, without periods, is part of "(a)", or contains it.

    That makes an empty reply right.
    """
    wanted = f"({letter.lower()})"
    word = answer.lower().strip().split(" ")[0]
    return word.replace(".", "") in wanted or wanted in word
