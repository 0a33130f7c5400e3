"""This project: packs of its loader, its step, nothing padded."""

from __future__ import annotations

import argparse

import work as shared

from sailvl.model import checkpoint
from sailvl.train.step import train_step


def train(work: shared.Work, args: argparse.Namespace, updates: int, precision: str) -> shared.Run:
    model = work.model(checkpoint.PACKED)
    optimizer, loader = work.optimizer(model), work.loader(work.source())
    run = shared.Run()
    run.start()
    for _ in range(updates):
        batches = next(loader)
        result = train_step(model, batches, optimizer, max_grad_norm=1.0, precision=precision)
        run.losses.append(result.values[0].item())
        run.step()
        for batch in batches:
            run.count(batch.num_samples, len(batch.ids_T), len(batch.ids_T), len(batch.rows_R))
    return run


if __name__ == "__main__":
    shared.run_arm(train)
