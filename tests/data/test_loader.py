from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sailvl.data.batch import collate
from sailvl.data.encode import encode
from sailvl.data.loader import Loader, LoaderError
from sailvl.data.pool import WorkerError
from sailvl.data.source import JsonlSource, Source
from sailvl.types import Batch, Message, Picture, Record, RecordError


class Made:
    """Rows with a number in each text and a picture of its own size; some broken, some broken only in their pixels."""

    def __init__(
        self,
        name: str,
        size: int,
        *,
        broken: Sequence[int] = (),
        undecodable: Sequence[int] = (),
        long: Sequence[int] = (),
    ) -> None:
        self.name, self.size = name, size
        self.broken, self.undecodable, self.long = set(broken), set(undecodable), set(long)

    def __len__(self) -> int:
        return self.size

    def record(self, row: int) -> Record:
        if row in self.broken:
            raise RecordError(f"{self.name} row {row} is broken")
        words = 400 if row in self.long else 1 + row * 7 % 23
        size = 30 + row * 37 % 150
        pictures = () if row % 4 == 0 else (Picture(width=size, height=60, ref=size),)
        text = f"{self.name} {row} " + "a" * words
        return Record(
            id=f"{self.name}-{row}",
            messages=(Message(role="user", text=text), Message(role="assistant", text=f"{row}.")),
            pictures=pictures,
        )

    def images(self, record: Record) -> list[Image.Image]:
        row = int(record.id.split("-")[1])
        # another size than promised is found out only now
        width = 900 if row in self.undecodable else 0
        return [Image.new("RGB", (width or p.ref, 60), (row % 256, 9, 9)) for p in record.pictures]

    def fingerprint(self) -> str:
        return f"{self.name}{self.size}"


SHARES = {"a": 0.7, "b": 0.3}


def sources(**faults: Any) -> dict[str, Source]:
    return {"a": Made("a", 41, **faults), "b": Made("b", 13)}


def loader(processor: Any, data: dict[str, Source] | None = None, **changes: Any) -> Loader:
    options: dict[str, Any] = {"max_tokens": 200, "max_tiles": 12, "lanes": 2, "buffer": 8, "seed": 3}
    return Loader(data or sources(), SHARES, processor, **{**options, **changes})


def take(source: Loader, steps: int) -> list[list[Batch]]:
    return [next(source) for _ in range(steps)]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Batch):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch))
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def test_batches_are_packs_of_whole_documents(tiny_processor: Any) -> None:
    data = sources()
    k = tiny_processor.image_processor.tiling.tokens_per_tile
    seen_tiles = set()
    for step in take(loader(tiny_processor), 12):
        assert [batch.lane for batch in step] == [0, 1]
        for batch in step:
            assert len(batch.ids_T) <= 200
            assert len(batch.tiles_N3SS) <= 12
            assert (batch.ids_T == tiny_processor.image_token_id).sum() == len(batch.tiles_N3SS) * k
            ends = batch.cu_seqlens.tolist()
            assert batch.cu_seqlens.dtype == torch.int32
            assert ends[0] == 0 and ends[-1] == len(batch.ids_T)
            assert batch.max_length == max(b - a for a, b in pairwise(ends))
            assert batch.positions_T.tolist() == [i for a, b in pairwise(ends) for i in range(b - a)]
            seen_tiles.add(len(batch.tiles_N3SS) > 0)
            # each document is exactly one record, encoded alone
            start_of_tiles = 0
            for a, b in pairwise(ends):
                text = tiny_processor.tokenizer.decode(batch.ids_T[a:b])
                name, row = next(w for w in text.split("\n") if w.startswith(("a ", "b "))).split(" ")[:2]
                record = data[name].record(int(row))
                alone = encode(record, data[name].images(record), tiny_processor)
                assert batch.ids_T[a:b].tolist() == alone.ids_T.tolist()
                tiles = batch.tiles_N3SS[start_of_tiles : start_of_tiles + alone.num_tiles]
                assert torch.equal(tiles, torch.from_numpy(alone.tiles_N3SS))
                start_of_tiles += alone.num_tiles
                inside = (batch.rows_R >= a) & (batch.rows_R < b)
                assert torch.equal(batch.targets_R[inside], batch.ids_T[batch.rows_R[inside] + 1])
                assert tiny_processor.tokenizer.decode(batch.targets_R[inside]) == f"{row}.<|im_end|>"


