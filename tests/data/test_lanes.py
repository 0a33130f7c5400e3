"""Elastic lanes and the synchronised pool: the data order depends on the lanes, never on the processes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sailvl.config import ConfigError
from sailvl.data.encode import measure
from sailvl.data.lane import Health, Lane
from sailvl.data.loader import Loader, LoaderError
from sailvl.data.ready import Ready, quantile
from sailvl.types import Batch, Item, Message, Picture, Record, RecordError


class Rows:
    """Rows of unlike sizes, with a picture of its own size each; every seventh is broken."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def record(self, row: int) -> Record:
        if row % 7 == 3:
            raise RecordError(f"{self.name} row {row} is broken")
        width = 30 + row * 37 % 190
        text = f"{self.name} {row} " + "a" * (1 + row * 7 % 43)
        return Record(
            id=f"{self.name}-{row}",
            messages=(Message(role="user", text=text), Message(role="assistant", text=f"{row}." * (1 + row % 3))),
            pictures=() if row % 4 == 0 else (Picture(width=width, height=60, ref=width),),
        )

    def images(self, record: Record) -> list[Image.Image]:
        return [Image.new("RGB", (picture.ref, 60)) for picture in record.pictures]

    def fingerprint(self) -> str:
        return f"{self.name}{self.size}"


def loader(processor: Any, **changes: Any) -> Loader:
    options: dict[str, Any] = {"max_tokens": 200, "max_tiles": 12, "lanes": 4, "buffer": 8, "seed": 3}
    sources = {"a": Rows("a", 53), "b": Rows("b", 17)}
    return Loader(sources, {"a": 0.7, "b": 0.3}, processor, **{**options, **changes})


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Batch):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch))
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def steps_of(processor: Any, world_size: int, num_steps: int, state: Any = None, **changes: Any) -> tuple[Any, Any]:
    """Steps as {lane: batch}, of all simulated processes, and the state a checkpoint would hold."""
    ranks = [loader(processor, rank=rank, world_size=world_size, **changes) for rank in range(world_size)]
    if state is not None:
        for each in ranks:
            each.load_state_dict(state)
    steps = []
    for _ in range(num_steps):
        found = [next(each) for each in ranks]
        for rank, batches in enumerate(found):
            lanes = changes.get("lanes", 4)
            assert [batch.lane for batch in batches] == list(range(rank, lanes, world_size))
        steps.append({batch.lane: batch for batches in found for batch in batches})
    states = [each.state_dict() for each in ranks]
    for each in ranks:
        each.close()
    assert all({**s, "lanes": 0} == {**states[0], "lanes": 0} for s in states)
    lanes = [lane for each in reversed(states) for lane in each["lanes"]]
    return steps, json.loads(json.dumps({**states[0], "lanes": lanes}))


def all_same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(same(a[lane], b[lane]) for lane in a) for a, b in zip(first, second, strict=True)
    )


POOL = {"sync_pool": 6, "lane_group": 2}


@pytest.mark.parametrize("options", [{}, {"lanes": 8}, POOL, {**POOL, "weighting": "sample"}])
def test_any_number_of_processes_sees_the_same_lanes(tiny_processor: Any, options: Any) -> None:
    whole, _ = steps_of(tiny_processor, 1, 5, **options)
    for world_size in (2, 4):
        assert all_same(steps_of(tiny_processor, world_size, 5, **options)[0], whole)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
    workers=st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 3)]),
    cut=st.integers(0, 4),
    pool=st.booleans(),
)
def test_a_run_continues_on_any_number_of_processes_and_workers(
    tiny_processor: Any, before: int, after: int, workers: tuple[int, int], cut: int, pool: bool
) -> None:
    options = POOL if pool else {}
    whole, end = steps_of(tiny_processor, 1, 5, **options)
    first, state = steps_of(tiny_processor, before, cut, workers=workers[0], **options)
    rest, last = steps_of(tiny_processor, after, 5 - cut, state, workers=workers[1], **options)
    assert all_same(first + rest, whole)
    assert sorted(last["lanes"], key=lambda lane: lane["lane"]) == end["lanes"]


