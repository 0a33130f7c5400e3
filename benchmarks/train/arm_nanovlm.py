"""nanoVLM's training loop, packing, collator and autocast, run as they are, on this project's model.

``--source`` is a checkout of huggingface/nanoVLM. Its ``train.train`` runs unchanged; only what it would download is
given instead: the samples (encoded as every other arm's), the model, and no tracker. Its data set packs in groups of
``4 * batch`` sequences by a balanced knapsack with five spare bags and pads each bag to ``max_tokens``.

Its packs know no documents: attention is causal over a whole bag and positions run on. ``--mode leaking`` trains so,
which is not the same work; ``--mode fixed`` gives the model what is missing, a block-diagonal mask [B, 1, T, T] and
positions that restart (documents end at the padding token that its packing puts behind each).

``--batch`` bags are one update, in one forward pass, because its loss is a mean per forward pass; at the default 5 an
update is four full packs on average, as in the other arms; the last one is smaller, so that all samples are used. In
the verification all samples of an update are one batch. Its optimizer is its own (AdamW without fusing, weight decay
on all, a cosine schedule). Its data workers are the one process here, as in every arm.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.machinery
import itertools
import os
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import work as shared
from torch import nn
from torch.utils.data import DataLoader

AUTOCAST = torch.autocast


class Finished(Exception):
    """All samples are used: the way out of a loop that would begin the next epoch."""


def nanovlm(source: str) -> types.ModuleType:
    """nanoVLM's ``train`` module. The modules for downloads, tracking and cutting pictures are empty."""
    sys.path.insert(0, source)  # before this folder, so that its "data" is its own
    for name in ("wandb", "datasets", "data.processors"):
        sys.modules[name] = stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
    return importlib.import_module("train")


class Stream:
    """The rows as nanoVLM's ``VQADataset`` gives samples: labels shifted, one tensor of tiles per picture."""

    mp_image_token_length = 16

    def __init__(self, samples: shared.Samples, rows: list[int]) -> None:
        self.samples, self.rows, self.dataset = samples, rows, rows
        self.tokenizer = samples.processor.tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.samples[self.rows[index]]
        tiles = torch.from_numpy(example.tiles_N3SS)
        return {
            "images": [tiles] if len(tiles) else [],
            "input_ids": torch.from_numpy(example.ids_T),
            "labels": torch.from_numpy(example.targets_T),
            "attention_mask": torch.ones(example.num_tokens, dtype=torch.long),
        }


class Adapter(nn.Module):
    """This project's model behind the signature of nanoVLM's: logits of all positions, mean loss."""

    def __init__(self, model: Any, mode: str, run: shared.Run) -> None:
        super().__init__()
        self.vision_encoder, self.MP = model.model.vision_tower, model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.whole, self.mode, self.run = [model], mode, run  # in a list: its parameters are those of the three above

    def forward(
        self, input_ids: torch.Tensor, images: Any, attention_mask: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = torch.cat([tile for bag in images for tile in bag])
        ends_BT = attention_mask == 0  # behind each document; before the first, as padding is on the left
        given: dict[str, Any] = {"attention_mask": attention_mask}
        if self.mode == "fixed":
            document_BT = ends_BT.cumsum(1) - ends_BT.long()
            at_T = torch.arange(input_ids.shape[1])
            same_B1TT = (document_BT[:, None, :, None] == document_BT[:, None, None, :]) & (at_T[:, None] >= at_T)
            first_BT = torch.where(ends_BT, at_T + 1, 0).cummax(1).values
            first_BT = torch.where(ends_BT, at_T, first_BT)
            given = {"attention_mask": same_B1TT, "position_ids": at_T - first_BT}
        hidden = self.whole[0].model(input_ids=input_ids, pixel_values=tiles, use_cache=False, **given)
        logits = self.whole[0].lm_head(hidden.last_hidden_state)
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.size(-1)), targets.reshape(-1), ignore_index=shared.IGNORED
        )
        self.run.losses.append(loss.item())
        last_BT = ~ends_BT[:, :-1] & ends_BT[:, 1:]
        supervised = int((targets != shared.IGNORED).sum())
        self.run.count(int(last_BT.sum()), int(attention_mask.sum()), input_ids.numel(), supervised)
        return logits, loss


def train(work: shared.Work, args: argparse.Namespace, updates: int, precision: str) -> shared.Run:
    their = sys.modules.get("train") or nanovlm(args.source)
    run, samples = shared.Run(), shared.Samples(work)
    packing = importlib.import_module("data.advanced_datasets")
    collators = importlib.import_module("data.collators")
    verifying = updates < len(work.updates)

    def loader(rows: list[int]) -> DataLoader[Any]:
        packs = packing.ConstantLengthDataset(
            Stream(samples, rows), max_sample_length=work.max_tokens, seq_length=work.max_tokens,
            num_of_sequences=4 * args.batch, queue_size=1,
        )  # fmt: skip
        collate = collators.VQACollator(samples.processor.tokenizer, work.max_tokens)
        # Bags of an update's samples alone are fewer than 100: all of them are its one batch.
        batch = 100 if verifying else args.batch
        return DataLoader(packs, batch_size=batch, collate_fn=collate)

    def data() -> Iterator[Any]:
        if verifying:
            yield from itertools.chain.from_iterable(loader(rows) for rows in work.updates[:updates])
        else:
            yield from loader([row for rows in work.updates for row in rows])
        raise Finished

    class Timed(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            run.step()
            return found

    def get_dataloaders(train_cfg: Any, vlm_cfg: Any) -> tuple[Any, Any, Any, Any]:
        run.start()
        return None, None, data(), None

    their.get_dataloaders = get_dataloaders
    their.VisionLanguageModel = lambda *_, **__: Adapter(work.model("sdpa"), args.mode, run)
    their.get_run_name = lambda *_: ""
    their.optim = types.SimpleNamespace(AdamW=Timed)
    if precision == "fp32":
        their.torch.autocast = lambda **_: nullcontext()
    else:
        their.torch.autocast = AUTOCAST
    chosen = dataclasses.replace(
        their.config.TrainConfig(), lr_mp=shared.LR, lr_vision_backbone=shared.LR, lr_language_backbone=shared.LR,
        gradient_accumulation_steps=1, max_training_steps=1_000_000, eval_in_epochs=False, log_wandb=False,
        stats_log_interval=1_000_000,
    )  # fmt: skip
    out, sys.stdout = sys.stdout, sys.stderr  # its prints: the last line of ours is the result
    try:
        their.train(chosen, their.config.VLMConfig(vlm_load_backbone_weights=False))
    except Finished:
        pass
    finally:
        sys.stdout = out
        their.torch.autocast = AUTOCAST
    return run


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shared.run_arm(
        train,
        source={"required": True},
        mode={"choices": ["fixed", "leaking"], "required": True},
        batch={"type": int, "default": 5},
    )
