from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "packing.py"))


def write(path: Path, num_samples: int = 4000) -> Path:
    rng = np.random.default_rng(5)
    tiles = rng.choice([0, 1, 1, 4, 13], num_samples)
    np.savez(path, tokens=256 * tiles + rng.integers(30, 900, num_samples), tiles=tiles)
    return path


def test_ours_is_first_full_and_even(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    SCRIPT["main"](["--samples", str(write(tmp_path / "s.npz")), "--ranks", "4", "--json", str(out)])
    rows = json.loads(out.read_text())
    ours, greedy, decreasing, padded = rows
    assert ours["method"] == "ours"
    assert ours["utilisation"] >= 0.995
    assert ours["utilisation"] > decreasing["utilisation"] > greedy["utilisation"] > padded["utilisation"]
    assert ours["tiles_max_mean"] < greedy["tiles_max_mean"]
    assert ours["utilisation"] >= ours["utilisation_with_tail"] > 0.97
    assert 0 < ours["us_per_sample"] < 1000
    assert {"hardware", "command", "dropped"} <= ours.keys()
    assert capsys.readouterr().out.count("\n") == 7


@pytest.mark.parametrize("name", ["ours", "greedy next-fit", "best-fit-decreasing", "padded batch of 8"])
def test_every_method_packs_every_sample_once(name: str) -> None:
    limits = SCRIPT["argparse"].Namespace(max_tokens=2000, max_tiles=20, buffer=32)
    items = [
        SCRIPT["Item"](source="s", row=row, num_tokens=1 + row * 7919 % 2000, num_tiles=row % 14) for row in range(500)
    ]
    packs = list(SCRIPT["METHODS"][name](iter(items), limits))
    assert sorted(item.row for pack in packs for item in pack) == list(range(500))
    if not name.startswith("padded"):
        assert max(sum(item.num_tokens for item in pack) for pack in packs) <= 2000
        assert max(sum(item.num_tiles for item in pack) for pack in packs) <= 20


def test_samples_too_large_are_dropped_and_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", tokens=[5, 9000, 20, 30, 40], tiles=[0, 1, 0, 7, 0])
    out = tmp_path / "out.json"
    arguments = ["--samples", str(tmp_path / "s.npz"), "--ranks", "2", "--max-tiles", "6", "--json", str(out)]
    SCRIPT["main"](arguments)
    assert [row["dropped"] for row in json.loads(out.read_text())] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"tokens": [1, 2]}, "tiles"),
        ({"tokens": [1.5, 2], "tiles": [0, 0]}, "must be integers"),
        ({"tokens": [1, 2], "tiles": [0]}, "must be integers"),
        ({"tokens": [0, 2], "tiles": [0, 0]}, "at least one token"),
        ({"tokens": [9999, 9999], "tiles": [0, 0]}, "0 of 2 samples fit"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SystemExit, match=reason):
        SCRIPT["main"](["--samples", str(tmp_path / "s.npz"), "--ranks", "1"])


def test_lanes_with_a_pool_wait_less_and_the_price_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--samples", str(write(tmp_path / "s.npz")), "--sync-pool", "16", "--lanes", "8", "--lane-group", "4"]
    SCRIPT["main"]([*arguments, "--steps", "60", "--json", str(out)])
    plain, pooled = json.loads(out.read_text())
    assert (plain["sync_pool"], pooled["sync_pool"]) == (0, 16)
    assert set(pooled["efficiency"]) == {"2", "4", "8"}
    assert pooled["efficiency"]["4"] > plain["efficiency"]["4"] + 0.01
    assert 0 < plain["tiles_cv"] < 1 and pooled["longest_wait"] > 0
    assert capsys.readouterr().out.count("\n") == 4
    with pytest.raises(SystemExit):
        SCRIPT["main"]([*arguments, "--lanes", "6"])
