"""How a stage of training begins and how it ends: the live objects at step 0, and the folders it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sailvl import dist
from sailvl.config import ConfigError
from sailvl.curriculum import Train
from sailvl.data.loader import Loader
from sailvl.data.source import Source
from sailvl.model import checkpoint as model_checkpoint
from sailvl.model import convert, lora
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.train import checkpoint, ema, optim, parallel, schedule
from sailvl.train.plan import unshareable
from sailvl.train.state import TrainState
from sailvl.train.step import resolve_precision


def set_up(
    stage: Train,
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    sources: Mapping[str, Source],
    workers: int,
    *,
    precision: str | None = None,
) -> TrainState:
    """The live objects of a stage at step 0; ``precision`` is what "auto" meant before, if the stage is continued.

    Half-precision weights become fp32 (in place): most updates are smaller than the spacing of bf16 numbers. The order
    matters: what is frozen is known before weights are shared, and the optimizer sees what is left of them here.
    Raises ConfigError if the processes cannot share the stage, or for an average of adapters.
    """
    faults = unshareable(stage, dist.world_size())
    if stage.lora is not None and stage.ema is not None:
        faults.append(("ema", "of adapters no average is kept: leave out ema or lora"))
    if faults:
        raise ConfigError(faults, f"stage {stage.name}")
    torch.manual_seed(stage.seed)
    if "projector" in stage.fresh:
        model_checkpoint.reset_projector(model, stage.seed)
    if dist.world_size() == 1 and model.dtype in (torch.bfloat16, torch.float16):
        model.float()  # type: ignore[no-untyped-call]
    if stage.lora is not None:
        lora.attach(model, stage.trains, rank=stage.lora.rank, alpha=stage.lora.alpha, seed=stage.seed)
    model.train()
    optim.freeze(model, stage.trains, adapters=stage.lora is not None)
    device = model.device if dist.world_size() == 1 else dist.device()
    precision = precision or dist.broadcast(resolve_precision(stage.precision, device))
    parallel.wrap(model, stage.parallel, precision=precision)
    loader = Loader(
        sources,
        stage.data.shares,
        processor,
        max_tokens=stage.max_tokens,
        max_tiles=stage.max_tiles,
        lanes=stage.lanes,
        seed=stage.seed,
        workers=workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
        weighting=stage.weighting,
        answer_only=stage.answer_only,
        sync_pool=stage.sync_pool,
        lane_group=stage.lane_group,
    )
    return TrainState(
        model=model,
        optimizer=optim.build(model, stage),
        schedule=schedule.build(stage.schedule, stage.steps),
        loader=loader,
        precision=precision,
        ema=None if stage.ema is None else ema.start(model, stage.ema),
    )


def write_models(
    state: TrainState, stage: Train, processor: SailVLProcessor, out: Path
) -> tuple[Path, Path | None, Path | None]:
    """Write the finished model's folder, its adapters' and its averaged weights' if it has them; gives the three.

    All processes must call it, and none can use the model afterwards.
    """
    whole, adapter, average = out / "model", out / "adapter", out / "ema"
    if stage.lora is None:
        if state.ema is not None:
            with ema.swapped(state.ema, state.model):
                checkpoint.export(state.model, processor, average)
        checkpoint.export(state.model, processor, whole)
        return whole, None, average if state.ema is not None else None
    parallel.make_whole(state.model)
    if dist.is_main():
        # What later stages and servers get is what is on disk: the base as it was, and the folder merged into it.
        lora.save(state.model, adapter)
        lora.detach(state.model)
        convert.merge_adapter(state.model, adapter, processor)
        model_checkpoint.save(state.model, processor, whole)
    dist.barrier()
    return whole, adapter, None
