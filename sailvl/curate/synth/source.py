"""Generated scenes as training records and as test questions, drawn from a seed: row i is always the same record.

Chance is measured, not assumed: the best score that one fixed answer reaches on many questions of the family, by the
verifier that judges it. For four equally likely answers that is a quarter; for boxes and lines of text it is whatever
the best guess without looking earns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from PIL import Image

from sailvl import assets
from sailvl.config import digest
from sailvl.curate.synth.families import FAMILIES, LANGS, Scene, Turn, world
from sailvl.curate.synth.scene import Drawing, draw
from sailvl.curate.synth.words import Lang
from sailvl.types import Message, Picture, Question, Record
from sailvl.verify import score

THINKING_PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
"""Appended to the question when the answer shall begin with a thought (the report's prompt, word for word)."""


def _pictures(scene: Scene) -> tuple[Picture, ...]:
    return tuple(Picture(width=d.width, height=d.height, ref=d, frame=scene.clip) for d in scene.drawings)


def _images(record: Record) -> list[Image.Image]:
    drawings = [picture.ref for picture in record.pictures]
    assert all(isinstance(drawing, Drawing) for drawing in drawings)
    return [draw(drawing) for drawing in drawings]


class SynthSource:
    """``size`` generated conversations about pictures. Implements the loader's source.

    A record draws a family evenly, makes one of its scenes, and asks up to ``max_turns`` of the questions that the
    scene supports and whose family is listed. With ``thinking`` only questions that have a thought are asked, one a
    record, and the answer is ``<think>`` thought ``</think>`` ``\\boxed{answer}``.
    """

    def __init__(
        self,
        name: str,
        *,
        families: Sequence[str],
        split: assets.Split,
        size: int,
        seed: int,
        side: int = 112,
        max_turns: int = 4,
        thinking: bool = False,
    ) -> None:
        unknown = sorted(set(families) - set(FAMILIES))
        if unknown:
            raise ValueError(f"source {name}: unknown families {unknown}; there are {sorted(FAMILIES)}")
        self.name = name
        self.families = tuple(families)
        self.split = split
        self.size = size
        self.seed = seed
        self.side = side
        self.max_turns = 1 if thinking else max_turns
        self.thinking = thinking

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """Changes when any record would."""
        return digest({key: value for key, value in vars(self).items() if key != "name"})

    def record(self, row: int) -> Record:
        """Row ``row``, without drawing it. Raises IndexError outside 0..size-1."""
        if not 0 <= row < self.size:
            raise IndexError(f"source {self.name}: row {row} of {self.size}")
        rng = Random(f"{self.seed}/{self.split}/{row}")
        while True:
            lang = rng.choice(LANGS)
            scene = rng.choice(FAMILIES[rng.choice(self.families)])(rng, world(self.split, self.side), lang, False)
            turns = [t for t in scene.turns if t.family in self.families and (t.thought or not self.thinking)]
            if turns:
                break
        messages: list[Message] = []
        for turn in rng.sample(turns, min(self.max_turns, len(turns))):
            messages.append(Message(role="user", text=self._question(turn)))
            messages.append(Message(role="assistant", text=self._answer(turn)))
        return Record(id=f"{self.name}/{row}", messages=tuple(messages), pictures=_pictures(scene))

    def _question(self, turn: Turn) -> str:
        return f"{turn.question} {THINKING_PROMPT}" if self.thinking else turn.question

    def _answer(self, turn: Turn) -> str:
        return f"<think>{turn.thought}</think>\\boxed{{{turn.answer}}}" if self.thinking else turn.answer

    def images(self, record: Record) -> list[Image.Image]:
        """The record's pictures, drawn, RGB."""
        return _images(record)


def _question(family: str, lang: Lang, split: assets.Split, seed: int, index: int, side: int) -> Question:
    rng = Random(f"question/{seed}/{split}/{family}/{lang}/{index}")
    turns: list[Turn] = []
    while not turns:  # a scene may support a family only sometimes
        scene = rng.choice(FAMILIES[family])(rng, world(split, side), lang, True)
        turns = [turn for turn in scene.turns if turn.family == family]
    turn = rng.choice(turns)
    record = Record(
        id=f"{family}-{lang}-{index:03d}",
        messages=(Message(role="user", text=turn.question),),
        pictures=_pictures(scene),
    )
    return Question(record=record, truth=turn.answer, family=family, lang=lang, verifier=turn.verifier, chance=0.0)


@functools.cache
def _chance(family: str, lang: Lang, split: assets.Split, side: int, population: int = 256, guesses: int = 48) -> float:
    asked = [_question(family, lang, split, -1, index, side) for index in range(population)]
    candidates = dict.fromkeys(question.truth for question in asked[:guesses])
    return max(sum(score(question, guess) for question in asked) / population for guess in candidates)


def questions(
    *, families: Sequence[str], per_family: int, split: assets.Split = "test", seed: int = 0, side: int = 112
) -> list[Question]:
    """``per_family`` questions of every family, half of them English and half Chinese, always the same ones."""
    return [
        replace(_question(family, lang, split, seed, index, side), chance=_chance(family, lang, split, side))
        for family in families
        for index in range(per_family)
        for lang in (LANGS[index % 2],)
    ]


def question_images(record: Record) -> list[Image.Image]:
    """The pictures of a question's record, drawn, RGB."""
    return _images(record)
