"""What GPUs can do, from their makers' data sheets: to say how much of it a run uses, and to plan one.

Peaks are for dense bf16 products with fp32 sums (data sheets often print twice that, for half of the weights zero).
Memory is the GB that are printed (programs see a few percent more or less), links the GB/s that one GPU can send to the
others in its machine. No torch.

Sources: NVIDIA's data sheets of A100 (2021), H100 and H200 (2024), B200 in HGX (2025), A800, H800 and H20, L40S, L4,
A10, A6000, and the Ada and Blackwell GeForce white papers (dense, fp32 sums); AMD's of
MI300X and MI325X. Figures of cards whose power can be capped are those of the full card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """``flops`` per second in dense bf16; ``memory`` GB; ``bandwidth`` GB/s to it; ``link`` GB/s to its neighbours."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float


def _gpu(name: str, teraflops: float, memory: float, bandwidth: float, link: float) -> Gpu:
    return Gpu(name=name, flops=teraflops * 1e12, memory=memory, bandwidth=bandwidth, link=link)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10", 125, 24, 600, 32),
        _gpu("a6000", 154.8, 48, 768, 32),
        _gpu("a100-40", 312, 40, 1555, 300),
        _gpu("a100-80", 312, 80, 2039, 300),
        _gpu("a800-80", 312, 80, 2039, 200),
        _gpu("l4", 121, 24, 300, 32),
        _gpu("l40s", 362, 48, 864, 32),
        _gpu("rtx4090", 165.2, 24, 1008, 32),
        _gpu("rtx5090", 209.5, 32, 1792, 64),
        _gpu("h20", 148, 96, 4000, 450),
        _gpu("h100", 989.4, 80, 3350, 450),
        _gpu("h100-pcie", 756, 80, 2000, 64),
        _gpu("h800", 989.4, 80, 3350, 200),
        _gpu("h200", 989.4, 141, 4800, 450),
        _gpu("gh200", 989.4, 96, 4000, 450),
        _gpu("b200", 2250, 180, 8000, 900),
        _gpu("mi300x", 1307.4, 192, 5300, 448),
        _gpu("mi325x", 1307.4, 256, 6000, 448),
    )
}
"""Name, as ``sailvl plan --gpu`` takes it, to facts."""

_NAMES = (
    (r"A100.*80GB", "a100-80"),
    (r"A100.*40GB", "a100-40"),
    (r"A800.*80GB", "a800-80"),
    (r"GH200", "gh200"),
    (r"H100.*PCIe", "h100-pcie"),
    (r"H100.*(HBM3|SXM)", "h100"),
    (r"H800(?!.*PCIe)", "h800"),
    (r"H200(?!.*NVL)", "h200"),
    (r"H20\b", "h20"),
    (r"B200", "b200"),
    (r"L40S", "l40s"),
    (r"L4\b", "l4"),
    (r"A10\b", "a10"),
    (r"RTX A6000", "a6000"),
    (r"RTX 4090(?! D)(?!.*Laptop)", "rtx4090"),
    (r"RTX 5090(?! D)(?!.*Laptop)", "rtx5090"),
    (r"MI300X", "mi300x"),
    (r"MI325X", "mi325x"),
)


def recognise(device_name: str) -> Gpu | None:
    """The GPU that calls itself ``device_name`` (``torch.cuda.get_device_name``), or None: unknown, or a CPU.

    A slice of a GPU (MIG) is unknown: it has a fraction of the peak, and does not say which.
    """
    if "MIG" in device_name or "GB200" in device_name:
        return None
    found = [name for pattern, name in _NAMES if re.search(rf"\b{pattern}", device_name, re.IGNORECASE)]
    return GPUS[found[0]] if found else None