def test_a_live_loader_of_several_processes_rewinds(tiny_processor: Any) -> None:
    _, state = steps_of(tiny_processor, 1, 3, **POOL)
    live = loader(tiny_processor, rank=1, world_size=2, workers=2, **POOL)
    live.load_state_dict(state)
    expected = [next(live) for _ in range(3)]
    live.load_state_dict(state)
    again = [next(live) for _ in range(3)]
    live.close()
    assert all(same(a, b) for x, y in zip(expected, again, strict=True) for a, b in zip(x, y, strict=True))


def test_lanes_that_cannot_be_shared_are_refused(tiny_processor: Any) -> None:
    with pytest.raises(ConfigError, match="4 lanes cannot be shared evenly by 3 processes"):
        loader(tiny_processor, world_size=3)
    with pytest.raises(ConfigError, match="4 lanes do not make groups of 3"):
        loader(tiny_processor, lane_group=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(tiny_processor, rank=2, world_size=2)


def test_a_position_without_all_lanes_or_of_another_order_is_refused(tiny_processor: Any) -> None:
    half = loader(tiny_processor, rank=1, world_size=2)
    with pytest.raises(LoaderError, match=r"has lanes \[1, 3\], this process also needs \[0, 2\]"):
        loader(tiny_processor).load_state_dict(half.state_dict())
    with pytest.raises(LoaderError, match=r"lanes: 4 then, 8 now"):
        loader(tiny_processor, lanes=8).load_state_dict(loader(tiny_processor).state_dict())
    with pytest.raises(LoaderError, match=r"sync_pool: None then, 6 now"):
        loader(tiny_processor, **POOL).load_state_dict(loader(tiny_processor).state_dict())
    assert "sync_pool" not in loader(tiny_processor).state_dict()["terms"]


# ---- the pool -------------------------------------------------------------------------------------------------------


def lane(sync_pool: int, *, number: int = 0, num_lanes: int = 1, lane_group: int = 1, processor: Any = None) -> Lane:
    sources = {"a": Rows("a", 53)}
    return Lane(
        sources, {"a": 1.0}, partial(measure, processor=processor), Health({"a": 53}), lane=number,
        num_lanes=num_lanes, seed=1, max_tokens=200, max_tiles=12, buffer=8, sync_pool=sync_pool, lane_group=lane_group,
    )  # fmt: skip


def test_the_pool_only_changes_the_order_of_packs(tiny_processor: Any) -> None:
    plain, pooled = lane(0, processor=tiny_processor), lane(6, processor=tiny_processor)
    packs = [plain.next()[0].items for _ in range(60)]
    given_, rejects = [], []
    for _ in range(55):
        pack, skipped = pooled.next()
        given_.append(pack.items)
        rejects += skipped
    assert given_ != packs[:55]
    state = pooled.state_dict()
    ready = [tuple(tuple(item) for item in pack) for pack in state["ready"]["packs"]]
    seen = Counter(tuple((i.source, i.row, i.num_tokens, i.num_tiles) for i in pack) for pack in given_)
    assert seen + Counter(ready) == Counter(
        tuple((i.source, i.row, i.num_tokens, i.num_tiles) for i in pack) for pack in packs
    )
    assert state["skipped"] == len(rejects) > 0


def test_quantiles_are_shared_by_a_group_spread_over_blocks_and_even_over_steps() -> None:
    for step in range(50):
        at = [quantile(step, number, 16, 4) for number in range(16)]
        assert all(len(set(at[i : i + 4])) == 1 for i in (0, 4, 8, 12))
        spread = sorted((u - at[0]) % 1 for u in set(at))
        assert spread == pytest.approx([0, 0.25, 0.5, 0.75])
        assert all(0 <= u < 1 for u in at)
    first = [quantile(step, 0, 16, 4) for step in range(1000)]
    assert all(abs(sum(u < edge / 10 for u in first) - 100 * edge) <= 4 for edge in range(11))


def pack(tokens: int, tiles: int, row: int = 0) -> tuple[Item, ...]:
    return (Item(source="a", row=row, num_tokens=tokens, num_tiles=tiles),)


def test_cost_is_the_documented_formula_and_pop_takes_its_quantile() -> None:
    ready = Ready(3, 100)
    for tokens, tiles in ((100, 4), (50, 2), (80, 0)):
        assert not ready.full
        ready.add(pack(tokens, tiles))
    mean_squares = (100**2 + 50**2 + 80**2) / 3
    assert ready.full
    assert ready.cost(pack(50, 2)) == pytest.approx(0.45 + 0.55 * (0.85 * 0.5 + 0.15 * 2500 / mean_squares))
    assert ready.pop(0.0)[0].num_tokens == 80
    assert ready.pop(0.99)[0].num_tokens == 100
    assert len(ready) == 1 and ready.pop(0.7)[0].num_tokens == 50
    with pytest.raises(IndexError):
        ready.pop(0.5)


def test_of_equal_packs_the_older_goes_first_and_text_alone_has_a_cost() -> None:
    ready = Ready(3, 100)
    for row in range(3):
        ready.add(pack(40, 0, row))
    assert [ready.pop(0.1)[0].row for _ in range(3)] == [0, 1, 2]


def test_the_state_of_a_pool_is_small_json_and_exact(tiny_processor: Any) -> None:
    first, second = lane(32, processor=tiny_processor), lane(32, processor=tiny_processor)
    for _ in range(20):
        pack_, _ = first.next()
    text = json.dumps(pack_.state)
    assert len(text) < 10_000
    second.load_state_dict(json.loads(text))
    for _ in range(20):
        (a, x), (b, y) = first.next(), second.next()
        assert (a, x) == (b, y)


def test_lanes_of_a_group_take_packs_of_like_cost(tiny_processor: Any) -> None:
    def unevenness(sync_pool: int) -> float:
        lanes = [
            lane(sync_pool, number=n, num_lanes=4, lane_group=4, processor=tiny_processor) for n in range(4)
        ]  # fmt: skip
        sizes = [[each.next()[0].num_tiles for each in lanes] for _ in range(60)]
        return sum(map(max, sizes)) / sum(map(sum, sizes)) * 4

    assert unevenness(24) < unevenness(0) - 0.02


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "power"), [("sample", -1.0), ("sqrt", -0.5)])
def test_a_row_is_weighed_by_its_own_document_whatever_the_pack(
    tiny_processor: Any, weighting: Any, power: float
) -> None:
    by_text: dict[tuple[int, ...], set[tuple[float, ...]]] = {}
    for max_tokens, seed in ((200, 3), (130, 4)):
        stream = loader(tiny_processor, max_tokens=max_tokens, seed=seed, weighting=weighting)
        plain = loader(tiny_processor, max_tokens=max_tokens, seed=seed)
        for _ in range(5):
            for batch, unweighted in zip(next(stream), next(plain), strict=True):
                assert unweighted.weights_R is None
                assert batch.weights_R is not None and batch.weights_R.dtype == torch.float32
                assert same(replace(batch, weights_R=None), unweighted)
                assert batch.weights_R.shape == batch.rows_R.shape
                ends = batch.cu_seqlens.tolist()
                for start, end in pairwise(ends):
                    inside = (batch.rows_R >= start) & (batch.rows_R < end)
                    weights, count = batch.weights_R[inside], int(inside.sum())
                    assert torch.equal(weights, torch.full((count,), count**power, dtype=torch.float32))
                    ids = tuple(batch.ids_T[start:end].tolist())
                    by_text.setdefault(ids, set()).add(tuple(weights.tolist()))
    assert len(by_text) > 20
    assert all(len(found) == 1 for found in by_text.values())


def test_a_masked_document_has_no_weight(tiny_processor: Any) -> None:
    class Blind(Rows):
        def images(self, record: Record) -> list[Image.Image]:
            if record.id == "a-5":
                raise RecordError("unreadable")
            return super().images(record)

    sources = {"a": Blind("a", 20)}
    stream = Loader(
        sources, {"a": 1.0}, tiny_processor, max_tokens=150, max_tiles=9, buffer=4, seed=0, weighting="sample"
    )  # fmt: skip
    batches = [batch for _ in range(12) for batch in next(stream)]
    assert any(reject.id == "a-5" for batch in batches for reject in batch.rejects)
    for batch in batches:
        masked = sum(reject.id == "a-5" for reject in batch.rejects)
        assert batch.weights_R is not None
        assert batch.weights_R.sum().item() == pytest.approx(batch.num_samples - masked)
