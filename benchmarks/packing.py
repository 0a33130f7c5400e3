"""How full and how even packed sequences are: ours against greedy next-fit, best-fit-decreasing and padded batches.

    python benchmarks/packing.py --samples FILE.npz --ranks 8 --max-tokens 8192 [--json OUT] [--buffer 256]
                                 [--max-tiles N]
    python benchmarks/packing.py --sync-pool 32 --lanes 16,32,64 --lane-group 8 [--steps 400] ...

FILE.npz holds two integer arrays, ``tokens`` (of the whole sample, image tokens included) and ``tiles``. Without it a
mix of captions, OCR, documents, text, VQA and long reasoning is drawn.

What is measured. Samples go to ranks as the loader deals them (the same shuffled order, rank r takes every ranks-th),
and ours is the loader's own Packer. As in training the stream has no end: after the last sample comes the next epoch,
and a rank stops once every one of its samples was packed once. So there is no unfinished last pack, for any method, and
no sample of the file is left out. ``utilisation`` is tokens / (packs x max_tokens) of those packs.
``utilisation_with_tail`` is the other extreme: one epoch, then the buffer is emptied, and the badly filled last packs
count; with few samples per rank the tail weighs much. Samples over max_tokens (or max_tiles) are dropped and counted.

tiles_max_mean: mean over steps of (most tiles of a rank / mean of the ranks): how long the others wait for the slowest.
vision_efficiency: sum over steps of the mean / sum of the most. us_per_sample: processor time of the packing alone.

With --sync-pool the second table instead: lanes as the loader runs them, with and without that many ready packs.
efficiency: at a number of processes, sum over micro-batches of the mean modelled cost of a pack / sum of the most.
tiles_cv: coefficient of variation over optimizer steps of the step's mean tiles, the price. longest_wait: steps that a
ready pack waited.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from sailvl.data.order import Order
from sailvl.data.pack import Packer
from sailvl.data.ready import Ready, quantile
from sailvl.doctor import cpu_name
from sailvl.types import Item

Pack = Sequence[Item]
Method = Callable[[Iterable[Item], "argparse.Namespace"], Iterator[Pack]]


def simulated(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, tiles) of a mix: 30 % captions, 20 % OCR, 10 % documents, 20 % text, 15 % VQA, 5 % long reasoning."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(6, count, p=[0.3, 0.2, 0.1, 0.2, 0.15, 0.05])
    tiles = np.choose(
        kind,
        [1, rng.integers(1, 13, count), 13, 0, rng.integers(1, 8, count), rng.integers(1, 8, count)],
    )
    text = np.choose(
        kind,
        [
            rng.integers(44, 345, count),
            np.minimum(rng.lognormal(6, 1, count), 4000),
            rng.integers(50, 601, count),
            rng.lognormal(6, 1, count).clip(30, 6000),
            rng.integers(30, 301, count),
            rng.lognormal(8, 0.8, count).clip(500, 16000),
        ],
    )
    return 256 * tiles + text.astype(np.int64), tiles


def ours(items: Iterable[Item], limits: argparse.Namespace) -> Iterator[Pack]:
    """The loader's packer; when items end, what waits is packed too."""
    packer = Packer(limits.max_tokens, limits.max_tiles, limits.buffer)
    for item in items:
        packer.add(item)
        if packer.full:
            yield packer.pop()
    while len(packer):
        yield packer.pop()


def next_fit(items: Iterable[Item], limits: argparse.Namespace) -> Iterator[Pack]:
    """Fill in order of arrival; close the pack at the first sample that does not fit."""
    pack: list[Item] = []
    tokens = tiles = 0
    for item in items:
        if pack and (tokens + item.num_tokens > limits.max_tokens or tiles + item.num_tiles > limits.max_tiles):
            yield pack
            pack, tokens, tiles = [], 0, 0
        pack.append(item)
        tokens, tiles = tokens + item.num_tokens, tiles + item.num_tiles
    if pack:
        yield pack


def best_fit_decreasing(items: Iterable[Item], limits: argparse.Namespace) -> Iterator[Pack]:
    """Window by window: longest first, each into the fullest pack that holds it."""
    source = iter(items)
    while window := sorted(islice(source, limits.buffer), key=lambda item: -item.num_tokens):
        packs: list[list[Item]] = []
        rooms: list[tuple[int, int]] = []
        for item in window:
            holds = [i for i, (a, b) in enumerate(rooms) if item.num_tokens <= a and item.num_tiles <= b]
            if holds:
                at = min(holds, key=lambda i: rooms[i][0])
            else:
                at = len(packs)
                packs.append([])
                rooms.append((limits.max_tokens, limits.max_tiles))
            packs[at].append(item)
            rooms[at] = (rooms[at][0] - item.num_tokens, rooms[at][1] - item.num_tiles)
        yield from packs


def padded(items: Iterable[Item], limits: argparse.Namespace) -> Iterator[Pack]:
    """Eight samples at a time, each padded to the longest: no packing."""
    source = iter(items)
    while batch := list(islice(source, 8)):
        yield batch


