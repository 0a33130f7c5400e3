"""What a curriculum would cost on given GPUs: memory of each, days, communication, and what to change where it fails.

Everything follows from the recipe and the configurations alone (``memory``, ``flops``, ``hardware``); nothing is
downloaded, built or measured, and torch is not loaded. How many samples a step has is unknown, as packs hold what fits.
The assumptions are in ``ASSUMED``, and printed with every plan.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sailvl import assets
from sailvl.config import ConfigError
from sailvl.curriculum import Checkpoint, Curriculum, Fresh, Parallel, Train
from sailvl.sizes import SIZES
from sailvl.train.flops import Shape, step_flops
from sailvl.train.hardware import Gpu
from sailvl.train.memory import CONTEXT, MAX_REPLICATED, MAX_WAITING, Memory, experts, parameters, step_memory

DOCUMENT, SUPERVISED = 1200, 0.25
NODE, NETWORK = 8, 45.0
USABLE = 0.94

ASSUMED = (
    f"Packs are full, of documents of {DOCUMENT:,} tokens, {SUPERVISED:.0%} of them supervised. Memory is for all the "
    "tiles that packs may have, days for half of the tokens being image tokens (or fewer, if max_tiles says so).",
    f"Of each GPU {CONTEXT / 1e9:g} GB are the CUDA context and libraries, and {1 - USABLE:.0%} is left for "
    "fragmentation. bf16, fused attention, frozen weights stored in bf16.",
    f"Nodes of {NODE} GPUs; between nodes {NETWORK:g} GB/s for each GPU, within one {0.75:.0%} of what its links can.",
)
"""What a plan takes for granted; a line each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage on the GPUs: bytes of each, work, and time at the given MFU.

    ``days`` and ``step_seconds`` leave out loading, saving and waiting. ``traffic`` is bytes of each GPU per step;
    ``traffic_share`` its time over the computation's (above 1 it cannot be hidden). ``advice`` is empty if it fits.
    """

    name: str
    memory: Memory
    fits: bool
    flops: int
    step_seconds: float
    days: float
    traffic: int
    traffic_share: float
    advice: str


def dims(curriculum: Curriculum) -> Any:
    """Shape of the curriculum's model, with the fields of a ``SailVLConfig`` that counting needs.

    Raises ConfigError for a model folder that is missing or says too little.
    """
    model = curriculum.model
    if isinstance(model, Checkpoint):
        return _of_folder(Path(model.path))
    side, vision, text = SIZES[model.size]
    vision = {**vision, "image_size": model.side or side, "patch_size": 14}
    return _namespace(vision, {**text, "vocab_size": _vocabulary(model)}, select_layer=-1, ratio=0.5)


def released(size: str) -> Any:
    """The same of a named size with the vocabulary that the size itself has."""
    side, vision, text = SIZES[size]
    return _namespace({**vision, "image_size": side, "patch_size": 14}, text, select_layer=-1, ratio=0.5)


def _vocabulary(model: Fresh) -> int:
    """Rows of the embedding: the tokenizer's ids, rounded up to 64."""
    path = Path(model.tokenizer) if model.tokenizer else assets.tokenizer_path()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = {*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([("model.tokenizer", f"{path}: not a readable tokenizer.json ({error})")]) from error
    return -(-len(tokens) // 64) * 64


def _of_folder(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError([("model.path", f"{folder}: no model folder here (it would hold a config.json)")])
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        text = given.get("llm_config") or given["text_config"]
        # What a configuration leaves out is what the classes it was written by take for it.
        defaults = {"image_size": 224, "patch_size": 14}
        vision = {**defaults, **given["vision_config"]}
        select, ratio = given.get("select_layer", -4), given.get("downsample_ratio", 0.5)
        return _namespace(vision, text, select_layer=select, ratio=ratio)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([("model.path", f"{path}: cannot be read as a SAIL-VL2 configuration ({error})")]) from error


def _namespace(vision: dict[str, Any], text: dict[str, Any], *, select_layer: int, ratio: float) -> Any:
    own = SimpleNamespace(
        **{"num_channels": 3, **vision}, num_patches=(vision["image_size"] // vision["patch_size"]) ** 2
    )
    sparse = text.get("model_type", "qwen3") == "qwen3_moe"
    head = text["hidden_size"] // text["num_attention_heads"] if sparse else 128
    words = {"tie_word_embeddings": False, "head_dim": head, "decoder_sparse_step": 1, **text}
    words["mlp_only_layers"] = text.get("mlp_only_layers") or []
    # transformers 5 writes the number of experts under another name than releases do.
    words["num_experts"] = text.get("num_experts", text.get("num_local_experts", 0)) if sparse else 0
    needed = ["vocab_size", "num_key_value_heads", *("num_experts_per_tok", "moe_intermediate_size")[: 2 * sparse]]
    for given, names in ((vision, []), (text, needed)):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *names):
            _ = given[name]  # KeyError names the field
    merge = round(1 / ratio)
    return SimpleNamespace(
        vision_config=own,
        text_config=SimpleNamespace(**words),
        select_layer=select_layer,
        merge=merge,
        tokens_per_tile=(vision["image_size"] // vision["patch_size"] // merge) ** 2,
    )


# ---- one stage on the GPUs ------------------------------------------------------------------------------------------


def costs(curriculum: Curriculum, *, gpus: int, gpu: Gpu, mfu: float) -> list[StageCost]:
    """Every training stage on ``gpus`` of kind ``gpu`` that reach ``mfu`` of their peak. ConfigError as in ``dims``."""
    config = dims(curriculum)
    return [cost(config, stage, gpus, gpu, mfu) for stage in curriculum.stages if isinstance(stage, Train)]


def cost(config: Any, stage: Train, gpus: int, gpu: Gpu, mfu: float) -> StageCost:
    """One stage; ``config`` is from ``dims``."""
    memory = _memory(config, stage, gpus)
    fits = memory.total <= gpu.memory * 1e9 * USABLE
    rank, pack = stage.lora.rank if stage.lora else None, _shape(config, stage, 0.5)
    flops = stage.lanes * step_flops(config, [pack], stage.trains, lora_rank=rank)
    seconds = flops / (gpus * gpu.flops * mfu)
    gathers, exchanges, between = _traffic(config, stage, gpus)
    near, far = gpu.link * 0.75e9, NETWORK * 1e9
    waits = gathers / (near if gpus // stage.parallel.replicas <= NODE else far)
    waits += exchanges / (near if stage.parallel.experts <= NODE else far) + between / (near if gpus <= NODE else far)
    advice = _uneven(stage, gpus) or ("" if fits else _remedy(config, stage, gpus, gpu))
    return StageCost(
        name=stage.name,
        memory=memory,
        fits=fits,
        flops=flops,
        step_seconds=seconds,
        days=seconds * stage.steps / 86400,
        traffic=gathers + exchanges + between,
        traffic_share=waits / seconds,
        advice=advice,
    )


def _shape(config: Any, stage: Train, share: float) -> Shape:
    """A full pack in which at most ``share`` of the tokens are image tokens."""
    tiles = min(stage.max_tiles, int(share * stage.max_tokens) // config.tokens_per_tile)
    whole, rest = divmod(stage.max_tokens, DOCUMENT)
    lengths = (DOCUMENT,) * whole + ((rest,) if rest else ())
    return Shape(lengths=lengths, num_tiles=tiles, num_supervised=int(SUPERVISED * stage.max_tokens))


def _memory(config: Any, stage: Train, gpus: int) -> Memory:
    return step_memory(config, _shape(config, stage, 1.0), stage, bf16=stage.precision != "fp32", processes=gpus)


def _traffic(config: Any, stage: Train, gpus: int) -> tuple[int, int, int]:
    """Bytes that each GPU receives in a step: weights gathered in bf16 and gradients added up in fp32 among those that
    share the weights, tokens sent to shared experts and back, and gradients added up between replicas."""
    if gpus == 1:
        return 0, 0, 0
    own, text = stage.parallel, config.text_config
    parts = parameters(config)
    learned = sum(parts[part] for part in stage.trains) if stage.lora is None else 0
    whole = sum(parts.values()) if 2 * (sum(parts.values()) - learned) > MAX_REPLICATED else learned
    passes = max(1, stage.lanes // gpus // own.packs_per_forward)
    exchanges = 0
    if own.experts > 1 and text.num_experts:
        apart = experts(config)
        learned, whole = (max(0, count - apart) for count in (learned, whole))
        times = 4 if own.checkpointing == "none" else 6  # there and back, forward and backward (and again)
        a_token = times * 2 * text.num_experts_per_tok * text.hidden_size * text.num_hidden_layers
        exchanges = int((1 - 1 / own.experts) * stage.lanes // gpus * stage.max_tokens * a_token)
    gathers = passes * (2 if own.shard == "zero3" else 1)
    adds = 1 if 4 * learned <= MAX_WAITING else passes
    shared = int((1 - own.replicas / gpus) * (2 * whole * gathers + 4 * learned * adds))
    return shared, exchanges, int(8 * learned * own.replicas / gpus * (1 - 1 / own.replicas))


def unshareable(stage: Train, world_size: int) -> list[tuple[str, str]]:
    """(field, message) of all that cannot be shared by ``world_size`` processes; empty if the stage can run."""
    found, own = [], stage.parallel
    if stage.lanes % world_size:
        text = f"{stage.lanes} lanes cannot be dealt evenly to {world_size} processes: start a divisor of {stage.lanes}"
        found.append(("lanes", text))
    elif stage.lanes // world_size % own.packs_per_forward:
        text = (
            f"{stage.lanes // world_size} packs of each process ({stage.lanes} lanes over {world_size} processes) "
            f"cannot be joined by {own.packs_per_forward}"
        )
        found.append(("parallel.packs_per_forward", text))
    for field, size in (("replicas", own.replicas), ("experts", own.experts)):
        if world_size % size:
            found.append((f"parallel.{field}", f"{world_size} processes do not make groups of {size}"))
    return found


def _uneven(stage: Train, gpus: int) -> str:
    own = stage.parallel
    each = gpus * own.packs_per_forward
    if stage.lanes % each:
        more = -(-stage.lanes // each) * each
        return f"{stage.lanes} lanes cannot be shared by {gpus} GPUs: set lanes={more}, or use fewer."
    return "; ".join(f"{field}: {text}" for field, text in unshareable(stage, gpus))


def _remedy(config: Any, stage: Train, gpus: int, gpu: Gpu) -> str:
    """The mildest change with which the stage fits."""
    limit = gpu.memory * 1e9 * USABLE
    for changes, words in _milder_first(stage, gpus):
        own = dataclasses.replace(stage, parallel=dataclasses.replace(stage.parallel, **changes))
        needed = _memory(config, own, gpus)
        if needed.total <= limit:
            host = f", and {needed.host / 1e9:.0f} GB of host memory each" if needed.host else ""
            return f"Fits with {words}: {needed.total / 1e9:.0f} GB{host}."
    best: dict[str, Any] = {"checkpointing": "full", "shard": "zero3"}
    count = gpus * 2
    while count <= 4096:
        lanes = -(-stage.lanes // count) * count
        own = dataclasses.replace(stage, lanes=lanes, parallel=dataclasses.replace(stage.parallel, **best))
        if _memory(config, own, count).total <= limit:
            return f"Fits on {count} GPUs with parallel.checkpointing=full."
        count *= 2
    tokens = stage.max_tokens
    while tokens > 256:
        tokens //= 2
        parallel = dataclasses.replace(stage.parallel, **best, offload=gpus > 1)
        own = dataclasses.replace(stage, max_tokens=tokens, parallel=parallel)
        if _memory(config, own, gpus).total <= limit:
            also = " parallel.offload=true" if gpus > 1 else ""
            return f"Fits with parallel.checkpointing=full{also} and max_tokens={tokens}."
    return "Fits in no way known here: train fewer parts, or adapters (lora)."


def _milder_first(stage: Train, gpus: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of ``parallel`` in order of what they cost."""
    own: Parallel = stage.parallel
    shards: list[dict[str, Any]] = [{}] if own.shard == "zero3" or gpus == 1 else [{}, {"shard": "zero3"}]
    if own.replicas > 1:
        shards.append({"shard": "zero3", "replicas": 1})
    hosts: list[dict[str, Any]] = [{}] if own.offload or gpus == 1 else [{}, {"offload": True}]
    kinds = ("none", "selective", "full")
    for host in hosts:
        for kind in kinds[kinds.index(own.checkpointing) :]:
            for shard in shards:
                changes = {**shard, **({"checkpointing": kind} if kind != own.checkpointing else {}), **host}
                words = [f"parallel.{key}={str(item).lower()}" for key, item in changes.items()]
                if changes:
                    yield changes, " ".join(words)
