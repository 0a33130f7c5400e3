"""The whole curriculum at nano scale: the report's stages in its order, on drawn pictures, on a CPU, in minutes.

Differences from the report (arXiv 2509.14033, table 3): it starts from a pre-trained encoder and language model, and
nothing of this size exists, so three stages ``base-*`` make both first, one skill after another: a mixture of twelve
skills from random weights learns colours and then nothing for all the minutes there are, while one skill alone takes
half a minute and makes the next one easier. Supervised fine-tuning has three of its four phases,
and the third is run twice to have something to average; learning rates are those of small models trained from
scratch; ``longcot`` mixes direct answers with thoughts, or so small a model forgets how to give the former.
Reinforcement learning is not part of it.

Packs are small: a model this far from converged gains more from steps than from samples per step.
"""

from __future__ import annotations

from dataclasses import replace

from sailvl.curriculum import AdaLRS, Constant, Cosine, Curriculum, Fresh, Part, Probe, Soup, Source, Synth, Train
from sailvl.types import Mixture

ALL: tuple[Part, ...] = ("vit", "projector", "lm")

SOURCES: dict[str, Source] = {
    "count": Synth(families=("count",), size=100_000, seed=1, max_turns=1),
    "relation": Synth(families=("relation",), size=100_000, seed=2, max_turns=1),
    "clip": Synth(families=("clip",), size=100_000, seed=3),
    "colour": Synth(families=("colour",), size=100_000, seed=4, max_turns=1),
    "caption": Synth(families=("caption", "name", "colour"), size=100_000, seed=5, max_turns=2),
    "ocr": Synth(families=("ocr", "arithmetic"), size=100_000, seed=6, max_turns=2),
    "document": Synth(families=("chart", "table"), size=100_000, seed=7, max_turns=3),
    "ground": Synth(families=("where",), size=100_000, seed=8, max_turns=1),
    "compare": Synth(families=("compare",), size=100_000, seed=9, max_turns=1),
    "thought": Synth(families=("count", "arithmetic", "compare"), size=100_000, seed=10, thinking=True),
}

BASE_COUNT = Train(
    name="base-count",
    data=Mixture(shares={"count": 1.0}),
    trains=ALL,
    steps=320,
    max_tokens=1024,
    max_tiles=32,
    lr=1e-3,
    schedule=Constant(warmup_steps=60),
    betas=(0.9, 0.99),
    log_every=5,
)
BASE_RELATION = replace(
    BASE_COUNT,
    name="base-relation",
    init="base-count",
    data=Mixture(shares={"count": 0.4, "relation": 0.6}),
    steps=300,
    schedule=Constant(warmup_steps=40),
)
BASE_COLOUR = replace(
    BASE_RELATION,
    name="base-colour",
    init="base-relation",
    data=Mixture(shares={"count": 0.2, "relation": 0.3, "clip": 0.2, "colour": 0.3}),
    steps=300,
)
VIT_WARMUP = replace(
    BASE_COLOUR,
    name="vit-warmup",
    init="base-colour",
    data=Mixture(shares={"caption": 0.6, "ocr": 0.4}),
    trains=("projector",),
    steps=40,
    lr=2e-4,
    schedule=Cosine(warmup_steps=6),
)
VIT_ALIGN = replace(
    VIT_WARMUP,
    name="vit-align",
    init="vit-warmup",
    data=Mixture(shares={"caption": 0.4, "ocr": 0.2, "document": 0.2, "clip": 0.2}),
    trains=("vit", "projector"),
    steps=50,
)
VIT_KNOWLEDGE = replace(
    VIT_ALIGN,
    name="vit-knowledge",
    init="vit-align",
    data=Mixture(
        shares={
            "count": 0.1,
            "relation": 0.15,
            "clip": 0.05,
            "colour": 0.1,
            "document": 0.2,
            "compare": 0.1,
            "ocr": 0.3,
        }
    ),
    trains=ALL,
    steps=300,
    lr=8e-4,
    schedule=Constant(warmup_steps=40),
)
PRETRAIN = replace(
    VIT_KNOWLEDGE,
    name="pretrain",
    init="vit-knowledge",
    data=Mixture(shares={"caption": 0.2, "count": 0.2, "relation": 0.2, "clip": 0.1, "document": 0.2, "ocr": 0.1}),
    trains=("projector",),
    fresh=("projector",),
    steps=150,
    lr=5e-4,
    schedule=AdaLRS(base=Cosine(warmup_steps=10), window=10),
    log_every=1,
)
MULTITASK = replace(
    VIT_KNOWLEDGE,
    name="multitask",
    init="pretrain",
    data=Mixture(
        shares={
            "caption": 0.1, "count": 0.12, "relation": 0.18, "clip": 0.05, "colour": 0.05,
            "ocr": 0.15, "document": 0.2, "compare": 0.1, "ground": 0.05,
        }
    ),
    steps=1500,
    schedule=Cosine(warmup_steps=40, final=0.3),
)  # fmt: skip
SFT_1 = replace(
    MULTITASK,
    name="sft-1",
    init="multitask",
    data=Mixture(
        shares={"caption": 0.1, "count": 0.15, "relation": 0.15, "colour": 0.15, "document": 0.25, "ground": 0.2}
    ),
    steps=120,
    lr=3e-4,
    schedule=Cosine(warmup_steps=10, final=0.5),
)
SFT_2 = replace(
    SFT_1,
    name="sft-2",
    init="sft-1",
    data=Mixture(shares={"caption": 0.1, "count": 0.2, "relation": 0.1, "compare": 0.2, "document": 0.2, "ocr": 0.2}),
    steps=100,
    lr=2e-4,
)
SFT_3A = replace(
    SFT_2,
    name="sft-3a",
    init="sft-2",
    data=Mixture(
        shares={
            "caption": 0.1, "count": 0.1, "relation": 0.1, "clip": 0.2, "colour": 0.1,
            "compare": 0.1, "document": 0.1, "ground": 0.1, "ocr": 0.1,
        }
    ),
    steps=60,
    lr=1e-4,
    seed=1,
)  # fmt: skip
SFT_3B = replace(SFT_3A, name="sft-3b", seed=2)
LONGCOT = replace(
    SFT_3A,
    name="longcot",
    init="soup",
    data=Mixture(
        shares={
            "thought": 0.25, "caption": 0.1, "count": 0.2, "relation": 0.1, "clip": 0.05, "colour": 0.05,
            "compare": 0.05, "document": 0.1, "ground": 0.05, "ocr": 0.05,
        }
    ),
    steps=80,
    lr=5e-5,
    seed=0,
)  # fmt: skip

NANO = Curriculum(
    name="nano",
    model=Fresh(size="nano", seed=0, max_tiles=4),
    sources=SOURCES,
    stages=(
        BASE_COUNT,
        BASE_RELATION,
        BASE_COLOUR,
        VIT_WARMUP,
        VIT_ALIGN,
        VIT_KNOWLEDGE,
        PRETRAIN,
        MULTITASK,
        SFT_1,
        SFT_2,
        SFT_3A,
        SFT_3B,
        Soup(name="soup", of=("sft-3a", "sft-3b")),
        LONGCOT,
    ),
    probe=Probe(
        families=(
            "caption", "name", "colour", "count", "where", "relation",
            "ocr", "chart", "table", "arithmetic", "compare", "clip",
        ),
        samples=40,
    ),
)  # fmt: skip
