"""Which sample is next: an exact random order without memory, and a mixture without randomness.

A row order is a keyed permutation (a four-round Feistel network, walked until it lands inside the range), so any
position of any epoch is computed in O(1) time and memory: nothing is shuffled, stored, or replayed on resume.
A mixture is stride scheduling on exact fractions: the source furthest behind its share is next. After any whole
multiple of the shares' common denominator the counts are exactly the shares; no source is ever a full sample ahead.

A source that reads neighbouring rows together names windows of them: then the windows are permuted, and the rows inside
of each. That needs the windows' sizes in the epoch's order, 8 B a window, and reads every row of an epoch once too.

Lanes deal the order out: draw k of lane v of V has global index base + k V + v, so all lanes together read each
epoch once, in any number of processes. Cost: about 5 us per draw.

The report (section 3.2) names the mixtures, not how they are drawn.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import lcm
from typing import Any

_MASK64 = (1 << 64) - 1
_ROUNDS = 4


def splitmix64(x: int) -> int:
    """Mix a 64-bit integer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@lru_cache(maxsize=256)
def epoch_key(seed: int, source: str, epoch: int) -> int:
    """The 64-bit key of one source's order in one epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:8], "big")


def feistel(i: int, n: int, key: int) -> int:
    """Position i of the permutation of range(n) named by key. Raises ValueError unless 0 <= i < n."""
    if not 0 <= i < n:
        raise ValueError(f"position {i} is outside 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:  # the network permutes 4**half values, at most 4 n: on average fewer than 4 walks end inside
        left, right = i >> half, i & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (splitmix64(right ^ (key + round_ & _MASK64)) & mask)
        i = left << half | right
        if i < n:
            return i


class WindowOrder:
    """One epoch of a source read by windows. ``starts``: the first row of each window, ascending from 0."""

    def __init__(self, starts: Sequence[int], size: int, key: int) -> None:
        self._key = key
        ends = [*starts[1:], size]
        dealt = [feistel(i, len(starts), key) for i in range(len(starts))]
        self._windows = [(starts[window], ends[window] - starts[window]) for window in dealt]
        self._ends = list(accumulate(num_rows for _, num_rows in self._windows))

    def __getitem__(self, position: int) -> int:
        """The row at a position of the epoch."""
        at = bisect_right(self._ends, position)
        start, num_rows = self._windows[at]
        inside = position - (self._ends[at] - num_rows)
        return start + feistel(inside, num_rows, splitmix64(self._key ^ start))


class Order:
    """The draws of one lane: an endless, resumable stream of (source, row).

    sizes: rows per source. shares: parts of the mixture, in any unit; names must equal those of sizes. windows: of the
    sources that are read by windows, the first row of each window.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        *,
        seed: int,
        lane: int = 0,
        num_lanes: int = 1,
        windows: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if set(sizes) != set(shares):
            raise ValueError(f"shares name {sorted(shares)}, sources are {sorted(sizes)}")
        if empty := [name for name, size in sizes.items() if size < 1]:
            raise ValueError(f"no rows in source {', '.join(empty)}: leave it out of the mixture")
        if wrong := [name for name, share in shares.items() if not share > 0]:
            raise ValueError(f"the share of {', '.join(wrong)} is not above 0: leave it out of the mixture")
        if not 0 <= lane < num_lanes:
            raise ValueError(f"lane {lane} of {num_lanes}")
        self.names = tuple(shares)
        self.sizes = tuple(sizes[name] for name in self.names)
        # decimal fractions as written ("0.3" is 3/10), so that the scheduling below is exact on integers
        exact = [Fraction(repr(float(shares[name]))) for name in self.names]
        scale = lcm(*(value.denominator for value in exact))
        self._weights = [int(value * scale) for value in exact]
        self._total = sum(self._weights)
        self.seed, self.lane, self.num_lanes = seed, lane, num_lanes
        self.num_draws = 0
        self.counts = [0] * len(self.names)
        self.bases = [0] * len(self.names)
        self._windows = [(windows or {}).get(name) for name in self.names]
        self._epochs: dict[int, tuple[int, WindowOrder]] = {}  # source: its epoch under way

    def draw(self) -> tuple[int, int]:
        """The next sample as (index of its source in ``names``, row)."""
        self.num_draws += 1
        behind = [w * self.num_draws - c * self._total for w, c in zip(self._weights, self.counts, strict=True)]
        source = behind.index(max(behind))
        index = self.bases[source] + self.counts[source] * self.num_lanes + self.lane
        self.counts[source] += 1
        size = self.sizes[source]
        return source, self._row(source, *divmod(index, size))

    def _row(self, source: int, epoch: int, position: int) -> int:
        key, starts = epoch_key(self.seed, self.names[source], epoch), self._windows[source]
        if starts is None:
            return feistel(position, self.sizes[source], key)
        if source not in self._epochs or self._epochs[source][0] != epoch:
            self._epochs[source] = epoch, WindowOrder(starts, self.sizes[source], key)
        return self._epochs[source][1][position]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; with the constructor's arguments it names the rest of the stream."""
        return {"draws": self.num_draws, "counts": list(self.counts), "bases": list(self.bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.num_draws = int(state["draws"])
        self.counts = [int(count) for count in state["counts"]]
        self.bases = [int(base) for base in state["bases"]]
