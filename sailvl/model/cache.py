"""Keys and values of many sequences at once: rows join, grow by a token a step, and leave, each with its own length.

One buffer a layer, [R, KV, C, K]: the first B = ``len(cache.lengths)`` of its R rows are in use, row b holds
``lengths[b]`` positions from column 0 on, and C is at least the longest. What lies behind a row's length is finite and
never attended. Buffers are zeroed when made (a masked NaN is still a NaN) and grow geometrically, so that a step writes
one column and copies nothing. A row that leaves is overwritten by the last one: B shrinks, the others stay in place.

    with cache.joining([5, 9]) as positions:      # a pack of two prompts; its keys and values become two new rows
        language_model(..., past_key_values=cache, position_ids=positions, cu_seq_lens_q=...)
    with cache.stepping() as (positions, mask):   # one token for every row
        language_model(..., past_key_values=cache, position_ids=positions, attention_mask=mask)
    cache.drop(0)

Memory is R times C positions: one long row makes every row's memory long, so what admits rows watches ``padded``.
Sliding windows are not for this cache. It is a transformers ``Cache`` as far as its models ask (5.18 to 5.23).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache

BLOCK = 64
"""Columns are added by at least so many."""


class BatchCache(Cache):
    """Keys and values of at most ``max_rows`` sequences; ``keys[layer]``, ``values[layer]`` are [R, KV, C, K].

    A decoder that does without transformers' modules writes ``keys[layer][b, :, lengths[b]]`` itself, between
    ``reserve`` and ``advance``.
    """

    def __init__(self, max_rows: int):
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.lengths: list[int] = []
        self._joining: list[int] | None = None
        self._room = (0, 0)
        self._rows = self._places = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def padded(self, more: Sequence[int] = ()) -> int:
        """Positions a buffer needs to hold the rows and ``more`` of these lengths: rows times the longest."""
        rows = [*self.lengths, *more]
        return len(rows) * max(rows, default=0)

    # ---- a pack of prompts ------------------------------------------------------------------------------------

    @contextmanager
    def joining(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """Inside, a forward pass over a pack of documents of these ``lengths`` makes them rows, behind the others.

        Gives their positions [1, T]. They are rows when the block ends well; after an exception nothing has changed.
        """
        if min(lengths, default=1) < 1 or self.num_rows + len(lengths) > self.max_rows:
            raise ValueError(f"{self.num_rows} rows and documents of {list(lengths)} tokens; {self.max_rows} rows fit")
        self.reserve(self.num_rows + len(lengths), max([*self.lengths, *lengths]) + 1)
        self._joining = list(lengths)
        try:
            yield torch.cat([torch.arange(length, device=device) for length in lengths])[None]
            self.lengths += lengths
        finally:
            self._joining = None

    # ---- a token for every row --------------------------------------------------------------------------------

    @contextmanager
    def stepping(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Inside, a forward pass over one token a row, ids [B, 1]: all rows are one longer when the block ends well.

        Gives their positions [B, 1] and the additive mask [B, 1, 1, longest + 1], None when no row is shorter.
        """
        if not self.keys:
            raise ValueError("no rows to step")
        self.reserve(self.num_rows, max(self.lengths) + 1)
        keys = self.keys[0]
        self._rows = torch.arange(self.num_rows, device=keys.device)
        self._places = torch.tensor(self.lengths, device=keys.device)
        mask = None
        if min(self.lengths) < max(self.lengths):
            columns = torch.arange(max(self.lengths) + 1, device=keys.device)
            mask = torch.zeros((self.num_rows, len(columns)), dtype=keys.dtype, device=keys.device)
            mask = mask.masked_fill_(columns > self._places[:, None], float("-inf"))[:, None, None]
        yield self._places[:, None], mask
        self.advance()

    def advance(self) -> None:
        """Every row is one longer."""
        self.lengths = [length + 1 for length in self.lengths]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a layer made, [1, KV, T, K] of a pack or [B, KV, 1, K] of a step; give what it attends to."""
        if layer_idx == len(self.keys):
            _, heads, _, size = key_states.shape
            shape = (self._room[0], heads, self._room[1], size)
            self.keys.append(key_states.new_zeros(shape))
            self.values.append(value_states.new_zeros((*shape[:3], value_states.shape[-1])))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._joining is not None:
            if key_states.shape[0] != 1 or key_states.shape[2] != sum(self._joining):
                raise ValueError(
                    f"a pack of documents of {self._joining} tokens, but keys of {key_states.shape[0]} rows, "
                    f"{key_states.shape[2]} long"
                )
            parts = zip(key_states[0].split(self._joining, 1), value_states[0].split(self._joining, 1), strict=True)
            for row, (key, value) in enumerate(parts, self.num_rows):
                keys[row, :, : key.shape[1]] = key
                values[row, :, : value.shape[1]] = value
            return key_states, value_states
        rows, longest = self.num_rows, max(self.lengths)
        if key_states.shape[0] != rows or key_states.shape[2] != 1:
            raise ValueError(f"{rows} rows, but keys of {key_states.shape[0]} rows, {key_states.shape[2]} long")
        if min(self.lengths) == longest:
            keys[:rows, :, longest] = key_states[:, :, 0]
            values[:rows, :, longest] = value_states[:, :, 0]
        else:
            keys[self._rows, :, self._places] = key_states[:, :, 0]
            values[self._rows, :, self._places] = value_states[:, :, 0]
        return keys[:rows, :, : longest + 1], values[:rows, :, : longest + 1]

    # ---- rows ---------------------------------------------------------------------------------------------------

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for ``rows`` sequences of ``columns`` positions, keeping what is there."""
        has_rows, has_columns = self._room
        if rows <= has_rows and columns <= has_columns:
            return
        used, longest = self.num_rows, max(self.lengths, default=0)
        # Made anew, a buffer drops the columns that only a departed row needed.
        wide = columns if columns <= has_columns else max(columns, longest * 3 // 2)
        many = has_rows if rows <= has_rows else min(self.max_rows, max(rows, 2 * has_rows))
        room = (many, -(-wide // BLOCK) * BLOCK)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros((room[0], old.shape[1], room[1], old.shape[3]))
                new[:used, :, :longest] = old[:used, :, :longest]
                buffers[layer] = new
        self._room = room

    def repeat(self, row: int, times: int) -> None:
        """Add ``times`` copies of a row behind the others."""
        if self.num_rows + times > self.max_rows:
            raise ValueError(f"{self.num_rows} rows and {times} copies; {self.max_rows} rows fit")
        length, used = self.lengths[row], self.num_rows
        self.reserve(used + times, max(self.lengths) + 1)
        for buffer in (*self.keys, *self.values):
            buffer[used : used + times, :, :length] = buffer[row, :, :length]
        self.lengths += [length] * times

    def drop(self, row: int) -> None:
        """Take a row out; the last row takes its place. The buffers go with the last one."""
        last = self.num_rows - 1
        if row != last:
            length = self.lengths[last]
            for buffer in (*self.keys, *self.values):
                buffer[row, :, :length] = buffer[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.clear()

    def clear(self) -> None:
        """Take all rows out and give their memory back."""
        self.keys, self.values, self.lengths, self._room = [], [], [], (0, 0)

    # ---- what transformers asks -----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._joining is not None else max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + int(query_length), 0
