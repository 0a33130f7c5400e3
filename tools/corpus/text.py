"""Running text of the corpus: poems in simplified characters (Tang, Song, Qing; public domain) and WordNet glosses.

Lines of both are what the reading tasks draw on pictures. A poem is split as a whole, a gloss by its headword.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from corpus.drafts import refused, split_of
from corpus.packages import members

_POEMS = ("package/dist/shuimotangshi/", "package/dist/nalanxingde/", "package/dist/songci/ci.song.")


def poems(folder: Path) -> list[tuple[str, list[str]]]:
    """(author and title, lines) of every complete poem; the modern commentary beside some of them is not taken."""

    def wanted(path: str) -> bool:
        return path.startswith(_POEMS) and path.endswith(".json")

    found = []
    for data in members(folder, "poetry", wanted).values():
        for poem in json.loads(data):
            lines = [line.strip() for line in poem.get("paragraphs") or poem.get("para") or []]
            title = poem.get("title") or poem.get("rhythmic") or ""
            if lines and not re.search(r"[□■?？\[\]【】{}]|[A-Za-z0-9]", "".join(lines) + title):
                found.append((f"{poem['author']} {title} {lines[0]}", lines))
    return found


def glosses(folder: Path) -> list[tuple[str, str]]:
    """(headword, definition) of WordNet's nouns and verbs: the first clause, without examples."""
    prefix = "./usr/share/wordnet/data."
    found = []
    for data in members(folder, "wordnet", {prefix + "noun", prefix + "verb"}.__contains__).values():
        for line in data.decode().splitlines():
            if not line.startswith("  "):
                fields, _, gloss = line.partition(" | ")
                head, text = fields.split()[4].replace("_", " "), gloss.split(";")[0].strip()
                if text and not refused(head, text):
                    found.append((head, text))
    return found


def reading_lines(folder: Path, per_language: int = 6000) -> list[dict[str, object]]:
    """Short lines to draw and read, spread evenly over the sources: rows of lang, split, text."""
    chinese = [
        (key, clause)
        for key, lines in poems(folder)
        for line in lines
        for clause in re.split(r"(?<=[。！，；])", line)
        if re.fullmatch(r"[一-龥]{4,11}[。！，；]?", clause)
    ]
    english = [(head, text) for head, text in glosses(folder) if 8 <= len(text) <= 40 and text.isascii()]
    rows: list[dict[str, object]] = []
    for lang, pairs in (("en", english), ("zh", chinese)):
        step = max(1, len(pairs) // per_language)
        seen: set[str] = set()
        for key, text in pairs[::step][:per_language]:
            text = text.rstrip("。！，；")
            if text not in seen:
                seen.add(text)
                rows.append({"lang": lang, "split": split_of("line:" + key), "text": text})
    return rows
