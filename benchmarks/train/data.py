"""Conversations of mixed length about the corpus's drawings, as JSON lines and JPEG files: what every arm trains on.

Scenes are those of ``sailvl.curate.synth``; their sizes, numbers of pictures and of turns, and lines of the corpus's
text as long answers make the lengths as mixed as instruction data: captions, short questions, long conversations, text
alone, several pictures. Lengths decide what packing is worth, so the result prints their quartiles.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sailvl import assets
from sailvl.curate.synth.source import SynthSource, question_images
from sailvl.types import IMAGE_PLACEHOLDER

# (share, sides of the pictures, pictures, turns a picture, lines of text as a last answer): least and most of each.
KINDS = (
    (0.35, (112, 112, 168, 224, 336), (1, 1), ("caption",), (1, 1), (0, 2)),  # captions
    (0.30, (112, 112, 224, 336), (1, 1), ("relation", "colour", "count", "where", "ocr"), (1, 3), (0, 0)),  # questions
    (0.15, (224, 336), (1, 1), ("chart", "table", "compare", "describe", "arithmetic"), (2, 6), (3, 25)),  # long ones
    (0.10, (), (0, 0), (), (0, 0), (4, 50)),  # text alone
    (0.10, (112, 224), (2, 3), ("caption", "colour", "count"), (1, 2), (0, 6)),  # several pictures
)


def write(folder: Path, rows: int, seed: int = 0) -> Path:
    """``rows`` records in ``folder``/data.jsonl, pictures beside it; row i is always the same. Returns the file."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = assets.lines("train", "en")
    scenes: dict[tuple[tuple[str, ...], int], SynthSource] = {}
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            draw = random.Random(f"{seed}/{row}")
            _, sides, count, families, turns, text = draw.choices(KINDS, [kind[0] for kind in KINDS])[0]
            messages: list[dict[str, str]] = []
            images: list[str] = []
            for _ in range(draw.randint(*count)):
                side, most = draw.choice(sides), draw.randint(*turns)
                if (families, side) not in scenes:
                    scenes[families, side] = SynthSource(
                        "scenes", families=families, split="train", size=10**6, seed=seed, side=side, max_turns=8
                    )
                record = scenes[families, side].record(draw.randrange(10**6))
                asked = [{"role": message.role, "content": message.text} for message in record.messages[: 2 * most]]
                asked[0]["content"] = IMAGE_PLACEHOLDER * len(record.pictures) + "\n" + asked[0]["content"]
                for image in question_images(record):
                    name = f"{row}-{len(images)}.jpg"
                    image.save(pictures / name, quality=90)
                    images.append(f"pictures/{name}")
                messages += asked
            if (wanted := draw.randint(*text)) or not messages:
                messages.append({"role": "user", "content": f"Write {wanted} entries of a dictionary."})
                messages.append({"role": "assistant", "content": "\n".join(draw.choices(lines, k=max(1, wanted)))})
            value = {"id": str(row), "messages": messages, **({"images": images} if images else {})}
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return path