METHODS: dict[str, Method] = {
    "ours": ours,
    "greedy next-fit": next_fit,
    "best-fit-decreasing": best_fit_decreasing,
    "padded batch of 8": padded,
}


def room(name: str, pack: Pack, limits: argparse.Namespace) -> int:
    """Tokens a pack occupies on the device."""
    return 8 * max(item.num_tokens for item in pack) if name.startswith("padded") else int(limits.max_tokens)


def stream(samples: list[Item], rank: int, limits: argparse.Namespace) -> Iterator[Item]:
    """The loader's order of one rank, without end."""
    order = Order({"s": len(samples)}, {"s": 1.0}, seed=0, lane=rank, num_lanes=limits.ranks)
    while True:
        yield samples[order.draw()[1]]


def until_all_are_packed(packs: Iterable[Pack], first_epoch: set[int]) -> list[Pack]:
    """Packs up to the one that holds the last of these rows."""
    missing, taken = set(first_epoch), []
    for pack in packs:
        taken.append(pack)
        missing.difference_update(item.row for item in pack)
        if not missing:
            break
    return taken


def measure(name: str, samples: list[Item], limits: argparse.Namespace) -> dict[str, object]:
    """One method's row of the table."""
    method, share = METHODS[name], -(-len(samples) // limits.ranks)
    ranks, tail = [], []
    seconds, count = 0.0, 0
    for rank in range(limits.ranks):
        epoch = list(islice(stream(samples, rank, limits), share))
        ranks.append(until_all_are_packed(method(stream(samples, rank, limits), limits), {item.row for item in epoch}))
        started = time.process_time()
        drained = list(method(epoch, limits))
        seconds, count = seconds + time.process_time() - started, count + len(epoch)
        tail += drained
    steps = min(len(packs) for packs in ranks)
    tiles = np.array([[sum(item.num_tiles for item in packs[step]) for packs in ranks] for step in range(steps)])
    mean, most = tiles.mean(1), tiles.max(1)
    uneven = np.divide(most, mean, out=np.ones(steps), where=mean > 0)

    def utilisation(packs: Iterable[Pack]) -> float:
        used = [(sum(item.num_tokens for item in pack), room(name, pack, limits)) for pack in packs]
        return sum(a for a, _ in used) / sum(b for _, b in used)

    return {
        "method": name,
        "utilisation": round(utilisation(chain.from_iterable(ranks)), 5),
        "utilisation_with_tail": round(utilisation(tail), 5),
        "tiles_max_mean": round(float(uneven.mean()), 4),
        "vision_efficiency": round(float(mean.sum() / most.sum()) if most.sum() else 1.0, 4),
        "us_per_sample": round(seconds / count * 1e6, 3),
        "packs": sum(map(len, ranks)),
        "samples": count,
    }


def lane_packs(samples: list[Item], lane: int, num_lanes: int, size: int, limits: argparse.Namespace) -> list[Pack]:
    """What one lane gives in ``steps`` steps, from a pool of ``size`` ready packs (0: none)."""
    order = Order({"s": len(samples)}, {"s": 1.0}, seed=0, lane=lane, num_lanes=num_lanes)
    packs = ours((samples[order.draw()[1]] for _ in iter(int, 1)), limits)
    if not size:
        return list(islice(packs, limits.steps))
    ready, given = Ready(size, limits.max_tokens), []
    for step in range(limits.steps):
        while not ready.full:
            ready.add(tuple(next(packs)))
        given.append(ready.pop(quantile(step, lane, num_lanes, limits.lane_group)))
    return given


def measure_lanes(num_lanes: int, size: int, samples: list[Item], limits: argparse.Namespace) -> dict[str, object]:
    """One row of the second table."""
    lanes = [lane_packs(samples, lane, num_lanes, size, limits) for lane in range(num_lanes)]
    model = Ready(1, limits.max_tokens)  # with the means of all packs
    for pack in chain.from_iterable(lanes):
        model.add(tuple(pack))
    costs = np.array([[model.cost(pack) for pack in packs] for packs in lanes]).T  # [steps, lanes]
    tiles = np.array([[sum(item.num_tiles for item in pack) for pack in packs] for packs in lanes]).mean(0)
    efficiency = {}
    for processes in (2, 4, 8, 16):
        if num_lanes % processes == 0:
            micro = costs.reshape(-1, processes)
            efficiency[str(processes)] = round(float(micro.mean(1).sum() / micro.max(1).sum()), 4)
    return {
        "lanes": num_lanes,
        "sync_pool": size,
        "efficiency": efficiency,
        "tiles_cv": round(float(tiles.std() / tiles.mean()), 4),
        "longest_wait": longest_wait(num_lanes, size, samples, limits) if size else 0,
    }


def longest_wait(num_lanes: int, size: int, samples: list[Item], limits: argparse.Namespace) -> int:
    """The most steps a ready pack of lane 0 waited, of those given and those still there."""
    order = Order({"s": len(samples)}, {"s": 1.0}, seed=0, lane=0, num_lanes=num_lanes)
    packs = ours((samples[order.draw()[1]] for _ in iter(int, 1)), limits)
    ready, born, longest = Ready(size, limits.max_tokens), dict[int, int](), 0
    for step in range(10 * limits.steps):
        while not ready.full:
            pack = tuple(next(packs))
            ready.add(pack)
            born[id(pack)] = step
        longest = max(longest, step - born.pop(id(ready.pop(quantile(step, 0, num_lanes, limits.lane_group)))))
    return max([longest, *(10 * limits.steps - step for step in born.values())])


def compare_lanes(items: list[Item], limits: argparse.Namespace, common: dict[str, object]) -> list[dict[str, object]]:
    """Measure and print the second table."""
    rows = [
        measure_lanes(count, size, items, limits) | common for count in limits.lanes for size in (0, limits.sync_pool)
    ]
    print(f"groups of {limits.lane_group} lanes, {limits.steps} steps, {limits.max_tokens} tokens a pack")
    print(f"{'lanes':>6}{'pool':>6}{'tiles cv':>10}{'wait':>6}   efficiency by processes")
    for row in rows:
        efficiency = "  ".join(f"{count}: {share:.3f}" for count, share in row["efficiency"].items())  # type: ignore[attr-defined]
        print(f"{row['lanes']:6}{row['sync_pool']:6}{row['tiles_cv']:10.4f}{row['longest_wait']:6}   {efficiency}")
    return rows


def load(limits: argparse.Namespace) -> tuple[list[Item], int]:
    """Usable samples, and how many were too large. Exits with a message if the file is unusable."""
    if limits.samples:
        try:
            with np.load(limits.samples) as file:
                tokens, tiles = file["tokens"], file["tiles"]
        except (OSError, KeyError, ValueError) as error:
            sys.exit(f"{limits.samples}: needs integer arrays 'tokens' and 'tiles': {error}")
    else:
        tokens, tiles = simulated(3000 * limits.ranks)
    if tokens.shape != tiles.shape or tokens.ndim != 1 or {tokens.dtype.kind, tiles.dtype.kind} - {"i", "u"}:
        sys.exit(f"{limits.samples}: 'tokens' {tokens.shape} and 'tiles' {tiles.shape} must be integers, one a sample")
    if (tokens < 1).any() or (tiles < 0).any():
        sys.exit(f"{limits.samples}: a sample has at least one token and no fewer than 0 tiles")
    items = [
        Item(source="s", row=row, num_tokens=a, num_tiles=b)
        for row, (a, b) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True))
        if a <= limits.max_tokens and b <= limits.max_tiles
    ]
    if len(items) < limits.ranks:
        sys.exit(f"{len(items)} of {len(tokens)} samples fit a pack: too few for {limits.ranks} ranks")
    return items, len(tokens) - len(items)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON: a list of rows, ours first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, help="npz file with integer arrays tokens and tiles")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--max-tiles", type=int, default=1_000_000, help="tiles a pack may hold (default: no limit)")
    parser.add_argument(
        "--buffer", type=int, default=256, help="waiting samples of ours, window of best-fit-decreasing"
    )
    parser.add_argument("--sync-pool", type=int, default=0, help="ready packs of each lane: measure lanes instead")
    parser.add_argument(
        "--lanes", type=lambda text: [int(count) for count in text.split(",")], default=[16, 32, 64],
        help="with --sync-pool: numbers of lanes, separated by commas",
    )  # fmt: skip
    parser.add_argument("--lane-group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    limits = parser.parse_args(argv)
    if limits.sync_pool and (wrong := [count for count in limits.lanes if count % limits.lane_group]):
        parser.error(f"{wrong[0]} lanes do not make groups of {limits.lane_group}")
    items, dropped = load(limits)
    hardware = f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    command = shlex.join(["python", "benchmarks/packing.py", *(sys.argv[1:] if argv is None else argv)])
    common = {
        "dropped": dropped, "ranks": limits.ranks, "max_tokens": limits.max_tokens, "buffer": limits.buffer,
        "mean_tokens": round(sum(item.num_tokens for item in items) / len(items), 1),
        "hardware": hardware, "command": command,
    }  # fmt: skip
    if limits.sync_pool:
        common |= {"lane_group": limits.lane_group, "steps": limits.steps}
        rows = compare_lanes(items, limits, common)
        if limits.json:
            limits.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    rows = [measure(name, items, limits) | common for name in METHODS]
    print(
        f"{len(items)} samples, {dropped} dropped as too large; {limits.ranks} ranks, {limits.max_tokens} tokens a pack"
    )
    print(
        f"{'method':22}{'utilisation':>12}{'with tail':>11}{'tiles max:mean':>16}{'vision eff.':>13}{'us/sample':>11}"
    )
    for row in rows:
        print(
            f"{row['method']:22}{row['utilisation']:12.4f}{row['utilisation_with_tail']:11.4f}"
            f"{row['tiles_max_mean']:16.2f}{row['vision_efficiency']:13.3f}{row['us_per_sample']:11.2f}"
        )
    print(
        "utilisation: endless stream, every sample packed at least once; with tail: one epoch, then the buffer emptied"
    )
    if limits.json:
        limits.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
