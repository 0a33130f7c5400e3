import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl.model.attention import PACKED
from sailvl.model.cache import BLOCK, BatchCache

LAYERS, HEADS, SIZE = 2, 2, 3


class Reference:
    """Rows as plain lists: what each position of each layer was given."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def drop(self, row: int) -> None:
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


def states(values: list[float], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, HEADS, T, SIZE] keys and values that name position and layer."""
    base = torch.tensor(values)[None, None, :, None].expand(1, HEADS, len(values), SIZE) + 0.1 * layer
    return base.clone(), -base


def check(cache: BatchCache, reference: Reference) -> None:
    assert cache.lengths == [len(row) for row in reference.rows]
    for layer in range(len(cache.keys)):
        for row, values in enumerate(reference.rows):
            keys, vals = states(values, layer)
            assert torch.equal(cache.keys[layer][row, :, : len(values)], keys[0])
            assert torch.equal(cache.values[layer][row, :, : len(values)], vals[0])
        assert cache.keys[layer].isfinite().all() and cache.values[layer].isfinite().all()


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_any_history_keeps_every_row(seed: int) -> None:
    rng = random.Random(seed)
    cache, reference, count = BatchCache(6), Reference(), 0.0
    for _ in range(rng.randrange(1, 60)):
        event = rng.choice(["join", "step", "step", "step", "drop", "repeat"])
        if event == "join" and len(reference.rows) < 6:
            lengths = [rng.choice([1, 2, 9, BLOCK]) for _ in range(rng.randrange(1, 7 - len(reference.rows)))]
            values = [[count := count + 1.0 for _ in range(length)] for length in lengths]
            with cache.joining(lengths) as positions:
                assert positions.tolist() == [[at for length in lengths for at in range(length)]]
                assert cache.get_seq_length() == 0 and cache.get_mask_sizes(sum(lengths), 0) == (sum(lengths), 0)
                for layer in range(LAYERS):
                    keys, vals = states([value for row in values for value in row], layer)
                    assert all(a is b for a, b in zip(cache.update(keys, vals, layer), (keys, vals), strict=True))
            reference.rows += values
        elif event == "step" and reference.rows:
            values = [count := count + 1.0 for _ in reference.rows]
            before = [len(row) for row in reference.rows]
            with cache.stepping() as (positions, mask):
                assert positions.tolist() == [[length] for length in before]
                for layer in range(LAYERS):
                    keys, vals = (part.transpose(0, 2) for part in states(values, layer))
                    keys, vals = cache.update(keys, vals, layer)
                    assert keys.shape == vals.shape == (len(values), HEADS, max(before) + 1, SIZE)
            assert (mask is None) == (len(set(before)) == 1)
            if mask is not None:
                attended = (mask[:, 0, 0] == 0).sum(1).tolist()
                assert attended == [length + 1 for length in before] and (mask[:, 0, 0, 0] == 0).all()
            for row, value in zip(reference.rows, values, strict=True):
                row.append(value)
        elif event == "drop" and reference.rows:
            row = rng.randrange(len(reference.rows))
            cache.drop(row)
            reference.drop(row)
        elif event == "repeat" and 0 < len(reference.rows) < 6:
            row, times = rng.randrange(len(reference.rows)), rng.randrange(1, 7 - len(reference.rows))
            cache.repeat(row, times)
            reference.rows += [reference.rows[row].copy() for _ in range(times)]
        check(cache, reference)


def test_a_failed_pass_changes_nothing() -> None:
    cache = BatchCache(2)
    with cache.joining([3]):
        cache.update(*states([1.0, 2.0, 3.0], 0), 0)
    for block in (cache.joining([2]), cache.stepping()):
        with pytest.raises(RuntimeError, match="out of memory"), block:
            raise RuntimeError("out of memory")
        assert cache.lengths == [3] and cache.get_seq_length() == 3
    with cache.stepping():
        cache.update(*(part.transpose(0, 2) for part in states([4.0], 0)), 0)
    assert cache.lengths == [4] and cache.keys[0][0, 0, :4, 0].tolist() == [1, 2, 3, 4]


