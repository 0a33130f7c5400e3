"""What a run is made of: a curriculum of training stages and soups, checked and printed before anything is computed.

A curriculum is one value: a model to start from, named sources, and stages that each start from an earlier stage's
model. ``check`` finds every fault of the graph at once, ``plan`` lists the stages, ``shrink`` makes the same graph
small, ``stage_hash`` says when a finished stage may be kept.

The report's curriculum (arXiv 2509.14033, section 3) counts samples per stage; here a stage counts optimizer steps of
``lanes`` packs of at most ``max_tokens`` tokens, because packs, not samples, are what a step consumes.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sailvl.config import did_you_mean, digest, to_dict, value
from sailvl.types import Mixture

Part = Literal["vit", "projector", "lm"]
Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ValueError(f"{name!r} names a folder: use up to 64 lower-case letters, digits, '-' and '_'")
    return name


Name = Annotated[str, AfterValidator(_folder_name)]

HASH_VERSION = 1
"""Raise when a change of the code makes finished stages invalid."""

NOT_HASHED = ("save_every", "log_every", "keep_last", "keep_best", "validation", "parallel")
"""Fields that cannot change a stage's weights (``parallel``: but for rounding)."""

LATER = (
    "lora", "weighting", "answer_only", "z_loss", "balance_loss", "sync_pool", "lane_group", "ema", "num_frames"
)  # fmt: skip
"""Fields that came later: at their defaults, a stage or source keeps the hash it had without them."""

MIN_WINDOW = 3
"""AdaLRS estimates a slope and its error: fewer points leave no degree of freedom."""


@value
class Constant:
    """The peak learning rate after a linear warm-up."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Natural = 0


@value
class Cosine:
    """Linear warm-up, then a half cosine down to ``final`` times the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Natural = 0
    final: Fraction = 0.1


