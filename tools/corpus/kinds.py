"""What kind of thing a name names, when two independent sources agree.

The folder or icon category suggests a kind; WordNet must have a sense of the name's last word below the matching
synset. Where the two do not agree the drawing has no kind, nor has a plant that is also a food (a cherry): a wrong kind
would teach a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from corpus.drafts import normalise
from corpus.packages import members

# category -> WordNet words whose first noun sense is the root of the kind
_ROOTS = {
    "animal": ("animal",), "plant": ("plant#2", "flower"), 
    "food": ("food", "foodstuff", "edible_fruit", "vegetable", "dish#2"),
    "drink": ("beverage",), "vehicle": ("vehicle", "craft#2"), "building": ("building", "tower", "house"),
    "clothing": ("clothing", "footwear#2", "headdress"), "tool": ("tool", "implement"),
    "music": ("musical_instrument",), "sport": ("sport", "sports_equipment"), "weather": ("weather", "precipitation#3"),
    "person": ("person",), "body": ("body_part",), "device": ("electronic_equipment", "computer", "telephone"),
    "household": ("furniture", "kitchen_utensil", "home_appliance"), "stationery": ("writing_implement",),
}  # fmt: skip


@cache
def _wordnet(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Noun -> its synsets in order of use, and synset -> its hypernyms."""
    prefix = "./usr/share/wordnet/"
    files = members(folder, "wordnet", {prefix + "index.noun", prefix + "data.noun"}.__contains__)
    senses: dict[str, list[str]] = {}
    above: dict[str, list[str]] = {}
    for line in files[prefix + "index.noun"].decode().splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0]] = fields[-int(fields[2]) :]
    for line in files[prefix + "data.noun"].decode().splitlines():
        if not line.startswith("  "):
            fields = line.split(" | ")[0].split()
            above[fields[0]] = [fields[i + 1] for i, field in enumerate(fields) if field in ("@", "@i")]
    return senses, above


@cache
def is_noun(folder: Path, name: str) -> bool:
    """Whether WordNet knows the last word of a name (or its singular) as a noun."""
    return bool(_senses(folder, name))


def _senses(folder: Path, name: str) -> list[str]:
    senses, _ = _wordnet(folder)
    words = normalise(name).split()
    for lemma in ("_".join(words), *(words[-1:])):
        for form in (lemma, lemma.removesuffix("s"), lemma.removesuffix("es")):
            if form in senses:
                return senses[form]
    return []


@cache
def agreed(folder: Path, name: str, suggested: str | None) -> str | None:
    """The suggested category if one of the name's first two senses is of that kind, else None."""
    if suggested not in _ROOTS or (suggested == "plant" and agreed(folder, name, "food")):
        return None
    senses, above = _wordnet(folder)
    roots = set()
    for root in _ROOTS[suggested]:
        word, _, number = root.partition("#")
        if word in senses:
            roots.add(senses[word][int(number or 1) - 1])
    reached, todo = set(), _senses(folder, name)[:2]
    while todo:
        synset = todo.pop()
        if synset not in reached:
            reached.add(synset)
            todo.extend(above[synset])
    return suggested if roots & reached else None


def first_match(rules: Mapping[str, str], path: str) -> str | None:
    """The value of the first key that is a prefix of ``path``."""
    return next((value for key, value in rules.items() if path.startswith(key)), None)
