"""transformers' Trainer, or TRL's SFTTrainer, on padded batches of this project's model: the usual way to fine-tune.

``--micro`` samples go through the model at once (the libraries' default is 8); gradients of an update add up over as
many forward passes as its samples need, normalised by all its supervised tokens, as the libraries do by
themselves. ``--sort`` orders the samples of an update by length before, which is the least padding without packing
(the libraries' ``group_by_length`` sorts within larger pools, and changes which samples share an update).

The samples of an update are given, so an item of the data set is a batch's rows, and the collator decodes and pads
them; TRL takes the same through its documented ``skip_prepare_dataset``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import work as shared
from transformers import Trainer, TrainerCallback, TrainingArguments


class Watch(TrainerCallback):
    """Begin, end of every update, and its loss."""

    def __init__(self, run: shared.Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.run.losses.append(float(logs["loss"]))


def batches(work: shared.Work, samples: shared.Samples, micro: int, sort: bool) -> tuple[list[list[int]], int]:
    """Rows of every forward pass, and how many passes make an update: the library wants one number for all."""
    mean, least = sum(map(len, work.updates)) / len(work.updates), min(map(len, work.updates))
    passes = min(max(1, round(mean / micro)), least)
    found = []
    for rows in work.updates:
        if sort:
            rows = sorted(rows, key=lambda row: samples[row].num_tokens)
        bounds = [round(i * len(rows) / passes) for i in range(passes + 1)]
        found += [rows[a:b] for a, b in itertools.pairwise(bounds)]
    return found, passes


def collator(samples: shared.Samples, run: shared.Run) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Decodes and pads the samples whose rows it is given, and counts them."""
    pad = samples.processor.tokenizer.pad_token_id

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [samples[row] for item in items for row in item["rows"]]
        batch = shared.padded(examples, pad)
        supervised = int((batch["labels"] != shared.IGNORED).sum())
        run.count(len(examples), int(batch["attention_mask"].sum()), batch["input_ids"].numel(), supervised)
        return batch

    return collate


def options(out: str, passes: int, updates: int, precision: str) -> dict[str, Any]:
    return {
        "output_dir": out, "per_device_train_batch_size": 1, "gradient_accumulation_steps": passes,
        "max_steps": updates, "learning_rate": shared.LR, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "bf16": precision == "bf16", "fp16": False, "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip


def train(work: shared.Work, args: argparse.Namespace, updates: int, precision: str) -> shared.Run:
    model, run, samples = work.model("sdpa"), shared.Run(), shared.Samples(work)
    rows, passes = batches(work, samples, args.micro, args.sort)
    with tempfile.TemporaryDirectory() as out:
        chosen = options(out, passes, updates, precision)
        common: dict[str, Any] = {
            "model": model, "data_collator": collator(samples, run), "callbacks": [Watch(run)],
            "optimizers": (work.optimizer(model), None),
        }  # fmt: skip
        if args.trl:
            trainer = sft_trainer(chosen, common, rows, samples.processor)
        else:
            data = [{"rows": some} for some in rows]
            trainer = Trainer(args=TrainingArguments(**chosen), train_dataset=data, **common)
        trainer.train()
    return run


def sft_trainer(chosen: dict[str, Any], common: dict[str, Any], rows: list[list[int]], processor: Any) -> Any:
    from datasets import Dataset  # noqa: PLC0415  (only in TRL's own environment)
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    args = SFTConfig(**chosen, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    data = Dataset.from_dict({"rows": rows})
    return SFTTrainer(args=args, train_dataset=data, processing_class=processor, **common)


if __name__ == "__main__":
    shared.run_arm(
        train, micro={"type": int, "default": 8}, sort={"action": "store_true"}, trl={"action": "store_true"}
    )
