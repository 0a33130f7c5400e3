"""Build the committed corpus under ``sailvl/assets/`` from downloaded packages, and NOTICE from what was taken.

    python tools/build_corpus.py --packages DIR

DIR holds the files listed in ``tools/corpus/packages.py`` (pinned by sha256). The result is a function of those
packages and of Pillow's WebP encoder alone: order, names and splits never depend on time, hash seeds or the machine.
A drawing without a licence, or under one that is not allowed, stops the build.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from corpus import emoji, font, tables, text, vector
from corpus.drafts import LICENCES, Draft, join, split_of
from corpus.notices import NOTICE_HEAD, NOTICE_LICENCES
from corpus.packages import PACKAGES
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "sailvl" / "assets" / "corpus"
MAX_BYTES = 22_000_000
QUALITY = 80


def encode(image: Image.Image, flat: bool) -> bytes:
    """WebP: quality 80 for drawings, lossless for icons of a few flat colours (smaller, and sharp)."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4, lossless=flat, alpha_quality=90)
    return buffer.getvalue()


def write_items(drafts: Sequence[Draft], out: Path) -> list[dict[str, object]]:
    """One blob of pictures per source and one index line per drawing; returns the index rows."""
    rows: list[dict[str, object]] = []
    blobs: dict[str, bytearray] = {}
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for draft, concept in zip(drafts, join(drafts), strict=True):
        if draft.licence not in LICENCES:
            raise ValueError(f"{draft.source} {draft.path}: licence {draft.licence!r} is not one of {sorted(LICENCES)}")
        data = encode(draft.image, flat=draft.kind == "icon")
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen:
            if draft.kind == "flag":
                raise ValueError(f"{draft.source} {draft.path} ({draft.name_en}) is drawn exactly like {seen[digest]}")
            continue
        seen[digest] = draft.name_en
        blob = blobs.setdefault(draft.source, bytearray())
        name = f"{draft.source}/{Path(draft.path).stem}"
        if name in ids:
            name = f"{draft.source}/{Path(draft.path).parent.name}/{Path(draft.path).stem}"
        if name in ids:
            raise ValueError(f"{draft.source} {draft.path}: the id {name} is taken")
        ids.add(name)
        row = {
            "id": name,
            "concept": concept,
            "split": split_of(concept),
            "kind": draft.kind,
            "category": draft.category,
            "name_en": draft.name_en,
            "name_zh": draft.name_zh,
            "keywords_en": list(draft.keywords_en),
            "keywords_zh": list(draft.keywords_zh),
            "description": draft.description,
            "facts": dict(draft.facts),
            "source": draft.source,
            "path": draft.path,
            "licence": draft.licence,
            "author": draft.author,
            "width": draft.image.width,
            "height": draft.image.height,
            "offset": len(blob),
            "size": len(data),
            "sha256": digest,
        }
        rows.append({key: value for key, value in row.items() if value not in (None, [], {})})
        blob += data
    for source, blob in blobs.items():
        (out / f"{source}.bin").write_bytes(blob)
    _write_lines(out / "items.jsonl", rows)
    return rows


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def write_packages(out: Path) -> None:
    """What the source names in the index stand for."""
    rows = {
        name: {"package": p.label, "sha256": p.sha256, "licence": p.licence, "credit": p.credit}
        for name, p in PACKAGES.items()
    }
    (out / "packages.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def notice(rows: Sequence[dict[str, object]], table_rows: Sequence[dict[str, object]]) -> str:
    """The project's NOTICE: what was taken from which package, under which licence, and from whom."""
    counts = Counter(str(row["source"]) for row in rows)
    uses = {
        "emojibase": "names of the emoji",
        "poetry": "lines of verse to read; training text of the tokenizer",
        "wordnet": "definitions to read; training text of the tokenizer",
        "qwen3-tokenizer": "split rule and added tokens of the nano tokenizer; no vocabulary",
        "microhei": "font.ttf, a subset without hinting",
    }
    parts = [NOTICE_HEAD]
    for name, package in sorted(PACKAGES.items()):
        mine = [row for row in table_rows if row["source"] == name]
        what = f"{counts[name]} drawings" if counts[name] else uses.get(name) or f"{len(mine)} tables"
        parts += ["", f"{package.label}", f"    {package.credit}", f"    Licence: {package.licence}. Taken: {what}."]
        parts += [f"    {row['title_en']}: {row['licence']}; {' '.join(str(row['credit']).split())}" for row in mine]
    authors = sorted({str(row["author"]) for row in rows if row["source"] == "openclipart" and "author" in row})
    parts += ["", "Artists of the Open Clip Art drawings (each is named in corpus/items.jsonl):"]
    parts += textwrap.wrap(", ".join(authors), 110, initial_indent="    ", subsequent_indent="    ")
    for name, text_of_licence in NOTICE_LICENCES.items():
        parts += ["", "-" * 80, f"{name}", "", text_of_licence.strip()]
    return "\n".join(parts) + "\n"


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.packages
    drafts = [
        *emoji.drafts(folder),
        *vector.flags(folder),
        *vector.icon_park(folder),
        *vector.tabler(folder),
        *vector.clip_art(folder),
    ]
    rows = write_items(drafts, arguments.out)
    table_rows = tables.build(folder)
    lines = text.reading_lines(folder)
    write_json(arguments.out / "tables.json", table_rows)
    _write_lines(arguments.out / "lines.jsonl", lines)
    write_packages(arguments.out)
    drawn = [str(row.get("name_zh", "")) for row in rows] + [str(line["text"]) for line in lines]
    drawn += [str(row[key]) for row in table_rows for key in ("title_zh", "columns_zh")]
    (arguments.out / "font.ttf").write_bytes(font.build(folder, drawn))
    (arguments.out / "NOTICE").write_text(notice(rows, table_rows), encoding="utf-8")
    if arguments.out == OUT:
        (ROOT / "NOTICE").write_bytes((arguments.out / "NOTICE").read_bytes())
    total = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{len(rows)} drawings, {len({row['concept'] for row in rows})} concepts, {len(table_rows)} tables, ")
    print(f"{len(lines)} lines, {total / 1e6:.1f} MB")
    if total > MAX_BYTES:
        raise SystemExit(f"the corpus takes {total} bytes, limit {MAX_BYTES}")


if __name__ == "__main__":
    main()
