"""Which parameters a stage trains, and the one AdamW that trains them.

Weight decay falls on weight matrices, including the (tied) token embedding and adapters, and not on norms, biases or
the vision encoder's position embedding: the common practice of language-model and ViT training code (the report names
neither).

Always PyTorch's *fused* AdamW, on every device. Its roundings differ from the for-loop's by about 1e-6 after a few
steps, so one implementation is fixed for reproducibility; it is also the fastest, and it can skip an update on the
device itself (``step.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sailvl.curriculum import Train
from sailvl.model import lora
from sailvl.model.checkpoint import PARTS, part_parameters
from sailvl.model.modeling import SailVLForConditionalGeneration


def freeze(model: SailVLForConditionalGeneration, trains: Sequence[str], *, adapters: bool = False) -> None:
    """Let the parts in ``trains`` learn, or only their ``adapters``. ValueError for an unknown part, or none at all."""
    unknown = sorted(set(trains) - set(PARTS))
    if unknown or not trains:
        raise ValueError(f"a stage trains some of {list(PARTS)}, not {unknown or 'nothing'}")
    for part in PARTS:
        for name, parameter in part_parameters(model, part):
            parameter.requires_grad_(part in trains and (lora.is_adapter(name) or not adapters))


def build(model: SailVLForConditionalGeneration, stage: Train) -> torch.optim.AdamW:
    """AdamW over the trainable parameters only (call ``freeze`` before): a group per part, with and without decay."""
    groups = []
    for part in PARTS:
        if part not in stage.trains:
            continue
        for decays in (True, False):
            chosen = [p for name, p in part_parameters(model, part) if p.requires_grad and _decays(name, p) == decays]
            groups.append(
                {
                    "params": chosen,
                    "weight_decay": stage.weight_decay if decays else 0.0,
                    "lr_scale": stage.vit_lr_scale if part == "vit" else 1.0,
                }
            )
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; each group's own ``lr_scale`` applies."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """Every parameter the optimizer trains, in a fixed order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _decays(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("pos_embed")
