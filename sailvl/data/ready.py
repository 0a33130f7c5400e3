"""Packs that wait, so that lanes which run side by side take packs of equal cost, without talking to each other.

Each lane keeps ``size`` ready packs in order of their modelled cost and at step s gives the one at a quantile u. The
lanes of a block of ``lane_group`` share u; their streams are alike in distribution, so equal quantiles mean nearly
equal work, and devices that wait for the slowest wait less. Block b of B takes u = frac(0.6180339887 s + b / B): over
the steps every quantile comes evenly (the golden ratio), and within one step the blocks spread over all of them. World
size appears nowhere: any number of processes that divides ``lane_group`` profits, and none changes the data order.

Cost of a pack, in units of an average one: VISION tiles / mean tiles + (1 - VISION) ((1 - QUADRATIC) tokens /
max_tokens + QUADRATIC squares / mean squares), squares being the sum of the documents' squared lengths (attention).
The means are those of the lane's packs so far. The two constants are estimates, not yet fitted to a GPU.

The price is that packs of one step resemble each other, so steps differ more. 32 ready packs, groups of 8 lanes, 8192
tokens, a mixture from captions to documents (benchmarks/packing.py --sync-pool 32), without -> with the pool:

    lanes   mean / slowest cost at 2, 4, 8 processes               variation of a step's mean tiles
    16      0.956 -> 0.989, 0.926 -> 0.980, 0.905 -> 0.972         0.067 -> 0.130
    32      0.955 -> 0.989, 0.926 -> 0.981, 0.905 -> 0.974         0.052 -> 0.075
    64      0.955 -> 0.989, 0.926 -> 0.981, 0.905 -> 0.974         0.040 -> 0.046

So use it with ``lanes`` at least four times ``lane_group``. A ready pack waited 301 steps at most, of 4000.
The report (section 3.4) balances visual tokens across devices by a method it does not state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sailvl.types import Item

VISION = 0.45
"""Share of the vision encoder in the cost of a step."""

QUADRATIC = 0.15
"""Share of attention in the language model's cost."""

_GOLDEN = 0.6180339887

Items = tuple[Item, ...]


def quantile(step: int, lane: int, num_lanes: int, lane_group: int) -> float:
    """Which of its ready packs a lane takes at a step, in [0, 1): the same for all lanes of a group."""
    return (_GOLDEN * step + lane // lane_group / (num_lanes // lane_group)) % 1.0


class Ready:
    """The ready packs of one lane. Fill it with ``add`` until ``full``, then ``pop`` one, and so on."""

    def __init__(self, size: int, max_tokens: int) -> None:
        self.size, self._max_tokens = size, max_tokens
        self._packs: list[Items] = []  # in order of arrival
        self._num_packs = self._tiles = self._squares = 0  # of all packs so far

    def __len__(self) -> int:
        return len(self._packs)

    @property
    def full(self) -> bool:
        """Whether as many packs are ready as the pool holds."""
        return len(self._packs) >= self.size

    def add(self, pack: Items) -> None:
        """One more ready pack."""
        self._packs.append(pack)
        self._num_packs += 1
        self._tiles += sum(item.num_tiles for item in pack)
        self._squares += sum(item.num_tokens**2 for item in pack)

    def cost(self, pack: Sequence[Item]) -> float:
        """Modelled work of a pack; about 1 for an average full one."""
        tiles = sum(item.num_tiles for item in pack) * self._num_packs / max(self._tiles, 1)
        tokens = sum(item.num_tokens for item in pack) / self._max_tokens
        squares = sum(item.num_tokens**2 for item in pack) * self._num_packs / max(self._squares, 1)
        return VISION * tiles + (1 - VISION) * ((1 - QUADRATIC) * tokens + QUADRATIC * squares)

    def pop(self, at: float) -> Items:
        """The pack at a quantile of cost, the older one of equals. Raises IndexError if none is ready."""
        order = sorted(range(len(self._packs)), key=lambda number: self.cost(self._packs[number]))
        return self._packs.pop(order[int(at * len(order))])

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: what the means rest on, and the packs as lists of [source, row, tokens, tiles]."""
        packs = [[[item.source, item.row, item.num_tokens, item.num_tiles] for item in pack] for pack in self._packs]
        return {"seen": [self._num_packs, self._tiles, self._squares], "packs": packs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._num_packs, self._tiles, self._squares = state["seen"]
        self._packs = [
            tuple(
                Item(source=source, row=row, num_tokens=tokens, num_tiles=tiles) for source, row, tokens, tiles in pack
            )
            for pack in state["packs"]
        ]
