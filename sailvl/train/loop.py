"""The training loop. ``train`` can be read aloud: batches, step, the schedule observes the loss, log, save.

Killed at any instant, a run started again continues from its newest whole checkpoint and ends with the same bits as
one that was never stopped (on as many processes, on one kind of machine): the checkpoint holds weights, optimizer,
schedule, random generators and the data cursor, and metrics past it are dropped. Ctrl-C and SIGTERM finish the step,
save and stop; a second one stops at once.

On several processes every one runs this loop with the packs of its own lanes. They decide alike because they see the
same numbers: loss and gradient norm are those of all, and with each step's exchange goes what each of them has decided
so far and whether it was told to stop, so that all stop after the same step, and a process that went astray is noticed.

The loss and gradient norm of every step are read back once, after the step: a wait of microseconds beside a step of
at least tenths of a second, in exchange for a loop that always knows whether it is still sane.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from sailvl import dist, log
from sailvl.config import digest
from sailvl.curriculum import Train, hashed_fields
from sailvl.data.source import Source
from sailvl.model.modeling import SailVLForConditionalGeneration
from sailvl.model.processing import SailVLProcessor
from sailvl.train import checkpoint, ema, optim, validate
from sailvl.train.meter import Meter
from sailvl.train.stage import set_up, write_models
from sailvl.train.state import Counts, TrainState, count_step, roll_back, take_snapshot
from sailvl.train.step import train_step
from sailvl.train.stop import stop_signals

MAX_BAD_STEPS = 3
"""Consecutive steps without a finite loss and gradient after which a run is given up."""


class DivergedError(RuntimeError):
    """Training cannot go on: losses or gradients stay infinite or NaN, or processes no longer do the same."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """``model`` is the finished model's folder, ``adapter`` that of its adapters if it learned through them (they are
    merged into the model), ``average`` that of the averaged weights if it kept them; ``loss`` is that of the last
    metrics row, in nats per supervised token.
    """

    model: Path
    adapter: Path | None = None
    average: Path | None = None
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

    Call it again with the same arguments to continue a run that was stopped. All processes of a group call it alike,
    with the same weights; the model is of no use to them afterwards. Raises ConfigError if the stage cannot be shared
    by so many processes, KeyboardInterrupt (SystemExit for SIGTERM) after saving when told to stop, CheckpointError
    when a checkpoint does not fit or cannot be written, and DivergedError after three consecutive steps without a
    finite loss and gradient.
    """
    identity = digest(hashed_fields(stage))
    with ExitStack() as stack:
        newest = checkpoint.newest(out / "checkpoints")
        precision = None if newest is None else checkpoint.saved_precision(newest)
        state = set_up(stage, model, processor, sources, workers, precision=precision)
        stack.enter_context(closing(state.loader))
        if newest is not None:
            checkpoint.load(state, newest, identity=identity)
        held_out = validate.held_out(stage, sources, processor) if stage.validation else None
        meter = stack.enter_context(Meter(stage, model, out, state.step))
        stop = stack.enter_context(stop_signals())
        task = progress.add_task(stage.name, total=stage.steps, completed=state.step) if progress else None

        while state.step < stage.steps:
            with meter.waiting_for_data():
                batches = next(state.loader)
            lr = stage.lr * state.schedule.factor(state.step)
            scale, phase = state.schedule.scale, state.schedule.phase
            optim.set_lr(state.optimizer, lr)
            result = train_step(
                model,
                batches,
                state.optimizer,
                max_grad_norm=stage.max_grad_norm,
                precision=state.precision,
                z_loss=stage.z_loss,
                balance=stage.balance_loss if "lm" in stage.trains and stage.lora is None else 0.0,
                expert_counts=state.expert_counts,
                packs_per_forward=stage.parallel.packs_per_forward,
                notes=(stop.requested, decided := fingerprint(state)),
            )
            loss, grad_norm = result.values.tolist()
            num_stopped, all_decided = result.notes
            if all_decided != decided * dist.world_size():
                raise DivergedError(f"stage {stage.name}: before step {state.step + 1} processes differ in state")
            state.step += 1
            done = state.step
            counts = count_step(batches, loss, grad_norm, result.supervised_tokens, seconds=meter.lap())
            if result.expert_counts is not None:
                state.expert_counts = result.expert_counts
            if state.ema is not None:
                ema.update(state.ema, model)
            event = observe(state, counts)
            meter.add(done, batches, counts, result)

            # On one process a signal may also have come during the step; several learn of it with the next exchange.
            is_stopped = num_stopped > 0 or (stop.requested and dist.world_size() == 1)
            checked = stage.validation is not None and done % stage.validation.every == 0
            held_out_loss = validate.held_out_loss(state, held_out) if checked and held_out else None
            if progress and task is not None:
                progress.update(task, completed=done, description=f"{stage.name}  {meter.summary()}")
            is_saved = is_stopped or done % stage.save_every == 0 or done == stage.steps
            is_saved |= checked and stage.keep_best > 0
            if is_saved or checked or event != "go" or done % stage.log_every == 0:
                row = {"step": done, "lr": lr, "scale": scale, "phase": phase, "event": event, "grad_norm": grad_norm}
                state.totals.add(meter.row(row | ({"held_out_loss": held_out_loss} if checked else {})))
            if state.bad_steps == MAX_BAD_STEPS:
                raise DivergedError(
                    f"stage {stage.name}: loss or gradient norm was not finite in {MAX_BAD_STEPS} steps up to step "
                    f"{done} (last: loss {loss}, norm {grad_norm}). The weights are those from before; lower lr "
                    f"(now {lr:.3g}) or look at the data, and start again"
                )
            if is_saved:
                checkpoint.save(
                    state,
                    out / "checkpoints",
                    identity=identity,
                    keep_last=stage.keep_last,
                    best=stage.keep_best,
                    asynchronous=stage.parallel.save_async,
                )
            if is_stopped and done < stage.steps:
                checkpoint.finish(state)
                stop.leave()
        checkpoint.finish(state)
    whole, adapter, average = write_models(state, stage, processor, out)
    last = dist.broadcast(log.read(out / "metrics.jsonl")[-1] if dist.is_main() else {})
    return TrainResult(
        model=whole,
        adapter=adapter,
        average=average,
        steps=state.step,
        loss=last["loss"],
        precision=state.precision,
        totals=state.totals,
    )


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


def fingerprint(state: TrainState) -> int:
    """A number for what a process has decided so far: its step and its schedule."""
    decided = f"{state.step} {state.bad_steps} {state.schedule.phase} {state.schedule.scale!r}"
    return zlib.crc32(decided.encode())