@value
class WSD:
    """Linear warm-up, a plateau, then a linear decay over the last ``decay_steps`` to ``final`` times the peak."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Natural = 0
    decay_steps: Natural
    final: Fraction = 0.0


Base = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


@value
class AdaLRS:
    """Search for the learning rate during training, by the velocity of the loss (arXiv 2506.13274).

    ``window`` is in steps (None: a hundredth of the stage, at least 50). The search runs from ``start`` to ``stop``,
    fractions of the stage. ``margin`` multiplies the error that a change must exceed (0 is an ablation).
    ``rewind`` also takes the data and the step counter back at a rollback.
    """

    kind: Literal["adalrs"] = "adalrs"
    base: Base = Cosine()
    window: Count | None = None
    alpha: Annotated[float, Field(gt=1)] = 3.0
    beta: Annotated[float, Field(gt=1)] = 2.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99
    start: Fraction = 0.1
    stop: Fraction = 0.4
    margin: Annotated[float, Field(ge=0)] = 1.0
    rewind: bool = False


Schedule = Annotated[Constant | Cosine | WSD | AdaLRS, Field(discriminator="kind")]


@value
class Lora:
    """Learn through low-rank adapters of the linear layers, scaled by ``alpha / rank``, and not through the weights."""

    rank: Count = 16
    alpha: Count = 32


@value
class Parallel:
    """How processes and memory share a stage; nothing here changes what is computed, but for rounding.

    ``shard``: "zero3" gathers a block's weights for each use, "zero2" keeps them gathered from forward to backward.
    ``replicas`` (HSDP): so many groups of processes hold all weights each, usually one a node. ``experts``: processes
    that share one set of experts. ``offload`` keeps weights and optimizer in host memory. ``checkpointing`` recomputes
    activations: "full" all of a language model's block, "selective" all but its products of matrices.
    ``packs_per_forward`` joins packs of several lanes. ``save_async`` trains on while a checkpoint is written.
    """

    shard: Literal["zero2", "zero3"] = "zero3"
    replicas: Count = 1
    experts: Count = 1
    offload: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    packs_per_forward: Count = 1
    save_async: bool = False


@value
class Validation:
    """The loss on ``packs`` packs of held-out data, the same ones every time, after each ``every`` steps."""

    data: Mixture
    every: Count
    packs: Count = 8


@value
class Train:
    """One training run. ``init`` names an earlier stage (None: the curriculum's model).

    ``trains`` lists the parts that learn, ``fresh`` those that start from new random weights. With ``lora`` the parts
    learn through adapters alone; the finished stage has the adapters, and the model with them merged in. One step
    consumes ``lanes`` packs, each of at most ``max_tokens`` tokens and ``max_tiles`` tiles.

    ``weighting`` is what counts alike in the loss: every supervised token, every sample, or (sqrt) a sample by the
    square root of its supervised tokens. Packing many samples into a step makes the choice matter. Of the sources
    named in ``answer_only`` the thought before an answer is not learned. ``z_loss`` weighs the squared log of the
    softmax's sum, ``balance_loss`` how unevenly experts are used.

    ``sync_pool`` ready packs wait in each lane, so that lanes of one of the groups of ``lane_group`` can take packs of
    equal cost (0: none wait). ``ema`` is the decay of an average of the weights, kept beside the model.
    ``keep_best`` checkpoints of the lowest validation loss are kept beside the ``keep_last`` newest.
    """

    kind: Literal["train"] = "train"
    name: Name
    init: str | None = None
    data: Mixture
    trains: Annotated[tuple[Part, ...], Field(min_length=1)]
    fresh: tuple[Literal["projector"], ...] = ()
    lora: Lora | None = None
    steps: Count
    lanes: Count = 1
    max_tokens: Count
    max_tiles: Natural
    lr: Positive
    vit_lr_scale: Positive = 1.0
    schedule: Schedule = Cosine()
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    max_grad_norm: Positive = 1.0
    seed: Natural = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    weighting: Literal["token", "sample", "sqrt"] = "token"
    answer_only: tuple[str, ...] = ()
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    balance_loss: Annotated[float, Field(ge=0)] = 0.001
    sync_pool: Natural = 0
    lane_group: Count = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    validation: Validation | None = None
    parallel: Parallel = Parallel()
    save_every: Count = 100
    log_every: Count = 10
    keep_last: Count = 2
    keep_best: Natural = 0


@value
class Soup:
    """The uniform average of homologous models: stages that branched from one trained stage."""

    kind: Literal["soup"] = "soup"
    name: Name
    of: Annotated[tuple[str, ...], Field(min_length=1)]


Stage = Annotated[Train | Soup, Field(discriminator="kind")]


@value
class Jsonl:
    """Conversations in a JSON-lines file; picture paths are relative to ``image_root`` (None: the file's folder).

    ``num_frames`` are taken of a clip, unless its record says how many.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str
    image_root: str | None = None
    num_frames: Annotated[int, Field(ge=1, le=1024)] = 16


@value
class Parquet:
    """Conversations in a Parquet file, a folder of them, or a pattern; pictures inside, or below ``image_root``.

    ``num_frames`` are taken of a clip, unless its record says how many. Needs the extra ``parquet``.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    image_root: str | None = None
    num_frames: Annotated[int, Field(ge=1, le=1024)] = 16


@value
class WebDataset:
    """Samples in a plain tar shard, a folder of them, or a pattern (``train-*.tar``).

    ``prompt`` is what is asked about a picture that has a caption (``txt``) instead of a conversation (``json``).
    """

    kind: Literal["webdataset"] = "webdataset"
    path: str
    prompt: str = ""
    num_frames: Annotated[int, Field(ge=1, le=1024)] = 16


@value
class Synth:
    """Drawn pictures of ``side`` pixels with exact answers: ``size`` records, drawn evenly from the named families.

    ``thinking`` asks one question a record and answers with a thought first.
    """

    kind: Literal["synth"] = "synth"
    families: Annotated[tuple[str, ...], Field(min_length=1)]
    split: Literal["train", "validation", "test"] = "train"
    size: Count
    seed: Natural = 0
    side: Count = 112
    max_turns: Count = 4
    thinking: bool = False


Source = Annotated[Jsonl | Parquet | WebDataset | Synth, Field(discriminator="kind")]


@value
class Probe:
    """Questions asked of the model after every stage: ``samples`` of each family, half English and half Chinese."""

    families: Annotated[tuple[str, ...], Field(min_length=1)]
    samples: Count
    split: Literal["train", "validation", "test"] = "test"
    seed: Natural = 0
    side: Count = 112
    max_new_tokens: Count = 48


@value
class Fresh:
    """A model with new random weights. ``side`` (pixels of a tile) and ``max_tiles`` replace the size's own.

    At any resolution ``side`` is that of the position table, no side of a picture exceeds four of it, and ``max_tiles``
    bounds a picture's area in tiles.
    """

    kind: Literal["fresh"] = "fresh"
    size: Literal["nano", "nano-moe", "nano-anyres", "1b", "2b", "2b-anyres", "8b", "16b-a2.5b", "30b-a3b"] = "nano"
    seed: Natural = 0
    side: Count | None = None
    max_tiles: Count | None = None
    tokenizer: str | None = None


@value
class Checkpoint:
    """A model folder to start from."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str


Model = Annotated[Fresh | Checkpoint, Field(discriminator="kind")]


@value
class Curriculum:
    """A whole run. Ablations are ``dataclasses.replace``, which checks the values again."""

    name: Name
    model: Model = Fresh()
    sources: dict[str, Source]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    probe: Probe | None = None


# ---- faults of the graph --------------------------------------------------------------------------------------


def check(curriculum: Curriculum) -> list[tuple[str, str]]:
    """Find every fault that a single field cannot show; (path, message) pairs, empty when the graph is sound."""
    faults: list[tuple[str, str]] = []
    earlier: dict[str, Train | Soup] = {}
    every = [stage.name for stage in curriculum.stages]
    for index, stage in enumerate(curriculum.stages):
        path = f"stages.{index}"
        if stage.name in earlier:
            faults.append((f"{path}.name", f"'{stage.name}' is already the name of stages.{every.index(stage.name)}"))
        if isinstance(stage, Train):
            faults += _check_train(stage, path, curriculum, earlier, every)
        else:
            faults += _check_soup(stage, path, curriculum, earlier, every)
        earlier.setdefault(stage.name, stage)
    return faults


def _check_train(
    stage: Train, path: str, curriculum: Curriculum, earlier: Mapping[str, Train | Soup], every: list[str]
) -> list[tuple[str, str]]:
    faults = []
    if stage.init is not None and stage.init not in earlier:
        faults.append((f"{path}.init", _not_earlier(stage.init, stage.name, earlier, every)))
    mixtures = {"data": stage.data} | ({"validation.data": stage.validation.data} if stage.validation else {})
    for field, mixture in mixtures.items():
        for name in mixture.shares:
            if name not in curriculum.sources:
                hint = did_you_mean(name, curriculum.sources)
                faults.append((f"{path}.{field}.shares.{name}", f"no source has this name; {hint}"))
    for name in stage.answer_only:
        if name not in stage.data.shares:
            hint = did_you_mean(name, stage.data.shares)
            faults.append((f"{path}.answer_only", f"the stage has no source '{name}'; {hint}"))
    if stage.keep_best and stage.validation is None:
        faults.append((f"{path}.keep_best", "the best are those of the lowest validation loss: give a validation"))
    if stage.lanes % stage.lane_group:
        faults.append((f"{path}.lane_group", f"{stage.lanes} lanes do not make groups of {stage.lane_group}"))
    for part in stage.fresh:
        if part not in stage.trains:
            faults.append((f"{path}.fresh", f"a fresh {part} that is not trained stays random; add it to trains"))
    if len(set(stage.trains)) < len(stage.trains):
        faults.append((f"{path}.trains", f"a part is listed twice: {', '.join(stage.trains)}"))
    if stage.lora is not None and stage.ema is not None:
        faults.append((f"{path}.ema", "adapters are merged at the end, and their average is not: leave it out"))
    if stage.lora is not None and stage.fresh:
        faults.append((f"{path}.lora", f"adapters beside a fresh {stage.fresh[0]} leave it random; train it first"))
    if stage.lora is not None and stage.init is None and isinstance(curriculum.model, Fresh):
        faults.append((f"{path}.lora", "adapters need a trained model: start from a stage, or a checkpoint"))
    return faults + _check_schedule(stage, f"{path}.schedule")


def _check_schedule(stage: Train, path: str) -> list[tuple[str, str]]:
    schedule, faults = stage.schedule, []
    base = schedule.base if isinstance(schedule, AdaLRS) else schedule
    inner = f"{path}.base" if isinstance(schedule, AdaLRS) else path
    if base.warmup_steps >= stage.steps:
        text = f"{base.warmup_steps} steps of warm-up do not end before the stage does ({stage.steps} steps)"
        faults.append((f"{inner}.warmup_steps", text))
    elif isinstance(base, WSD) and base.warmup_steps + base.decay_steps > stage.steps:
        text = f"warm-up ({base.warmup_steps}) and decay ({base.decay_steps}) exceed the stage's {stage.steps} steps"
        faults.append((f"{inner}.decay_steps", text))
    if not isinstance(schedule, AdaLRS):
        return faults
    if schedule.start >= schedule.stop:
        faults.append((f"{path}.start", f"the search must start before it stops ({schedule.start} >= {schedule.stop})"))
        return faults
    if base.warmup_steps > schedule.start * stage.steps:
        text = f"warm-up ends at step {base.warmup_steps}, after the search starts ({schedule.start * stage.steps:g})"
        faults.append((f"{inner}.warmup_steps", text))
    window = adalrs_window(schedule, stage.steps)
    active = (schedule.stop - schedule.start) * stage.steps
    if window < MIN_WINDOW:
        faults.append((f"{path}.window", f"a window of {window} steps shows no slope; use at least {MIN_WINDOW}"))
    elif active < 4 * window - 1e-6:
        text = f"the search lasts {active:g} steps, fewer than 4 windows of {window}: raise steps or lower window"
        faults.append((f"{path}.window", text))
    return faults


def _check_soup(
    stage: Soup, path: str, curriculum: Curriculum, earlier: Mapping[str, Train | Soup], every: list[str]
) -> list[tuple[str, str]]:
    faults = []
    for position, name in enumerate(stage.of):
        if name not in earlier:
            faults.append((f"{path}.of.{position}", _not_earlier(name, stage.name, earlier, every)))
        elif name in stage.of[:position]:
            faults.append((f"{path}.of.{position}", f"'{name}' is listed twice"))
    if not faults and not _homologous(stage, curriculum, earlier):
        text = f"{', '.join(stage.of)} share no trained ancestor without a fresh part after it: their average is noise"
        faults.append((f"{path}.of", text))
    return faults


def _homologous(soup: Soup, curriculum: Curriculum, earlier: Mapping[str, Train | Soup]) -> bool:
    common = set.intersection(*(_family(name, curriculum, earlier) for name in soup.of))
    return bool(common)


def _family(name: str | None, curriculum: Curriculum, earlier: Mapping[str, Train | Soup]) -> set[str]:
    """Stages (and "" for a given checkpoint) whose weights the named stage continues in every part."""
    if name is None:
        return {""} if isinstance(curriculum.model, Checkpoint) else set()
    stage = earlier.get(name)
    if stage is None:
        return set()
    if isinstance(stage, Soup):
        members = [_family(member, curriculum, earlier) for member in stage.of]
        return {name} | set.intersection(*members)
    return {name} if stage.fresh else {name} | _family(stage.init, curriculum, earlier)


def _not_earlier(name: str, own: str, earlier: Mapping[str, Train | Soup], every: list[str]) -> str:
    if name == own:
        return "a stage cannot start from itself"
    if name in every:
        return f"'{name}' comes later; put it before this stage"
    return f"no earlier stage is called '{name}'; {did_you_mean(name, earlier)}"


def sources_of(stage: Train) -> list[str]:
    """Names of the sources a stage reads, for training and validation, sorted."""
    return sorted({*stage.data.shares, *(stage.validation.data.shares if stage.validation else ())})


def adalrs_window(schedule: AdaLRS, steps: int) -> int:
    """Length of AdaLRS's window in steps: as given, else a hundredth of the stage and at least 50."""
    return schedule.window or max(50, math.ceil(0.01 * steps))


# ---- plan, shrink, hash -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One stage of the plan. ``max_tokens`` is an upper bound: packs are rarely full to the last token."""

    name: str
    init: str
    trains: str
    steps: int
    max_tokens: int
    lr: float | None
    schedule: str
    data: str


def plan(curriculum: Curriculum) -> list[PlanRow]:
    """List the stages: what each trains, from where, on what, for how many steps and at most how many tokens."""
    return [_plan_row(stage) for stage in curriculum.stages]


def _plan_row(stage: Train | Soup) -> PlanRow:
    if isinstance(stage, Soup):
        init = " + ".join(stage.of)
        return PlanRow(name=stage.name, init=init, trains="", steps=0, max_tokens=0, lr=None, schedule="soup", data="")
    shares = sorted(stage.data.shares.items(), key=lambda pair: -pair[1])
    kind = stage.schedule.kind
    return PlanRow(
        name=stage.name,
        init=stage.init or "start",
        trains=", ".join(f"{part} (fresh)" if part in stage.fresh else part for part in stage.trains)
        + (f" (lora {stage.lora.rank})" if stage.lora else ""),
        steps=stage.steps,
        max_tokens=stage.steps * stage.lanes * stage.max_tokens,
        lr=stage.lr,
        schedule=f"adalrs on {stage.schedule.base.kind}" if isinstance(stage.schedule, AdaLRS) else kind,
        data=", ".join(f"{name} {share:.0%}" for name, share in shares),
    )


def shrink(curriculum: Curriculum, factor: float) -> Curriculum:
    """Keep the graph and divide the steps by ``factor``: for tests and a first look on a laptop.

    Warm-up, decay and AdaLRS's window shrink along, so that a sound curriculum stays sound: a stage under AdaLRS keeps
    at least the steps of four of the shortest windows. Sources, models and packs stay as they are.
    """
    if factor < 1:
        raise ValueError(f"shrink divides by its factor: it must be at least 1, not {factor}")
    stages = tuple(_shrink_stage(stage, factor) for stage in curriculum.stages)
    probe = curriculum.probe
    if probe is not None:
        probe = dataclasses.replace(probe, samples=max(1, int(probe.samples / factor)))
    return dataclasses.replace(curriculum, stages=stages, probe=probe)


def _shrink_stage(stage: Train | Soup, factor: float) -> Train | Soup:
    if isinstance(stage, Soup):
        return stage
    schedule, steps = stage.schedule, max(1, int(stage.steps / factor))
    if isinstance(schedule, AdaLRS):
        active = schedule.stop - schedule.start
        steps = min(
            stage.steps, max(steps, math.ceil(4 * MIN_WINDOW / active), math.ceil(1 / max(schedule.start, 0.01)))
        )
        window = min(adalrs_window(schedule, stage.steps), max(MIN_WINDOW, int(active * steps / 4 + 1e-6)))
        base = _shrink_schedule(schedule.base, factor, limit=int(schedule.start * steps))
        new: Constant | Cosine | WSD | AdaLRS = dataclasses.replace(schedule, window=window, base=base)
    else:
        new = _shrink_schedule(schedule, factor, limit=steps - 1)
    if isinstance(new, WSD):
        new = dataclasses.replace(new, decay_steps=min(new.decay_steps, steps - new.warmup_steps))
    return dataclasses.replace(stage, steps=steps, schedule=new, log_every=max(1, int(stage.log_every / factor)))


def _shrink_schedule(schedule: Constant | Cosine | WSD, factor: float, *, limit: int) -> Constant | Cosine | WSD:
    warmup = min(limit, int(schedule.warmup_steps / factor))
    if isinstance(schedule, WSD):
        return dataclasses.replace(schedule, warmup_steps=warmup, decay_steps=int(schedule.decay_steps / factor))
    return dataclasses.replace(schedule, warmup_steps=warmup)


def hashed_fields(stage: Train | Soup) -> dict[str, Any]:
    """The fields of a stage that decide its weights, as plain data."""
    return {key: item for key, item in _known_before(stage).items() if key not in NOT_HASHED}


def _known_before(value: Any) -> dict[str, Any]:
    """Its fields as plain data, without later ones that are at their default."""
    defaults = {field.name: to_dict(field.default) for field in dataclasses.fields(value)}
    return {key: item for key, item in to_dict(value).items() if key not in LATER or item != defaults[key]}


def stage_hash(curriculum: Curriculum, name: str, fingerprints: Mapping[str, str] | None = None) -> str:
    """Hash a stage, its ancestors, their sources and the first model (sha256 hex): equal hash, equal weights.

    ``fingerprints`` maps sources to a digest of their content; give it whenever the data can change under its name.
    Other stages, the probe and how often is saved or logged do not count. Raises KeyError for an unknown stage.
    """
    stages = {stage.name: stage for stage in curriculum.stages}
    known: dict[str, str] = {}

    def hash_of(stage: Train | Soup) -> str:
        if stage.name in known:
            return known[stage.name]
        content = hashed_fields(stage)
        if isinstance(stage, Soup):
            parents = [hash_of(stages[member]) for member in stage.of]
        else:
            parents = [hash_of(stages[stage.init]) if stage.init else digest(curriculum.model)]
            content["sources"] = {
                source: [_known_before(curriculum.sources[source]), (fingerprints or {}).get(source, "")]
                for source in stage.data.shares
            }
        known[stage.name] = digest({"version": HASH_VERSION, "stage": content, "parents": parents})
        return known[stage.name]

    return hash_of(stages[name])
