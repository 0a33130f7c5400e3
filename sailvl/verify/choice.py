"""Which of the offered options does an answer name? It must name exactly one.

An answer that lists several options, or none, is wrong: there is no guess and no judge behind it. Negation is not
understood ("not red" names red); a longer option hides a shorter one inside it ("dark red" does not also name "red").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from sailvl.verify.text import exact, fold


def choice(answer: str, truth: str, options: Sequence[str] = ()) -> float:
    """1 if the answer names the true option and no other.

    ``options`` are all that were offered, the truth among them; without them only the truth itself is right. Raises
    ValueError if the options are not different words, or the truth is not one of them.
    """
    if not options:
        return exact(answer, truth)
    folded = [fold(option) for option in options]
    if "" in folded or len(set(folded)) < len(folded):
        raise ValueError(f"the {len(options)} options {list(options)!r} must be different and not empty")
    if fold(truth) not in folded:
        raise ValueError(f"the truth {truth!r} is not among the {len(options)} options {list(options)!r}")
    return float(named(answer, options) == {fold(truth)})


def named(answer: str, options: Sequence[str]) -> set[str]:
    """The options, folded, that an answer names. Letters ("B") count in upper case, or as the whole answer."""
    text = fold(answer)
    folded = {fold(option) for option in options}
    if text in folded:
        return {text}
    if all(len(option) == 1 and option.isascii() and option.isalpha() for option in folded):
        # "A" before a lower-case word is the article, unless the word says that it is the answer.
        answer = unicodedata.normalize("NFKC", answer)
        letters = re.findall(r"(?<![\w'])[A-Z](?![\w'])(?!\s+(?!(?:is|or|and)\b)[a-z])", answer, re.ASCII)
        return {letter.casefold() for letter in letters} & folded
    # Longest first: at one place the regular expression takes the first alternative that fits.
    ordered = sorted(folded, key=len, reverse=True)
    return set(re.findall("|".join(map(_whole, ordered)), text))


def _whole(option: str) -> str:
    """A pattern for the option as whole words; Chinese has no spaces, so there it may touch its neighbours."""
    before = r"(?<![a-z0-9_])" if re.match(r"[a-z0-9_]", option) else ""
    after = r"(?![a-z0-9_])" if re.search(r"[a-z0-9_]$", option) else ""
    return before + re.escape(option) + after
