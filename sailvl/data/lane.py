"""The planner of one lane: draws samples, measures them, packs them; all of a data stream's state, and no pixels.

A run has a fixed number of lanes; one optimizer step is one pack from every lane. Lanes never talk to each other, so
which process plans which lane does not matter. The state after a pack is a few kilobytes of JSON (counters and the
waiting samples) and travels with the pack: whoever consumed that pack last can continue exactly there.

A record that cannot be used (broken line, missing picture, no assistant turn) or fits no pack is skipped here. That
depends on the record alone, so a resumed run skips the same ones, and no other sample moves.

With ``sync_pool`` the lane keeps that many ready packs and gives the one whose cost suits the step (``ready``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sailvl.data.order import Order
from sailvl.data.pack import Packer
from sailvl.data.ready import Ready, quantile
from sailvl.data.source import Source, Windowed
from sailvl.media import MediaError
from sailvl.types import Item, Pack, Record, RecordError, Reject

_HOPELESS = 10_000
"""Rows of one source rejected, with not one good among them, before a run is stopped; or all its rows, if fewer."""


class Health:
    """Rejected rows per source until its first good one, to stop a run whose source has nothing to give."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._bad: dict[str, set[int]] = {name: set() for name in sizes}

    def accept(self, source: str) -> None:
        """A sample of this source was decoded: it is not hopeless, now or later."""
        self._bad.pop(source, None)

    def reject(self, source: str, row: int, reason: str) -> None:
        """Raises RecordError once every row (or the first 10,000 drawn) of the source was rejected."""
        bad = self._bad.get(source)
        if bad is None:
            return
        bad.add(row)
        if len(bad) >= min(self._sizes[source], _HOPELESS):
            raise RecordError(
                f"source {source}: all of the first {len(bad)} rows (of {self._sizes[source]}) were rejected, "
                f"the last because: {reason}"
            )


class Lane:
    """An endless stream of packs.

    measure: record -> (tokens, tiles), raising RecordError; health is shared by the lanes of a loader.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        shares: Mapping[str, float],
        measure: Callable[[Record], tuple[int, int]],
        health: Health,
        *,
        lane: int,
        num_lanes: int,
        seed: int,
        max_tokens: int,
        max_tiles: int,
        buffer: int,
        sync_pool: int = 0,
        lane_group: int = 1,
    ) -> None:
        self.lane, self._num_lanes, self._lane_group = lane, num_lanes, lane_group
        self._sources, self._measure, self._health = sources, measure, health
        sizes = {name: len(source) for name, source in sources.items()}
        windows = {name: source.windows for name, source in sources.items() if isinstance(source, Windowed)}
        self._order = Order(sizes, shares, seed=seed, lane=lane, num_lanes=num_lanes, windows=windows)
        self._packer = Packer(max_tokens, max_tiles, buffer)
        self._ready = Ready(sync_pool, max_tokens) if sync_pool else None
        self._num_packs = 0
        self._num_skipped = 0

    def next(self) -> tuple[Pack, tuple[Reject, ...]]:
        """The next pack, and the samples skipped since the last. Raises RecordError if a source has no good row."""
        skipped: list[Reject] = []
        if self._ready is None:
            items = self._pack(skipped)
        else:
            while not self._ready.full:
                self._ready.add(self._pack(skipped))
            items = self._ready.pop(quantile(self._num_packs, self.lane, self._num_lanes, self._lane_group))
        self._num_packs += 1
        self._num_skipped += len(skipped)
        return Pack(lane=self.lane, items=items, state=self.state_dict()), tuple(skipped)

    def _pack(self, skipped: list[Reject]) -> tuple[Item, ...]:
        while not self._packer.full:
            source, row = self._order.draw()
            made = self._item(self._order.names[source], row)
            if isinstance(made, Item):
                self._packer.add(made)
            else:
                skipped.append(made)
        return self._packer.pop()

    def _item(self, name: str, row: int) -> Item | Reject:
        id = f"{name}/{row}"
        try:
            record = self._sources[name].record(row)
            id = record.id
            num_tokens, num_tiles = self._measure(record)
        except (RecordError, MediaError) as error:
            self._health.reject(name, row, str(error))
            return Reject(id=id, reason=str(error))
        if num_tokens <= self._packer.max_tokens and num_tiles <= self._packer.max_tiles:
            return Item(source=name, row=row, num_tokens=num_tokens, num_tiles=num_tiles)
        reason = (
            f"record {id}: {num_tokens} tokens and {num_tiles} tiles, "
            f"a pack holds {self._packer.max_tokens} and {self._packer.max_tiles}"
        )
        self._health.reject(name, row, reason)
        return Reject(id=id, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: counters, and the waiting samples; about 7 kB at a buffer of 256, as much again for 32 packs."""
        ready = {} if self._ready is None else {"ready": self._ready.state_dict()}
        return {
            "lane": self.lane,
            "packs": self._num_packs,
            "skipped": self._num_skipped,
            "order": self._order.state_dict(),
            "packer": self._packer.state_dict(),
            **ready,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue right after the pack this state came with."""
        if state["lane"] != self.lane:
            raise ValueError(f"this is lane {self.lane}, the state is of lane {state['lane']}")
        self._order.load_state_dict(state["order"])
        self._packer.load_state_dict(state["packer"])
        if self._ready is not None:
            self._ready.load_state_dict(state["ready"])
        self._num_packs, self._num_skipped = int(state["packs"]), int(state["skipped"])