def test_a_batch_without_pictures_keeps_the_tile_shape(tiny_processor: Any) -> None:
    record = Record(id="t", messages=(Message(role="user", text="1"), Message(role="assistant", text="2")))
    batch = collate([encode(record, [], tiny_processor)], 0, {})
    assert batch.tiles_N3SS.shape == (0, 3, 56, 56)
    assert batch.tiles_N3SS.dtype == torch.float32
    assert batch.num_samples == 1


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 3), (3, 0), (0, 2)])
def test_resume_in_mid_epoch_is_exact_for_any_workers(tiny_processor: Any, before: int, after: int) -> None:
    whole = take(loader(tiny_processor), 9)
    first = loader(tiny_processor, workers=before)
    assert same(take(first, 4), whole[:4])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = loader(tiny_processor, workers=after, prefetch=3)
    second.load_state_dict(state)
    assert same(take(second, 5), whole[4:])
    assert second.state_dict()["steps"] == 9
    second.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_live_loader_rewinds(tiny_processor: Any, workers: int) -> None:
    live = loader(tiny_processor, workers=workers)
    start = live.state_dict()
    first = take(live, 3)
    state = live.state_dict()
    expected = take(live, 4)
    for _ in range(2):
        live.load_state_dict(state)
        assert live.state_dict() == state
        assert same(take(live, 4), expected)
    live.load_state_dict(start)
    assert same(take(live, 7), first + expected)
    live.close()


def test_making_batches_leaves_the_random_numbers_alone(tiny_processor: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(loader(tiny_processor), 2)
    assert torch.equal(torch.rand(3), expected)


def test_every_sample_of_an_epoch_is_used_once(tiny_processor: Any) -> None:
    data = {"a": Made("a", 41)}
    stream = Loader(data, {"a": 1.0}, tiny_processor, max_tokens=200, max_tiles=12, lanes=2, buffer=4, seed=0)
    counts: dict[str, int] = {}
    drawn = 0
    while drawn < 41 * 3:
        for batch in next(stream):
            for turn in tiny_processor.tokenizer.decode(batch.ids_T).split("user\n")[1:]:
                row = turn.split("a ")[1].split(" ")[0]
                counts[row] = counts.get(row, 0) + 1
                drawn += 1
    waiting = 2 * 4 + 12
    assert len(counts) == 41
    assert min(counts.values()) >= 1
    assert sum(abs(n - drawn / 41) for n in counts.values()) <= 41 + waiting


def test_bad_samples_are_masked_and_do_not_move_the_others(tiny_processor: Any) -> None:
    clean = take(loader(tiny_processor), 10)
    broken = take(loader(tiny_processor, sources(undecodable=[1, 2, 3, 5, 7])), 10)
    rejected = [r for step in broken for b in step for r in b.rejects]
    assert {r.id for r in rejected} == {"a-1", "a-2", "a-3", "a-5", "a-7"}
    assert "a-1: picture 1 was 67 x 60" in next(r.reason for r in rejected if r.id == "a-1")
    k = tiny_processor.image_processor.tiling.tokens_per_tile
    for was, now in zip([b for s in clean for b in s], [b for s in broken for b in s], strict=True):
        assert torch.equal(was.cu_seqlens, now.cu_seqlens)
        assert was.tiles_N3SS.shape == now.tiles_N3SS.shape
        assert (now.ids_T == tiny_processor.image_token_id).sum() == len(now.tiles_N3SS) * k
        changed = 0
        for a, b in zip(was.cu_seqlens, was.cu_seqlens[1:], strict=False):
            rows = [r for r in now.rows_R.tolist() if a <= r < b]
            if torch.equal(was.ids_T[a:b], now.ids_T[a:b]):
                assert rows == [r for r in was.rows_R.tolist() if a <= r < b]
            else:
                changed += 1
                assert rows == []
        assert changed == len(now.rejects)


@pytest.mark.parametrize("faults", [{"broken": range(0, 41, 3)}, {"long": range(0, 41, 3)}])
def test_skipped_samples_are_reported_once_a_draw_and_resume_exactly(tiny_processor: Any, faults: Any) -> None:
    def new(workers: int = 0) -> Loader:
        return loader(tiny_processor, sources(**faults), workers=workers)

    whole = take(new(), 8)
    rejects = [r for step in whole for b in step for r in b.rejects]
    assert {int(r.id.replace("-", "/").split("/")[1]) for r in rejects} <= set(range(0, 41, 3))
    assert len(rejects) > 10
    word = "is broken" if "broken" in faults else "a pack holds 200"
    assert all(word in r.reason for r in rejects)
    # the counter in the state is the number of reports, lane by lane
    for lane in (0, 1):
        assert whole[-1][lane].state["skipped"] == sum(len(step[lane].rejects) for step in whole)
    first = new(workers=2)
    take(first, 3)
    second = new()
    second.load_state_dict(first.state_dict())
    first.close()
    assert same(take(second, 5), whole[3:])


@pytest.mark.parametrize("faults", [{"broken": range(41)}, {"long": range(41)}])
def test_a_hopeless_source_stops_the_run(tiny_processor: Any, faults: Any) -> None:
    with pytest.raises(RecordError, match="source a: all of the first 41 rows"):
        take(loader(tiny_processor, sources(**faults)), 40)
    with pytest.raises(RecordError, match="source a: all of the first 41 rows"):  # and with no other source to turn to
        next(Loader({"a": Made("a", 41, **faults)}, {"a": 1}, tiny_processor, max_tokens=200, max_tiles=9, seed=0))


def test_a_source_whose_every_picture_is_broken_stops_the_run(tiny_processor: Any) -> None:
    class Blind(Made):
        def images(self, record: Record) -> list[Image.Image]:
            raise RecordError(f"record {record.id}: unreadable")

    with pytest.raises(RecordError, match=r"source a: all of the first 41 rows .* unreadable"):
        take(loader(tiny_processor, {"a": Blind("a", 41), "b": Made("b", 13)}), 40)


def test_a_killed_worker_is_a_clear_error(tiny_processor: Any) -> None:
    class Deadly(Made):
        def images(self, record: Record) -> list[Image.Image]:
            if record.id == "a-7":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().images(record)

    doomed = loader(tiny_processor, {"a": Deadly("a", 41), "b": Made("b", 13)}, workers=2)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"data worker . died .killed by signal 9, SIGKILL"):
        take(doomed, 60)
    assert time.monotonic() - began < 20
    doomed.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_the_code_is_not_a_bad_sample(tiny_processor: Any, workers: int) -> None:
    class Buggy(Made):
        def images(self, record: Record) -> list[Image.Image]:
            raise KeyError("a mistake in the program")

    with pytest.raises(KeyError, match="a mistake in the program"):
        take(loader(tiny_processor, {"a": Buggy("a", 41), "b": Made("b", 13)}, workers=workers), 2)


