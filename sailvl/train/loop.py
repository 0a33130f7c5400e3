"""The training loop. ``train`` can be read aloud: batches, step, the schedule observes the loss, log, save.

Killed at any instant, a run started again continues from its newest whole checkpoint and ends with the same bits as
one that was never stopped (on one process and one machine): the checkpoint holds weights, optimizer, schedule, random
generators and the data cursor, and metrics past it are dropped. Ctrl-C and SIGTERM finish the step, save and stop; a
second one stops at once.

The loss and gradient norm of every step are read back once, after the step: a wait of microseconds beside a step of
at least tenths of a second, in exchange for a loop that always knows whether it is still sane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from sailvl import log
from sailvl.config import digest
from sailvl.curriculum import Train, hashed_fields
from sailvl.data.loader import Loader
from sailvl.data.source import Source
from sailvl.model import checkpoint as model_checkpoint
from sailvl.model import convert, lora
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.train import checkpoint, optim, schedule
from sailvl.train.state import Counts, TrainState, count_step, roll_back, take_snapshot
from sailvl.train.step import resolve_precision, train_step
from sailvl.train.stop import stop_signals

MAX_BAD_STEPS = 3
"""Consecutive steps without a finite loss and gradient after which a run is given up."""


class DivergedError(RuntimeError):
    """Training cannot go on: losses or gradients stay infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """``model`` is the finished model's folder, ``adapter`` that of its adapters if it learned through them (they are
    merged into the model); ``loss`` is that of the last metrics row, in nats per supervised token.
    """

    model: Path
    adapter: Path | None = None
    steps: int
    loss: float | None
    precision: str
    totals: Counts


def train(
    stage: Train,
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    sources: Mapping[str, Source],
    out: Path,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> TrainResult:
    """Train ``model`` (in place) as ``stage`` says; checkpoints, metrics, rejects and the final model go to ``out``.

    Call it again with the same arguments to continue a run that was stopped. Raises KeyboardInterrupt (SystemExit for
    SIGTERM) after saving when told to stop, CheckpointError when a checkpoint does not fit or cannot be written, and
    DivergedError after three consecutive steps without a finite loss and gradient.
    """
    identity = digest(hashed_fields(stage))
    with ExitStack() as stack:
        state = set_up(stage, model, processor, sources, workers)
        stack.enter_context(closing(state.loader))
        resume(state, out / "checkpoints", identity)
        metrics = stack.enter_context(log.MetricsLog(out / "metrics.jsonl"))
        rejects = stack.enter_context(log.MetricsLog(out / "rejects.jsonl"))
        metrics.truncate_after(state.step)
        rejects.truncate_after(state.step)
        stop = stack.enter_context(stop_signals())
        task = progress.add_task(stage.name, total=stage.steps, completed=state.step) if progress else None

        since_row, clock = Counts(), time.perf_counter()
        while state.step < stage.steps:
            batches = next(state.loader)
            lr = stage.lr * state.schedule.factor(state.step)
            scale, phase = state.schedule.scale, state.schedule.phase
            optim.set_lr(state.optimizer, lr)
            result = train_step(
                model, batches, state.optimizer, max_grad_norm=stage.max_grad_norm, precision=state.precision
            )
            loss, grad_norm = result.values.tolist()
            state.step += 1
            done, now = state.step, time.perf_counter()
            counts = count_step(batches, loss, grad_norm, result.supervised_tokens, seconds=now - clock)
            clock = now
            event = observe(state, counts)
            since_row.add(counts)

            for reject in (reject for batch in batches for reject in batch.rejects):
                rejects.write(step=done, id=reject.id, reason=reject.reason)
            if progress and task is not None:
                progress.update(task, completed=done, description=f"{stage.name}  {since_row.summary()}")
            is_saved = stop.requested or done % stage.save_every == 0 or done == stage.steps
            if is_saved or event != "go" or done % stage.log_every == 0:
                metrics.write(
                    step=done, lr=lr, scale=scale, phase=phase, event=event, grad_norm=grad_norm, **since_row.row()
                )
                state.totals.add(since_row)
                since_row = Counts()
            if state.bad_steps == MAX_BAD_STEPS:
                raise DivergedError(
                    f"stage {stage.name}: loss or gradient norm was not finite in {MAX_BAD_STEPS} steps up to step "
                    f"{done} (last: loss {loss}, norm {grad_norm}). The weights are those from before; lower lr "
                    f"(now {lr:.3g}) or look at the data, and start again"
                )
            if is_saved:
                checkpoint.save(state, out / "checkpoints", identity=identity)
            if stop.requested and state.step < stage.steps:
                stop.leave()

    adapter = out / "adapter" if stage.lora else None
    if adapter is not None:
        # What later stages and servers get is what is on disk: the base as it was, and the folder merged into it.
        lora.save(model, adapter)
        lora.detach(model)
        convert.merge_adapter(model, adapter, processor)
    model_checkpoint.save(model, processor, out / "model")
    last = log.read(out / "metrics.jsonl")[-1]
    return TrainResult(
        model=out / "model",
        adapter=adapter,
        steps=state.step,
        loss=last["loss"],
        precision=state.precision,
        totals=state.totals,
    )


def set_up(
    stage: Train,
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    sources: Mapping[str, Source],
    workers: int,
) -> TrainState:
    """The live objects of a stage at step 0.

    Half-precision weights become fp32 (in place): most updates are smaller than the spacing of bf16 numbers.
    """
    torch.manual_seed(stage.seed)
    if "projector" in stage.fresh:
        model_checkpoint.reset_projector(model, stage.seed)
    if model.dtype in (torch.bfloat16, torch.float16):
        model.float()  # type: ignore[no-untyped-call]
    if stage.lora is not None:
        lora.attach(model, stage.trains, rank=stage.lora.rank, alpha=stage.lora.alpha, seed=stage.seed)
    model.train()
    optim.freeze(model, stage.trains, adapters=stage.lora is not None)
    loader = Loader(
        sources,
        stage.data.shares,
        processor,
        max_tokens=stage.max_tokens,
        max_tiles=stage.max_tiles,
        lanes=stage.lanes,
        seed=stage.seed,
        workers=workers,
    )
    return TrainState(
        model=model,
        optimizer=optim.build(model, stage),
        schedule=schedule.build(stage.schedule, stage.steps),
        loader=loader,
        precision=resolve_precision(stage.precision, model.device),
    )


def resume(state: TrainState, checkpoints: Path, identity: str) -> None:
    """Continue from the newest whole checkpoint, if there is one."""
    path = checkpoint.newest(checkpoints)
    if path is not None:
        checkpoint.load(state, path, identity=identity)


def observe(state: TrainState, counts: Counts) -> str:
    """Show the schedule the step's loss, do with the weights what it asks, and name what happened.

    The schedule decides before the guard against bad steps: a trial of AdaLRS may diverge, and ends in a rollback.
    """
    is_bad = counts.skipped_updates > 0
    event: str = state.schedule.observe(math.nan if is_bad else counts.loss)
    if event == "snapshot":
        state.snapshot = take_snapshot(state)
    elif event == "rollback":
        counts.wasted_steps = roll_back(state, rewind=state.schedule.rewind)
    elif state.schedule.phase != "trial":
        state.snapshot = None
    state.bad_steps = state.bad_steps + 1 if is_bad and event != "rollback" else 0
    return "skipped" if state.bad_steps else event
