"""benchmarks/evaluation.py: its tables are what it says, all arms do the same work, and faults end it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sailvl import assets
from sailvl.eval.table import picture_key, pictures
from sailvl.model import checkpoint
from sailvl.model.processing import build_processor

PATH = Path(__file__).parents[1] / "benchmarks" / "evaluation.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("benchmarks.evaluation")


def test_the_circular_table_shows_each_picture_four_times_and_the_truth_moves_along(
    script: ModuleType, tmp_path: Path
) -> None:
    table = script.table(tmp_path / "a.tsv", 12, per_picture=4)
    assert table.name == "MMBench_DEV_EN_V11" and len(table.rows) == 12 and len(table.places) == 3
    shown = [picture_key(table, number) for number in range(12)]
    assert shown == [0] * 4 + [4] * 4 + [8] * 4 and pictures(table, 5) == pictures(table, 4)
    truths = [row[str(row["answer"])] for row in table.rows]
    assert [len(set(truths[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert [int(row["index"]) % 1_000_000 for row in table.rows] == [0] * 4 + [1] * 4 + [2] * 4
    plain = script.table(tmp_path / "b.tsv", 12, per_picture=1)
    assert plain.name == "MMStar" and len(plain.places) == 12


def test_a_quick_run_measures_every_part_and_writes_it(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/evaluation.json"
    script.main(["--quick", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    distinct, circular = found["distinct"]["3 tokens"], found["circular"]["3 tokens"]
    assert found["distinct"]["pictures"] == 8 and found["circular"]["pictures"] == 2
    for part in (distinct, circular):
        assert part["same_answers"] == {"one at a time": 8, "generate": 8} and set(part["seconds"]) == set(script.ARMS)
        (slow,), (fast,) = part["seconds"]["generate"], part["seconds"]["batched"]
        assert (
            part["ratios"]["generate"] == pytest.approx(slow / fast, rel=0.02) and part["ratios"]["one at a time"] > 0
        )
    # the memory of pictures spares three of four; without it, and with pictures of their own, nothing is spared
    assert circular["encoded_tiles"]["one at a time"] == 4 * circular["encoded_tiles"]["batched"]
    assert distinct["encoded_tiles"]["one at a time"] == distinct["encoded_tiles"]["batched"] > 0
    assert distinct["encoded_tiles"]["generate"] == distinct["encoded_tiles"]["batched"]
    assert found["keeping"]["answers"] == 500 and len(found["keeping"]["microseconds_per_answer_by_tenth"]) == 10
    assert "thread" in found["hardware"] and "torch" in found["versions"]


def test_answers_that_fail_or_differ_end_it(script: ModuleType, tmp_path: Path) -> None:
    processor = build_processor(assets.tokenizer_path(), tiling=checkpoint.scheme_for("nano"), system_message="")
    model = checkpoint.build(checkpoint.config_for("nano", processor=processor), seed=0).eval()
    table = script.table(tmp_path / "a.tsv", 4, per_picture=1)
    path = tmp_path / "a.tsv"
    path.write_text(path.read_text().replace("\tiVBOR", "\tiVXXX", 1))
    with pytest.raises(SystemExit, match="batched: 4 of 4 rows asked, failures"):
        script.evaluate(model, processor, table, tmp_path / "out", "batched", 1)

    def runs(*answers: str) -> dict[str, Any]:
        one = {"seconds": 1.0, "processor": 1.0, "tiles": 1}
        return {arm: [{**one, "answers": dict(enumerate(a))}] for arm, a in zip(script.ARMS, answers, strict=True)}

    same = script.compared(runs("abcdefghij", "abcdefghiX", "abcdefghij"), 10)["same_answers"]
    assert same == {"one at a time": 9, "generate": 10}
    with pytest.raises(SystemExit, match=r"of 10 answers so many agree .* 'generate': 8"):
        script.compared(runs("abcdefghij", "abcdefghij", "abcdefghXX"), 10)
    with pytest.raises(SystemExit):
        script.main(["--rows", "6"])
