"""Batches for training: a planner in this process, decoding in workers, exact to stop, resume and rewind.

The planner (one ``Lane`` per lane) owns order, packing and all state, and works on texts and picture sizes alone.
Workers get a planned pack and return its tensors; they hold nothing. The state that ``state_dict`` returns is the one
that travelled with the last batches handed out, so neither the number of workers nor how far they read ahead matters:
any run can be continued with any other number of them, bit for bit.

The lanes, not the processes, are what the data order depends on. Of ``world_size`` processes the one of ``rank`` runs
lanes rank, rank + world_size, ...; a run saved by any number of processes continues, sample for sample, on any other
that divides the lanes.

A sample that fails to decode, or does not have the size it was planned with, keeps its slot: blank tiles, padding
tokens, nothing supervised; its id and reason are in the batch. The report (section 3.4) has neither.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from sailvl.config import ConfigError
from sailvl.data.batch import Weighting, collate
from sailvl.data.encode import Processor, blank, encode, measure
from sailvl.data.lane import Health, Lane
from sailvl.data.pool import Pool
from sailvl.data.source import Source
from sailvl.media import MediaError
from sailvl.types import Batch, Example, Item, Pack, RecordError, Reject

_Task = tuple[int, tuple[Item, ...]]


class LoaderError(RuntimeError):
    """A saved position that belongs to other data or settings."""


def _example(
    item: Item, sources: Mapping[str, Source], processor: Processor, answer_only: frozenset[str]
) -> tuple[Example, Reject | None]:
    """The planned sample, or a blank of its size and why."""
    id = f"{item.source}/{item.row}"
    try:
        source = sources[item.source]
        record = source.record(item.row)
        id = record.id
        example = encode(record, source.images(record), processor, answer_only=item.source in answer_only)
        if (example.num_tokens, example.num_tiles) != (item.num_tokens, item.num_tiles):
            raise RecordError(
                f"record {id}: planned as {item.num_tokens} tokens and {item.num_tiles} tiles, "
                f"is {example.num_tokens} and {example.num_tiles}: did its file change?"
            )
        return example, None
    except (RecordError, MediaError) as error:
        return blank(id, item.num_tokens, item.num_tiles, processor), Reject(id=id, reason=str(error))


def _make(
    task: _Task,
    *,
    sources: Mapping[str, Source],
    processor: Processor,
    weighting: Weighting = "token",
    answer_only: frozenset[str] = frozenset(),
) -> tuple[Batch, tuple[Reject | None, ...]]:
    """A planned pack as a batch still without its state, and per item why it was rejected. Runs in the workers."""
    lane, items = task
    made = [_example(item, sources, processor, answer_only) for item in items]
    batch = collate([example for example, _ in made], lane, {}, weighting=weighting)
    return batch, tuple(reject for _, reject in made)


class Loader:
    """An endless iterator of steps; a step is one Batch of every lane of this process, in lane order.

    sources and shares have the same names; max_tokens and max_tiles limit each pack; buffer is how many samples a lane
    chooses from; prefetch is how many packs each worker reads ahead. workers=0 decodes in this process. sync_pool ready
    packs wait in each lane, to suit the other lanes of its ``lane_group`` (``sailvl.data.ready``). weighting fills the
    batches' weights_R (``sailvl.data.batch``); of the sources named in answer_only thoughts are not supervised.
    Raises ConfigError if world_size does not divide lanes, RecordError if every row of a source is unusable,
    WorkerError if a worker dies.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        shares: Mapping[str, float],
        processor: Processor,
        *,
        max_tokens: int,
        max_tiles: int,
        lanes: int = 1,
        buffer: int = 256,
        seed: int,
        workers: int = 0,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        weighting: Weighting = "token",
        answer_only: Collection[str] = (),
        sync_pool: int = 0,
        lane_group: int = 1,
    ) -> None:
        if lanes % world_size:
            text = f"{lanes} lanes cannot be shared evenly by {world_size} processes: use a number that divides {lanes}"
            raise ConfigError([("lanes", text)])
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        if lanes % lane_group:
            raise ConfigError([("lane_group", f"{lanes} lanes do not make groups of {lane_group}")])
        sources = {name: sources[name] for name in shares if name in sources}
        self._sources, self._processor = sources, processor
        self._terms = {
            "shares": {name: float(share) for name, share in shares.items()},
            "lanes": lanes, "seed": seed, "max_tokens": max_tokens, "max_tiles": max_tiles, "buffer": buffer,
        }  # fmt: skip
        if sync_pool:
            self._terms |= {"sync_pool": sync_pool, "lane_group": lane_group}
        self._health = Health({name: len(source) for name, source in sources.items()})
        self._lanes = [
            Lane(
                sources, shares, partial(measure, processor=processor), self._health,
                lane=lane, num_lanes=lanes, seed=seed, max_tokens=max_tokens, max_tiles=max_tiles, buffer=buffer,
                sync_pool=sync_pool, lane_group=lane_group,
            )
            for lane in range(rank, lanes, world_size)
        ]  # fmt: skip
        self._make = partial(
            _make, sources=sources, processor=processor, weighting=weighting, answer_only=frozenset(answer_only)
        )
        self._workers, self._num_ahead = workers, max(1, workers * prefetch)
        self._pool: Pool | None = None
        self._planned: deque[tuple[Pack, tuple[Reject, ...]]] = deque()  # sent to workers, not yet received
        self._turn = 0
        self._consumed = [lane.state_dict() for lane in self._lanes]
        self._num_steps = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next step. Blocks until it is decoded."""
        if self._workers and self._pool is None:
            self._pool = Pool(self._make, self._workers)
        step = [self._batch() for _ in self._lanes]
        self._consumed = [batch.state for batch in step]
        self._num_steps += 1
        return step

    def _batch(self) -> Batch:
        while len(self._planned) < self._num_ahead:
            plan = self._lanes[self._turn].next()
            self._turn = (self._turn + 1) % len(self._lanes)
            if self._pool:
                self._pool.send((plan[0].lane, plan[0].items))
            self._planned.append(plan)
        pack, skipped = self._planned.popleft()
        batch, rejects = self._pool.receive() if self._pool else self._make((pack.lane, pack.items))
        for item, reject in zip(pack.items, rejects, strict=True):
            if reject:
                self._health.reject(item.source, item.row, reject.reason)
            else:
                self._health.accept(item.source)
        return replace(batch, state=pack.state, rejects=skipped + tuple(reject for reject in rejects if reject))

    @cached_property
    def _data_id(self) -> dict[str, str]:
        content = {name: source.fingerprint() for name, source in self._sources.items()}
        tokenizer = self._processor.tokenizer.backend_tokenizer.to_str()
        terms = f"{tokenizer}{self._processor.image_processor.tiling}{self._processor.system_message}"
        return {**content, "processor": hashlib.sha256(terms.encode()).hexdigest()}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the last step handed out ended, and what data and settings that belongs to.

        ``lanes`` has the states of this process's lanes alone; a checkpoint needs those of all processes.
        """
        return {"steps": self._num_steps, "terms": self._terms, "data": self._data_id, "lanes": self._consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, or go back, to a state; also in the middle of iterating.

        ``lanes`` may hold the states of more lanes than this process runs, in any order.
        Raises LoaderError if the state belongs to other data or settings, or lacks one of the lanes.
        """
        for part, mine in (("terms", self._terms), ("data", self._data_id)):
            theirs = json.loads(json.dumps(state[part]))
            if changed := [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]:
                facts = "; ".join(f"{key}: {theirs.get(key)} then, {mine.get(key)} now" for key in sorted(changed))
                raise LoaderError(f"the saved position belongs to other {part} ({facts}): begin the stage anew")
        found = {int(lane["lane"]): lane for lane in state["lanes"]}
        if missing := [lane.lane for lane in self._lanes if lane.lane not in found]:
            text = f"the saved position has lanes {sorted(found)}, this process also needs {missing}"
            raise LoaderError(f"{text}: it was saved by one process of several, without the others' lanes")
        if self._pool:
            self._pool.discard()
        self._planned.clear()
        self._turn = 0
        self._consumed = [dict(found[lane.lane]) for lane in self._lanes]
        for lane, lane_state in zip(self._lanes, self._consumed, strict=True):
            lane.load_state_dict(lane_state)
        self._num_steps = int(state["steps"])

    def close(self) -> None:
        """End the workers. To go on afterwards, load a state."""
        if self._pool:
            self._pool.close()
        self._pool = None
