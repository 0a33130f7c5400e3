from __future__ import annotations

import runpy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "data_plane.py"))


def test_the_three_kinds_of_files_hold_the_same_samples_and_resume_exactly(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = tmp_path / "small"
    samples = [(f"{row}.", SCRIPT["jpeg"](Image.new("RGB", (24, 24), (row, row, row)))) for row in range(50)]
    SCRIPT["write_files"](folder, samples)
    for kind in ("jsonl", "parquet", "webdataset"):
        steps = list(islice(SCRIPT["Ours"](kind, folder, 0), 12))
        seen = [number for numbers in steps for number in numbers]
        assert set(seen) == set(range(50))
    first = SCRIPT["Ours"](kind, folder, 0)
    again = list(islice(first, 5))
    again += islice(SCRIPT["Ours"](kind, folder, 0, first.state()), 7)
    assert again == steps


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(SystemExit):
        SCRIPT["main"](["--samples", "100"])
