"""Short answers of the public question-answering sets: normalised words, relaxed numbers, edit distance, containment.

The rules are those behind published figures (VLMEvalKit's scoring of TextVQA, ChartQA, DocVQA, InfoVQA, OCRVQA, GQA and
OCRBench, which go back to each set's own), flaws included; ``strict`` arguments repair the flaws, and what they give is
not comparable. Costs are linear in the reply, but for the edit distance (see ``text.edit_distance``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sailvl.verify.text import edit_distance

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS = 32
"""The published rule passes a flag where a count belongs, so that only the first 32 periods go."""

_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))

# The contractions of the public VQA evaluation that are in lower case, as they are written in full; it repairs each
# from every spelling with one apostrophe left out.
_CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
        "you'll you're you've"
    ).split()
    for place in range(len(form))
    if form[place] == "'"
} | {"somebody'd": "somebodyd"}


def punct(text: str, *, every_period: bool = False) -> str:
    """Punctuation out: a sign that stands next to a space goes, others become spaces; all go if a digit,digit is there.

    Then the first 32 periods go that have no digit on either side.
    """
    grouped = _DIGIT_COMMA_DIGIT.search(text) is not None
    signs: dict[str, str | int | None] = {
        sign: "" if grouped or f"{sign} " in text or f" {sign}" in text else " " for sign in _PUNCTUATION
    }
    return _PERIOD.sub("", text.translate(str.maketrans(signs)), count=0 if every_period else _PERIODS)


def norm(text: str, *, every_period: bool = False) -> str:
    """Normalised words: punctuation out, lower case, number words to digits, no articles, apostrophes repaired."""
    text = punct(text.replace("\n", " ").replace("\t", " ").strip(), every_period=every_period)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def relaxed(answer: str, truth: str) -> bool:
    """The rule of charts: numbers within 5 % of the truth, a percent sign meaning hundredths; else equal, case aside.

    A truth of 0 is compared as text.
    """
    given, wanted = _number(answer), _number(truth)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= 0.05
    return answer.lower() == truth.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls_distance(truth: str, answer: str, *, strict: bool = False) -> float:
    """Edit distance of the texts, case and runs of white space aside, over the longer length *before* that folding.

    ``strict``: over the longer folded length. Two empty texts are 0 apart.
    """
    folded = [" ".join(text.lower().split()) for text in (truth, answer)]
    longest = max(map(len, folded if strict else (truth.upper(), answer.upper())))
    return edit_distance(*folded) / longest if longest else 0.0


def contains(answer: str, truth: str, *, formula: bool = False) -> bool:
    """The rule of OCRBench: the truth is part of the answer, case aside; formulas keep case and lose their spaces.

    An empty truth is part of every answer.
    """
    answer, truth = answer.strip(), truth.strip()
    if formula:
        return truth.replace("\n", "").replace(" ", "") in answer.replace("\n", "").replace(" ", "")
    return truth.lower().replace("\n", " ") in answer.lower().replace("\n", " ")


Method = Literal["vqa", "relaxed", "equal_max", "equal_mean", "anls"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An answer against each truth: both as they were compared, and the match of each (for "anls" a distance)."""

    truths: tuple[str, ...]
    answer: str
    match: tuple[float, ...]


def compare(answer: str, truths: Sequence[str], method: Method, *, strict: bool = False) -> Compared:
    """An answer against every truth. Raises ValueError for no truths.

    "vqa": normalised; a truth's match is how many *other* truths agree with the answer, in thirds, at most 1.
    """
    if not truths:
        raise ValueError("no truths to compare with")
    if method == "vqa":
        truths = [norm(truth, every_period=strict) for truth in truths]
        answer = norm(answer, every_period=strict)
        equal = [truth == answer for truth in truths]
        match: list[float] = [min(1.0, (sum(equal) - own) / 3) for own in equal]
    elif method == "anls":
        match = [anls_distance(truth, answer, strict=strict) for truth in truths]
    elif method == "relaxed":
        answer = answer.strip()
        match = [relaxed(answer, truth) for truth in truths]
    else:
        answer = answer.strip()
        match = [float(truth.strip().lower() == answer.lower()) for truth in truths]
    return Compared(truths=tuple(truths), answer=answer, match=tuple(match))


def total(compared: Compared, method: Method) -> float:
    """The score of an answer in [0, 1]: the best match, or the mean; an "anls" similarity below one half is 0."""
    if method == "anls":
        similarity = 1 - min(compared.match)
        return similarity if similarity >= 0.5 else 0.0
    if method in ("relaxed", "equal_max"):
        return float(max(compared.match))
    return sum(compared.match) / len(compared.match)
