"""Samples into sequences of at most max_tokens: online, oldest-anchored best fit, balanced in tiles.

Out of a buffer of some hundred waiting samples a pack takes

1. the one that has waited longest, which bounds the wait: long samples, hard to place, need no periodic forced
   inclusion (the report's remedy, section 3.4);
2. until 70 % full, long ones that fit; among the eight longest the one that brings tiles per token closest to the
   stream's average. The vision encoder's time goes with tiles, not tokens, and lanes that run side by side wait for the
   slowest: this way they become alike without knowing of each other (the report balances visual tokens across devices
   by an unstated method);
3. then the longest whose best companion fills the rest; and if a gap stays, whatever of 32 spread candidates fills it
   best (subset sums, on the bits of one integer each).

Long before short keeps a stock of short samples, which are what fills gaps. Nothing is ever cut, both limits hold, and
no random number is drawn. Cost: 2-4 us per sample; sequences 99.8 % full on usual mixtures (benchmarks/packing.py, also
the comparison with other methods).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

from sailvl.types import Item

# A waiting sample is one integer: length, then age (older is higher), then tiles. At this size no tree beats a sorted
# list of integers.
_TILE_BITS, _AGE_BITS = 20, 40
_LENGTH = _TILE_BITS + _AGE_BITS
_TILES = (1 << _TILE_BITS) - 1
_NEWEST = (1 << _AGE_BITS) - 1

_FINISH = 0.7  # of max_tokens: from here gaps count, no longer tiles
_CHOICE = 8  # how many of the longest may compete on tiles
_PARTNERS = 32  # how many of the longest may look for a companion
_GAP = 0.0025  # of max_tokens: a larger gap is worth a search for subsets
_SUBSET = 32  # how many candidates the search for subsets sees


class Packer:
    """The waiting samples of one lane. Fill it with ``add`` until ``full``, then ``pop`` one pack, and so on.

    max_tokens and max_tiles limit a pack; buffer is how many samples wait. Samples that fit no pack are refused by
    ``add``: the caller drops them first.
    """

    def __init__(self, max_tokens: int, max_tiles: int, buffer: int = 256) -> None:
        if min(max_tokens, buffer) < 1 or max_tiles < 0:
            raise ValueError(f"max_tokens {max_tokens}, max_tiles {max_tiles}, buffer {buffer}: must be positive")
        self.max_tokens, self.max_tiles, self.buffer = max_tokens, min(max_tiles, _TILES), buffer
        self._waiting: dict[int, Item] = {}  # by key, in order of arrival
        self._keys: list[int] = []  # sorted
        self._serial = self._most_tiles = 0
        self._seen_tokens = self._seen_tiles = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether as many samples wait as the buffer holds."""
        return len(self._waiting) >= self.buffer

    def add(self, item: Item) -> None:
        """One more waiting sample. Raises ValueError if it cannot fit any pack."""
        if item.num_tokens > self.max_tokens or item.num_tiles > self.max_tiles:
            raise ValueError(
                f"row {item.row} of {item.source} has {item.num_tokens} tokens and {item.num_tiles} tiles; "
                f"a pack holds {self.max_tokens} and {self.max_tiles}"
            )
        self._seen_tokens += item.num_tokens
        self._seen_tiles += item.num_tiles
        self._insert(item)

    def _insert(self, item: Item) -> None:
        key = item.num_tokens << _LENGTH | (_NEWEST - self._serial) << _TILE_BITS | item.num_tiles
        self._waiting[key] = item
        insort(self._keys, key)
        self._serial += 1
        self._most_tiles = max(self._most_tiles, item.num_tiles)

    def pop(self) -> tuple[Item, ...]:
        """The next pack: at least one sample, within both limits. Raises IndexError if nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits to be packed")
        key = next(iter(self._waiting))
        pack = [self._take(key)]
        tokens, tiles = key >> _LENGTH, key & _TILES
        while tokens < self.max_tokens * _FINISH:
            fits = self._fits(self.max_tokens - tokens, self.max_tiles - tiles)
            if not fits:
                return tuple(pack)
            key = self._most_balancing(fits, tokens, tiles)
            pack.append(self._take(key))
            tokens, tiles = tokens + (key >> _LENGTH), tiles + (key & _TILES)
        pack += [self._take(key) for key in self._finish(self.max_tokens - tokens, self.max_tiles - tiles)]
        return tuple(pack)

    def _take(self, key: int) -> Item:
        del self._keys[bisect_left(self._keys, key)]
        return self._waiting.pop(key)

    def _fits(self, tokens: int, tiles: int) -> list[int]:
        """Keys of all that fit into this room, shortest first."""
        fits = self._keys[: bisect_left(self._keys, (tokens + 1) << _LENGTH)]
        if tiles >= self._most_tiles:
            return fits
        return [key for key in fits if key & _TILES <= tiles]

    def _most_balancing(self, fits: list[int], tokens: int, tiles: int) -> int:
        seen_tokens, seen_tiles = self._seen_tokens, self._seen_tiles  # compared as integers: exact on any machine
        over = tiles * seen_tokens - tokens * seen_tiles
        best, least = -1, -1
        for key in fits[: -1 - _CHOICE : -1]:
            off = abs(over + (key & _TILES) * seen_tokens - (key >> _LENGTH) * seen_tiles)
            if best < 0 or off < least:
                best, least = key, off
        return best

    def _finish(self, tokens: int, tiles: int) -> list[int]:
        """Keys to fill the rest with."""
        pairs = self._fill_by_pairs(tokens, tiles)
        gap = tokens - sum(key >> _LENGTH for key in pairs)
        if gap <= self.max_tokens * _GAP:
            return pairs
        subset = self._fill_by_subset(tokens, tiles)
        better = sum(key >> _LENGTH for key in subset) > tokens - gap + self.max_tokens * _GAP / 2
        return subset if better and sum(key & _TILES for key in subset) <= tiles else pairs

    def _fill_by_pairs(self, tokens: int, tiles: int) -> list[int]:
        chosen: list[int] = []
        fits = self._fits(tokens, tiles)
        while fits:
            best, pick = -1, -1
            for at in range(len(fits) - 1, max(-1, len(fits) - 1 - _PARTNERS), -1):
                length = fits[at] >> _LENGTH
                if 2 * length <= best:  # a companion is no longer than the sample itself
                    break
                companion = bisect_left(fits, (tokens - length + 1) << _LENGTH, 0, at) - 1
                both = length + (fits[companion] >> _LENGTH if companion >= 0 else 0)
                if both > best:
                    best, pick = both, at
                if both == tokens:
                    break
            key = fits.pop(pick)
            chosen.append(key)
            tokens, tiles = tokens - (key >> _LENGTH), tiles - (key & _TILES)
            del fits[bisect_left(fits, (tokens + 1) << _LENGTH) :]
            if tiles < self._most_tiles:
                fits = [key for key in fits if key & _TILES <= tiles]
        return chosen

    def _fill_by_subset(self, tokens: int, tiles: int) -> list[int]:
        fits = self._fits(tokens, tiles)
        candidates = fits[:: -max(1, -(-len(fits) // _SUBSET))][::-1]  # spread over all lengths, the longest included
        room = (1 << tokens + 1) - 1
        reachable = 1  # bit n: some of the candidates so far have n tokens together
        before = []
        for key in candidates:
            before.append(reachable)
            reachable |= reachable << (key >> _LENGTH) & room
        left = reachable.bit_length() - 1
        chosen = []
        for key, without in zip(reversed(candidates), reversed(before), strict=True):  # long ones first
            length = key >> _LENGTH
            if length <= left and without >> left - length & 1:
                chosen.append(key)
                left -= length
        return chosen

    def waiting(self) -> tuple[Item, ...]:
        """The waiting samples, longest waiting first."""
        return tuple(self._waiting.values())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: tokens and tiles seen, and the waiting samples as [source, row, tokens, tiles]."""
        waiting = [[item.source, item.row, item.num_tokens, item.num_tiles] for item in self._waiting.values()]
        return {"seen": [self._seen_tokens, self._seen_tiles], "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._waiting, self._keys, self._serial, self._most_tiles = {}, [], 0, 0
        self._seen_tokens, self._seen_tiles = state["seen"]
        for source, row, num_tokens, num_tiles in state["waiting"]:
            self._insert(Item(source=source, row=row, num_tokens=num_tokens, num_tiles=num_tiles))
