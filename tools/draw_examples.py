"""Draw the pictures of ``examples/pictures`` from sprites of the test split, which no training picture shows."""

from __future__ import annotations

from pathlib import Path

from sailvl.curate.synth import questions
from sailvl.curate.synth.source import question_images

WANTED = {"ball.png": ("relation", "Where is the animal"), "things.png": ("count", "How many")}


def main() -> None:
    out = Path(__file__).resolve().parent.parent / "examples" / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    for name, (family, asked) in WANTED.items():
        for question in questions(families=[family], per_family=400, seed=1):
            text = question.record.messages[0].text
            if asked in text and question.truth != "1":
                question_images(question.record)[0].save(out / name)
                print(f"{name}: {text} {question.truth}")
                break


if __name__ == "__main__":
    main()