def test_a_position_in_other_data_is_refused(tiny_processor: Any) -> None:
    state = loader(tiny_processor).state_dict()
    with pytest.raises(LoaderError, match=r"other terms .seed: 3 then, 4 now"):
        loader(tiny_processor, seed=4).load_state_dict(state)
    with pytest.raises(LoaderError, match=r"other data .a: a41 then, a40 now"):
        loader(tiny_processor, {"a": Made("a", 40), "b": Made("b", 13)}).load_state_dict(state)


def test_reads_files_end_to_end(tiny_processor: Any, tmp_path: Path) -> None:
    lines = []
    for i in range(12):
        Image.new("RGB", (40 + i, 50), (i, i, i)).save(tmp_path / f"{i}.png")
        lines.append({"id": f"r{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nhow dark?"}, {"from": "gpt", "value": f"{i} of 255"}]})  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "data.jsonl").write_text(text + '\n{"messages": [\n')
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "5.png").unlink()
    options: dict[str, Any] = {"max_tokens": 150, "max_tiles": 20, "buffer": 6, "seed": 0}
    source = JsonlSource(tmp_path / "data.jsonl")
    plain = take(Loader({"data": source}, {"data": 1.0}, tiny_processor, **options), 6)
    worked = Loader({"data": source}, {"data": 1.0}, tiny_processor, workers=2, **options)
    assert same(take(worked, 6), plain)
    worked.close()
    reasons = {r.id: r.reason for step in plain for b in step for r in b.rejects}
    assert set(reasons) == {"r3", "data/5", "data/12"}
    assert "3.png" in reasons["r3"] and "no such file" in reasons["data/5"] and "line 13" in reasons["data/12"]


class Thinker(Made):
    """Every answer is a thought and an answer; of row 9 the thought never ends."""

    def record(self, row: int) -> Record:
        made = super().record(row)
        answer = f"<think>{'hm ' * (row % 5)}</think>\n{row}." if row != 9 else "<think>hm"
        return replace(made, messages=(made.messages[0], Message(role="assistant", text=answer)))


def test_thoughts_are_masked_in_the_named_sources_and_move_nothing(tiny_processor: Any) -> None:
    def new(**changes: Any) -> Loader:
        return loader(tiny_processor, {"a": Thinker("a", 41), "b": Thinker("b", 8)}, max_tokens=260, **changes)

    plain, masked = (take(new(answer_only=names), 10) for names in ((), ("a",)))
    rejects = [reject for step in masked for batch in step for reject in batch.rejects]
    assert {reject.id for reject in rejects} == {"a-9"} and "thought without an end" in rejects[0].reason
    heard = {"a": set[str](), "b": set[str]()}
    for was, now in zip([b for s in plain for b in s], [b for s in masked for b in s], strict=True):
        assert was.cu_seqlens.equal(now.cu_seqlens) and was.state == now.state
        for start, end in pairwise(now.cu_seqlens.tolist()):
            inside = (now.rows_R >= start) & (now.rows_R < end)
            name = "a" if "\na " in tiny_processor.tokenizer.decode(now.ids_T[start:end]) else "b"
            heard[name].add(tiny_processor.tokenizer.decode(now.targets_R[inside]))
    assert all("think" not in text for text in heard["a"]) and "7.<|im_end|>" in heard["a"]
    assert all(text.startswith("<think>") for text in heard["b"] if text)