def test_wrong_shapes_are_refused() -> None:
    cache = BatchCache(2)
    with pytest.raises(ValueError, match="no rows to step"), cache.stepping():
        pass
    with pytest.raises(ValueError, match="2 rows fit"), cache.joining([1, 1, 1]):
        pass
    with pytest.raises(ValueError, match="2 rows fit"), cache.joining([0]):
        pass
    with pytest.raises(ValueError, match=r"documents of \[2, 2\] tokens, but keys of 1 rows, 3 long"):
        with cache.joining([2, 2]):
            cache.update(*states([1.0, 2.0, 3.0], 0), 0)
    with cache.joining([2]):
        cache.update(*states([1.0, 2.0], 0), 0)
    with pytest.raises(ValueError, match="1 rows, but keys of 1 rows, 2 long"), cache.stepping():
        cache.update(*states([1.0, 2.0], 0), 0)
    with pytest.raises(ValueError, match="1 rows and 2 copies"):
        cache.repeat(0, 2)


def test_memory_grows_by_the_longest_and_goes_with_the_last() -> None:
    cache = BatchCache(32)
    with cache.joining([5]):
        cache.update(*states([1.0] * 5, 0), 0)
    assert cache.keys[0].shape == (1, HEADS, BLOCK, SIZE)
    sizes = set()
    for _ in range(300):
        with cache.stepping():
            cache.update(*(part.transpose(0, 2) for part in states([4.0], 0)), 0)
        sizes.add(cache.keys[0].shape[2])
    assert len(sizes) <= 5 and max(sizes) <= 1.6 * 305
    assert cache.padded([10, 400]) == 3 * 400
    cache.drop(0)
    assert cache.keys == [] and cache.padded() == 0
    with cache.joining([2, 3]):
        cache.update(*states([1.0] * 5, 0), 0)
    assert cache.keys[0].shape == (2, HEADS, BLOCK, SIZE)


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
@torch.inference_mode()
def test_logits_equal_reading_each_row_by_itself(tiny_model, attention: str) -> None:
    """Rows of other lengths that join, step and leave: each step gives what the whole row alone gives."""
    model = copy.deepcopy(tiny_model).double()
    rng = random.Random(0)
    cache, rows = BatchCache(4), []

    def join(lengths: list[int]) -> None:
        model.model.language_model.config._attn_implementation = PACKED
        fresh = [[rng.randrange(100) for _ in range(length)] for length in lengths]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        with cache.joining(lengths) as positions:
            hidden = model.model(
                input_ids=torch.tensor([[id for row in fresh for id in row]]),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                cu_seq_lens_q=ends.int(),
                cu_seq_lens_k=ends.int(),
                max_length_q=max(lengths),
                max_length_k=max(lengths),
            ).last_hidden_state[0]
        for row, end in zip(fresh, ends[1:].tolist(), strict=True):
            torch.testing.assert_close(hidden[end - 1], alone(row), rtol=0, atol=1e-12)
        rows.extend(fresh)

    def alone(ids: list[int]) -> torch.Tensor:
        return model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]

    def step() -> None:
        model.model.language_model.config._attn_implementation = attention
        for row in rows:
            row.append(rng.randrange(100))
        with cache.stepping() as (positions, mask):
            hidden = model.model.language_model(
                input_ids=torch.tensor([row[-1:] for row in rows]),
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
        for row, found in zip(rows, hidden, strict=True):
            torch.testing.assert_close(found, alone(row), rtol=0, atol=1e-12)

    join([7])
    step()
    join([1, 70, 3])
    for _ in range(3):
        step()
    cache.drop(1)
    rows[1] = rows.pop()
    step()
    cache.drop(1)
    rows[1] = rows.pop()
    cache.repeat(0, 2)
    rows += [rows[0].copy(), rows[0].copy()]
    step()
    assert cache.lengths == [len(row) for row in rows]
